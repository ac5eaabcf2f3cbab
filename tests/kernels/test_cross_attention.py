"""The attention kernels: numbers in the interpreter and on a GPU, what they compile to, operators, dispatch, errors."""

import functools

import pytest
import torch
from aot import ARCHITECTURES, aot, assert_sound
from cross_attention_cases import CASES, oracle, relative, run
from interpreted import run_cases
from torch._subclasses.fake_tensor import FakeTensorMode

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
    # finite gradients instead of inf would hide an overflow from the loss scaler
    assert errors.get("overflows", 2) == errors.get("overflows_shown", 2) == 2
    assert errors["out"] < out
    if case["S"] == 1:
        # softmax over one key does not move: dq is zero, and its relative error means nothing
        return
    assert errors["dq"] < gradient
    assert errors["dkv"] < gradient


@pytest.mark.parametrize("name", CASES)
def test_numbers_in_the_interpreter_are_those_of_float64(name):
    check(CASES[name], interpreted()[name])


@pytest.mark.parametrize("name", CASES)
def test_the_operator_without_a_gpu_has_the_same_numbers(name):
    check(CASES[name], run(**CASES[name]))


# The kernels take 16 bits, and scores of thousands need more. Kernels take seconds to compile for each case: float16,
# whose kernels differ in how they round alone, runs each kind of backward once.
ON_THE_GPU = [
    pytest.param(case | {"dtype": "bfloat16"}, id=name)
    for name, case in CASES.items()
    if "magnitude" not in case and name not in ("bfloat16", "bfloat16, d 192", "float16", "float16, long")
]
ON_THE_GPU += [
    pytest.param(CASES[name] | {"dtype": "float16"}, id=f"{name} in float16")
    for name in ("float16", "float16, long", "d 192")
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_THE_GPU)
def test_numbers_on_the_gpu_are_those_of_float64(case):
    check(case, run(**case, device="cuda"))


@pytest.mark.parametrize("case", ON_THE_GPU)
def test_numbers_of_the_gpus_cases_are_those_of_float64_without_one(case):
    """The same sizes, types and limits, on the operator's arithmetic in PyTorch: what fails here fails there."""
    check(case, run(**case))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("call", [cap_attention, reference.cap_attention])
def test_api_and_reference_give_the_numbers_of_float64(call, groups):
    q, kv = torch.randn(groups, 9, 2, 16), torch.randn(4, 7, 2, 2, 16)
    upstream = torch.randn(4, 9, 2, 16, dtype=torch.float64)
    expected = oracle(q, kv, 0.7, upstream)
    q.requires_grad_(), kv.requires_grad_()
    out = call(q, *kv.unbind(2), 0.7)
    for ours, theirs in zip((out, *torch.autograd.grad((out * upstream).sum(), (q, kv))), expected, strict=True):
        assert relative(ours, theirs) < 2e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_api_on_16_bits_rounds_only_its_results(groups, dtype, tolerance, autocast):
    q, kv = torch.randn(groups, 49, 2, 32).to(dtype), torch.randn(4, 49, 2, 2, 32).to(dtype)
    upstream = torch.randn(4, 49, 2, 32).to(dtype)
    expected = oracle(q, kv, 0.9, upstream.double())
    q.requires_grad_(), kv.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = cap_attention(q, *kv.unbind(2), 0.9)
    assert out.dtype == dtype and out.is_contiguous()
    for ours, theirs in zip((out, *torch.autograd.grad(out, (q, kv), upstream)), expected, strict=True):
        assert ours.dtype == dtype and relative(ours, theirs) < tolerance


def test_gradients_of_keys_and_values_share_one_buffer():
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    out, lse = ops.cap_attention(q, k, v, 1.0)
    dq, dkv = ops.cap_attention_backward(torch.randn_like(out), q, k, v, out, lse, 1.0)
    assert dq.shape == q.shape and dkv.shape == (3, 4, 2, 2, 8) and dkv.is_contiguous()


# -- what the kernels compile to -----------------------------------------------------------------------------------


def types_of(kernel, stride):
    """A launch's types: strides are int64 because the kernels declare it, and dq is float32 where chunks are summed."""
    kinds = {name: "*fp32" if name in ("lse_ptr", "delta_ptr", "dq_ptr") else "*bf16" for name in kernel.arg_names}
    for parameter in kernel.params:
        if not parameter.name.endswith("_ptr"):
            declared = parameter.annotation_type and stride
            kinds[parameter.name] = declared or ("fp32" if "scale" in parameter.name else "i32")
    return kinds


def kernels_of(head_size, tokens):
    """Kernel, tile, whether it goes by keys, and chunk of samples of all launches with that many queries and keys."""
    forward, backward = ops.tiles(head_size)
    yield triton_kernels.cap_forward_kernel, forward, False, 1
    if ops.is_small(head_size, tokens, tokens):
        yield triton_kernels.cap_backward_small_kernel, backward, False, ops.MAX_CHUNK
    else:
        yield triton_kernels.cap_backward_q_kernel, backward, False, ops.MAX_CHUNK
        yield triton_kernels.cap_backward_kv_kernel, backward, True, 1


