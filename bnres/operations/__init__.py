"""The fused operations.

A file that is named after an operation contains this operation. The other files contain helpers.
"""
