"""What the numba kernels of `conv` and `scan` share."""
