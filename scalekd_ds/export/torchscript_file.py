"""The format torchscript: model.ts, a traced program, for C++ and for mobile runtimes that read no other format."""

from __future__ import annotations

from pathlib import Path

import torch

from scalekd_ds.export.student import LoadedStudent
from scalekd_ds.export.torch_program import program_usage, write_program


def write(student: LoadedStudent, folder: Path) -> float:
    """Writes the program; returns and raises as `write_program`."""

    def save_and_load(file: Path) -> torch.jit.ScriptModule:
        program = torch.jit.trace(student.network, student.example_images(), check_trace=False)
        # through Python's file, whose errors say what the system says
        with file.open("wb") as written:
            torch.jit.save(program, written)
        return torch.jit.load(file)

    return write_program(student, folder / "model.ts", "torch.jit", save_and_load)


def usage(student: LoadedStudent) -> str:
    """Python code that runs the file."""
    return program_usage(student, 'torch.jit.load("FOLDER/model.ts")')
