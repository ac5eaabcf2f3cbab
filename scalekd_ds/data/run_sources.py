"""Opens the training and validation images of a run."""

from __future__ import annotations

from pathlib import Path

from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.image_folder import ImageFolder
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import Source, check_same_classes, per_class, subset
from scalekd_ds.data.verify import without_quarantined
from scalekd_ds.errors import UserError


def read_sources(cfg: RunConfig) -> tuple[Source, Source]:
    """Opens the training images, reduced to the subset that the run uses, and the validation images.

    Images on the quarantine list of `data.root` are left out.

    Raises:
        UserError: A source is missing or empty, or the two have different classes.
    """
    data = cfg.data
    if not data.root and not (data.train.startswith("hf:") and data.val.startswith("hf:")):
        raise UserError("data.root is not set: give the folder that holds train/ and val/ as --data.root DIR.")
    root = Path(data.root)

    def where(name: str) -> str | Path:
        return name if name.startswith("hf:") else root / name

    train = open_source(where(data.train), "data.train")
    # class folders carry the names of their classes; other labels mean in validation what they mean in training
    has_class_folders = isinstance(train, ImageFolder) and (root / data.val).is_dir()
    val = open_source(where(data.val), "data.val", None if has_class_folders else train.classes)
    check_same_classes(train, val)
    train, val = without_quarantined(train, root), without_quarantined(val, root)
    seed = cfg.seed if data.subset_seed is None else data.subset_seed
    if data.images_per_class is not None:
        train = per_class(train, data.images_per_class, seed)
    if data.train_images is not None:
        train = subset(train, data.train_images, seed)
    return train, val
