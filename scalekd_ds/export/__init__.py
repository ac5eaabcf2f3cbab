"""Exports a trained student for other tools: a folder with the model, a card for people and a card for programs.

It may import `plan`, `inspection`, `evaluation` and everything below them, but not `watching` or `training`.

Each format has a module. Its `write(student, folder) -> float` writes the files, loads them back as a user would, and returns
the largest difference of the logits from the student's; its `usage(student) -> str` is Python code that loads the files.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from scalekd_ds.errors import UserError, cause_of, problem_of, suggest
from scalekd_ds.names import utf8_path

# the card for programs; beside a model.safetensors it makes that file a consolidated one, which this library can read
CARD = "model.json"


@dataclass(frozen=True)
class Format:
    """One format of export.

    Attributes:
        about: What it writes, in one line.
        module: Its module in this package.
        needs: Packages that must be installed.
        extra: The extra of setup.py that installs them.
        preprocessing: Whether mean and std can be put inside the exported program.
    """

    about: str
    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    preprocessing: bool = True


FORMATS = {
    "timm": Format("timm.create_model('local-dir:OUT', pretrained=True)", "timm_folder", preprocessing=False),
    "hf": Format("the same folder, loaded by transformers", "hf_folder", ("transformers",), "hf", False),
    "onnx": Format("model.onnx with a dynamic batch", "onnx_file", ("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "torchscript": Format("model.ts, a traced program", "torchscript_file"),
    "torch_export": Format("model.pt2 of torch.export, with a dynamic batch", "torch_export_file"),
}


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        folder: The folder.
        difference: Largest absolute difference of the logits from the student's.
        architecture: The student's name in timm.
    """

    folder: Path
    difference: float
    architecture: str


def check_request(format: str, out: Path, with_preprocessing: bool, overwrite: bool) -> None:
    """Refuses what can be refused before the student is loaded. The arguments are those of `export`.

    Raises:
        UserError: The format is unknown, lacks a package, or has no preprocessing inside; or `out` must not be replaced.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}.{suggest(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    chosen = FORMATS[format]
    missing = [name for name in chosen.needs if find_spec(name) is None]
    if missing:
        raise UserError(
            f"format {format} needs {' and '.join(missing)}: pip install 'scalekd_ds[{chosen.extra}]' installs what it needs."
        )
    if with_preprocessing and not chosen.preprocessing:
        raise UserError(
            f"format {format} is a timm model, which has its mean and std in config.json: leave them outside."
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is a file or a link: OUT must name a folder, which export makes.")
    if out.is_dir() and not overwrite:
        raise UserError(f"{out} exists already: --overwrite replaces it, or name another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / CARD).is_file():
        raise UserError(
            f"{out} was not written by export (it has no {CARD}), and is not replaced: name another folder."
        )


def export(
    source: str | Path,
    out: str | Path,
    format: str,
    weights: str | None = None,
    with_preprocessing: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Writes a student into the folder `out`, which appears whole or not at all.

    Args:
        source: A run's folder, a checkpoint's, or a consolidated .safetensors with its card beside it.
        out: The folder to make.
        format: A key of `FORMATS`.
        weights: `student` or `ema` of a checkpoint; None takes what the run ships.
        with_preprocessing: The exported program takes pixels in [0, 1], and normalises them itself.
        overwrite: Replace a folder that an earlier export wrote.

    Raises:
        UserError: `check_request` or `load_student` refuses, the folder cannot be written, the student cannot be exported
            in this format, or the exported logits differ by more than 1e-4 from the student's.
    """
    out = Path(out)
    check_request(format, out, with_preprocessing, overwrite)
    from scalekd_ds.export.readme import readme
    from scalekd_ds.export.student import load_student
    from scalekd_ds.files.durable import sync, write_json

    student = load_student(source, weights, with_preprocessing)
    writer = import_module(f"scalekd_ds.export.{FORMATS[format].module}")
    partial, old = (out.with_name(f".{word}-{out.name}") for word in ("partial", "partial-old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}.") from None
    try:
        try:
            # converters write by libraries in C++, which take no other paths
            with utf8_path(partial) as folder:
                difference = writer.write(student, Path(folder))
        except (UserError, OSError):
            raise
        # converters run the model's own code and that of other libraries, which may raise any error
        except Exception as error:
            raise UserError(
                f"{student.card['architecture']} cannot be exported as {format}: {cause_of(error)}."
            ) from None
        (partial / "README.md").write_text(readme(student, format, writer.usage(student), difference), encoding="utf-8")
        write_json(partial / CARD, student.card)
        readable = (partial / "README.md").stat().st_mode
        for path in partial.iterdir():
            # safetensors makes files that only their owner can read
            path.chmod(readable)
            sync(path)
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync(out.absolute().parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {problem_of(error)}.") from None
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return Exported(out, difference, student.card["architecture"])
