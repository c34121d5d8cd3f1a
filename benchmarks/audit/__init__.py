"""Audits of memory accesses, machine code and CPU time. They need no GPU."""
