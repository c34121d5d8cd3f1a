"""The fused operations.

Each operation has a file, with everything from its public function to the calls of the launchers of
its kernels.
"""
