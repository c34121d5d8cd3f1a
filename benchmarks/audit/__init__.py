"""Audits of the kernels that need no GPU: bytes touched, machine code and the host's time."""
