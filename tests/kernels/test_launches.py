"""What the kernels' launchers do around a launch: its device, its arguments, and nothing that waits for the device."""

import pytest
import torch
from aot import assert_sound
from dual_view_cases import basis_of
from launches import record
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scalekd_ds.kernels.cross_attention import ops, triton_kernels
from scalekd_ds.kernels.dual_view import launch
from scalekd_ds.kernels.dual_view import triton_kernels as dual_view_kernels

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def attend(q, k, v):
    out, lse = ops._triton_forward(q, k, v, 0.2)
    ops._triton_backward(out, q, k, v, out, lse, 0.2)


def mimic(s_spatial, s_frequency, t, basis=None):
    L = len(s_spatial)
    _, coef = launch.forward(s_spatial, s_frequency, t, basis, WEIGHTS[: 2 * L])
    return launch.backward(t.new_empty(L, 2, dtype=torch.float32), s_spatial, s_frequency, t, basis, coef)


# the backward of 7x7 is one launch, that of 14x14 two
@pytest.mark.parametrize("tokens", [49, 196])
def test_attention_is_launched_on_the_device_of_its_tensors(monkeypatch, tokens):
    launches = record(monkeypatch, triton_kernels)
    with FakeTensorMode():
        q = torch.empty(1, tokens, 2, 32, device="cuda:1", dtype=torch.bfloat16)
        attend(q, *torch.empty(4, tokens, 2, 2, 32, device="cuda:1", dtype=torch.bfloat16).unbind(2))
    assert [x.device for x in launches] == [1] * (2 if tokens == 49 else 3)
    assert torch.cuda._exchange_device(-1) == 0


def test_the_dual_view_loss_is_launched_on_the_device_of_its_tensors(monkeypatch):
    launches = record(monkeypatch, dual_view_kernels)
    with FakeTensorMode():
        tokens = torch.empty(2, 49, 64, device="cuda:1")
        mimic([tokens], [tokens], tokens)
    assert [x.device for x in launches] == [1, 1, 1]
    assert torch.cuda._exchange_device(-1) == 0


class Waits(TorchDispatchMode):
    """Collects what would wait for the device on a GPU: numbers read from tensors, and tensors made from Python's."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::_to_copy", "aten::nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_only_the_first_step_with_a_filter_reads_its_basis(monkeypatch):
    record(monkeypatch, dual_view_kernels)
    tokens = [torch.randn(2, 49, 64) for _ in range(2)]
    basis = basis_of((7, 7), [(0, 0), (0, 1)])
    found = []
    for _ in range(3):
        with Waits() as waits:
            mimic(tokens, tokens, tokens[0], basis)
        found.append(waits.found)
    assert "aten::_local_scalar_dense" in found[0]
    assert found[1:] == [[], []]


@pytest.mark.parametrize("stages", [1, 2])
def test_weights_are_arguments_of_the_launch(monkeypatch, stages):
    launches = record(monkeypatch, dual_view_kernels)
    tokens = [torch.randn(2, 49, 64) for _ in range(stages)]
    with Waits() as waits:
        mimic(tokens, tokens, tokens[0])
    assert waits.found == []
    names = ("spatial_0", "frequency_0", "spatial_1", "frequency_1")[: 2 * stages]
    assert [launches[1].arguments[name] for name in names] == [w / 2 for w in WEIGHTS[: 2 * stages]]


# -- strides that no teacher has -----------------------------------------------------------------------------------


def rows_that_begin_anywhere(B, P, C, dtype):
    return torch.zeros(B, P, C + 1, dtype=dtype)[..., 1:]


def one_sample_with_an_odd_stride(B, P, C, dtype):
    return torch.zeros(P * C + 1, dtype=dtype).as_strided((1, P, C), (P * C + 1, C, 1))


def rows_of_an_odd_width(B, P, C, dtype):
    return torch.zeros(B, P, 1001, dtype=dtype)


MAKERS = [rows_that_begin_anywhere, one_sample_with_an_odd_stride, rows_of_an_odd_width]


@pytest.mark.parametrize("make", MAKERS)
def test_a_launch_has_aligned_strides_and_gradients_the_shape_of_their_tensors(monkeypatch, make):
    launches = record(monkeypatch, dual_view_kernels)
    x = make(2, 49, 64, torch.bfloat16)
    gradients = mimic([x, x], [x, x], x)
    assert [(g.shape, g.dtype, g.is_contiguous()) for g in gradients] == [(x.shape, x.dtype, True)] * 4
    for recorded in (launches[0], launches[2]):
        assert recorded.arguments["C"] % 16 == 0
        assert len(recorded.strides()) == 10 and all(s % 16 == 0 for s in recorded.strides().values())
        tensors = [a for a in recorded.arguments.values() if isinstance(a, torch.Tensor)]
        assert all(a.storage_offset() * a.element_size() % 16 == 0 for a in tensors)


@pytest.mark.parametrize(("tokens", "stages"), [(49, 2), (256, 2)])
def test_what_it_launches_for_odd_strides_does_not_spill(monkeypatch, tokens, stages):
    launches = record(monkeypatch, dual_view_kernels)
    x = [rows_of_an_odd_width(2, tokens, 0, torch.bfloat16) for _ in range(stages)]
    mimic(x, x, x[0])
    for recorded in launches:
        assert_sound(recorded.compile(90), 90, False)


def test_aligned_tensors_are_launched_as_they_are(monkeypatch):
    launches = record(monkeypatch, dual_view_kernels)
    s, f, t = (torch.zeros(2, 50, 64)[:, 1:] for _ in range(3))
    mimic([s], [f], t)
    for recorded in (launches[0], launches[2]):
        assert all(recorded.arguments[name] is x for name, x in (("s0_ptr", s), ("f0_ptr", f), ("t_ptr", t)))
