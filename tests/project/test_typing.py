"""A user's own typed project gets the types of this package, and mistakes in calls of it are found."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from launching import ROOT

if find_spec("mypy") is None:
    pytest.skip("needs mypy: pip install mypy", allow_module_level=True)

USER = """\
import torch
from scalekd_ds import ScaleKD, Student, Teacher
from scalekd_ds.kernels import cap_attention
from scalekd_ds.losses import dual_view_loss

distiller = ScaleKD("resnet18", Teacher("swin_tiny_patch4_window7_224"), kd_weight=0.5)
images = torch.zeros(2, 3, 224, 224)
reveal_type(distiller)
reveal_type(distiller(images))
reveal_type(distiller.forward(images))
reveal_type(distiller.student)
reveal_type(distiller.teacher)
reveal_type(Student("resnet18").shapes((224, 224)).last)
reveal_type(dual_view_loss(images[0], images[0], images[0], (224, 224), (1.0, 1.0)))
reveal_type(cap_attention(images, images, images, 1.0))
ScaleKD("resnet18", None, temprature=2.0)
ScaleKD("resnet18", 50)
"""
# line -> what mypy says of it
REVEALED = {
    8: "scalekd_ds.distiller.ScaleKD",
    9: "dict[str, torch._tensor.Tensor]",
    10: "dict[str, torch._tensor.Tensor]",
    11: "torch.nn.modules.module.Module",
    12: "scalekd_ds.teacher.Teacher | None",
    13: "torch._tensor.Tensor",
    14: "tuple[torch._tensor.Tensor, torch._tensor.Tensor]",
    15: "torch._tensor.Tensor",
}
WRONG = {
    16: 'Unexpected keyword argument "temprature" for "ScaleKD"',
    17: 'Argument 2 to "ScaleKD" has incompatible type "int"',
}


def test_a_users_file_sees_the_types_of_the_package_and_mistakes_in_its_calls(tmp_path):
    user = tmp_path / "user.py"
    user.write_text(USER)
    # in the package's folder, with its settings and the cache that `make lint` has filled: reading torch takes long
    command = [sys.executable, "-m", "mypy", "--no-pretty", str(user)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    said = re.findall(r"user\.py:(\d+): (\w+): (.*)$", done.stdout, re.MULTILINE)
    revealed = {int(line): text for line, kind, text in said if kind == "note" and text.startswith("Revealed")}
    assert {line: text.split('"')[1].replace("builtins.", "") for line, text in revealed.items()} == REVEALED, done
    errors = {int(line): text for line, kind, text in said if kind == "error"}
    assert errors.keys() == WRONG.keys(), done.stdout + done.stderr
    assert all(errors[line].startswith(text) for line, text in WRONG.items()), errors
