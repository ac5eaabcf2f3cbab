"""The folder that goes to a hub: the student of a finished run, or of a folder that export wrote, with its public card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from scalekd_ds.errors import UserError, first_line, problem_of
from scalekd_ds.export import CARD, export

WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
# these alone go up, whatever else lies beside them
FILES = (README, CONFIG, CARD, WEIGHTS)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NOT_GIVEN = "None was given, and without one these weights may not be used by others than whoever published them."


def check_source(source: Path) -> bool:
    """Checks that `source` can be published, before anything is loaded.

    Returns:
        Whether it is a folder that `export` wrote, and not a run's.

    Raises:
        UserError: It is neither, or a run that has not ended.
    """
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise UserError(
            f"{str(source)!r} {what}: give the folder of a finished run, or one that `scalekd export --format timm` wrote."
        )
    if (source / CARD).is_file():
        missing = [name for name in FILES if not (source / name).is_file()]
        if missing:
            raise UserError(
                f"{source} has no {missing[0]}: a hub takes what `scalekd export --format timm` writes, and no other format."
            )
        return True
    if (source / "results.json").is_file() and (source / "student.safetensors").is_file():
        return False
    if (source / "manifest.json").is_file():
        raise UserError(
            f"{source} is a checkpoint: `scalekd export --format timm {source} OUT` makes a folder of it that can be pushed."
        )
    if (source / "checkpoints").is_dir() or (source / CONFIG).is_file():
        lacks = "results.json" if not (source / "results.json").is_file() else "student.safetensors"
        raise UserError(
            f"the run in {source} has not ended (it has no {lacks}): let it end with --run.resume auto, or export a "
            "checkpoint with `scalekd export --format timm` and push that folder."
        )
    raise UserError(
        f"{source} is no run's folder: give one of a finished run, or one that `scalekd export --format timm` wrote."
    )


def check_license(license: str | None) -> None:
    """Raises UserError for what cannot be the identifier of a licence."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError(f"--license is {license!r}: it must be an identifier such as apache-2.0, mit or cc-by-nc-4.0.")


def write_folder(source: Path, out: Path, name: str, license: str | None, overwrite: bool = False) -> str | None:
    """Writes what goes to a hub into the folder `out`.

    Of a run, the student that it ships is exported in the format timm. Of a folder that export wrote the four files are taken
    as they are, with a README.md that may have been edited since. In the README's code the repository takes the place of the
    folder, and the licence goes into its metadata.

    Args:
        source: What `check_source` has passed.
        out: The folder to make.
        name: `OWNER/NAME` on the hub.
        license: The identifier of the licence, or None.
        overwrite: Replace a folder that an earlier export or push wrote.

    Returns:
        The licence in the README's metadata, or None.

    Raises:
        UserError: `export` refuses, a file cannot be read or written, or the README's metadata is no YAML.
    """
    if check_source(source):
        _copy(source, out, overwrite)
    else:
        export(source / "student.safetensors", out, "timm", overwrite=overwrite)
    readme = out / README
    try:
        text, found = _with_license(readme.read_text(encoding="utf-8"), license)
        text = text.replace("local-dir:FOLDER", f"hf-hub:{name}").replace('"FOLDER"', f'"{name}"')
        readme.write_text(text, encoding="utf-8")
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise UserError(
            f"{source / README} has no metadata that can be read ({first_line(error)}): it begins with YAML between two "
            "lines of `---`."
        ) from None
    except OSError as error:
        raise UserError(f"{readme} cannot be written: {problem_of(error)}.") from None
    return found


def _with_license(text: str, license: str | None) -> tuple[str, str | None]:
    """A README with the licence in its metadata and its section, and the licence that it then has."""
    # here, since it imports torch, and a missing token shall be told at once
    from scalekd_ds.export.readme import NO_LICENCE

    card = ModelCard(text, ignore_metadata_errors=True)
    if license is not None:
        card.data.license = license
    found = card.data.license
    told = f"`{found}`." if found else _NOT_GIVEN
    return str(card).replace(NO_LICENCE, told), found


def _copy(source: Path, out: Path, overwrite: bool) -> None:
    """Copies the four files of an exported folder into `out`.

    Raises:
        UserError: Its weights or their card are damaged, or `out` must not be replaced or cannot be written.
    """
    from scalekd_ds.export import check_request
    from scalekd_ds.export.student import load_student

    check_request("timm", out, False, overwrite)
    if out.exists() and out.samefile(source):
        raise UserError(f"{out} is the folder that is pushed: name another one.")
    # a model that cannot be built, or lacks a weight, would fail at whoever loads it
    load_student(source / WEIGHTS)
    try:
        json.loads((source / CONFIG).read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source / CONFIG} is damaged ({first_line(error)}): export the student again.") from None
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(source / name, out / name)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {problem_of(error)}.") from None
