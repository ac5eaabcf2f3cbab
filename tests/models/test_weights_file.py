"""Files of weights that are damaged, are something else, or would run code: one line each, and nothing runs."""

import argparse
import gzip
import pickle
import shlex
import subprocess
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import forked
from image_fixtures import make_dataset
from launching import ROOT, errors_of
from safetensors.torch import save_file
from source_fixtures import write_tar
from weight_files import same_outputs, shaken, vit, written

from scalekd_ds.errors import UserError
from scalekd_ds.models.load_weights import load_weights


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path, legacy):
    state, mark = vit().state_dict(), tmp_path / "ran"
    path = tmp_path / "w.pth"
    torch.save({"model": state, "hook": Bomb(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"w.pth needs pickled code.* is not run. .*convert it once: python -c"
    ) as error:
        load_weights(vit(), path)
    assert "\n" not in str(error.value) and not mark.exists()
    # the bomb is live: what is refused here would run elsewhere
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        lambda m: {"model": m.state_dict(), "config": types.SimpleNamespace(lr=1)},
        pytest.param(lambda m: {"model": m, "epoch": 3}, marks=pytest.mark.slow),
        pytest.param(lambda m: {name: value.numpy() for name, value in m.state_dict().items()}, marks=pytest.mark.slow),
    ],
)
def test_the_conversion_that_the_refusal_names_works(tmp_path, content):
    theirs, ours = shaken(vit()), vit()
    (tmp_path / "my weights").mkdir()
    path = written(content(theirs), tmp_path / "my weights/w.pth")
    with pytest.raises(UserError, match="needs pickled code") as error:
        load_weights(ours, path)
    command = shlex.split(str(error.value).split("convert it once: ")[1])
    subprocess.run(command, check=True)
    load_weights(ours, path.with_suffix(".safetensors"))
    same_outputs(ours, theirs)


def test_arguments_of_timms_training_script_in_a_file_are_no_code(tmp_path):
    theirs, ours = shaken(vit()), vit()
    content = {"state_dict": theirs.state_dict(), "args": argparse.Namespace(lr=0.1), "metric": 81.0}
    load_weights(ours, written(content, tmp_path / "w.tar"))
    same_outputs(ours, theirs)


def scripted(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/w.pth", b"x")


def exported(path):
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def with_values(change):
    return lambda path: torch.save({name: change(value) for name, value in vit().state_dict().items()}, path)


BAD = {
    "page.pth": (lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>"), "is a web page, not weights"),
    "page.safetensors": (lambda p: p.write_text("<html><body>login"), "is a web page, not weights"),
    "pointer.pth": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git-lfs pointer"),
    "empty.pth": (lambda p: p.write_bytes(b""), "is empty: fetch it again"),
    "noise.pth": (lambda p: p.write_bytes(bytes(range(1, 200))), "holds neither .safetensors nor PyTorch weights"),
    "folder.pth": (lambda p: p.mkdir(), "is a folder: give a file in it"),
    "missing.pth": (lambda p: None, "missing.pth' does not exist"),
    "none.pth": (lambda p: torch.save({"epoch": 3, "optimizer": {}}, p), r"no weights \(its keys: epoch, optimizer\)"),
    "state.pth": (lambda p: torch.save(torch.optim.AdamW(vit().parameters()).state_dict(), p), "holds no weights"),
    "error.pth": (lambda p: p.write_text('{"error": "not found"}'), 'but text, \'{"error": "not found"}\''),
    "s3.pth": (lambda p: p.write_text("<Error><Code>NoSuchKey"), "is a web page, not weights"),
    "w.pth.gz": (lambda p: p.write_bytes(gzip.compress(b"x")), r"is compressed \(gzip\): unpack it"),
    "w.zip": (zipped, r"is a zip archive \(a/w.pth\): unpack it"),
    "w.pth.tar": (lambda p: write_tar(p, [("w.pth", b"x")]), "is a tar: unpack it"),
    "w.npz": (lambda p: np.savez(p, a=np.ones(3)), "is a NumPy archive of a JAX model or another framework's"),
    "array.npy": (lambda p: np.save(p, np.ones(3)), "is one NumPy array"),
    "w.pdparams": (lambda p: p.write_bytes(pickle.dumps({"a": np.ones(3)}, 2)), "is a pickle that torch.save did not"),
    "w.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file, as Keras has"),
    "w.gguf": (lambda p: p.write_bytes(b"GGUF\x03"), "is a GGUF file"),
    "program.pt2": (exported, "is a program of torch.export"),
    "meta.pth": (lambda p: torch.save({"a": torch.ones(2, device="meta")}, p), "has 'a' without values"),
    "sparse.pth": (lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "has 'a' as a sparse tensor"),
    "codes.pth": (with_values(lambda v: (v * 9).to(torch.int8)), "has 'cls_token' as int8: its scale is not known"),
    "nan.pth": (with_values(lambda v: v / 0), "has values in 'cls_token' that are not finite: its training diverged"),
    "torchvision.pth": (lambda p: torch.save({"features.0.0.weight": torch.ones(2)}, p), "The names are torchvision's"),
    "list.pth": (lambda p: torch.save([1, 2], p), "holds a list, not weights by name"),
    "script.pt": (scripted, "is a TorchScript program"),
    "jax.npz": (lambda p: np.savez(p, a=np.ones(2)), "is a NumPy archive of a JAX model"),
    "w.onnx": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(90)), "is a protocol buffer, as ONNX has"),
    "w.msgpack": (lambda p: p.write_bytes(b"\x84\xa6params" + bytes(90)), "is a file of Flax"),
    "dcp": (lambda p: (p.mkdir(), (p / ".metadata").touch()), "is a folder: torch.distributed.checkpoint wrote it"),
    "__0_0.distcp": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(90)), "is a part of what torch.distributed.check"),
    "bin": (lambda p: (p.mkdir(), (p / "pytorch_model.bin").touch()), r"give a file in it \(pytorch_model.bin\)"),
    "nothing.safetensors": (lambda p: save_file({}, p), "holds no weights"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript).*")
