"""The format hf: the folder of format timm, checked by loading it with the TimmWrapper of Hugging Face's transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from scalekd_ds.export import timm_folder
from scalekd_ds.export.student import LoadedStudent


def write(student: LoadedStudent, folder: Path) -> float:
    """Writes timm's folder and loads it back with transformers.

    Raises:
        UserError: The format timm refuses the student, or the logits differ.
        Exception: transformers cannot load the folder; it raises errors of its own, of timm and of the hub.
    """
    timm_folder.write(student, folder)
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    return student.check_logits(
        torch.no_grad()(lambda images: loaded(images).logits), "the folder, loaded by transformers,"
    )


def usage(student: LoadedStudent) -> str:
    """Python code that loads the folder."""
    return """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
logits = model(**processor(Image.open("IMAGE").convert("RGB"))).logits
print(model.config.id2label[logits.argmax().item()])"""
