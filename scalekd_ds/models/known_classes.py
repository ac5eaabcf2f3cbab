"""What is known of the names of a model's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from scalekd_ds.class_names import KnownClasses, match_classes
from scalekd_ds.errors import UserError
from scalekd_ds.models.card import card_path, read_card
from scalekd_ds.models.load_weights import reset_classifier


def card_classes(card: dict[str, Any], path: str | Path) -> list[str] | None:
    """The names of the classes in a card, or None where it has none.

    Raises:
        UserError: The card has another number of names than of classes, or a name twice.
    """
    names = card.get("classes")
    if not names:
        return None
    if len(names) != card.get("num_classes", len(names)) or len(set(names)) < len(names):
        raise UserError(
            f"{path} has {len(names)} names of classes, {len(set(names))} of them different, for {card.get('num_classes')} "
            "classes: write the card again with scalekd consolidate."
        )
    return [str(name) for name in names]


def name_classes(model: nn.Module, weights: str | Path) -> None:
    """Notes the names in the card beside a file of weights as the model's `label_names`, where timm keeps such names.

    For a file without a card they are None, since what timm knows of its own weights need not hold for it.
    """
    path, names = Path(weights), None
    if path.suffix == ".safetensors" and card_path(path).is_file():
        names = card_classes(read_card(path), card_path(path))
    if names is not None and len(names) != model.num_classes:
        names = None
    model.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {}, label_names=names)


def known_classes(model: nn.Module) -> KnownClasses:
    """The names of a built model's classes: those beside its weights, or else ImageNet's for timm's own weights."""
    count = int(getattr(model, "num_classes", 0) or 0)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = cfg.get("label_names")
    if names and len(names) == count:
        return KnownClasses(([str(name) for name in names],))
    subset = infer_imagenet_subset(model) if count else None
    if subset is None:
        return KnownClasses()
    info = ImageNetInfo(subset)
    words = [info.index_to_description(position) for position in range(count)]
    schemes = info.label_names(), words, [word.split(",")[0] for word in words]
    # where the key is there without names, `name_classes` has found none beside the weights
    return KnownClasses(schemes, certain=False, guessed_for_file="label_names" in cfg)


def fit_classifier(model: nn.Module, classes: Sequence[str]) -> str | None:
    """Puts the outputs of a classifier that came with weights into the order of the training classes.

    Args:
        model: The student, with as many outputs as there are classes.
        classes: Names of the training classes.

    Returns:
        What was changed, in one line, or None: names of other classes leave a newly initialised classifier.
    """
    known = known_classes(model)
    if not known.certain or not known.schemes or len(known.schemes[0]) != len(classes):
        return None
    try:
        matched = match_classes(known, len(classes), classes, "the student's weights", "data.train")
    except UserError as error:
        reset_classifier(model, len(classes))
        return f"{str(error).rstrip('.')}: the student's classifier is initialised anew"
    if not matched.same_order:
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple | list) else (heads,):
            for module in head.modules():
                # a norm inside of a classifier is as wide as its input
                if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == len(classes):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data[matched.positions].clone()
    return matched.notice