def test_a_file_that_is_no_weights_is_named(tmp_path, name):
    make, words = BAD[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=words) as error:
        load_weights(vit(), tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ("file:///data/w.pth", "give its path alone"),
        ("https://host/w.pth", "download it, and give the file's path"),
        ("hf-hub:timm/resnet18", "give hf-hub:timm/resnet18 as the model itself"),
        ("~/w.pth", "write the whole path"),
        ("pretraind", "give pretrained, none or a file of weights"),
        ("", "give pretrained, none or a file of weights"),
    ],
)
def test_what_is_no_path_is_shown_as_it_was_given(given, cure):
    with pytest.raises(UserError) as error:
        load_weights(vit(), given)
    assert str(error.value).startswith(f"weights file {given!r} does not exist: ") and cure in str(error.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_named(tmp_path, name, share):
    path = tmp_path / name
    if name == "legacy.pth":
        torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        written(vit().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"is damaged or cut short|is not a readable .safetensors") as error:
        load_weights(vit(), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "w.pth"), ("pth", "w.safetensors.pth")])
def test_what_a_file_is_does_not_depend_on_its_name(tmp_path, kind, name):
    theirs, ours = shaken(vit()), vit()
    written(theirs.state_dict(), tmp_path / f"x.{kind}").rename(tmp_path / name)
    load_weights(ours, tmp_path / name)
    same_outputs(ours, theirs)


def test_the_length_of_a_header_is_not_taken_for_that_of_a_compressed_file(tmp_path):
    theirs, ours = shaken(vit()), vit()
    path = written(theirs.state_dict(), tmp_path / "w.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    # blanks behind the header, until its length begins as gzip does
    wanted = 0x8B1F
    header = content[8 : 8 + length].ljust(wanted)
    path.write_bytes(wanted.to_bytes(8, "little") + header + content[8 + length :])
    load_weights(ours, path)
    same_outputs(ours, theirs)


def test_a_run_whose_teacher_is_no_weights_ends_before_it_starts(tmp_path):
    data = make_dataset(tmp_path / "data", train=4, val=2, classes=2, size=(32, 32))
    page = tmp_path / "teacher.pth"
    page.write_text("<html>")
    done = forked(
        ROOT / "launch" / "train.py",
        *("--recipe", "fashion-scalekd", "--data.root", data, "--data.train_images", "null", "--global_batch_size", 2),
        *("--run.dir", tmp_path / "run", "--teacher", "swin_tiny_patch4_window7_224", "--teacher_weights", page),
    )
    assert done.returncode == 2 and errors_of(done) == [
        f"error: {page} is a web page, not weights: fetch the file itself (a `raw` or `resolve` link)."
    ]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
