"""A student in other tools: a real one, trained on Fashion-MNIST by two ranks, and small ones of every kind."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from forking import forked_ranks
from launching import ROOT
from PIL import Image
from safetensors.torch import load_file

from scalekd_ds.commands.dispatch import dispatch
from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, fashion
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation.accuracy import evaluate
from scalekd_ds.export import FORMATS, export
from scalekd_ds.export.student import load_student

DOCS = (ROOT / "docs" / "export.md").read_text()
COMMANDS = [line.strip() for line in DOCS.splitlines() if line.startswith("    scalekd export ")]
IMAGES = 10_000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the images, `runs/mine` of a short training on two ranks, and what the documents' commands export."""
    home = tmp_path_factory.mktemp("export")
    try:
        sets, classes, origin = fashion.find(None, False)
    except UserError as error:
        pytest.skip(str(error))
    if len(sets["val"][1]) != IMAGES:
        pytest.skip(f"needs Fashion-MNIST, and this is {origin}")
    # all test images; the run uses 1,000 of the others
    sets["train"] = tuple(part[:1200] for part in sets["train"])
    fashion.write(home / "data", sets, classes, origin)
    run = ["--recipe", "fashion-ce", "--data.root", home / "data", "--run.dir", home / "runs" / "mine"]
    run += ["--schedule.epochs", 3, "--schedule.warmup_epochs", 1, "--ema.decay", 0.5, "--run.progress", "none"]
    done = forked_ranks(ROOT / "launch" / "train.py", *run)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for command in COMMANDS:
            _, verb, *words = shlex.split(command)
            dispatch_quietly(verb, words)
    return home


