#!/usr/bin/env python3
"""Measures images/s of the library's loader, timm's, torchvision's, and FFCV's: `python benchmarks/loader.py`.

All load the same JPEGs to the same size, with as many decoding threads in the library as worker processes in the others. They
alternate in one process. In each turn, batches that were prepared while others ran are dropped, and then whole batches are
timed. `--soak N` reports memory over N images instead. FFCV is measured if it is installed
(`pip install ffcv`, which needs the headers of OpenCV and libturbojpeg).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import numpy as np
import psutil
import timing
import torch
from PIL import Image, ImageFilter
from timm.data import create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder as TorchFolder

from scalekd_ds.config import DataConfig
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.train_loader import TrainLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# the augmentations of the traditional and of the advanced published recipes
RECIPES = {
    "crop and flip": {"interpolation": "bilinear"},
    "RandAugment": {"interpolation": "bicubic", "auto_augment": "rand-m5-n2-mstd0.5-inc1", "random_erasing": 0.25},
}
# the aims: times faster than timm's loader
EXPECTED = {"crop and flip": 1.4, "RandAugment": 1.2}


class Endless(Dataset):
    """A data set repeated many times, so that no end of an epoch is timed."""

    def __init__(self, data: Dataset, times: int = 1000) -> None:
        self.data, self.times = data, times

    def __len__(self) -> int:
        return len(self.data) * self.times

    def __getitem__(self, index: int):
        return self.data[index % len(self.data)]

    @property
    def transform(self):
        """The transform of the data set, which timm's loader sets."""
        return self.data.transform

    @transform.setter
    def transform(self, transform) -> None:
        self.data.transform = transform


def make_images(folder: Path, count: int, size: tuple[int, int] = (500, 400)) -> Path:
    """Writes an ImageFolder of JPEGs with the detail of photographs: smoothed noise of several scales at quality 90."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = [rng.integers(0, 256, (size[1] // s, size[0] // s, 3)).astype(np.uint8) for s in (50, 10, 3)]
        mixed = np.mean([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in layers], 0)
        Image.fromarray(mixed.astype(np.uint8)).filter(ImageFilter.SMOOTH).save(path, quality=90)
    return folder


def library_loader(
    folder: Path, args: argparse.Namespace, recipe: dict, workers: int, device: torch.device
) -> Iterator:
    """Batches of the library's loader."""
    source = index_folder(folder, "folder")
    cfg = DataConfig(image_size=args.size, threads=workers, **recipe)
    return iter(
        TrainLoader(source, cfg, StreamSampler(len(source), 0, args.batch, args.batch, 0, 1), device, MEAN, STD)
    )


def timm_loader(folder: Path, args: argparse.Namespace, recipe: dict, workers: int, device: torch.device) -> Iterator:
    """Batches of timm's loader."""
    loader = create_loader(
        Endless(TorchFolder(folder)),
        (3, args.size, args.size),
        args.batch,
        is_training=True,
        use_prefetcher=device.type == "cuda",
        re_prob=recipe.get("random_erasing", 0.0),
        re_mode="pixel",
        hflip=0.5,
        color_jitter=0.0,
        auto_augment=recipe.get("auto_augment"),
        interpolation=recipe["interpolation"],
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=device,
    )
    return iter(loader)


def torchvision_loader(
    folder: Path, args: argparse.Namespace, recipe: dict, workers: int, device: torch.device
) -> Iterator:
    """Batches of torchvision's transforms in PyTorch's loader."""
    steps = [
        transforms.RandomResizedCrop(args.size, interpolation=transforms.InterpolationMode(recipe["interpolation"])),
        transforms.RandomHorizontalFlip(),
    ]
    if "auto_augment" in recipe:
        # torchvision has no form whose effect increases with the magnitude, and applies every operation that it draws
        steps.append(transforms.RandAugment(2, 9))
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if "random_erasing" in recipe:
        steps.append(transforms.RandomErasing(recipe["random_erasing"], value="random"))
    data = Endless(TorchFolder(folder, transforms.Compose(steps)))
    return iter(DataLoader(data, args.batch, shuffle=True, num_workers=workers, drop_last=True))


