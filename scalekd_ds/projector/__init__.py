"""CAP, the cross attention projector: equations 1 to 3 of the paper, for one view and for both in one pass."""

from scalekd_ds.projector.cross_attention import CrossAttentionProjector

__all__ = ["CrossAttentionProjector"]
