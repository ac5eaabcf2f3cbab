"""The format torch_export: model.pt2, a program of torch.export, from which AOTInductor and ExecuTorch start."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import Dim

from scalekd_ds.export.student import LoadedStudent
from scalekd_ds.export.torch_program import program_usage, write_program


def write(student: LoadedStudent, folder: Path) -> float:
    """Writes the program, with a dynamic batch; returns and raises as `write_program`."""

    def save_and_load(file: Path) -> torch.nn.Module:
        batch = ({0: Dim("batch")},)
        program = torch.export.export(student.network, (student.example_images(),), dynamic_shapes=batch)
        # through Python's file, whose errors say what the system says
        with file.open("wb") as written:
            torch.export.save(program, written)
        return torch.export.load(file).module()

    return write_program(student, folder / "model.pt2", "torch.export", save_and_load)


def usage(student: LoadedStudent) -> str:
    """Python code that runs the file."""
    return program_usage(student, 'torch.export.load("FOLDER/model.pt2").module()')
