"""model.pt2, a program of torch.export: what AOTInductor and ExecuTorch start from."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.export import Dim

from scalekd_ds.export.subject import Subject, cannot


def write(subject: Subject, folder: Path) -> float:
    """Writes the program.

    Raises:
        UserError: It cannot be captured, or gives other logits than the student.
    """
    file = folder / "model.pt2"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(subject.network, (subject.images(),), dynamic_shapes=({0: Dim("batch")},))
            torch.export.save(program, file)
            loaded = torch.export.load(file).module()
    # dynamo's errors, and those of the model's own code
    except Exception as error:
        raise cannot(subject, "torch_export", error) from None
    return subject.check(torch.no_grad()(loaded), "model.pt2, loaded by torch.export,")


def usage(subject: Subject) -> str:
    """Python that runs the file."""
    size = subject.card["image_size"]
    images = "in [0, 1]" if subject.normalised else "normalised with the mean and std above"
    return f"""import torch

model = torch.export.load("FOLDER/model.pt2").module()
with torch.no_grad():
    logits = model(torch.zeros(8, 3, {size}, {size}))  # any batch, {images}"""
