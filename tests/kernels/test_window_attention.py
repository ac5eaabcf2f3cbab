"""The window attention kernels: numbers in the interpreter and on a GPU, what they compile to, operators, dispatch, errors."""

import functools

import pytest
import torch
from aot import ARCHITECTURES, assert_sound
from interpreted import run_cases
from launches import record
from torch._subclasses.fake_tensor import FakeTensorMode
from window_attention_cases import CASES, SLOW_CASES, make, oracle, relative, run

from scalekd_ds.kernels import window_attention
from scalekd_ds.kernels.window_attention import ops, reference, table, triton_kernels
from scalekd_ds.kernels.window_attention.api import attend_in_windows, implementation

# of the output, and of the gradient
TOLERANCE = {"float32": (5e-7, 1e-6), "bfloat16": (5e-3, 1e-2), "float16": (6e-4, 1.5e-3)}
FILE = __file__.replace("test_window", "window").replace(".py", "_cases.py")
interpreted = functools.cache(lambda: run_cases(FILE))


def check(case, errors):
    out, gradient = TOLERANCE[case.get("dtype", "float32")]
    if case.get("magnitude", 1) > 1:
        # scores of hundreds: float32 holds them to 1e-5, which softmax turns into a relative error
        out, gradient = 1e-5, 1e-4
    assert errors["deterministic"] == errors["finite"] == 1
    assert errors["out"] < out
    assert errors["dqkv"] < gradient


@pytest.mark.parametrize("name", CASES)
def test_numbers_in_the_interpreter_are_those_of_float64(name):
    check(CASES[name], interpreted()[name])


@pytest.mark.slow
def test_numbers_of_large_windows_in_the_interpreter_are_those_of_float64():
    found = run_cases(FILE, "slow")
    for name, case in SLOW_CASES.items():
        check(case, found[name])


@pytest.mark.parametrize("name", [*CASES, *SLOW_CASES])
def test_the_operator_without_a_gpu_has_the_same_numbers(name):
    case = (CASES | SLOW_CASES)[name]
    check(case, run(**case))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *SLOW_CASES])
def test_numbers_on_the_gpu_are_those_of_float64(name):
    case = (CASES | SLOW_CASES)[name]
    check(case, run(**case, device="cuda"))


def in_windows(qkv, constant, window, shift, scale, head_scale, pad):
    out = attend_in_windows(reference.partition(qkv, window, shift, pad), constant, scale, head_scale)
    return reference.merge(out, tuple(qkv.shape[1:3]), window, shift)


@pytest.mark.parametrize("name", ["shifted", "shifted, cosine", "padded, cosine"])
@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        (reference.window_attention, "float32"),
        *((call, dtype) for call in (window_attention, in_windows) for dtype in ("float32", "bfloat16")),
    ],
)
def test_api_and_reference_have_the_numbers_of_float64(call, name, dtype):
    qkv, constant, head_scale, pad, window, shift, scale = make(**CASES[name] | {"dtype": dtype})
    upstream = torch.randn(*qkv.shape[:3], *qkv.shape[4:]).to(qkv.dtype)
    expected = oracle(qkv, constant, window, shift, scale, head_scale, pad, upstream.double())
    leaf = qkv.requires_grad_()
    out = call(leaf, constant, window, shift, scale, head_scale, pad)
    with torch.no_grad():
        # takes 16 bits as they are, where there is no gradient
        assert relative(call(qkv, constant, window, shift, scale, head_scale, pad), expected[0]) < TOLERANCE[dtype][0]
    for ours, theirs, limit in zip(
        (out, *torch.autograd.grad(out, leaf, upstream)), expected, TOLERANCE[dtype], strict=True
    ):
        assert ours.dtype == qkv.dtype and relative(ours, theirs) < limit


# -- what the kernels compile to -----------------------------------------------------------------------------------

