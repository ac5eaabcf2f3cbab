"""Evaluates plain weights or a timm model in one process, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_ds.class_names import match_classes
from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import Source, check_all_present, with_classes
from scalekd_ds.data.verify import without_quarantined
from scalekd_ds.errors import UserError, cause_of, problem_of, say
from scalekd_ds.evaluation.accuracy import evaluate
from scalekd_ds.evaluation.left_out import check_left_out
from scalekd_ds.files.durable import save_tensors, written_aside
from scalekd_ds.models.build import build_model
from scalekd_ds.models.card import card_path, eval_resize_at, read_card
from scalekd_ds.models.known_classes import known_classes
from scalekd_ds.models.preprocessing import Preprocessing, cut_off_notice, normalisation_of
from scalekd_ds.names import escape


@torch.no_grad()
def evaluate_model(
    name: str,
    data: str | Path,
    weights: str = "pretrained",
    image_size: int | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    logits_file: Path | None = None,
    eval_resize: int | None = None,
    allow_missing_classes: bool = False,
    max_bad_share: float = DataConfig.max_bad_share,
) -> dict[str, float]:
    """Measures top-1 and top-5 of a file of plain weights or of a timm model, in float32 without TF32.

    Args:
        name: Path of a .safetensors file with its card, or name of a timm model.
        data: Validation images in any form that `open_source` takes, or the folder above class folders in val/.
        weights: Weights of a timm model: `pretrained`, `none` or a .safetensors file.
        image_size: Height and width of the images in pixels; None takes the model's own.
        batch_size: Images in a forward pass.
        threads: Decoding threads; None takes them from the cores.
        logits_file: File to which `logits` (n, K) and `labels` (n,) are written, in the order of the sorted images;
            None writes none.
        eval_resize: Shorter side before the centre crop in pixels; None takes that of training, in proportion where the
            size is another.
        allow_missing_classes: The images may lack some of the model's classes.
        max_bad_share: Share of the images that may be left out because they cannot be used.

    Returns:
        `top1` and `top5` in percent, `images`, their number, and `left_out`, the number of those that cannot be used.

    Raises:
        UserError: The model or the images cannot be opened, they have different classes, too many images cannot be used, or
            the logits cannot be written.
    """
    if _has_card_of(name, weights):
        say(f"{escape(weights)} has a card: size, crop and filter are those of its training")
        name = weights
    card = read_card(name) if name.endswith(".safetensors") else {}
    model = _built(name, card, weights, image_size).eval()
    source = images_for(model, name, data)
    if not allow_missing_classes:
        check_all_present(source, "--data", "--allow-missing-classes")
    trained = Preprocessing.of(model)
    size = image_size or card.get("image_size") or (trained.size or (224, 224))[0]
    say(cut_off_notice(model, size))
    if not card and trained.squashes:
        say(
            f"{escape(name)}: timm squashes its images to squares, where here the shorter side is resized and the middle cut "
            "out; top-1 may differ a little"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    _check_size(model, name, size, device)
    if eval_resize is None:
        eval_resize = eval_resize_at(card, size) if card else trained.shorter_side(size)
    # DataConfig refuses another one
    interpolation: Any = card.get("interpolation") or trained.interpolation or "bicubic"
    cfg = DataConfig(
        image_size=size,
        eval_resize=eval_resize,
        interpolation=interpolation,
        threads=threads,
    )
    loader = EvalLoader(source, cfg, batch_size, 0, 1, device, *normalisation_of(model))
    all_logits: list[torch.Tensor] = []
    all_labels: list[torch.Tensor] = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in loader:
            all_labels.append(labels)
            yield images, labels

    def predict(images: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        if logits_file is not None:
            all_logits.append(logits)
        return logits

    result = evaluate(predict, batches(), device)
    check_left_out(loader, result, max_bad_share, "--max-bad-share")
    if logits_file is not None:
        labels = torch.cat(all_labels)
        real = labels >= 0
        found = {"logits": torch.cat(all_logits)[real].cpu().contiguous(), "labels": labels[real].cpu().contiguous()}
        try:
            with written_aside(logits_file) as partial:
                save_tensors(partial, found)
        except OSError as error:
            raise UserError(f"--logits: {logits_file} cannot be written: {problem_of(error)}.") from None
    return result


def _has_card_of(name: str, weights: str) -> bool:
    """Whether a card beside a file of weights says that they are of the timm model `name`."""
    if name.endswith(".safetensors") or not weights.endswith(".safetensors") or not card_path(weights).is_file():
        return False
    return str(read_card(weights).get("architecture", "")).split(".")[0] == name.split(".")[0]


def _built(name: str, card: dict[str, Any], weights: str, image_size: int | None) -> nn.Module:
    if not card or not image_size:
        return build_model(name, None, None, weights, image_size)
    try:
        # with its number of classes given, a model of a file is built for the new size
        return build_model(name, card.get("num_classes"), None, weights, image_size)
    except UserError:
        own = card.get("image_size")
        if image_size == own:
            raise
        # where the file itself is at fault, this says so
        build_model(name)
        raise UserError(
            f"--image-size is {image_size}, and the weights of {escape(name)} are for images of {own} pixels, since timm does "
            f"not resize those of {card.get('architecture')}: leave the option out."
        ) from None


def _check_size(model: nn.Module, name: str, size: int, device: torch.device) -> None:
    """Raises UserError where a model does not run on images of `size` pixels."""
    try:
        model(torch.zeros(1, 3, size, size, device=device))
    # a model that was built for another size may fail in any way
    except Exception as error:
        raise UserError(
            f"{escape(name)} cannot take {size}x{size} images: {cause_of(error)}; give its own size as --image-size."
        ) from None


def images_for(model: Any, name: str, data: str | Path) -> Source:
    """The images with labels as the model's outputs, by the names of the classes; without those in quarantine.

    Raises:
        UserError: The images cannot be opened, or have classes that the model has not.
    """
    count, known = int(model.num_classes), known_classes(model)
    root = Path(data)
    where: str | Path = root
    if str(data).startswith("hf:"):
        root, where = Path(), str(data)
    elif (root / "val").is_dir():
        where = root / "val"

    def outputs_or_names(names: list[str]) -> list[str]:
        # labels that are numbers are outputs, unless the model knows them as the names of other ones
        numbers = [str(position) for position in range(count)]
        return numbers if set(names) <= set(numbers) else names

    source = open_source(where, "--data", outputs_or_names)
    matched = match_classes(known, count, source.classes, escape(name), escape(where), subset=True)
    say(matched.notice)
    classes = known.schemes[0] if known.schemes else source.classes
    source = with_classes(source, matched.positions, classes)
    # the list is in the folder that a run has as data.root
    for folder in () if isinstance(where, str) else {root, where.parent}:
        source = without_quarantined(source, folder)
    return source
