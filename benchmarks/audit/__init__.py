"""Audits, without a GPU, of the bytes that kernels touch, of machine code and of host time."""
