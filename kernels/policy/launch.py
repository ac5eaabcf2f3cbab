"""Launches of the policies' kernels, in place of what `scalekd_ds.data.on_device` does in PyTorch.

All take images (B, S, S, 3) uint8, contiguous, and (K,) int64 places of those in the batch that an operation is for. They
change these images in place, and wait for nothing.
"""

from __future__ import annotations

import torch
import triton

from scalekd_ds.kernels.policy import triton_kernels as kernels

# pixels, or values, of a program
BLOCK, VALUES_BLOCK, COUNTS_BLOCK = 256, 2048, 1024
# programs that share the histograms of a large image
SPLITS = 8
# a sum of products as Pillow rounds it
EXACT = {"enable_fp_fusion": False}


def map_levels(
    images: torch.Tensor,
    places: torch.Tensor,
    autocontrast: int,
    equalize: int,
    contrast: torch.Tensor,
    tables: torch.Tensor,
) -> None:
    """Gives the levels of every channel new ones.

    Args:
        images: The batch.
        places: The images, in the order of what follows.
        autocontrast: Number of images with AutoContrast.
        equalize: Number of images with Equalize.
        contrast: (C,) float32, factors of images with Contrast.
        tables: (K - autocontrast - equalize - C, 256) uint8 tables of the others.
    """
    pixels, measured = images.shape[1] * images.shape[2], autocontrast + equalize + len(contrast)
    made = torch.empty(measured, 3, 256, dtype=torch.uint8, device=images.device)
    # Triton launches on the current device, whatever the tensors' own is
    with torch.cuda.device_of(images):
        if measured:
            counts = torch.zeros(measured, 4, 256, dtype=torch.int32, device=images.device)
            splits = min(SPLITS, triton.cdiv(pixels, COUNTS_BLOCK))
            turns = triton.cdiv(pixels, splits * COUNTS_BLOCK)
            kernels.counts_kernel[(measured, splits)](
                images, places, counts, pixels, turns, BLOCK=COUNTS_BLOCK, **EXACT
            )
            kernels.tables_kernel[(measured, 3)](counts, contrast, made, autocontrast, equalize, pixels, **EXACT)
        grid = (len(places), triton.cdiv(3 * pixels, VALUES_BLOCK))
        kernels.levels_kernel[grid](
            images, places, made, tables, measured, 3 * pixels, BLOCK=VALUES_BLOCK, **EXACT
        )  # fmt: skip


def blend(images: torch.Tensor, places: torch.Tensor, colours: int, factors: torch.Tensor) -> None:
    """Blends with a version without colours, of the first `colours` images, or without details; (K,) float32 factors."""
    out, grid = _out(images, places)
    with torch.cuda.device_of(images):
        kernels.blend_kernel[grid](images, out, places, factors, colours, images.shape[1], BLOCK=BLOCK, **EXACT)
    images.index_copy_(0, places, out)


def warp(
    images: torch.Tensor, places: torch.Tensor, matrices: torch.Tensor, bicubic: torch.Tensor, fill: torch.Tensor
) -> None:
    """Resamples images.

    Args:
        images: The batch.
        places: The images.
        matrices: (K, 6) float64, affine maps from the centre of a pixel to where it comes from, row by row.
        bicubic: (K,) int32, 1 for bicubic and 0 for bilinear.
        fill: (3,) uint8, the colour of pixels that come from outside.
    """
    out, grid = _out(images, places)
    with torch.cuda.device_of(images):
        kernels.warp_kernel[grid](images, out, places, matrices, bicubic, fill, images.shape[1], BLOCK=BLOCK, **EXACT)
    images.index_copy_(0, places, out)


def _out(images: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Memory for the new images, and a grid of their blocks of pixels."""
    side = images.shape[1]
    return images.new_empty(len(places), side, side, 3), (len(places), triton.cdiv(side * side, BLOCK))
