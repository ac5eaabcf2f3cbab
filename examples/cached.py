#!/usr/bin/env python3
"""ScaleKD from a teacher cache in a bare PyTorch loop: the loader replays the views that the teacher has answered to.

python examples/cached.py --cache CACHE --images IMAGES/train                   a cache that `scalekd cache` has made of them
python examples/cached.py --size 64 --batch 4 --steps 4                         makes a small one first; a minute on a CPU
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from scalekd_ds import ScaleKD
from scalekd_ds.data import StreamSampler, TrainLoader
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.teacher import TeacherTargets
from scalekd_ds.teacher_cache.headless import headless_teacher
from scalekd_ds.teacher_cache.reader import TeacherCache
from scalekd_ds.teacher_cache.settings import views_of


def make_cache(folder, size, batch):
    """Noise of two classes, and a cache of two views of each image, by the command that a user types."""
    for i in range(16):
        for name in ("train", "val"):
            path = folder / "images" / name / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
    words = f"--teacher vit_tiny_patch16_224 --teacher_weights none --data.image_size {size} --micro_batch_size {batch}"
    run = [*words.split(), "--teacher_kwargs", '{"num_classes": 2}', "--run.ds_config", "cpu_fp32"]
    out = ["--data.root", str(folder / "images"), "--views", "2", "--out", str(folder / "cache")]
    subprocess.run([sys.executable, "-m", "scalekd_ds", "cache", *run, *out], check=True)
    return folder / "cache", folder / "images" / "train"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of a cache; a small one is made if not given")
    parser.add_argument("--images", help="the training images that it was made of")
    parser.add_argument("--size", type=int, default=224, help="side of the images of the small cache")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.cache is None:
            args.cache, args.images = make_cache(Path(folder), args.size, args.batch)
        train(args, device)


def train(args, device):
    cache = TeacherCache(args.cache)
    made = cache.manifest
    # the weights of its last stage, through which TPP's gradients pass; no trunk, no file of the teacher
    teacher = headless_teacher(made.teacher, cache.last_stage())
    student = timm.create_model("resnet18", num_classes=made.layout.classes)
    data = views_of(made)
    distiller = ScaleKD(student, teacher, image_size=data.image_size).to(device)
    # on one rank; the order is that of a seed of yours, and pass p of the images takes view p mod K
    sampler = StreamSampler(made.samples, 0, args.batch, args.batch, 0, 1, views=made.views, view_seed=made.view_seed)
    source = open_source(args.images, "--images")
    loader = TrainLoader(source, data, sampler, device, made.mean, made.std, cached=cache)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, weight_decay=0.05)
    for step, (images, labels, entries) in enumerate(itertools.islice(loader, args.steps), 1):
        losses = distiller(images, labels, TeacherTargets(*cache.targets(entries)))
        optimizer.zero_grad()
        losses["loss/total"].backward()
        optimizer.step()
        print(f"step {step}: " + "  ".join(f"{k.removeprefix('loss/')} {v.item():.3f}" for k, v in losses.items()))
    loader.close()
    print(f"{len(cache.damaged)} entries were damaged, reading took {cache.seconds:.2f} s")


if __name__ == "__main__":
    main()
