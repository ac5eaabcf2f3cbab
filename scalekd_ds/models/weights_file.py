"""Reads the tensors of a .safetensors, .pth or .pt file, whoever wrote it, without ever running code from it."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scalekd_ds.errors import UserError, first_line
from scalekd_ds.models.models_in_file import Candidate, models_in
from scalekd_ds.names import utf8_path

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")

# a shell command that takes the path of a pickle and the path of the .safetensors to write
CONVERT_COMMAND = (
    "python -c 'import sys,torch; from safetensors.torch import save_file; "
    'd=torch.load(sys.argv[1],"cpu",weights_only=False); '
    'd=d.get("state_dict",d.get("model",d)) if isinstance(d,dict) else d.state_dict(); '
    "save_file({k:v.clone().contiguous() for k,v in d.items() if torch.is_tensor(v)},sys.argv[2])'"
)


def _read_torch(path: Path) -> Any:
    try:
        # timm's training script keeps its arguments beside the weights in a Namespace, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "Unsupported" not in str(error):
            raise UserError(f"{path} is damaged or cut short ({first_line(error)}): fetch it again.") from None
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # the names are for the message only, and torch cannot list them for its older file format
        except Exception:
            names = []
        paths = f"{shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('.safetensors')))}"
        listed = f" ({', '.join(sorted(names)[:5])})" if names else ""
        raise UserError(
            f"{path} needs pickled code{listed}, which could do anything and is not run. Where you trust its source, "
            f"convert it once: {CONVERT_COMMAND} {paths}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program: save its state_dict() as .safetensors.") from None
        raise UserError(f"{path} is damaged or cut short ({first_line(error)}): fetch it again.") from None


def _read_any(path: Path, shard: bool = False) -> Any:
    """The content of a weights file, whatever its format: tensors by name, or what was pickled."""
    if path.is_dir():
        files = [p.name for p in sorted(path.glob("*.index.json")) or sorted(path.glob("*.safetensors"))]
        raise UserError(
            f"weights file {str(path)!r} is a folder: give a file in it{f' ({files[0]})' if files else ''}; "
            "launch/consolidate.py makes one from a checkpoint."
        )
    if not path.is_file():
        raise UserError(f"weights file {str(path)!r} does not exist.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    if not start:
        raise UserError(f"{path} is empty: fetch it again.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if (number := re.search(r"-(\d+)-of-(\d+)\.(safetensors|bin)$", path.name)) and int(number[2]) > 1 and not shard:
        index = f"{path.name[: number.start()]}.{number[3]}.index.json"
        raise UserError(f"{path} is one of {int(number[2])} files with parts of a model: give their index, {index}.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it came from.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"{path} is a web page, not weights: fetch the file itself (a `raw` or `resolve` link).")
    # told by content, because either format is found under the other's suffix
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        try:
            with utf8_path(path) as alias:
                return load_file(alias)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a readable .safetensors file ({first_line(error)}): fetch it again."
            ) from None
    if path.suffix == ".npz":
        raise UserError(f"{path} is a NumPy archive of a JAX model: use timm's own conversion of it from the hub.")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path)
    raise UserError(f"{path} holds neither .safetensors nor PyTorch weights: fetch it again, or name another file.")


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all the files that the index of Hugging Face's sharded weights names, which lie beside it."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is no index of weights in several files ({first_line(error)}): fetch it again."
        ) from None
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if "/" in name or "\\" in name:
            raise UserError(f"{index} names {name!r}: the files of an index lie beside it.")
        content = _read_any(index.with_name(name), shard=True)
        if not isinstance(content, Mapping):
            raise UserError(f"{index.with_name(name)} holds a {type(content).__name__}, not weights by name.")
        tensors |= content
    return tensors


def read_models(path: str | Path) -> list[Candidate]:
    """Reads the tensors of a weights file. Pickles are read by torch's restricted unpickler.

    Returns:
        Each dict of tensors in it that may be a model's, on the CPU.

    Raises:
        UserError: There is no such file, or it is a folder, is damaged, needs code, or holds no weights.
    """
    path = Path(path)
    content = _read_any(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name: save a state_dict().")
    models = models_in(content)
    if not models:
        found = f" (its keys: {', '.join(map(str, list(content)[:5]))})" if content else ""
        raise UserError(f"{path} holds no weights{found}: save a state_dict(), or give another file.")
    return models
