"""Turns maps, attention and spectra into pictures: functions from tensors to (3, H, W) floats in 0 to 1.

They need no plotting library, and may import what `inspection` may. `pca` colours feature maps, `attention` computes and
colours the attention of a projector's queries, `spectrum` computes and colours frequencies, and `canvas` scales, blends and
tiles pictures.
"""

from scalekd_ds.inspection.pictures.attention import attention_maps, attention_pictures, default_queries, unsharded_copy
from scalekd_ds.inspection.pictures.canvas import blend, enlarge, heat_colours, mark_cell, tile, to_uint8, unnormalise
from scalekd_ds.inspection.pictures.pca import pca_colours, tokens_to_map
from scalekd_ds.inspection.pictures.spectrum import spectrum, spectrum_pictures

__all__ = [
    "attention_maps",
    "attention_pictures",
    "blend",
    "default_queries",
    "enlarge",
    "heat_colours",
    "mark_cell",
    "pca_colours",
    "spectrum",
    "spectrum_pictures",
    "tile",
    "to_uint8",
    "tokens_to_map",
    "unnormalise",
    "unsharded_copy",
]
