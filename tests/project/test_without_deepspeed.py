"""The method, the kernels and what builds them from a run's configuration need neither DeepSpeed nor DALI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LIMIT, ROOT

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed" or name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""
STEP = """
import json
import torch
import scalekd_ds
from scalekd_ds.build import build_distiller
from scalekd_ds.config import DataConfig, RunConfig

cfg = RunConfig(
    student="resnet18",
    student_kwargs={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    teacher="swin_tiny_patch4_window7_224",
    teacher_kwargs=SWIN | {"num_classes": 3},
    teacher_weights="none",
    data=DataConfig(image_size=32),
)
distiller = build_distiller(cfg, 3, verbose=False)
assert isinstance(distiller, scalekd_ds.ScaleKD)
losses = distiller(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))
losses["loss/total"].backward()
assert losses["loss/total"].isfinite() and len(losses) == 7
"""
OPTIMIZER = """
import torch
from scalekd_ds.config import OptimConfig
from scalekd_ds.optim.optimizers import build_optimizer

layer = torch.nn.Linear(3, 2)
before = layer.weight.detach().clone()
optimizer = build_optimizer(layer, OptimConfig("lamb"))
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
assert not torch.equal(layer.weight, before)
"""
BENCHMARK = """
import runpy

sys.path.insert(0, "benchmarks")
sys.argv = ["step.py", "--pair", "tiny", "--batch", "1", "--repeats", "1", "--ceiling-repeats", "1", "--device", "cpu"]
sys.argv += ["--profile-repeats", "0", "--variants", "ours-fp32", "published-fp32", "--out", OUT]
runpy.run_path("benchmarks/step.py", run_name="__main__")
assert not {"deepspeed", "nvidia.dali"} & sys.modules.keys()
"""
PIECES = {
    "the names of the package": "import scalekd_ds; scalekd_ds.ScaleKD, scalekd_ds.Teacher, scalekd_ds.Student",
    "the kernels": "from scalekd_ds.kernels import cap_attention, dual_view_loss",
    "projector and losses": "import scalekd_ds.losses; from scalekd_ds.projector import CrossAttentionProjector",
    "recipes": "from scalekd_ds.recipes import RECIPES; [make() for make in RECIPES.values()]",
    "plain weights of a checkpoint": "from scalekd_ds.checkpoint import consolidate",
    "exporting": "import scalekd_ds.export",
    "LAMB without an engine": OPTIMIZER,
}


# each piece in a fork of its own, of a process that has loaded what none of them is about
RUN_EACH = """
import json, os, tempfile, traceback
import timm, torch

def run(code):
    with tempfile.TemporaryFile("w+") as log:
        if not (child := os.fork()):
            status = 1
            try:
                os.dup2(log.fileno(), 1)
                exec(code, {"__name__": "__main__", "sys": sys})
                status = 0
            except BaseException:
                traceback.print_exc(file=log)
                log.flush()
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        log.seek(0)
        return "" if status == 0 else log.read() + f"status {status}"

print("RESULT", json.dumps({name: run(code) for name, code in json.load(sys.stdin).items()}))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Name of a piece -> what it said where it failed, or nothing; and the benchmark's folder."""
    from tiny_run import SWIN

    out = tmp_path_factory.mktemp("benchmark")
    codes = PIECES | {
        "step": f"SWIN = {SWIN!r}\n{STEP}",
        "benchmark": f"OUT = {str(out)!r}\n{BENCHMARK}",
        "dali": "import nvidia.dali",
        "deepspeed": "import scalekd_ds.training.trainer",
    }
    command = [sys.executable, "-c", HIDE + RUN_EACH]
    done = subprocess.run(command, input=json.dumps(codes), capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1]) | {"out": str(out)}


@pytest.mark.parametrize("name", PIECES)
def test_piece(errors, name):
    assert errors[name] == ""


def test_a_step_of_a_run_built_from_its_configuration(errors):
    assert errors["step"] == ""


def test_the_whole_steps_benchmark(errors):
    assert errors["benchmark"] == ""
    result = json.loads((Path(errors["out"]) / "step-tiny-cpu.json").read_text())
    assert result["ratios"].keys() == {"ours-fp32/published-fp32"}


def test_what_hides_them_does_hide_them(errors):
    assert "nvidia.dali is hidden" in errors["dali"] and "deepspeed is hidden" in errors["deepspeed"]
