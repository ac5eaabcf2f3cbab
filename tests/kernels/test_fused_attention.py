"""PyTorch's attention as the projectors call it: never by cuDNN where that has no backward."""

import functools
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from cross_attention_cases import oracle, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalekd_ds.kernels import cap_attention
from scalekd_ds.kernels.cross_attention import table
from scalekd_ds.kernels.cross_attention.api import fused_attention


def backends() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


@pytest.fixture
def seen(monkeypatch):
    """The backends that were enabled at each call of scaled_dot_product_attention, which is not run."""
    found = []

    def record(q, k, v, scale):
        found.append(backends())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(table, "_MEASURED", {})
    return found


def on_a_gpu(head_size, call=cap_attention):
    with FakeTensorMode():
        q = torch.empty(1, 49, 2, head_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return call(q, *torch.empty(4, 49, 2, 2, head_size, device="cuda", dtype=torch.bfloat16).unbind(2), 0.2)


@pytest.mark.parametrize(("head_size", "cudnn"), [(64, True), (128, True), (136, False), (192, False), (256, False)])
@pytest.mark.parametrize("call", [cap_attention, fused_attention])
def test_cudnn_does_not_see_heads_whose_backward_it_lacks(seen, head_size, cudnn, call):
    before = backends()
    on_a_gpu(head_size, call)
    assert [x["cudnn"] for x in seen] == [cudnn]
    assert seen[0] == before | {"cudnn": cudnn}
    assert backends() == before


def test_a_choice_of_the_caller_is_kept(seen):
    with sdpa_kernel(SDPBackend.MATH):
        on_a_gpu(192)
    assert seen == [{"flash": False, "efficient": False, "math": True, "cudnn": False}]


def test_the_choice_ends_with_an_error_too(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        on_a_gpu(192)
    assert backends()["cudnn"]


@pytest.mark.parametrize(("head_size", "chosen"), [(128, False), (192, True)])
def test_a_compiled_call_chooses_without_a_break(monkeypatch, head_size, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(table, "_MEASURED", {})
    calls = []

    def backend(graph, _):
        calls.extend(graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(cap_attention, fullgraph=True, backend=backend)
    assert on_a_gpu(head_size, compiled).shape == (4, 49, 2, head_size)
    names = [getattr(node.target, "__name__", "") for node in calls]
    # before the attention, and back after it
    switches = [i for i, name in enumerate(names) if name == "_sdpa_kernel"]
    assert len(switches) == (2 if chosen else 0)
    if chosen:
        assert switches[0] < names.index("scaled_dot_product_attention") < switches[1]
        picked = [node.args[0] for node in calls[switches[0]].args[0]]
        assert picked == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert backends()["cudnn"]


@pytest.mark.skipif(fake_cuda.available() is not None, reason=str(fake_cuda.available()))
def test_what_pytorch_picks_on_an_h100_is_not_cudnn_above_128(tmp_path):
    worker = Path(__file__).parents[1] / "workers" / "fake_attention.py"
    environment = fake_cuda.environment(tmp_path)
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    picked = json.loads(done.stdout.splitlines()[-1])
    for head_size, names in picked.items():
        assert len(names) == 1
        wide = ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"]
        assert names[0] in [*wide, *(["_scaled_dot_product_cudnn_attention"] if int(head_size) <= 128 else [])]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head_size", [128, 136, 192, 224, 256])
def test_wide_heads_have_gradients_on_the_gpu(head_size, compiled):
    q = torch.randn(1, 49, 2, head_size, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(4, 49, 2, 2, head_size, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(4, 49, 2, head_size, device="cuda", dtype=torch.bfloat16)
    expected = oracle(q, kv, head_size**-0.5, upstream.double())
    q.requires_grad_(), kv.requires_grad_()
    # aot_eager picks the backend as inductor does, and compiles nothing
    compile_it = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    attend = compile_it(cap_attention) if compiled else cap_attention
    out = attend(q, *kv.unbind(2), head_size**-0.5)
    for ours, theirs in zip((out, *torch.autograd.grad(out, (q, kv), upstream)), expected, strict=True):
        assert relative(ours, theirs) < 2e-2
