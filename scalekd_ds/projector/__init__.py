"""The projectors that bring student maps onto the teacher's grid: CAP, and a linear one to compare it with.

They may use `kernels`, and nothing else of the package.
"""

from scalekd_ds.projector.cross_attention import CrossAttentionProjector

__all__ = ["CrossAttentionProjector"]
