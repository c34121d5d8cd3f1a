"""The fused operations.

Each file that is named after an operation contains this operation. The others contain helpers.
"""
