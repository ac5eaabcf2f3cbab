"""What a cache takes on the disk."""

from __future__ import annotations

from scalekd_ds.teacher_cache.manifest import Manifest
from scalekd_ds.teacher_cache.shards import header
from scalekd_ds.teacher_cache.sizes import format_decimal


def bytes_of(manifest: Manifest) -> int:
    """Bytes of all shards."""
    dtype = manifest.layout.dtype
    heads = sum(len(header(dtype, manifest.entries_of(shard))) for shard in range(manifest.shards_of_a_view))
    return manifest.views * (manifest.samples * dtype.itemsize + heads)


def describe(manifest: Manifest) -> str:
    """Views, images and bytes of a cache, as text."""
    per_view = format_decimal(bytes_of(manifest) / manifest.views)
    return (
        f"{manifest.views} view{'s' * (manifest.views != 1)} of {manifest.samples:,} images, {per_view} a view, "
        f"{format_decimal(bytes_of(manifest))} in all"
    )
