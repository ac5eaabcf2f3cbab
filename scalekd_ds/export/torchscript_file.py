"""model.ts, a traced TorchScript program, for C++ and for mobile runtimes that read no other."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from scalekd_ds.export.subject import Subject, cannot


def write(subject: Subject, folder: Path) -> float:
    """Writes the program.

    Raises:
        UserError: It cannot be traced, or gives other logits than the student.
    """
    file = folder / "model.ts"
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # a trace keeps what it saw, which the check below looks at with other batches
            warnings.simplefilter("ignore")
            torch.jit.trace(subject.network, subject.images(), check_trace=False).save(str(file))
            loaded = torch.jit.load(file)
    # tracing runs the model's own code, which raises what it likes
    except Exception as error:
        raise cannot(subject, "torchscript", error) from None
    return subject.check(torch.no_grad()(loaded), "model.ts, loaded by torch.jit,")


def usage(subject: Subject) -> str:
    """Python that runs the file."""
    size = subject.card["image_size"]
    images = "in [0, 1]" if subject.normalised else "normalised with the mean and std above"
    return f"""import torch

model = torch.jit.load("FOLDER/model.ts")
with torch.no_grad():
    logits = model(torch.zeros(8, 3, {size}, {size}))  # any batch, {images}"""
