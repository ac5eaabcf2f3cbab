"""What is known of the names of a model's classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from scalekd_ds.class_names import KnownClasses, is_almost, match_classes
from scalekd_ds.errors import UserError
from scalekd_ds.models.card import card_path, read_card
from scalekd_ds.models.classifier import reset_classifier
from scalekd_ds.models.listed_names import as_list, names_in


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


def name_classes(model: Any, weights: str | Path, content: Mapping[Any, Any], outputs: int) -> str | None:
    """Notes the names that come with a file of weights as the model's `label_names`, where timm keeps such names.

    They are those of the card beside the file, of the file itself, or of timm's or Hugging Face's config.json beside it.
    Without any they are None, since what timm knows of its own weights need not hold for the file.

    Args:
        model: The model with these weights.
        weights: The file.
        content: What the file holds.
        outputs: Number of classes of its classifier.

    Returns:
        A line for the user where there are names, and they cannot be the file's.

    Raises:
        UserError: The card is none.
    """
    path, names, notice = Path(weights), None, None
    card = card_path(path)
    if path.suffix == ".safetensors" and card.is_file():
        names = card_classes(read_card(path), card)
    else:
        beside = [file for file in (card, path.with_name("config.json")) if file != path and file.is_file()]
        for where, found in ((path, content), *((file, _json_of(file)) for file in beside)):
            try:
                names = names_in(found)
                if names is not None and len(names) != outputs:
                    raise UserError(f"it has {len(names)} names of classes for {outputs}")
            except UserError as error:
                names, notice = None, f"the names of classes in {where} are not used: {str(error).rstrip('.')}"
            if names is not None:
                break
    if names is not None and len(names) != model.num_classes:
        names = None
    model.pretrained_cfg = {
        **(getattr(model, "pretrained_cfg", None) or {}),
        "label_names": names,
        "label_descriptions": None,
    }
    return notice if names is None and outputs else None


def _json_of(file: Path) -> dict[Any, Any]:
    """What a JSON of whatever origin holds; nothing where it is damaged or is no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def name_classes_of_hub(model: Any, config: Mapping[Any, Any]) -> None:
    """Notes the names in the config.json of a hub's model as its `label_names`, of which timm reads its own alone.

    Raises:
        UserError: They are no list of classes.
    """
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    if not cfg.get("label_names") and (names := names_in(config)) is not None:
        model.pretrained_cfg = cfg | {"label_names": names}


def known_classes(model: nn.Module) -> KnownClasses:
    """The names of a built model's classes: those beside its weights, or else ImageNet's for timm's own weights.

    Raises:
        UserError: What the model has as names is no list of its classes.
    """
    count = int(getattr(model, "num_classes", 0) or 0)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    names = _own_names(cfg, count) if count else None
    imagenet = _imagenets_names(model, count)
    if names is not None:
        if any(is_almost(names, scheme) for scheme in imagenet):
            # two of whose words are each the name of two classes
            return KnownClasses((names, *imagenet))
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"the model's names of classes, {len(names)}, have {twice!r} more than once: correct them.")
        return KnownClasses((names, *_descriptions(cfg, names)))
    # where the key is there without names, `name_classes` has found none beside the weights
    return KnownClasses(imagenet, certain=not imagenet, guessed_for_file="label_names" in cfg)


def _own_names(cfg: Mapping[str, Any], count: int) -> list[str] | None:
    """The `label_names` of a configuration of timm's; None where they are of another number of classes than the model."""
    where = cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("architecture") or "the model"
    names = as_list(cfg.get("label_names"), f"label_names of {where}")
    if cfg.get("label_names") and names is None and not isinstance(cfg["label_names"], Mapping | list | tuple):
        raise UserError(f"label_names of {where} is {cfg['label_names']!r:.60}: it must be a list of names.")
    if names is None or (len(names) != count and cfg.get("num_classes") != count):
        return None
    if len(names) != count:
        raise UserError(f"label_names of {where} has {len(names)} names of classes, for {count} classes.")
    return names


def _descriptions(cfg: Mapping[str, Any], names: list[str]) -> list[list[str]]:
    """timm's `label_descriptions` of these names, which are other names of the same classes; none where one lacks its own."""
    texts: Any = cfg.get("label_descriptions")
    texts = [texts.get(name) for name in names] if isinstance(texts, Mapping) else texts
    whole = isinstance(texts, list | tuple) and len(texts) == len(names) and all(isinstance(t, str) for t in texts)
    return [list(texts)] if whole else []


def _imagenets_names(model: nn.Module, count: int) -> tuple[list[str], ...]:
    """The names of ImageNet's classes by kind, where the model has as many; else none."""
    subset = infer_imagenet_subset(model) if count else None
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    words = [info.index_to_description(position) for position in range(count)]
    return info.label_names(), words, [word.split(",")[0] for word in words]


def fit_classifier(model: Any, classes: Sequence[str]) -> str | None:
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
