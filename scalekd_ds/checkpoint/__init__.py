"""Writes checkpoints that appear complete or not at all, and reads them on any number of ranks or as plain weights.

A kill at any moment leaves the last complete checkpoint; `layout` lists the files of one. This package may use `engine`
and the layers below it.
"""

from scalekd_ds.checkpoint.plain_weights import consolidate

__all__ = ["consolidate"]
