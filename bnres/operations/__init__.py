"""The fused operations.

A public operation is in one file with the code that belongs to it. The other files contain code
that the operations share.
"""
