"""The command ``bnres doctor``, which finds problems of this machine and says how to fix them."""

from bnres.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