def dispatch_quietly(verb, words):
    """The verb without the switch that silences the rest of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalekd_ds.commands.export.on_cpu", lambda: None)
        dispatch([verb, *words])


@pytest.fixture(scope="module")
def student(home):
    """Its weights and card."""
    return home / "runs" / "mine" / "student.safetensors"


def loader(home, card):
    source = index_folder(home / "data" / "val", "--data")
    cfg = DataConfig(
        image_size=card["image_size"], eval_resize=card["eval_resize"], interpolation=card["interpolation"]
    )
    return source, EvalLoader(source, cfg, 500, 0, 1, torch.device("cpu"), card["mean"], card["std"])


def session(folder):
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


# -- the trained student ---------------------------------------------------------------------------------------------


def test_two_ranks_have_trained_it(home):
    assert json.loads((home / "runs" / "mine" / "results.json").read_text())["world_size"] == 2


def test_top1_of_onnx_is_the_students_on_all_test_images(home, student, capsys):
    logits = home / "logits.safetensors"
    dispatch(["evaluate", str(student), "--data", str(home / "data"), "--batch-size", "500", "--logits", str(logits)])
    told = float(re.search(r"top-1 ([\d.]+)%.*\(10000 images\)", capsys.readouterr().out)[1])
    own = load_file(logits)
    model, seen = session(home / "exported" / "onnx"), []
    card = json.loads(student.with_suffix(".json").read_text())

    def predict(images):
        seen.append(torch.from_numpy(model.run(None, {"images": images.numpy()})[0]))
        return seen[-1]

    result = evaluate(predict, loader(home, card)[1], torch.device("cpu"))
    assert result["images"] == IMAGES and round(result["top1"], 2) == told
    predicted = torch.cat(seen).argmax(1)
    assert torch.equal(predicted, own["logits"].argmax(1))
    assert torch.allclose(torch.cat(seen), own["logits"], atol=1e-4)
    # it has learnt, and says more than one thing
    assert told > 30.0 and len(predicted.unique()) >= 6
    assert told == pytest.approx(json.loads((student.parent / "results.json").read_text())["top1"], abs=0.02)


def test_commands_of_the_documents_cover_every_format(home):
    assert {shlex.split(c)[3] for c in COMMANDS} == set(FORMATS)
    for name in FORMATS:
        files = {path.name for path in (home / "exported" / name).iterdir()}
        assert {"README.md", "model.json"} < files
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in (home / "exported" / name).iterdir())
    assert not list((home / "exported").glob(".*"))


@pytest.mark.parametrize("name", FORMATS)
def test_the_python_of_the_model_card_runs(home, name):
    folder = home / "exported" / name
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    image = next((home / "data" / "val").rglob("*.jpg"))
    scope = {}
    exec(code.replace("FOLDER", str(folder)).replace("IMAGE", str(image)), scope)
    logits = torch.as_tensor(scope["logits"]).detach()
    if name not in ("timm", "hf"):
        # eight images of nothing: that any batch is taken is what matters
        assert logits.shape == (8, 10)
        return
    assert logits.shape == (1, 10)


def test_the_model_card_tells_what_the_run_was(home, student):
    card = json.loads(student.with_suffix(".json").read_text())
    text = (home / "exported" / "timm" / "README.md").read_text()
    front = text.split("---")[1]
    assert "library_name: timm" in front and "# license: (yours to fill in" in front
    for words in (
        f"top-1 {card['top1']:.2f}%",
        "| recipe | fashion-ce |",
        "| teacher | none |",
        "| data | data (1,000 images) |",
        "| schedule | cosine, 3 epochs, 1 of warm-up |",
        "moving average, decay 0.5",
        "## Licence",
    ):
        assert words in text, words
    for path in (home / "exported").rglob("*"):
        # nobody's folders are published
        assert not path.is_file() or str(home).encode() not in path.read_bytes(), path
    # the same from the file alone, with the run's configuration beside it
    assert "| data | data (1,000 images) |" in (home / "exported" / "pixels" / "README.md").read_text()


def test_timm_and_transformers_load_one_folder_with_equal_logits_and_pixels(home, student):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    ours = load_student(student)
    own, hugging = home / "exported" / "timm", home / "exported" / "hf"
    assert (own / "config.json").read_bytes() == (hugging / "config.json").read_bytes()
    assert (own / "model.safetensors").read_bytes() == (hugging / "model.safetensors").read_bytes()
    model = timm.create_model(f"local-dir:{own}", pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(hugging).eval()
    images = ours.example_images(8)
    with torch.no_grad():
        wanted = ours.model(images)
        assert torch.allclose(model(images), wanted, atol=1e-6)
        assert torch.allclose(wrapped(images).logits, wanted, atol=1e-6)
    assert (
        [wrapped.config.id2label[i] for i in range(10)] == ours.card["classes"] == model.pretrained_cfg["label_names"]
    )
    # as they prepare an image, so does evaluation here
    source, batches = loader(home, ours.card)
    pixels, _ = next(iter(batches))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    processor = AutoImageProcessor.from_pretrained(hugging)
    for index in (0, 123, 499):
        image = Image.open(Path(source.root) / source.paths[index]).convert("RGB")
        assert (transform(image) - pixels[index]).abs().max() < 0.03
        assert torch.equal(processor(image)["pixel_values"][0], transform(image))


def test_buffers_are_kept_bit_for_bit(home, student):
    """BatchNorm's statistics are where consolidated files of similar tools differ."""
    wanted, given = load_file(student), load_file(home / "exported" / "timm" / "model.safetensors")
    assert given.keys() == wanted.keys() and any("running_var" in name for name in given)
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    assert not torch.equal(given["bn1.running_mean"], torch.zeros_like(given["bn1.running_mean"]))
    # the run ships its average; the student's own weights are there as well
    export(student.parent, home / "own", "timm", weights="student")
    own = load_file(home / "own" / "model.safetensors")
    assert not torch.equal(own["conv1.weight"], wanted["conv1.weight"])
    assert "| weights | the student's own |" in (home / "own" / "README.md").read_text()


def test_an_exported_folder_loads_as_a_student_again(home, student):
    again = load_student(home / "exported" / "timm" / "model.safetensors")
    images = again.example_images(4)
    assert torch.equal(again.model(images), load_student(student).model(images))


def test_a_model_with_preprocessing_inside_takes_raw_pixels(home, student):
    plain, inside = session(home / "exported" / "onnx"), session(home / "exported" / "pixels")
    card = json.loads(student.with_suffix(".json").read_text())
    pixels = np.random.default_rng(0).random((5, 3, 32, 32), dtype=np.float32)
    mean, std = (np.array(card[key], np.float32)[:, None, None] for key in ("mean", "std"))
    (wanted,) = plain.run(None, {"images": (pixels - mean) / std})
    (given,) = inside.run(None, {"images": pixels})
    np.testing.assert_allclose(given, wanted, atol=1e-5)
    assert np.abs(given - plain.run(None, {"images": pixels})[0]).max() > 0.1
    told = inside.get_modelmeta().custom_metadata_map
    assert json.loads(told["normalised"]) is True and json.loads(told["classes"]) == card["classes"]
    assert json.loads(plain.get_modelmeta().custom_metadata_map["mean"]) == card["mean"]


def test_a_damaged_checkpoint_is_not_exported(home, tmp_path):
    run = shutil.copytree(home / "runs" / "mine", tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").glob("step*")
    weights = checkpoint / "student_ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 255
    weights.write_bytes(content)
    for source in (run, checkpoint):
        with pytest.raises(UserError, match=r"is damaged: its SHA-256 differs"):
            export(source, tmp_path / "out", "timm")
