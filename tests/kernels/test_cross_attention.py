"""The attention kernels: numbers in the interpreter and on a GPU, what they compile to, operators, dispatch, errors."""

import functools

import pytest
import torch
from aot import ARCHITECTURES, aot, assert_sound
from cross_attention_cases import CASES, oracle, relative, run
from interpreted import run_cases

from scalekd_ds.kernels import cap_attention
from scalekd_ds.kernels.cross_attention import ops, reference, table, triton_kernels
from scalekd_ds.kernels.cross_attention.api import implementation

# of the output, and of gradients
TOLERANCE = {"float32": (5e-6, 1e-5), "bfloat16": (5e-3, 1e-2), "float16": (6e-4, 1.5e-3)}
interpreted = functools.cache(lambda: run_cases(__file__.replace("test_cross", "cross").replace(".py", "_cases.py")))


def check(case, errors):
    out, gradient = TOLERANCE[case.get("dtype", "float32")]
    if case.get("magnitude", 1) > 1:
        # scores of thousands: float32 holds them to 1e-4, and softmax turns that into a relative error
        out, gradient = 1e-3, 1e-2
    assert errors["deterministic"] == 1
    assert errors["out"] < out
    if case["S"] == 1:
        # softmax over one key does not move: dq is zero, and its relative error means nothing
        return
    assert errors["dq"] < gradient
    assert errors["dkv"] < gradient


@pytest.mark.parametrize("name", CASES)
def test_numbers_in_the_interpreter(name):
    check(CASES[name], interpreted()[name])


