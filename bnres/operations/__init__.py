"""The fused operations.

Each public operation has a file. The file contains the public function, and all code between this
function and the functions that launch kernels.
"""
