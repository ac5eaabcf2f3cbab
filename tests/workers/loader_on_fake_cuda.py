"""What the torch half of the loaders, mixing and evaluation ask of a GPU, counted on tensors without values, as JSON.

Arguments: the folder of the images, and sizes of a batch.
"""

from __future__ import annotations

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fake_cuda
import numpy as np
import torch
from fake_cuda import launches
from torch._subclasses.fake_tensor import FakeTensor

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader
from scalekd_ds.data.mix import Mixer
from scalekd_ds.data.policy import Op
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.sources.source import Source
from scalekd_ds.evaluation.accuracy import count_correct, evaluate
from scalekd_ds.kernels.policy import triton_kernels
from scalekd_ds.watching.agreement import logit_agreement

KERNELS = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
GPU, SIDE = torch.device("cuda", 0), 32
PIXELS = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
POLICY = {"auto_augment": "rand-m9-n2-mstd0.5"}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "mix_by": "view"}
# an operation of each kind, of which every image gets one
KINDS = [
    *(Op(name) for name in ("AutoContrast", "Equalize", "Invert")),
    *(Op(name, (0.7,)) for name in ("Contrast", "Color", "Sharpness", "GaussianBlur")),
    *(Op(name, (0.2,)) for name in ("ShearX", "TranslateYRel", "Rotate")),
]
TRAINING = {
    "crop": {},
    "noise": {"random_erasing": 1.0},
    "zero": {"random_erasing": 1.0, "erasing_fill": "zero"},
    "policy on the host": {**POLICY, "augment_on": "host"},
    "policy on the host and noise": {**POLICY, "augment_on": "host", "random_erasing": 1.0, "random_crop": False},
    "policy": POLICY,
    "policy and noise": {**POLICY, "random_erasing": 1.0, "random_crop": False},
    "mixed by view": MIXED,
    "policy on the host and mixed": {**POLICY, "augment_on": "host", **MIXED},
    "policy, noise and mixed": {**POLICY, "random_erasing": 1.0, **MIXED},
}


def of_dali(loader, count: int):
    """What DALI would give: normalised pixels on the GPU, or 8-bit ones there or on the host."""
    if loader._postprocess_in_pool:
        return [np.zeros((SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count)]
    if getattr(loader, "_policy_on_gpu", False):
        pixels = torch.empty(count, SIDE, SIDE, 3, dtype=torch.uint8, device=GPU)
    else:
        pixels = torch.empty(count, 3, SIDE, SIDE, device=GPU)
    return SimpleNamespace(as_tensor=lambda: pixels)


def batch_of(loader):
    with ThreadPoolExecutor(2) as pool:
        prepared = loader._prepare_batch(0)
        return loader._postprocess(pool, of_dali(loader, len(prepared.indices)), prepared)()


def train_loader(source: Source, count: int, options: dict, **more) -> TrainLoader:
    cfg = DataConfig(image_size=SIDE, **options)
    return TrainLoader(source, cfg, StreamSampler(len(source), 0, count, count, 0, 1), GPU, *PIXELS, **more)


class Targets:
    """A cache whose targets are of one number."""

    bad: ClassVar = {}

    def take(self, indices, views):
        return views, {"tokens": torch.zeros(len(indices), 1)}


def watched(work) -> dict:
    """Runs `work` and counts what it asks of the GPU."""
    with fake_cuda.Watch() as watch:
        for name in KERNELS:
            setattr(triton_kernels, name, launches._Kernel(name, watch))
        result = work()
    for each in result if isinstance(result, tuple) else ():
        for tensor in each.values() if isinstance(each, dict) else [each]:
            assert tensor.device == GPU, tensor.device
    return {"launches": sum(watch.launches.values()), "syncs": dict(watch.syncs), "copies": dict(watch.copies)}


def main(folder: str, sizes: list[int]) -> None:
    fake_cuda.pretend()
    # a stand-in for DALI's tensor is a tensor already, and pixels that a thread writes have no place in a fake one
    torch.from_dlpack = lambda tensor: tensor
    FakeTensor.numpy = lambda self: np.empty(self.shape, dtype=np.uint8)
    source = index_folder(Path(folder), "data.train")
    with fake_cuda.tensors(allow_real=True):
        print(json.dumps({size: counted(source, size) for size in sizes}))


def counted(source: Source, count: int) -> dict[str, dict]:
    """What is done -> its launches, host syncs and copies, with batches of `count` images."""
    found = {}
    for name, options in TRAINING.items():
        loader = train_loader(source, count, options)
        found[name] = watched(lambda loader=loader: batch_of(loader))
    for name, kinds in [("every kind", KINDS), *((op.name, [op]) for op in KINDS)]:
        loader = train_loader(source, count, POLICY)
        ops = itertools.cycle(kinds)
        loader.policy.draw = lambda rng, ops=ops: [next(ops)]
        found[name] = watched(lambda loader=loader: batch_of(loader))
    loader = train_loader(source, count, {}, cached=Targets(), seen=([0.0] * 3, [1.0] * 3))
    found["cached, for other models"] = watched(lambda: batch_of(loader))
    loader = EvalLoader(source, DataConfig(image_size=SIDE), count, 0, 1, GPU, *PIXELS)
    found["evaluation"] = watched(lambda: batch_of(loader))
    # what the counts would be of memory that is not pinned
    loader._pinned = lambda values: values
    found["pageable"] = watched(lambda: batch_of(loader))

    images, labels = torch.empty(count, 3, SIDE, SIDE, device=GPU), torch.empty(count, dtype=torch.int64, device=GPU)
    logits = torch.empty(count, 10, device=GPU)
    for options in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixer = Mixer(DataConfig(**options), 10, count, 0, 0)
        found[f"mix {options}"] = watched(lambda mixer=mixer: mixer(images, labels, 3, 0))
    found["count_correct"] = watched(lambda: count_correct(logits, labels))
    found["agreement"] = watched(lambda: tuple(logit_agreement(logits, logits).values()))
    for batches in (1, 5):
        given = [(images, labels)] * batches
        found[f"evaluate {batches}"] = watched(lambda given=given: evaluate(lambda _: logits, given, GPU))
    return found


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:]])
