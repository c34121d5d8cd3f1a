"""`bnres doctor`: what bnres finds on this machine, what is wrong, and how to fix it."""

from bnres.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
