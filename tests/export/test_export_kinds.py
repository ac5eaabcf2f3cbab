"""Students of every kind in other tools, and what export refuses."""

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from launching import ROOT, alone
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import nn

from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.errors import UserError
from scalekd_ds.export import FORMATS, export, timm_folder
from scalekd_ds.export.student import LoadedStudent, load_student


@register_model
def batch_minded(pretrained=False, **kwargs):
    """A model that timm does not have, and that treats a single image otherwise than many."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return BatchMinded(**kwargs)


class BatchMinded(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        logits = self.head(images.mean((2, 3)))
        return logits + 0.01 if len(images) == 1 else logits


KINDS = {
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 2}, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "embed_dim": 48, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4},
        32,
    ),
    "mixer_b14_224": ({"img_size": 28, "num_blocks": 1}, 28),
    "batch_minded": ({}, 16),
}


def file_of(folder, name) -> Path:
    """A consolidated file of a small student, every tensor of it random, as training leaves none at zero."""
    kwargs, size = KINDS[name]
    import scalekd_ds.models.build  # noqa: F401  registers what timm lacks

    model = timm.create_model(name, num_classes=5, **kwargs)
    generator = torch.Generator().manual_seed(1)
    state = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    card = {"version": 1, "architecture": name, "model_kwargs": kwargs, "num_classes": 5, "classes": [*"abcde"]}
    card |= {"image_size": size, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "eval_resize": None}
    card |= {"recipe": "", "step": 7, "top1": None, "top5": None, "teacher": "/home/me/big/student.safetensors"}
    write_student(folder / f"{name}.safetensors", state, card)
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("vit_tiny_patch16_224", "onnx"),
        ("swin_tiny_patch4_window7_224", "onnx"),
        pytest.param("mixer_b14_224", "onnx", marks=pytest.mark.slow),
        ("swin_tiny_patch4_window7_224", "torchscript"),
        pytest.param("swin_tiny_patch4_window7_224", "torch_export", marks=pytest.mark.slow),
    ],
)
def test_transformers_and_mixers_are_exported_with_equal_logits(tmp_path, name, format):
    file = file_of(tmp_path, name)
    done = export(file, tmp_path / "out", format)
    assert done.difference < 1e-5
    subject = load_student(file)
    images = subject.example_images(5, seed=9)
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
        given = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    elif format == "torchscript":
        given = torch.jit.load(tmp_path / "out" / "model.ts")(images)
    else:
        given = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    wanted = subject.model(images)
    assert wanted.std(0).mean() > 1e-2, "images must matter"
    assert torch.allclose(given, wanted, atol=1e-4)
    # half a card is a card: no accuracy and no run are known
    text = (tmp_path / "out" / "README.md").read_text()
    assert "top-1 not measured" in text and "distilled from `student.safetensors`" in text and "/home/me" not in text


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (224, 236), (32, 32), (288, 329), (160, 183), (96, 110)])
def test_crops_come_back_as_whole_pixels(size, shorter):
    transform = timm.data.create_transform((3, size, size), crop_pct=timm_folder.crop_pct(size, shorter))
    assert transform.transforms[0].size in (shorter, (shorter, shorter))


def test_tied_and_frozen_weights_are_written_whole(tmp_path):
    subject = load_student(file_of(tmp_path, "vit_tiny_patch16_224"))
    first, second = subject.model.blocks
    second.mlp.fc1.weight = first.mlp.fc1.weight
    first.attn.qkv.weight.requires_grad_(False)
    assert timm_folder.write(LoadedStudent(subject.model, subject.model, subject.card, None), tmp_path) < 1e-6
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert len(state) == len(subject.model.state_dict())


# -- what can go wrong -----------------------------------------------------------------------------------------------


def refused(told, *arguments, **keywords):
    with pytest.raises(UserError) as error:
        export(*arguments, **keywords)
    assert told in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_a_program_that_differs_is_refused_with_the_difference(tmp_path):
    file = file_of(tmp_path, "batch_minded")
    refused("differs from the student by 0.01 at batch 1, more than 0.0001", file, tmp_path / "out", "torchscript")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batch_minded.json", "batch_minded.safetensors"]
    # what stood there stays
    export(file_of(tmp_path, "mixer_b14_224"), tmp_path / "out", "torchscript")
    before = (tmp_path / "out" / "model.ts").read_bytes()
    refused("differs", file, tmp_path / "out", "torchscript", overwrite=True)
    assert (tmp_path / "out" / "model.ts").read_bytes() == before


@pytest.mark.parametrize("name", ["batch_minded", "mixer_b14_224"])
def test_a_model_that_timm_lacks_is_no_timm_folder(tmp_path, name):
    file = file_of(tmp_path, name)
    for format in ("timm", "hf"):
        refused("timm alone cannot build it: take the format onnx", file, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_nobody_registered_is_refused(tmp_path):
    file = file_of(tmp_path, "mixer_b14_224")
    card = json.loads(file.with_suffix(".json").read_text())
    for architecture, told in (("resnet1888", "unknown timm model 'resnet1888'. Did you mean"), ("resnet18", "do")):
        file.with_suffix(".json").write_text(json.dumps(card | {"architecture": architecture, "model_kwargs": {}}))
        refused(told, file, tmp_path / "out", "timm")


def test_a_mistake_is_refused_in_one_line(tmp_path, monkeypatch):
    file, out = file_of(tmp_path, "mixer_b14_224"), tmp_path / "out"
    refused("unknown format 'onx'. Did you mean 'onnx'", file, out, "onx")
    refused("unknown format 'tensorrt'.", file, out, "tensorrt")
    refused("does not exist: give a run's folder", tmp_path / "nowhere", out, "onnx")
    refused("weights file", tmp_path / "nowhere.safetensors", out, "onnx")
    refused("holds no checkpoint", tmp_path, out, "onnx")
    (tmp_path / "weights.pth").write_bytes(b"PK")
    refused("is no checkpoint: give a run's folder", tmp_path / "weights.pth", out, "onnx")
    refused("one set of weights: leave it out", file, out, "onnx", weights="ema")
    refused("which has its mean and std", file, out, "timm", with_preprocessing=True)
    refused("is a file or a link", file, file, "onnx")
    (tmp_path / "taken").mkdir()
    refused("exists already: --overwrite replaces it", file, tmp_path / "taken", "torchscript")
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    refused("was not written by export", file, tmp_path / "taken", "torchscript", overwrite=True)
    assert (tmp_path / "taken" / "thesis.tex").exists()
    (tmp_path / "block").write_text("")
    refused("cannot be made", file, tmp_path / "block" / "out", "torchscript")
    for format, missing in (("onnx", "onnxscript"), ("hf", "transformers")):
        monkeypatch.setattr("scalekd_ds.export.find_spec", lambda name, gone=missing: None if name == gone else name)
        refused(f"needs {missing}: pip install 'scalekd_ds[{FORMATS[format].extra}]'", file, out, format)
    monkeypatch.undo()
    assert not out.exists()


def test_damaged_and_lacking_files_are_refused(tmp_path):
    file, out = file_of(tmp_path, "mixer_b14_224"), tmp_path / "out"
    card = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({k: v for k, v in card.items() if k != "mean"}))
    refused("has no 'mean': consolidate the checkpoint again", file, out, "torchscript")
    file.with_suffix(".json").write_text("{")
    refused("is not JSON", file, out, "torchscript")
    file.with_suffix(".json").unlink()
    refused("has no card", file, out, "torchscript")
    file.with_suffix(".json").write_text(json.dumps(card))
    state = load_file(file)
    save_file({name: value for name, value in state.items() if "head" not in name}, file)
    refused("head", file, out, "torchscript")
    file.write_bytes(file.read_bytes()[:1000])
    refused(str(file), file, out, "torchscript")


def test_overwriting_leaves_one_whole_folder(tmp_path):
    file, out = file_of(tmp_path, "mixer_b14_224"), tmp_path / "out"
    export(file, out, "torchscript")
    refused("exists already", file, out, "torch_export")
    export(file, out, "torch_export", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.json", "model.pt2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixer_b14_224.json", "mixer_b14_224.safetensors", "out"]


def test_the_script_ends_a_mistake_with_one_line(tmp_path):
    done = alone(ROOT / "launch" / "export.py", "--format", "onx", tmp_path, tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line == f"error: unknown format 'onx'. Did you mean 'onnx'? Known: {', '.join(FORMATS)}."
