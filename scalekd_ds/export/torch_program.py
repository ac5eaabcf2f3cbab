"""What the formats torchscript and torch_export share: write a program of torch's, and load it back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from scalekd_ds.export.student import LoadedStudent


def write_program(
    student: LoadedStudent,
    file: Path,
    loader: str,
    save_and_load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
) -> float:
    """Writes a program and checks its logits.

    Args:
        student: The student to export.
        file: The file to write.
        loader: The module of torch that loads the file, for error messages.
        save_and_load: Captures the student's network, writes the file, and returns the program that was read back.

    Returns:
        The largest absolute difference of the logits from the student's.

    Raises:
        UserError: The program gives other logits than the student.
        Exception: The network cannot be captured; capturing runs the model's own code, which may raise any error.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # about what a trace may have missed, which the check with other batches finds
        warnings.simplefilter("ignore")
        program = save_and_load(file)
    return student.check_logits(torch.no_grad()(program), f"{file.name}, loaded by {loader},")


def program_usage(student: LoadedStudent, load: str) -> str:
    """Python code that loads a program by the expression `load`, and runs it."""
    size = student.card["image_size"]
    return f"""import torch

model = {load}
with torch.no_grad():
    logits = model(torch.zeros(8, 3, {size}, {size}))  # any batch, {student.input_range}"""
