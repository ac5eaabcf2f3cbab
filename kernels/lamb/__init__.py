"""A step of the optimizer LAMB over all layers of a group, in two passes over its memory."""

from scalekd_ds.kernels.lamb.api import implementation, runs_triton
from scalekd_ds.kernels.lamb.blocks import Place, blocks_of

__all__ = ["Place", "blocks_of", "implementation", "runs_triton"]