# map, window, shift, heads, head size, cosine: Swin-L's stages at 224 and 384 pixels, and Swin v2's
SHAPES = {
    "swin_l.1": ((56, 56), 7, 3, 6, 32, False),
    "swin_l.2": ((28, 28), 7, 3, 12, 32, False),
    "swin_l.3": ((14, 14), 7, 3, 24, 32, False),
    "swin_l.4": ((7, 7), 7, 0, 48, 32, False),
    "swin_l.384.3": ((24, 24), 12, 6, 24, 32, False),
    "swin_l.padded": ((56, 56), 12, 6, 6, 32, False),
    "swinv2.24": ((24, 24), 24, 0, 24, 32, True),
    "d 64, cosine": ((16, 16), 8, 4, 8, 64, True),
    "d 48, window 24": ((24, 24), 24, 0, 8, 48, False),
}


def launched(monkeypatch, shape, dtype):
    """The launches of a forward and a backward pass, recorded on tensors that only claim to be on a GPU."""
    grid, window, shift, N, D, cosine = SHAPES[shape]
    launches = record(monkeypatch, triton_kernels)
    T = window * window
    n = 1 if not shift else -(-grid[0] // window) * -(-grid[1] // window)
    with FakeTensorMode():
        qkv = torch.empty(2, *grid, 3, N, D, device="cuda:1", dtype=dtype)
        constant = torch.empty(n, N, T, T + -T % 16, device="cuda:1", dtype=dtype)
        head_scale = torch.empty(N, device="cuda:1") if cosine else None
        rest = (constant, head_scale, None, (window, window), (shift, shift), D**-0.5)
        out, lse = ops._triton_forward(qkv, *rest)
        ops._triton_backward(out, out, lse, qkv, *rest)
    return launches


@pytest.mark.parametrize(
    ("shape", "dtype", "architectures"),
    [
        ("swin_l.3", torch.bfloat16, ARCHITECTURES),
        ("swinv2.24", torch.bfloat16, (90,)),
        *(pytest.param(s, torch.bfloat16, ARCHITECTURES, marks=pytest.mark.slow) for s in SHAPES),
        *(pytest.param(s, torch.float32, (90,), marks=pytest.mark.slow) for s in ("swin_l.3", "d 64, cosine")),
    ],
)
def test_compiles_without_spills(monkeypatch, shape, dtype, architectures):
    for launch in launched(monkeypatch, shape, dtype):
        assert launch.device == 1
        for arch in architectures:
            assert_sound(launch.compile(arch), arch, dtype != torch.float32)


def test_strides_are_int64_in_every_launch():
    for kernel in (
        triton_kernels.window_forward_kernel,
        triton_kernels.window_backward_q_kernel,
        triton_kernels.window_backward_kv_kernel,
    ):
        strides = [p for p in kernel.params if p.name.startswith(("q_", "c_"))]
        assert len(strides) == 8 and {p.annotation_type for p in strides} == {"i64"}


# -- as PyTorch operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shifted", "padded, cosine"])
def test_the_operators_pass_opcheck(name):
    qkv, constant, head_scale, pad, window, shift, scale = make(**CASES[name])
    rest = (constant, head_scale, pad, *window, *shift, scale)
    torch.library.opcheck(ops.window_attention, (qkv.clone().requires_grad_(), *rest))
    out, lse = ops.window_attention(qkv, *rest)
    torch.library.opcheck(ops.window_attention_backward, (torch.randn_like(out), out, lse, qkv, *rest))


def test_lse_is_that_of_the_kernels():
    """Of a constant that is the same for all keys, the sum of exponentials is known where q is zero."""
    qkv, constant = torch.zeros(1, 3, 3, 3, 2, 16), torch.full((1, 2, 9, 16), 2.0)
    _, lse = ops.window_attention(qkv, constant, None, None, 3, 3, 0, 0, 1.0)
    torch.testing.assert_close(lse, torch.full((1, 2, 9), (2.0 + torch.tensor(9.0).log()) / torch.tensor(2.0).log()))


@pytest.mark.parametrize("won", [False, True])
def test_torch_compiles_what_a_gpu_runs_without_a_break(monkeypatch, won):
    """Traced on tensors that only claim to be on a GPU: reading the table must not break the graph."""
    key = table.key_of(90, 32, 49, True, False, torch.bfloat16)
    monkeypatch.setattr(table, "_MEASURED", {key: "triton"} if won else {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        qkv = torch.empty(2, 14, 14, 3, 2, 32, device="cuda", dtype=torch.bfloat16)
        constant = torch.empty(4, 2, 49, 64, device="cuda", dtype=torch.bfloat16)
    calls = []

    def backend(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(window_attention, fullgraph=True, backend=backend)(qkv, constant, (7, 7), (3, 3), 0.2)
    assert out.shape == (2, 14, 14, 2, 32)
    assert any("scalekd_ds.window_attention" in call for call in calls) == won
    assert any("scaled_dot_product_attention" in call for call in calls) != won


# -- dispatch and errors -------------------------------------------------------------------------------------------

WON = {
    table.key_of(90, 32, 49, True, False, torch.bfloat16): "triton",
    table.key_of(90, 72, 49, True, False, torch.bfloat16): "triton",
}


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cuda", (90, 32, 49, True, False, torch.bfloat16), "triton"),
        ("cpu", (90, 32, 49, True, False, torch.bfloat16), "sdpa"),
        # nothing was measured there
        ("cuda", (80, 32, 49, True, False, torch.bfloat16), "sdpa"),
        ("cuda", (90, 32, 49, False, False, torch.bfloat16), "sdpa"),
        ("cuda", (90, 32, 49, True, True, torch.bfloat16), "sdpa"),
        ("cuda", (90, 32, 49, True, False, torch.float16), "sdpa"),
        # the table is wrong: no kernel takes it
        ("cuda", (90, 72, 49, True, False, torch.bfloat16), "sdpa"),
    ],
)
def test_device_table_and_sizes_choose_the_implementation(device, arguments, expected):
    assert implementation(device, *arguments, WON) == expected


def test_the_shipped_table_is_sound():
    assert set(table.measured().values()) <= {"triton", "sdpa"}
    assert all(key.startswith("sm_") and len(key.split("/")) == 6 for key in table.measured())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"qkv": torch.zeros(1, 4, 4, 2, 8)},
            r"qkv has shape \(1, 4, 4, 2, 8\): it must be \(B, H, W, 3, heads, head size\)",
        ),
        ({"window": (2, 0)}, r"window is \(2, 0\) and shift \(1, 1\)"),
        (
            {"shift": (2, 0)},
            r"window is \(2, 2\) and shift \(2, 0\): a shift must be from 0 to the window's size less 1",
        ),
        (
            {"constant": torch.zeros(3, 2, 4, 16)},
            r"constant has shape \(3, 2, 4, 16\): it must be \(4 or 1, 2, 4, 4 or more\)",
        ),
        ({"head_scale": torch.zeros(3)}, r"head_scale has shape \(3,\): it must be \(2,\)"),
        ({"pad": torch.zeros(3, 2, 8)}, r"pad has shape \(3, 2, 8\): it must be \(3, 2, 16\)"),
        ({"pad": torch.zeros(3, 2, 16, device="meta")}, "pad is on meta: it must be on qkv's device, cpu"),
        ({"qkv": torch.zeros(1, 4, 4, 3, 16, 2).mT}, "qkv has strides .*: its last axis must be contiguous, stride 1"),
    ],
)
def test_errors_name_the_argument(change, words):
    arguments = {
        "qkv": torch.zeros(1, 4, 4, 3, 2, 16),
        "constant": torch.zeros(1, 2, 4, 16),
        "window": (2, 2),
        "shift": (1, 1),
    }
    with pytest.raises(ValueError, match=words) as error:
        window_attention(**arguments | change, scale=1.0)
    assert "\n" not in str(error.value)


def test_sizes_that_the_kernels_do_not_take_are_refused_by_the_operator_alone():
    qkv, constant = torch.zeros(1, 2, 2, 3, 1, 20), torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"qkv has head size 20 .*: the kernels take multiples of 8 from 16 to 64"):
        ops.window_attention(qkv, constant, None, None, 2, 2, 0, 0, 1.0)
    # the entry point takes them all the same
    assert window_attention(qkv, constant, (2, 2), (0, 0), 1.0).shape == (1, 2, 2, 1, 20)
