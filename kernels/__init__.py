"""The two operations of the method that are worth a kernel: the projector's attention and the dual-view loss.

Each folder has `reference.py`, the operation's specification in plain PyTorch. Nothing else of scalekd_ds is used here.
"""

from scalekd_ds.kernels.cross_attention.api import cap_attention
from scalekd_ds.kernels.dual_view.api import dual_view_loss

__all__ = ["cap_attention", "dual_view_loss"]
