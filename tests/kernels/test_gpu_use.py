"""The kernels as a GPU meets them: in a CUDA graph, without a wait, on a second device, with mixed types and strides.

What needs no GPU in these cases also runs without one, on the operators' arithmetic in PyTorch.
"""

import functools

import pytest
import torch
from cross_attention_cases import oracle as attention_oracle
from cross_attention_cases import relative
from dual_view_cases import WEIGHTS, basis_of
from dual_view_cases import oracle as dual_view_oracle

from scalekd_ds.kernels import cap_attention
from scalekd_ds.kernels.cross_attention import ops as attention_ops
from scalekd_ds.kernels.cross_attention.api import fused_attention
from scalekd_ds.kernels.dual_view import launch, triton_kernels
from scalekd_ds.kernels.dual_view import ops as dual_view_ops
from scalekd_ds.losses import dual_view_losses

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRID, LOW = (7, 7), [(0, 0), (0, 1), (1, 0), (1, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def triton_attention(q, k, v, scale):
    return attention_ops.cap_attention(q, k, v, scale)[0]


def attention_step(attend, leaves, upstream):
    q, kv = leaves
    out = attend(q, *kv.unbind(2), 0.2)
    return out, *torch.autograd.grad(out, leaves, upstream)


def attention_leaves(tokens, device, dtype=torch.bfloat16):
    q = torch.randn(1, tokens, 2, 32).to(device, dtype).requires_grad_()
    kv = torch.randn(3, tokens, 2, 2, 32).to(device, dtype).requires_grad_()
    return [q, kv], torch.randn(3, tokens, 2, 32).to(device, dtype)


def dual_view_step(leaves, t, cut):
    losses = dual_view_losses([leaves[:2], leaves[2:]], t, GRID, WEIGHTS[:2], cut)
    total = sum(sum(pair) for pair in losses)
    return total, *torch.autograd.grad(total, leaves)


def dual_view_leaves(device):
    leaves = [torch.randn(2, 49, 64).to(device, torch.bfloat16).requires_grad_() for _ in range(4)]
    return leaves, torch.randn(2, 49, 64).to(device, torch.bfloat16)


def check_graph(step, leaves):
    """Captures a step, replays it on other numbers, and compares it with the same step without a graph, bit for bit."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    expected = step()
    assert all(x.isfinite().all() for x in expected)
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [49, 70])
def test_a_cuda_graph_captures_the_attention(tokens):
    leaves, upstream = attention_leaves(tokens, "cuda")
    check_graph(lambda: attention_step(triton_attention, leaves, upstream), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [1, 2])
def test_a_cuda_graph_captures_the_dual_view_loss(cut):
    leaves, t = dual_view_leaves("cuda")
    check_graph(lambda: dual_view_step(leaves, t, cut), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["triton", "sdpa", "cut 1", "cut 2"])
def test_no_step_after_the_first_waits_for_the_gpu(which):
    if which.startswith("cut"):
        step = functools.partial(dual_view_step, *dual_view_leaves("cuda"), int(which[-1]))
    else:
        attend = triton_attention if which == "triton" else fused_attention
        step = functools.partial(attention_step, attend, *attention_leaves(49, "cuda"))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_kernels_run_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    assert torch.cuda.current_device() == 0
    for step_on in (
        lambda device: attention_step(triton_attention, *attention_leaves(49, device)),
        lambda device: dual_view_step(*dual_view_leaves(device), 2),
    ):
        torch.manual_seed(0)
        first = step_on("cuda:0")
        torch.manual_seed(0)
        second = step_on("cuda:1")
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", [triton_attention, cap_attention])
def test_attention_takes_views_of_wider_tensors_and_any_upstream(call, device):
    dtype = torch.bfloat16
    q = torch.randn(3, 49, 3, 2, 32).to(device, dtype)[:, :, 1].requires_grad_()
    # keys and values of every second token of a wider projection; the gradient comes heads first
    kv = torch.randn(3, 98, 2, 2, 40).to(device, dtype)[:, ::2, :, :, :32].requires_grad_()
    upstream = torch.randn(3, 2, 49, 32).to(device, dtype).transpose(1, 2)
    expected = attention_oracle(q.detach(), kv.detach(), 0.2, upstream.double())
    out = call(q, *kv.unbind(2), 0.2)
    for ours, theirs in zip((out, *torch.autograd.grad(out, (q, kv), upstream)), expected, strict=True):
        # PyTorch's own rounds more than ours
        assert relative(ours, theirs) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dual_view_loss_takes_mixed_types_under_autocast(dtypes, autocast, device):
    s, f, t = (torch.randn(2, 49, 64).to(device, dtype) for dtype in dtypes)
    upstream = torch.randn(1, 2, dtype=torch.float64).to(device)
    expected, gradients = dual_view_oracle([s], [f], t, GRID, [(0, 0)], upstream)
    s.requires_grad_(), f.requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        losses = dual_view_ops.dual_view_stages([s], [f], t, None, WEIGHTS[:1])
    assert losses.dtype == torch.float32
    assert relative(losses, expected) < 5e-7
    ours = torch.autograd.grad((losses.double() * upstream).sum(), (s, f))
    for x, gradient, theirs in zip((s, f), ours, gradients, strict=True):
        assert gradient.dtype == x.dtype and relative(gradient, theirs) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing_in_the_operators(device):
    """The filter's matrix and float32 products are made where autocast is on."""
    dense = [(row, column) for row in range(6) for column in range(6)]
    s, f, t = (torch.randn(2, 49, 64, device=device) for _ in range(3))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(2, 49, 2, 32, device=device, dtype=dtype) for _ in range(3))
    results = []
    for autocast in (True, False):
        leaves = [x.detach().requires_grad_() for x in (s, f, q, k, v)]
        # a basis of its own, as its filter is kept
        basis = basis_of(GRID, dense).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            losses = dual_view_ops.dual_view_stages(leaves[:1], leaves[1:2], t, basis, WEIGHTS[:1])
            out = triton_attention(*leaves[2:], 0.2)
            gradients = torch.autograd.grad(losses.sum() + out.float().sum(), leaves)
        results.append((losses, out, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_matrix_of_a_dense_filter_is_exact_to_float32():
    basis = basis_of(GRID, [(row, column) for row in range(6) for column in range(6)])
    with torch.autocast("cpu", torch.bfloat16):
        made = launch.filter_of(basis)
    assert made.kind == triton_kernels.DENSE and made.matrix.is_contiguous() and made.matrix.dtype == torch.float32
    exact = torch.eye(49, dtype=torch.float64) - basis.double() @ basis.double().T
    torch.testing.assert_close(made.matrix.double(), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_filter_keeps_what_it_needs_of_its_basis(device):
    """Two filters in turn, as of two grids, give the numbers that each gives alone."""
    s, t = (torch.randn(2, 49, 64).to(device) for _ in range(2))
    both = [basis_of(GRID, LOW).to(device), basis_of(GRID, LOW[:2]).to(device)]

    def losses(basis):
        return dual_view_ops.dual_view_stages([s], [s], t, basis, WEIGHTS[:1])

    alone = [losses(basis) for basis in both]
    assert not torch.equal(*alone)
    for _ in range(2):
        assert all(torch.equal(losses(basis), expected) for basis, expected in zip(both, alone, strict=True))