def compile_all(head_size, tokens, architectures, stride="i64"):
    for kernel, tile, by_keys, chunk in kernels_of(head_size, tokens):
        options = ops._launch_options(tile, by_keys)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        constants = {"N": 24, "D": head_size, "Q": tokens, "S": tokens, "H": chunk, **options}
        constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
        # the same forward as with 196, its loop unrolled: one architecture will do
        short = kernel is triton_kernels.cap_forward_kernel and tokens == 49
        for arch in (90,) if short else architectures:
            assert_sound(aot(kernel, types_of(kernel, stride), constants, warps, arch, stages), arch, True)


# tokens of a 7x7 grid run another backward than those of 14x14, or the same with loops that unroll
@pytest.mark.parametrize("tokens", [49, 196])
@pytest.mark.parametrize(
    ("head_size", "architectures"),
    [
        *((size, ARCHITECTURES if size == 64 else (90,)) for size in (32, 48, 64, 96, 128, 192)),
        *(pytest.param(size, ARCHITECTURES, marks=pytest.mark.slow) for size in (32, 48, 96, 128, 192)),
    ],
)
def test_compiles_without_spills(head_size, tokens, architectures):
    compile_all(head_size, tokens, architectures)


@pytest.mark.parametrize(("head_size", "tokens"), [(40, 49), (120, 49), (248, 49)])
def test_rows_that_are_not_aligned_compile_without_spills(head_size, tokens):
    # `aot` takes int64 for aligned to 16, which strides of 8 times an odd number are not
    compile_all(head_size, tokens, (90,), stride="i32")


def test_strides_are_int64_in_every_launch():
    for kernel in [k for tokens in (49, 196) for k, *_ in kernels_of(64, tokens)]:
        strides = [p for p in kernel.params if p.name[1:] in ("_g", "_b", "_r", "_n")]
        assert len(strides) >= 9
        assert {p.annotation_type for p in strides} == {"i64"}


# -- as PyTorch operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_operators_pass_opcheck(groups):
    q = torch.randn(groups, 5, 2, 8, requires_grad=True)
    k, v = torch.randn(4, 6, 2, 2, 8).unbind(2)
    torch.library.opcheck(ops.cap_attention, (q, k.requires_grad_(), v.requires_grad_(), 0.5))
    with torch.no_grad():
        out, lse = ops.cap_attention(q, k, v, 0.5)
        torch.library.opcheck(ops.cap_attention_backward, (torch.randn_like(out), q, k, v, out, lse, 0.5))


@pytest.mark.parametrize("call", [lambda *a: ops.cap_attention(*a)[0], cap_attention])
def test_torch_compiles_it_without_a_break(call):
    q, kv = torch.randn(2, 5, 2, 8, requires_grad=True), torch.randn(4, 6, 2, 2, 8, requires_grad=True)

    def attend(q, kv):
        return call(q, *kv.unbind(2), 0.5).flatten(2)

    upstream = torch.randn(4, 5, 16)
    expected = attend(q, kv)
    gradients = torch.autograd.grad((expected * upstream).sum(), (q, kv))
    compiled = torch.compile(attend, fullgraph=True)(q, kv)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad((compiled * upstream).sum(), (q, kv)), gradients)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("won", [False, True])
def test_torch_compiles_what_a_gpu_runs_without_a_break(monkeypatch, won, dynamic):
    """Traced on tensors that only claim to be on a GPU: reading the table must not break the graph."""
    key = table.key_of(90, 32, 49, 49, True, torch.bfloat16)
    monkeypatch.setattr(table, "_MEASURED", {key: "triton"} if won else {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        q = torch.empty(1, 49, 2, 32, device="cuda", dtype=torch.bfloat16)
        k, v = torch.empty(4, 49, 2, 2, 32, device="cuda", dtype=torch.bfloat16).unbind(2)
    calls = []

    def backend(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(cap_attention, fullgraph=True, backend=backend, dynamic=dynamic)(q, k, v, 0.2)
    assert out.shape == (4, 49, 2, 32)
    assert any("scalekd_ds.cap_attention" in call for call in calls) == won
    assert any("scaled_dot_product_attention" in call for call in calls) != won


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
def test_device_table_and_sizes_choose_the_implementation(device, architecture, sizes, shared, dtype, expected):
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
        ({"q": (0, 5, 2, 8)}, r"q has shape \(0, 5, 2, 8\): .*G a divisor of k's batch, 4"),
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
    # a meta tensor takes the operator to its fake kernel
    for call in (cap_attention,) if "meta" in change.values() else (cap_attention, ops.cap_attention):
        with pytest.raises(ValueError, match=words) as error:
            call(**arguments, scale=1.0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((20, 5, 6), "q has head size 20: the kernels take multiples of 8 from 8 to 256"),
        ((264, 5, 6), "q has head size 264"),
        ((8, 1025, 6), "q has 1025 queries and k 6 keys: the kernels take at most 1024"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused_by_the_operator_alone(sizes, words):
    D, Q, S = sizes
    k = torch.randn(1, S, 1, D)
    with pytest.raises(ValueError, match=words):
        ops.cap_attention(torch.randn(1, Q, 1, D), k, k, 1.0)
    # the entry point takes them all the same
    assert cap_attention(torch.randn(1, Q, 1, D), k, k, 1.0).shape == (1, Q, 1, D)
