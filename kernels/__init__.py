"""The operations that are worth a kernel: the projector's attention, the dual-view loss, and attention in windows of a map.

`lamb` has those of an optimizer's step, and `policy` those of augmentation.

Each folder has `reference.py`, the operation's specification in plain PyTorch. Nothing else of scalekd_ds is used here.
"""

from scalekd_ds.kernels.cross_attention.api import cap_attention
from scalekd_ds.kernels.dual_view.api import dual_view_loss
from scalekd_ds.kernels.window_attention.api import window_attention

__all__ = ["cap_attention", "dual_view_loss", "window_attention"]
