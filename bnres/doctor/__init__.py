"""The command ``bnres doctor``: what is wrong on this machine, and how to fix it."""

from bnres.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