def ffcv_loader(
    folder: Path, args: argparse.Namespace, recipe: dict, workers: int, device: torch.device
) -> Iterator | None:
    """Batches of FFCV, from the same JPEGs in a file of its own; None without FFCV, or with RandAugment, which it lacks."""
    if "auto_augment" in recipe or importlib.util.find_spec("ffcv") is None:
        return None
    from ffcv import fields, loader, transforms, writer
    from ffcv.fields import decoders

    packed = folder.parent / f"{folder.name}.beton"
    if not packed.exists():
        columns = {"image": fields.RGBImageField(write_mode="jpg", jpeg_quality=90), "label": fields.IntField()}
        writer.DatasetWriter(packed, columns, num_workers=1).from_indexed_dataset(TorchFolder(folder))
    pixels = [decoders.RandomResizedCropRGBImageDecoder((args.size, args.size)), transforms.RandomHorizontalFlip()]
    pixels.append(transforms.NormalizeImage(np.array(MEAN) * 255, np.array(STD) * 255, np.float32))
    to_torch = [transforms.ToTensor(), transforms.ToTorchImage()]
    batches = loader.Loader(
        str(packed),
        batch_size=args.batch,
        num_workers=workers,
        order=loader.OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": pixels + to_torch, "label": [decoders.IntDecoder(), transforms.ToTensor()]},
    )
    return itertools.chain.from_iterable(itertools.repeat(batches))


LOADERS = {"ours": library_loader, "timm": timm_loader, "torchvision": torchvision_loader, "FFCV": ffcv_loader}


def batches_to_time(batches: Iterator, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A call that takes the batches of one turn to the device, where ours and timm's are already."""

    def run() -> None:
        for _ in range(args.batches):
            images = next(batches)[0].to(device)
            assert images.shape == (args.batch, 3, args.size, args.size)

    return run


def drop_prepared(batches: Iterator) -> None:
    """Drops the batches that the workers prepared while other loaders were timed."""
    for _ in range(5):
        next(batches)


def measure(folder: Path, args: argparse.Namespace, device: torch.device) -> dict:
    """Measures all loaders with all recipes and numbers of workers: the results for JSON."""
    result = {"benchmark": "loader", "machine": harness.machine(device), "settings": vars(args), "rows": []}
    for name, recipe in RECIPES.items():
        for workers in args.workers:
            built = {n: build(folder, args, recipe, workers, device) for n, build in LOADERS.items()}
            running = {n: batches for n, batches in built.items() if batches is not None}
            seconds: dict[str, list[float]] = {n: [] for n in running}
            for round_ in range(args.repeats):
                names = list(running)
                for n in names[round_ % len(names) :] + names[: round_ % len(names)]:
                    drop_prepared(running[n])
                    seconds[n].append(timing.wall_seconds(batches_to_time(running[n], args, device), device))
            images = args.batch * args.batches
            row = {"recipe": name, "workers": workers, "expected": EXPECTED[name], "loaders": {}}
            for n, times in seconds.items():
                faster = timing.speedup(seconds["timm"], times)
                row["loaders"][n] = {"images_per_s": images / timing.quantiles(times)["median"], "times_timm": faster}
            result["rows"].append(row)
            del running
    return result


def soak(folder: Path, args: argparse.Namespace, device: torch.device) -> None:
    """Prints the resident memory of this process in MB, ten times over `args.soak` images."""
    process = psutil.Process()
    batches = library_loader(folder, args, RECIPES["RandAugment"], args.workers[0], device)
    count, rows = args.soak // args.batch, []
    for number in range(count + 1):
        if number % max(1, count // 10) == 0:
            rows.append([number * args.batch, process.memory_info().rss / 2**20])
        next(batches)
    harness.print_table(["images", "resident MB"], rows)
    print(f"growth from {rows[1][0]} images on: {rows[-1][1] - rows[1][1]:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="an ImageFolder (default: generated JPEGs of 500x400)")
    parser.add_argument("--images", type=int, default=400, help="number of generated JPEGs")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=12, help="batches in a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads, or processes of the others")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--soak", type=int, default=0, help="measure memory over this many images instead of speed")
    parser.add_argument("--out", help="folder of the JSON; else $OUT, else benchmarks/results")
    args = parser.parse_args()
    device = timing.device_of(args.device)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or make_images(Path(made), args.images)
        if args.soak:
            soak(folder, args, device)
            return
        result = measure(folder, args, device)
    result["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    rows = []
    for row in result["rows"]:
        for name, v in row["loaders"].items():
            faster = v["times_timm"]
            cells = [v["images_per_s"], faster["median"], faster["p20"], faster["p80"]]
            expected = row["expected"] if name == "ours" else None
            rows.append([f"{row['recipe']}, {row['workers']} {name}", *cells, expected])
    harness.print_table(["", "images/s", "x timm", "p20", "p80", "expected"], rows)
    path = harness.results_dir(args.out) / f"loader-{device.type}.json"
    harness.write_json(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
