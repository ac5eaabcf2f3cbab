"""Whether a teacher cache is of a run's views and of its teacher: some entries are compared before the first step."""

from __future__ import annotations

import numpy as np
import torch

from scalekd_ds.build import build_answering
from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.source import Source
from scalekd_ds.data.view_loader import ViewLoader
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.names import escape
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.training.changes import teacher_record
from scalekd_ds.training.teacher_precision import Answers, distances

# by how much the mean of a view's colours may differ, of pixels with standard deviation 1: decoders of CPUs and GPUs differ by
# less, and another crop by ten times as much
_COLOURS = 0.02
_BATCH = 16


class _Chosen:
    """Gives a loader the samples and views of some entries, in the place of a `StreamSampler`."""

    accumulation = 1

    def __init__(self, cache: TeacherCache, pairs: list[tuple[int, int]]) -> None:
        self.micro_batch, self.pairs = _BATCH, pairs
        self.view_seed = cache.manifest.view_seed

    def __len__(self) -> int:
        return -(-len(self.pairs) // _BATCH)

    def indices(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.array(self.pairs[step * _BATCH : (step + 1) * _BATCH], dtype=np.int64)
        return chosen[:, 0].copy(), chosen[:, 1].copy()


def compare_with_run(cfg: RunConfig, cache: TeacherCache, train: Source, device: torch.device) -> str | None:
    """Compares entries of a cache with the views of this run and, where it has its weights, with the teacher.

    Args:
        cfg: The run.
        cache: The cache.
        train: The training images.
        device: Device of this rank.

    Returns:
        What was found, in one line; None where nothing is compared.

    Raises:
        UserError: The views are others, or the teacher's answers to them.
    """
    count = min(cfg.run.cache_gate, len(train) * cache.manifest.views)
    if not count:
        return None
    pairs = _choose(cache, count, cfg.data.views or cache.manifest.views)
    distiller = build_answering(cfg, len(train.classes), train.classes) if weights_are_given(cfg, cache) else None
    if distiller is not None and distiller.teacher is not None:
        found, before = teacher_record(distiller.teacher)["teacher_digest"], cache.manifest.digests["teacher_digest"]
        if found != before:
            raise UserError(
                f"the teacher's weights are not those that the teacher cache {escape(cache.folder)} was made with (digest "
                f"{found}, and {before} there): give those with --teacher or --teacher_weights, or make another cache."
            )
        try:
            distiller.to(device)
        except torch.OutOfMemoryError:
            # which a run from its cache does without
            distiller = None
    sampler = _Chosen(cache, pairs)
    loader = ViewLoader(train, cfg.data, sampler, device, cache.manifest.mean, cache.manifest.std, 0, len(sampler))
    differences: list[np.ndarray] = []
    sums, images = torch.zeros(3, dtype=torch.float64), 0
    try:
        for step, (pixels, ordered, real) in enumerate(loader):
            _, views = sampler.indices(step, 0)
            same = ordered == real
            differences.append(np.abs(pixels.mean((2, 3)).cpu().numpy() - cache.colours(ordered, views))[same])
            # a file that is bad since then has another in its place
            if distiller is not None and same.any():
                shown = pixels[torch.from_numpy(same).to(device)]
                sums += _distance(distiller, cache, shown, ordered[same], views[same], device)
                images += len(shown)
    finally:
        loader.close()
    # the memory of the teacher is the run's from here on
    del distiller
    if device.type == "cuda":
        torch.cuda.empty_cache()
    different = np.concatenate(differences).max(1)
    share = float((different > _COLOURS).mean()) if len(different) else 0.0
    if share > 0.1:
        raise UserError(
            f"the views of this run are not those of the teacher cache {escape(cache.folder)}: of {len(different)} that were "
            f"compared, {share:.0%} have other colours; the images have changed since, or this release draws views otherwise "
            f"than {cache.manifest.release}, which made it: make another cache."
        )
    if not images:
        why = "does not fit beside the run" if weights_are_given(cfg, cache) else "has no file of weights here"
        return f"teacher cache: {len(different)} of its views were made again and agree; the teacher {why}"
    return _check_answers((sums / images).tolist(), images, cfg, cache)


def _choose(cache: TeacherCache, count: int, views: int) -> list[tuple[int, int]]:
    """(sample, view) of entries that are drawn without replacement, the same ones at every start."""
    rng = np.random.Generator(np.random.Philox(cache.manifest.view_seed % 2**64))
    total = cache.manifest.samples * views
    places = rng.choice(total, count, replace=False) if total < 10**6 else rng.integers(0, total, count)
    pairs = [(int(place) % cache.manifest.samples, int(place) // cache.manifest.samples) for place in np.sort(places)]
    return [pair for pair in pairs if pair[0] not in cache.bad]


def weights_are_given(cfg: RunConfig, cache: TeacherCache) -> bool:
    """Whether the teacher can be built from what is on this machine: its file, or random weights of the same seed."""
    if cfg.teacher_weights == "none":
        return cfg.seed == cache.manifest.order_seed
    return cfg.teacher.endswith(".safetensors") or cfg.teacher_weights != "pretrained"


def _distance(
    distiller: ScaleKD,
    cache: TeacherCache,
    pixels: torch.Tensor,
    samples: np.ndarray,
    views: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """(3,) sums over the images of 1 - cosine in both views of the tokens, and of the KL divergence of the logits."""
    taken, entries = cache.take(samples, views)
    if (taken != views).any():
        # a damaged entry, which `take` has counted: its image says nothing
        return torch.zeros(3, dtype=torch.float64)
    tokens, logits = cache.targets({name: values.to(device) for name, values in entries.items()})
    now = distiller.teacher_targets(pixels)
    new = Answers(now.tokens.float().cpu(), None if now.logits is None else now.logits.float().cpu())
    old = Answers(torch.empty(0) if tokens is None else tokens.cpu(), None if logits is None else logits.cpu())
    return torch.tensor(distances(distiller, new, old), dtype=torch.float64)


def _check_answers(means: list[float], images: int, cfg: RunConfig, cache: TeacherCache) -> str:
    said, above = [], []
    names = {"spatial": "1 - cosine (spatial)", "frequency": "1 - cosine (frequency)", "kl": "KL of the logits"}
    for (name, title), mean in zip(names.items(), means, strict=True):
        bound = getattr(cfg.run, f"teacher_gate_{name}")
        said.append(f"{title} {mean:.2g} (at most {bound:g})")
        # NaN is above no bound
        if not mean <= bound:
            above.append(name)
    text = ", ".join(said)
    if above:
        raise UserError(
            f"the teacher's answers to {images} views are not those of the teacher cache {escape(cache.folder)}: {text}; give "
            "the teacher it was made with, make another cache, or allow more with "
            f"{' '.join(f'--run.teacher_gate_{name}' for name in above)}."
        )
    return f"teacher cache: {images} entries were made again: {text}"
