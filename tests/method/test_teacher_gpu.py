"""Teachers as a GPU meets them, without one: nothing that waits, and heads whose attention has a backward everywhere."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fake_cuda
import pytest
import timm
from zoo import TEACHERS

from scalekd_ds.teacher_families import FAMILIES

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(fake_cuda.available() is not None, reason=str(fake_cuda.available()))
def test_no_familys_step_waits_for_the_gpu(tmp_path):
    environment = fake_cuda.environment(tmp_path)
    environment["PYTHONPATH"] += f":{TESTS / 'helpers'}"
    command = [sys.executable, str(TESTS / "workers" / "fake_teachers.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    waits = json.loads(done.stdout.splitlines()[-1])
    assert waits.keys() >= TEACHERS.keys()
    assert not {name: places for name, places in waits.items() if places}


class _Built(Exception):
    """Ends an entry point of timm with what it would have built."""


def _stop(model_class, variant, pretrained, *args, **kwargs):
    raise _Built(model_class, kwargs)


def _widest_head(model_class, arguments):
    """The largest head size of a timm model, from its constructor's arguments; None where it has no attention."""
    defaults = {n: p.default for n, p in inspect.signature(model_class.__init__).parameters.items()} | arguments
    if "num_heads" not in defaults:
        return None
    heads, dims = defaults["num_heads"], defaults.get("embed_dims") or defaults["embed_dim"]
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    # Swin's width doubles with each stage, from that of the first
    dims = dims if isinstance(dims, (tuple, list)) else [dims * 2**i for i in range(len(heads))]
    return max(dim // count for dim, count in zip(dims, heads, strict=True))


def test_no_teachers_own_attention_has_heads_above_128(monkeypatch):
    """PyTorch 2.11 gives wider ones to cuDNN on Hopper, which has no backward for them: see the kernels' `fused_attention`.

    TPP needs the gradient of the teacher's last stage, which is timm's code.
    """
    modules = [m for n, m in sys.modules.items() if n.startswith("timm.models.") and hasattr(m, "build_model_with_cfg")]
    for module in modules:
        monkeypatch.setattr(module, "build_model_with_cfg", _stop)
    widest = {}
    for name in timm.list_models():
        try:
            timm.model_entrypoint(name)()
        except _Built as built:
            model_class, arguments = built.args
            if isinstance(model_class, type) and issubclass(model_class, tuple(FAMILIES)):
                widest[name] = _widest_head(model_class, arguments)
    assert len(widest) > 250 and None in widest.values()
    assert widest["vit_7b_patch16_dinov3"] == 128 and widest["swin_large_patch4_window7_224"] == 32
    assert {name: size for name, size in widest.items() if size is not None and size > 128} == {}
