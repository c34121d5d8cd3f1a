"""Audits that need no GPU: bytes that kernels touch, their machine code, and the host's time."""
