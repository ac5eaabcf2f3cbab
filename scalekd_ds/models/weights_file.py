"""Reads the tensors of a .safetensors, .pth or .pt file, whoever wrote it, without ever running code from it."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scalekd_ds.errors import UserError, first_line, suggest
from scalekd_ds.files.mistaken import HEAD, mistaken
from scalekd_ds.models.models_in_file import Candidate, models_in
from scalekd_ds.names import utf8_path

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")

# how files of other frameworks begin
_FORMATS = {
    b"\x93NUMPY": "one NumPy array",
    b"\x89HDF": "an HDF5 file, as Keras has",
    b"GGUF": "a GGUF file",
    b"\x08": "a protocol buffer, as ONNX has",
}
# of those whose beginning differs from file to file
_SUFFIXES = {".msgpack": "a file of Flax", ".onnx": "an ONNX file", ".tflite": "a file of TensorFlow Lite"}
# transformers' index of several files; a variant's name may stand in it
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} OUT.pth makes one file of it"
# torch.serialization.MAGIC_NUMBER in a pickle
_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

# a shell command that takes the path of a pickle and the path of the .safetensors to write
CONVERT_COMMAND = (
    "python -c 'import sys,torch; from safetensors.torch import save_file; "
    'd=torch.load(sys.argv[1],"cpu",weights_only=False); '
    'd=d.get("state_dict",d.get("model",d)) if isinstance(d,dict) else d; '
    'd=d.state_dict() if hasattr(d,"state_dict") else d; '
    'd={k:torch.as_tensor(v).clone().contiguous() for k,v in d.items() if hasattr(v,"shape")}; '
    "save_file(d,sys.argv[2])'"
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
        raise UserError(f"weights file {str(path)!r} is a folder: {_advice_for_folder(path)}.")
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise UserError(f"weights file {str(path)!r} does not exist.{suggest(path.name, near)}")
    try:
        with path.open("rb") as file:
            start = file.read(HEAD)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    # a .safetensors begins with the length of its header, whose bytes may be any
    if start[8:9] != b"{" and (other := mistaken(start, "weights")):
        raise UserError(f"{path} {other}.")
    if _INDEX.search(path.name):
        return _read_shards(path)
    if (number := re.search(r"-(\d+)-of-(\d+)\.(safetensors|bin)$", path.name)) and int(number[2]) > 1 and not shard:
        # transformers writes a variant's name, such as fp16, into that of the shards and behind that of their index
        stem, _, variant = path.name[: number.start()].partition(".")
        index = ".".join(filter(None, (stem, number[3], "index", variant, "json")))
        lost = "" if path.with_name(index).is_file() else ", which has to be fetched too"
        raise UserError(
            f"{path} is one of {int(number[2])} files with parts of a model: give their index, {index}{lost}."
        )
    # told by content, because either format is found under the other's suffix
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        try:
            with utf8_path(path) as alias:
                return load_file(alias)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path} is not a readable .safetensors file ({first_line(error)}): fetch it again."
            ) from None
    if other := _of_another_framework(path, start):
        raise UserError(f"{path} {other}.")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path)
    text = start[:80].decode("utf-8", "replace")
    shown = f" but text, {text!r}" if text.isprintable() else ""
    raise UserError(
        f"{path} holds neither .safetensors nor PyTorch weights{shown}: fetch it again, or name another file."
    )


def _advice_for_folder(folder: Path) -> str:
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        return f"torch.distributed.checkpoint wrote it; {_DCP.format(shlex.quote(str(folder)))}"
    indices = sorted(p for p in folder.iterdir() if _INDEX.search(p.name))
    files = indices or sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *TORCH_SUFFIXES))
    file = f" ({files[0].name})" if files else ""
    return f"give a file in it{file}; launch/consolidate.py makes one from a checkpoint"


def _of_another_framework(path: Path, start: bytes) -> str | None:
    """What a file of tensors is that torch cannot load, and what to do; None for all others."""
    convert = "write its arrays as .safetensors, or take timm's own conversion from the hub"
    if path.suffix == ".distcp":
        return f"is a part of what torch.distributed.checkpoint wrote; {_DCP.format(shlex.quote(str(path.parent)))}"
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError):
            # cut short, as torch will say
            return None
        if path.suffix == ".npz" or all(name.endswith(".npy") for name in names):
            return f"is a NumPy archive of a JAX model or another framework's: {convert}"
        if any(name.endswith("/archive_format") for name in names):
            return "is a program of torch.export: save its state_dict() as .safetensors"
        if not any(name.endswith("data.pkl") for name in names):
            return f"is a zip archive ({', '.join(names[:3])}): unpack it"
    if start[257:262] == b"ustar":
        return "is a tar: unpack it; where torch itself wrote it long ago, load it and save its state_dict()"
    # torch begins its older format with a number of its own, pickled in one of two protocols
    if start.startswith(b"\x80") and _MAGIC not in start[:32]:
        return f"is a pickle that torch.save did not write, and is not run: {convert}"
    name = next((name for magic, name in _FORMATS.items() if start.startswith(magic)), _SUFFIXES.get(path.suffix))
    return f"is {name}: {convert}" if name and not start.startswith((b"PK\x03\x04", b"\x80")) else None


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors of all the files that the index of Hugging Face's sharded weights names, which lie beside it."""
    try:
        listed = {str(tensor): str(name) for tensor, name in json.loads(index.read_text())["weight_map"].items()}
        names = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is no index of weights in several files ({first_line(error)}): fetch it again."
        ) from None
    tensors: dict[str, Any] = {}
    for name in names:
        if "/" in name or "\\" in name:
            raise UserError(f"{index} names {name!r}: the files of an index lie beside it.")
        if not index.with_name(name).exists():
            raise UserError(
                f"weights file {str(index.with_name(name))!r} does not exist, and {index.name} lists it: fetch it too."
            )
        content = _read_any(index.with_name(name), shard=True)
        if not isinstance(content, Mapping):
            raise UserError(f"{index.with_name(name)} holds a {type(content).__name__}, not weights by name.")
        tensors |= content
    if lost := sorted(set(listed) - set(tensors)):
        raise UserError(
            f"{index} lists {lost[0]!r} for {listed[lost[0]]!r}, which has no such tensor: fetch the files again."
        )
    return tensors


