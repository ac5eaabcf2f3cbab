"""The method's two hot operations. `reference.py` beside each is its specification in plain PyTorch."""

from scalekd_ds.kernels.cross_attention.api import cap_attention
from scalekd_ds.kernels.dual_view.api import dual_view_loss

__all__ = ["cap_attention", "dual_view_loss"]
