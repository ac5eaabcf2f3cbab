"""What models see, as images: pure functions from tensors to (3, H, W) floats in 0 to 1, without a plotting library.

`pca` colours feature maps, `attention` shows where a projector's queries look, `spectrum` shows frequencies, and `canvas`
enlarges, blends and lays pictures out.
"""

from scalekd_ds.inspection.pictures.attention import attention_maps, attention_pictures, default_queries, own_weights
from scalekd_ds.inspection.pictures.canvas import blend, enlarge, heat, mark, sheet, to_uint8, unnormalise
from scalekd_ds.inspection.pictures.pca import map_of, pca_colours
from scalekd_ds.inspection.pictures.spectrum import spectrum, spectrum_pictures

__all__ = [
    "attention_maps",
    "attention_pictures",
    "blend",
    "default_queries",
    "enlarge",
    "heat",
    "map_of",
    "mark",
    "own_weights",
    "pca_colours",
    "sheet",
    "spectrum",
    "spectrum_pictures",
    "to_uint8",
    "unnormalise",
]
