"""What the Triton kernels of `conv` and `scan` share."""
