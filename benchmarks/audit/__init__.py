"""What can be known of the kernels without a GPU: bytes touched and machine code."""
