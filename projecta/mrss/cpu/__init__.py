"""MRSS on the CPU as one operator: sums over blocks, the scan's own loop, and the way back to tokens.

A coarse band takes one pass over u, delta, z and y: a tile of tokens is summed over its blocks, the scan's
own loop advances the states by these, and the tile's y is written. With gradients the values of each block
are kept. The backward pass goes from tokens to blocks, through the scan's kernel, and back to tokens.

Tokens are read as they lie in memory: along the rows of channels if these are contiguous in time (`rows`),
else as vectors over channels, as in the scan.
"""

from projecta.mrss.cpu.launch import NAME, Coarse, Fine, may_run_beside, new_like, scanning, takes

__all__ = ["NAME", "Coarse", "Fine", "may_run_beside", "new_like", "scanning", "takes"]
