"""timm's folder, which Hugging Face's transformers loads by its TimmWrapper; this format checks that it does."""

from __future__ import annotations

from pathlib import Path

import torch

from scalekd_ds.export import timm_folder
from scalekd_ds.export.subject import Subject, cannot


def write(subject: Subject, folder: Path) -> float:
    """Writes timm's folder and loads it back with transformers.

    Raises:
        UserError: As timm's format does, or transformers cannot load it.
    """
    timm_folder.write(subject, folder)
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    # transformers raises its own, timm's and the hub's errors
    except Exception as error:
        raise cannot(subject, "hf", error) from None
    return subject.check(torch.no_grad()(lambda images: loaded(images).logits), "the folder, loaded by transformers,")


def usage(subject: Subject) -> str:
    """Python that loads the folder."""
    return """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
logits = model(**processor(Image.open("IMAGE").convert("RGB"))).logits
print(model.config.id2label[logits.argmax().item()])"""
