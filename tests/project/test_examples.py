"""The examples run as they are, with arguments that need no download, and show what they say."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from image_fixtures import make_folder
from launching import ROOT, environment

from scalekd_ds import Teacher
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.recipes.command_line import parse_run

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = ROOT / "examples"
DOC = (ROOT / "docs" / "own_loop.md").read_text()
# script -> the arguments that docs/own_loop.md says need no download
QUICK = {
    name: shlex.split(arguments) for name, arguments in re.findall(r"^    python examples/(\w+\.py) (.*)$", DOC, re.M)
}
TERMS = {"kd", "spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4", "total"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in this process, in a folder of its own; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def terms_of(text, start):
    """term -> value of each line that begins with `start`."""
    lines = re.findall(rf"^{start} \d+: (.*)$", text, re.M)
    return [{k: float(v) for k, v in re.findall(r"(\w+) (-?[\d.]+)", line)} for line in lines]


def test_own_loop_learns_without_deepspeed(tmp_path):
    script = EXAMPLES / "own_loop.py"
    code = f"import runpy, sys; sys.argv[1:] = {QUICK['own_loop.py']}; runpy.run_path({str(script)!r}, run_name='__main__'); "
    code += "print('without', not any(m.split('.')[0] == 'deepspeed' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "without True"
    losses = terms_of(done.stdout, "step")
    assert len(losses) == 3 and set(losses[0]) == TERMS | {"ce"}
    assert losses[-1]["total"] < losses[0]["total"]
    assert sum(v for k, v in losses[0].items() if k != "total") == pytest.approx(losses[0]["total"], abs=0.01)
    timm.create_model("resnet18", checkpoint_path=tmp_path / "student.safetensors")
    code = [line for line in script.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) < 50


def test_unlabelled_trains_without_a_ce_term(run, tmp_path):
    """Files in any subfolders; no CE among the terms."""
    make_folder(tmp_path / "images", {"a": 2, "b/c": 2}, size=(64, 64))
    text = run("unlabelled.py", *QUICK["unlabelled.py"], "--images", "images")
    losses = terms_of(text, "epoch")
    assert [set(epoch) for epoch in losses] == [TERMS, TERMS]
    assert all(v > 0 for v in losses[-1].values())
    state = torch.load(tmp_path / "student.pt", weights_only=True)
    timm.create_model("resnet18").load_state_dict(state, strict=True)


def test_own_data_trains_without_a_kd_term(run):
    text = run("own_data.py", *QUICK["own_data.py"])
    assert re.search(r"epoch 1: loss [\d.]+, \d of 8 right", text)
    # a teacher without the data's classes: its features alone
    assert "ce=1 spatial_s3=0.08" in text and "kd=" not in text


def test_own_datas_table_is_a_source_of_train_py(run, tmp_path):
    """The command that it prints is one that launch/train.py takes, and its tables are sources."""
    command = run("own_data.py", "--size", 32, "--images", 12, "--csv", "mine").split()
    assert command[:2] == ["python", "launch/train.py"]
    cfg, _ = parse_run(command[2:])
    assert (cfg.student, cfg.teacher, cfg.distill.kd_weight) == ("resnet18", "vit_small_patch14_dinov2", 0.0)
    train, val = (open_source(Path(cfg.data.root) / name, "data") for name in (cfg.data.train, cfg.data.val))
    assert (len(train), len(val)) == (12, 4) and sorted(train.classes) == ["blobs", "checks", "stripes"]
    assert os.path.samefile(Path(cfg.data.root), tmp_path / "mine")


def test_kernels_only_finds_no_difference_from_plain_pytorch(run):
    text = run("kernels_only.py", *QUICK["kernels_only.py"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert re.search(rf"dual_view_loss: (reference|triton) on {device}", text)
    assert re.search(rf"cap_attention: (sdpa|triton) on {device}", text)
    found = re.findall(r"value ([\d.e+-]+), gradients ([\d.e+-]+)", text)
    assert len(found) == 2 and all(float(share) < 1e-4 for pair in found for share in pair)


def test_own_teacher_lowers_the_loss(run):
    text = run("own_teacher.py", *QUICK["own_teacher.py"])
    losses = [float(v) for v in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_a_family_whose_last_stage_is_another_fails_the_examples_check():
    names = runpy.run_path(str(EXAMPLES / "own_teacher.py"))
    model, images = names["MyViT"](64, dim=48, depth=3, num_classes=5), torch.randn(2, 3, 64, 64)
    names["check"](names["Teacher"](model), images)
    wrong = names["Family"](names["forward"], lambda model, tokens: tokens, names["stages"])
    names["register_family"](names["MyViT"], wrong)
    with pytest.raises(AssertionError):
        names["check"](names["Teacher"](model), images)


def test_the_documents_code_runs_and_its_commands_parse(monkeypatch, capsys):
    assert set(QUICK) == {path.name for path in EXAMPLES.glob("*.py")}
    blocks = re.findall(r"```python\n(.*?)```", DOC, re.S)
    monkeypatch.syspath_prepend(EXAMPLES)
    names = {"__name__": "my_train"}
    monkeypatch.setitem(sys.modules, "my_train", types.ModuleType("my_train"))
    for block in blocks:
        exec(compile(block, "docs/own_loop.md", "exec"), names)
    # a name of timm's now, as a run builds it
    teacher = Teacher("my_vit", 64, "none", dim=48, depth=3, num_classes=5, size=64)
    assert teacher.last_output.grid == (4, 4) and teacher.num_classes == 5
    commands = re.findall(r"^    scalekd train (.*)$", DOC, re.M)
    assert len(commands) == 2
    assert [parse_run(shlex.split(c))[0].teacher for c in commands] == ["none", "runs/teacher/student.safetensors"]
