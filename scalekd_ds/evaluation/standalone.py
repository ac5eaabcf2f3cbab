"""Evaluates plain weights or a timm model in one process, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.durable_files import save_tensors, written_aside
from scalekd_ds.errors import UserError, problem_of
from scalekd_ds.evaluation.accuracy import evaluate
from scalekd_ds.evaluation.left_out import check_left_out
from scalekd_ds.models.build import build_model
from scalekd_ds.models.card import eval_resize_at, read_card
from scalekd_ds.models.preprocessing import Preprocessing, normalisation_of


@torch.no_grad()
def evaluate_model(
    name: str,
    data: Path,
    weights: str = "pretrained",
    image_size: int | None = None,
    batch_size: int = 64,
    threads: int = 2,
    logits_file: Path | None = None,
    eval_resize: int | None = None,
    max_bad_share: float = DataConfig.max_bad_share,
) -> dict[str, float]:
    """Measures top-1 and top-5 of a file of plain weights or of a timm model, in float32.

    Args:
        name: Path of a .safetensors file with its card, or name of a timm model.
        data: Folder with one folder of validation images per class, or the folder above it, which calls it val/.
        weights: Weights of a timm model: `pretrained`, `none` or a .safetensors file.
        image_size: Height and width of the images in pixels; None takes the model's own.
        batch_size: Images in a forward pass.
        threads: Decoding threads.
        logits_file: File to which `logits` (n, K) and `labels` (n,) are written, in the order of the sorted images;
            None writes none.
        eval_resize: Shorter side before the centre crop in pixels; None takes that of training, in proportion where the
            size is another.
        max_bad_share: Share of the images that may be left out because they cannot be used.

    Returns:
        `top1` and `top5` in percent, `images`, their number, and `left_out`, the number of those that cannot be used.

    Raises:
        UserError: The model or the images cannot be opened, they have different numbers of classes, too many images cannot
            be used, or the logits cannot be written.
    """
    folder = data / "val" if (data / "val").is_dir() else data
    source = index_folder(folder, "--data")
    card = read_card(name) if name.endswith(".safetensors") else {}
    # with its number of classes given, a model of a file is built for the new size
    model = build_model(name, card.get("num_classes") if image_size else None, None, weights, image_size).eval()
    num_classes = int(model.num_classes)
    if num_classes != len(source.classes):
        raise UserError(
            f"{name} has {num_classes} classes and {folder} has {len(source.classes)}: they must be the same."
        )
    size = image_size or card.get("image_size") or (Preprocessing.of(model).size or (224, 224))[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    cfg = DataConfig(
        image_size=size,
        eval_resize=eval_resize_at(card, size) if eval_resize is None else eval_resize,
        interpolation=card.get("interpolation", "bicubic"),
        threads=threads,
    )
    loader = EvalLoader(source, cfg, batch_size, 0, 1, device, *normalisation_of(model))
    all_logits: list[torch.Tensor] = []
    all_labels: list[torch.Tensor] = []

    def batches():
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