def check_is_path(text: str | Path) -> None:
    """Raises UserError for what stands for weights elsewhere, and names no file here."""
    text = str(text)
    if text.strip() and Path(text).exists():
        return
    if not text.strip():
        cure = "give pretrained, none or a file of weights"
    elif text.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        cure = f"give {text} as the model itself, whose weights are then `pretrained`"
    elif "://" in text:
        cure = "give its path alone" if text.startswith("file:") else "download it, and give the file's path"
    elif text.startswith("~"):
        cure = "a shell puts your home for ~ where a word begins with it; write the whole path"
    elif "/" not in text and not Path(text).suffix:
        cure = "give pretrained, none or a file of weights"
    else:
        return
    raise UserError(f"weights file {text!r} does not exist: {cure}.")


def read_content(path: str | Path) -> Mapping[Any, Any]:
    """Reads a weights file. Pickles are read by torch's restricted unpickler.

    Returns:
        What it holds: tensors by name, on the CPU, or dicts of them and of what a trainer keeps beside them.

    Raises:
        UserError: There is no such file, or it is a folder, is damaged, needs code, or holds no weights.
    """
    check_is_path(path)
    content = _read_any(Path(path))
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name: save a state_dict().")
    return content


def models_of(content: Mapping[Any, Any], path: str | Path) -> list[Candidate]:
    """Each dict of tensors in the content of a file that may be a model's.

    Raises:
        UserError: There is none.
    """
    models = models_in(content)
    if not models:
        found = f" (its keys: {', '.join(map(str, list(content)[:5]))})" if content else ""
        raise UserError(f"{path} holds no weights{found}: save a state_dict(), or give another file.")
    return models