@pytest.mark.parametrize("name", CASES)
def test_the_operator_without_a_gpu_has_the_same_numbers(name):
    check(CASES[name], run(**CASES[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_on_the_gpu(name, dtype):
    if CASES[name].get("magnitude", 1) > 1:
        pytest.skip("scores of thousands need more than 16 bits")
    case = CASES[name] | {"dtype": dtype}
    check(case, run(**case, device="cuda"))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("call", [cap_attention, reference.cap_attention])
def test_api_and_reference_against_float64(call, groups):
    q, kv = torch.randn(groups, 9, 2, 16), torch.randn(4, 7, 2, 2, 16)
    upstream = torch.randn(4, 9, 2, 16, dtype=torch.float64)
    expected = oracle(q, kv, 0.7, upstream)
    q.requires_grad_(), kv.requires_grad_()
    out = call(q, *kv.unbind(2), 0.7)
    for ours, theirs in zip((out, *torch.autograd.grad((out * upstream).sum(), (q, kv))), expected, strict=True):
        assert relative(ours, theirs) < 2e-6


def test_gradients_of_keys_and_values_share_one_buffer():
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    out, lse = ops.cap_attention(q, k, v, 1.0)
    dq, dkv = ops.cap_attention_backward(torch.randn_like(out), q, k, v, out, lse, 1.0)
    assert dq.shape == q.shape and dkv.shape == (3, 4, 2, 2, 8) and dkv.is_contiguous()


# -- what the kernels compile to -----------------------------------------------------------------------------------


def types_of(kernel):
    def kind(name):
        if name.endswith("_ptr"):
            return "*fp32" if name in ("lse_ptr", "delta_ptr") else "*bf16"
        return "fp32" if "scale" in name else "i32" if name in ("per_group", "chunks") else "i64"

    return {name: kind(name) for name in kernel.arg_names}


@pytest.mark.parametrize("head_size", [32, 48, 64, 96, 128, 192])
def test_compiles_without_spills(head_size):
    forward, backward = ops.tiles(head_size)
    kernels = [
        (triton_kernels.cap_forward_kernel, forward, False, {}),
        (triton_kernels.cap_backward_q_kernel, backward, False, {"H": 4}),
        (triton_kernels.cap_backward_kv_kernel, backward, True, {}),
    ]
    if ops.is_small(head_size, 49, 49):
        kernels.append((triton_kernels.cap_backward_small_kernel, backward, False, {"H": 4}))
    for kernel, tile, by_keys, more in kernels:
        options = ops._options(tile, by_keys)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        sizes = {"Q": 49, "S": 49} if "small" in kernel.__name__ else {"Q": 196, "S": 196}
        constants = {"N": 24, "D": head_size, **sizes, **options, **more}
        constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
        for arch in ARCHITECTURES:
            assert_sound(aot(kernel, types_of(kernel), constants, warps, arch, stages), arch, True)


# -- as PyTorch operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_opcheck(groups):
    q = torch.randn(groups, 5, 2, 8, requires_grad=True)
    k, v = torch.randn(4, 6, 2, 2, 8).unbind(2)
    torch.library.opcheck(ops.cap_attention, (q, k.requires_grad_(), v.requires_grad_(), 0.5))
    with torch.no_grad():
        out, lse = ops.cap_attention(q, k, v, 0.5)
        torch.library.opcheck(ops.cap_attention_backward, (torch.randn_like(out), q, k, v, out, lse, 0.5))


@pytest.mark.parametrize("call", [lambda *a: ops.cap_attention(*a)[0], cap_attention])
def test_compiles_whole(call):
    q, kv = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(4, 6, 2, 2, 8, requires_grad=True)

    def attend(q, kv):
        return call(q, *kv.unbind(2), 0.5).flatten(2)

    upstream = torch.randn(4, 5, 16)
    expected = attend(q, kv)
    gradients = torch.autograd.grad((expected * upstream).sum(), (q, kv))
    compiled = torch.compile(attend, fullgraph=True)(q, kv)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad((compiled * upstream).sum(), (q, kv)), gradients)


# -- dispatch and errors -------------------------------------------------------------------------------------------

SIZES = (32, 49, 49)
WON = {
    table.key_of(90, *SIZES, True, torch.bfloat16): "triton",
    table.key_of(90, 20, 49, 49, True, torch.bfloat16): "triton",
}


@pytest.mark.parametrize(
    ("device", "architecture", "sizes", "shared", "dtype", "expected"),
    [
        ("cuda", 90, SIZES, True, torch.bfloat16, "triton"),
        ("cpu", 90, SIZES, True, torch.bfloat16, "sdpa"),
        # nothing was measured there
        ("cuda", 80, SIZES, True, torch.bfloat16, "sdpa"),
        ("cuda", 90, SIZES, False, torch.bfloat16, "sdpa"),
        ("cuda", 90, SIZES, True, torch.float16, "sdpa"),
        ("cuda", 90, (32, 49, 196), True, torch.bfloat16, "sdpa"),
        # the table is wrong: no kernel takes it
        ("cuda", 90, (20, 49, 49), True, torch.bfloat16, "sdpa"),
    ],
)
def test_dispatch(device, architecture, sizes, shared, dtype, expected):
    assert implementation(device, architecture, sizes, shared, dtype, WON) == expected


def test_the_shipped_table_is_sound():
    assert set(table.measured().values()) <= {"triton", "sdpa"}
    assert all(key.startswith("sm_") and len(key.split("/")) == 6 for key in table.measured())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": (4, 6, 2)}, r"k has shape \(4, 6, 2\) and v \(4, 6, 2, 8\): both must be \(B, S, heads, head size\)"),
        ({"v": (4, 5, 2, 8)}, r"k has shape \(4, 6, 2, 8\) and v \(4, 5, 2, 8\)"),
        ({"q": (3, 5, 2, 8)}, r"q has shape \(3, 5, 2, 8\): .*G a divisor of k's batch, 4"),
        ({"q": (1, 5, 2, 16)}, r"q has shape \(1, 5, 2, 16\): it must be \(G, queries, 2, 8\)"),
        ({"q": torch.float64}, "q has dtype torch.float64: it must have k's, torch.float32"),
        ({"v": torch.bfloat16}, "v has dtype torch.bfloat16: it must have k's"),
        ({"q": "meta"}, "q is on meta: it must be on k's device, cpu"),
        ({"k": "strided"}, "k has strides .*: its head size must be contiguous, stride 1"),
    ],
)
def test_errors_name_the_argument(change, words):
    arguments = {"q": torch.randn(2, 5, 2, 8), "k": torch.randn(4, 6, 2, 8), "v": torch.randn(4, 6, 2, 8)}
    for name, value in change.items():
        x = arguments[name]
        if isinstance(value, tuple):
            arguments[name] = torch.randn(value)
        else:
            arguments[name] = x.mT.contiguous().mT if value == "strided" else x.to(value)
    with pytest.raises(ValueError, match=words) as error:
        cap_attention(**arguments, scale=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((20, 5, 6), "q has head size 20: the kernels take multiples of 8 from 8 to 256"),
        ((264, 5, 6), "q has head size 264"),
        ((8, 1025, 6), "q has 1025 queries and k 6 keys: the kernels take at most 1024"),
    ],
)
def test_what_the_kernels_do_not_take(sizes, words):
    D, Q, S = sizes
    k = torch.randn(1, S, 1, D)
    with pytest.raises(ValueError, match=words):
        ops.cap_attention(torch.randn(1, Q, 1, D), k, k, 1.0)
    # the entry point takes them all the same
    assert cap_attention(torch.randn(1, Q, 1, D), k, k, 1.0).shape == (1, Q, 1, D)
