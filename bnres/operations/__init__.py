"""The fused operations.

Each public operation has a file, with everything from the public function to the calls of the
functions that launch kernels.
"""
