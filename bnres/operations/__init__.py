"""The fused operations: one file each, from the public function to the kernels' launchers."""
