"""A trained student as other tools take it: a folder with the model, a card for people and one for programs.

One module a format. Each has `write(subject, folder) -> float`, which writes its files, loads them back as a user would, and
returns the largest difference of the logits from the student's; and `usage(subject) -> str`, Python that loads them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from scalekd_ds.errors import UserError, suggest

# the card for programs, beside model.safetensors where a format has one: this project then takes that file by its path
CARD = "model.json"


@dataclass(frozen=True)
class Format:
    """about: one line; module: in this package; needs: what must be importable; extra: of setup.py, which installs it."""

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
    """folder: what was written; difference: largest one of the logits, absolute; architecture: timm's name."""

    folder: Path
    difference: float
    architecture: str


def check_request(format: str, out: Path, with_preprocessing: bool, overwrite: bool) -> None:
    """What can be refused before anything is loaded.

    Raises:
        UserError: Unknown format, a missing package, or a place that is taken.
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
        raise UserError(f"{out} is a file or a link: OUT is a folder that is made.")
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
        with_preprocessing: The program takes pixels in [0, 1] and subtracts mean and divides by std itself.
        overwrite: Replaces a folder that an export wrote.

    Raises:
        UserError: What `check_request` refuses, a source that is none, a student that the format cannot hold, or logits
            that differ by more than 1e-4 from the student's.
    """
    out = Path(out)
    check_request(format, out, with_preprocessing, overwrite)
    from scalekd_ds.durable_files import sync, write_json
    from scalekd_ds.export.readme import readme
    from scalekd_ds.export.subject import load_subject

    subject = load_subject(source, weights, with_preprocessing)
    writer = import_module(f"scalekd_ds.export.{FORMATS[format].module}")
    partial, old = (out.with_name(f".{word}-{out.name}") for word in ("partial", "partial-old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}.") from None
    try:
        difference = writer.write(subject, partial)
        (partial / "README.md").write_text(readme(subject, format, writer.usage(subject), difference))
        write_json(partial / CARD, subject.card)
        readable = (partial / "README.md").stat().st_mode
        for path in partial.iterdir():
            # safetensors makes files that only their owner can read
            path.chmod(readable)
            sync(path)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        sync(out.absolute().parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}.") from None
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
    return Exported(out, difference, subject.card["architecture"])
