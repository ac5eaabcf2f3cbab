"""The operations of augmentation policies on batches of 8-bit images; `scalekd_ds.data.on_device` is their reference."""

from scalekd_ds.kernels.policy.launch import blend, map_levels, warp

__all__ = ["blend", "map_levels", "warp"]
