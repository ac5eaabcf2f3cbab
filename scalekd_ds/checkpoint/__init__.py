"""Checkpoints: written aside, synced, renamed; read back on any number of ranks, or as plain weights.

A kill at any moment leaves the last good one; `layout` says which files there are.
"""

from scalekd_ds.checkpoint.plain_weights import consolidate

__all__ = ["consolidate"]
