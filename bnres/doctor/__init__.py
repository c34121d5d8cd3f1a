"""Implements ``bnres doctor``, which says what is wrong on this machine and how to fix it."""

from bnres.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
