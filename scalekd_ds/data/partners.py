"""Finds what goes with the samples of a batch: their views, their targets in a cache, and the images they are mixed with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.data.cached_targets import CachedTargets
from scalekd_ds.data.sample_reader import Sample, SampleReader
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.view_mix import Mix, draw_mix, mixes_by_view
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape


class Paired(NamedTuple):
    """What goes with B samples.

    Attributes:
        views: (B,) int64 the views that are taken.
        targets: What the cache has for these views, by name.
        mixes: How each sample is mixed, or None; empty where none ever is.
        partners: The images that they are mixed with, in the order of the samples that have one.
    """

    views: np.ndarray
    targets: dict[str, torch.Tensor]
    mixes: list[Mix | None]
    partners: list[Sample]


class Partners:
    """Finds what goes with samples. Threads may share one object.

    Args:
        source: The training images.
        samples: Reads the partners.
        cfg: How images are mixed.
        seed: Seed of the views.
        cached: Targets by sample and view, or None.

    Raises:
        UserError: A set of one image would be mixed.
    """

    def __init__(
        self, source: Source, samples: SampleReader, cfg: DataConfig, seed: int, cached: CachedTargets | None
    ) -> None:
        if mixes_by_view(cfg) and len(source) < 2:
            raise UserError(
                "data.mix_by is 'view', and there is one training image, with nothing to mix it with: set --data.mixup 0 "
                "--data.cutmix 0."
            )
        self._source, self._samples, self._cfg, self._seed, self._cached = source, samples, cfg, seed, cached

    def find(self, indices: np.ndarray, views: np.ndarray) -> Paired:
        """What goes with samples.

        A bad partner is replaced as a bad sample is. A view of the cache is another image then, unless its partner was
        replaced when the cache was written: it is marked, and another view is taken.

        Args:
            indices: (B,) int64 samples, none of them bad.
            views: (B,) int64 views that are asked for.

        Raises:
            UserError: Too many files are bad, or the cache has no view of a sample any more.
        """
        while True:
            taken, targets = (views, {}) if self._cached is None else self._cached.take(indices, views)
            if not mixes_by_view(self._cfg):
                return Paired(taken, targets, [], [])
            pairs = list(zip(indices.tolist(), taken.tolist(), strict=True))
            mixes = [draw_mix(self._cfg, self._seed, view, index, len(self._source)) for index, view in pairs]
            read = [
                self._read(index, view, mix) for (index, view), mix in zip(pairs, mixes, strict=True) if mix is not None
            ]
            partners = [partner for partner in read if partner is not None]
            if len(partners) == len(read):
                return Paired(taken, targets, mixes, partners)

    def _read(self, index: int, view: int, mix: Mix) -> Sample | None:
        """The image that a view is mixed with; None where the cache has been told that it cannot be read any more."""
        if self._cached is None:
            return self._samples.read_or_replace(mix.partner, view)
        partner = self._samples.read_recorded(mix.partner, view, self._cached.bad)
        if isinstance(partner, Sample):
            return partner
        name = escape(self._source.name(partner.index))
        self._cached.mark(index, view, f"{name}, which it is mixed with, {partner.reason}")
        return None
