"""Opens the training and validation images of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scalekd_ds.class_names import KnownClasses, match_classes, natural_order, positions_in
from scalekd_ds.config import RunConfig
from scalekd_ds.data.sources.open import is_packed, open_source
from scalekd_ds.data.sources.source import Source, check_all_present, per_class, subset, with_classes
from scalekd_ds.data.verify import without_quarantined
from scalekd_ds.errors import UserError, say
from scalekd_ds.names import escape


def where_of(root: str | Path, name: str) -> str | Path:
    """Where a source of a run is: `name` below `root`, or a data set of Hugging Face."""
    return name if name.startswith("hf:") else Path(root) / name


def read_sources(cfg: RunConfig, classes: list[str] | None = None) -> tuple[Source, Source]:
    """Opens the training images, reduced to the subset that the run uses, and the validation images.

    Images on the quarantine list of `data.root` are left out.

    Args:
        cfg: The run.
        classes: Names of the classes in the order of the run that is resumed; None for a new one.

    Raises:
        UserError: A source is missing or empty, or the two have different classes.
    """
    data = cfg.data
    if not data.root and not (data.train.startswith("hf:") and data.val.startswith("hf:")):
        raise UserError("data.root is not set: give the folder that holds train/ and val/ as --data.root DIR.")
    root = Path(data.root)
    train = open_source(where_of(root, data.train), "data.train")
    if data.class_order == "natural":
        order = natural_order(train.classes)
        train = with_classes(train, positions_in(train.classes, order), order)
    if classes is not None and train.classes != classes:
        train = _in_order(train, classes, "data.train", "the checkpoint")
    # class folders carry the names of their classes; other labels mean in validation what they mean in training
    where = where_of(root, data.val)
    val = open_source(where, "data.val", train.classes if is_packed(where) else _training_or_own(train.classes))
    if val.classes != train.classes:
        val = _in_order(val, train.classes, "data.val", "data.train")
    if not data.allow_missing_classes:
        check_all_present(val, "data.val", "--data.allow_missing_classes true")
    train, val = without_quarantined(train, root), without_quarantined(val, root)
    seed = cfg.seed if data.subset_seed is None else data.subset_seed
    if data.images_per_class is not None:
        train = per_class(train, data.images_per_class, seed)
    if data.train_images is not None:
        train = subset(train, data.train_images, seed)
    return train, val


def _training_or_own(classes: list[str]) -> Callable[[list[str]], list[str]]:
    """A function that lists class folders: as training does where it knows them all, else as they are."""
    return lambda names: classes if (positions_in(names, classes) >= 0).all() else names


def _in_order(source: Source, classes: list[str], here: str, there: str) -> Source:
    """The source with its classes in the order of `classes`; says what had to be matched or assumed."""
    known = KnownClasses((classes,))
    matched = match_classes(known, len(classes), source.classes, there, f"{here} ({escape(source.root)})")
    say(matched.notice)
    return with_classes(source, matched.positions, classes)
