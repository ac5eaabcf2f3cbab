"""The dual-view kernels: numbers in the interpreter and on a GPU, what they compile to, operators, dispatch, errors."""

import functools

import pytest
import torch
from aot import ARCHITECTURES, aot, assert_sound
from dual_view_cases import CASES, basis_of, constant, run
from interpreted import run_cases
from torch._subclasses.fake_tensor import FakeTensorMode

from scalekd_ds.kernels import dual_view_loss
from scalekd_ds.kernels.dual_view import launch, ops, reference, triton_kernels
from scalekd_ds.kernels.dual_view.api import implementation

# of the gradient, by the dtype that it is stored in; sums are float32 throughout
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}
interpreted = functools.cache(lambda: run_cases(__file__.replace("test_dual_view", "dual_view_cases")))


def check(case, errors):
    assert errors["finite"] == 1 and errors["deterministic"] == 1
    assert errors["loss"] < 5e-7
    assert errors["gradient"] < TOLERANCE[case.get("dtype", "float32")]
    assert errors["clamped"] < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_numbers_in_the_interpreter_are_those_of_float64(name):
    check(CASES[name], interpreted()[name])


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_constant_maps_in_the_interpreter_have_no_gradient(which):
    expected = {"per_token": 0.0 if which == "both" else 1.0, "gradient": 0.0}
    assert interpreted()[f"constant {which}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_numbers_on_the_gpu_are_those_of_float64(name):
    errors = run(**CASES[name], device="cuda")
    if "cut" in name or "band" in name:
        # a general filter is a tf32 dot there
        assert errors["loss"] < 1e-3 and errors["gradient"] < 5e-3 and errors["deterministic"] == 1
    else:
        check(CASES[name], errors)


@pytest.mark.gpu
def test_constant_maps_on_the_gpu_have_no_gradient():
    assert constant("student", "cuda") == pytest.approx({"per_token": 1.0, "gradient": 0.0}, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_without_a_gpu_has_the_same_numbers(name):
    check(CASES[name], run(**CASES[name]))


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_maps_in_the_reference_have_no_gradient(which, value):
    """A student's 1x1 map makes every token equal: the frequency view then says nothing, instead of noise times 1e7."""
    shape = (2, 49, 96)
    f, t = (
        torch.full(shape, value) * torch.rand(96) if which in (n, "both") else torch.randn(shape)
        for n in ("student", "teacher")
    )
    f.requires_grad_()
    frequency = dual_view_loss(f, f, t)[1]
    (gradient,) = torch.autograd.grad(frequency, f)
    assert frequency.item() == pytest.approx(0.0 if which == "both" else 49.0, abs=1e-5)
    # of a constant teacher, the loss is |u|^2 = 1 whatever u is
    assert gradient.abs().max() < (1e-7 if which == "teacher" else 1e-30)


def test_a_nan_is_not_taken_for_silence():
    s, t = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    s[0, 1, 2] = float("nan")
    assert dual_view_loss(s, s, t).isnan().all()
    assert ops.dual_view([s], [s], t, None, [1.0, 1.0])[0].isnan().all()


def test_float16_gradients_saturate():
    s = torch.zeros(1, 4, 8, dtype=torch.float16, requires_grad=True)
    dual_view_loss(s, s.detach(), torch.randn(1, 4, 8).half())[0].backward()
    assert s.grad.isfinite().all() and s.grad.abs().max() == 65504


def test_several_stages_equal_one_after_the_other():
    stages = [[torch.randn(2, 9, 16) for _ in range(2)] for _ in range(3)]
    t, weights = torch.randn(2, 9, 16), [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)]
    together = dual_view_loss(*zip(*stages, strict=True), t, weights=weights)
    for stage, pair, losses in zip(stages, weights, together, strict=True):
        torch.testing.assert_close(losses, dual_view_loss(*stage, t, weights=pair))


def test_saved_for_backward_is_16_bytes_a_token():
    s = [torch.randn(4, 49, 64, requires_grad=True) for _ in range(2)]
    t = torch.randn(4, 49, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.dual_view(s[:1], s[1:], t, None, [1.0, 1.0])
    inputs = {x.data_ptr() for x in (*s, t)}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in inputs) == 16 * 4 * 49


# -- what the kernels compile to -----------------------------------------------------------------------------------

# tokens, rank of the filter, stages: every kind of filter and every tile
SHAPES = [(49, None, 2), (121, None, 2), (256, None, 2), (576, None, 1), (1024, None, 1)]
SHAPES += [(49, 4, 2), (49, 36, 2), (121, 9, 2), (121, 100, 1), (196, 4, 2), (400, 9, 1)]


def types_of(kernel, dtype):
    wide = ("q_ptr", "sums_ptr", "coef_ptr", "upstream_ptr", "loss_ptr")
    kinds = {n: "*fp32" if n in wide else f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")}
    for parameter in kernel.params:
        if parameter.name not in kinds:
            kinds[parameter.name] = parameter.annotation_type or ("i32" if parameter.name == "P" else "fp32")
    return kinds


COMPILED = [(*s, "bf16") for s in SHAPES] + [
    (*s, "fp32") for s in SHAPES if s[:2] in ((49, None), (256, None), (49, 4))
]


@pytest.mark.parametrize(
    ("tokens", "rank", "stages", "dtype", "architectures"),
    [
        *((*case, ARCHITECTURES if case[0] == 49 and case[3] == "bf16" else (90,)) for case in COMPILED),
        *(pytest.param(*case, ARCHITECTURES, marks=pytest.mark.slow) for case in COMPILED),
    ],
)
def test_compiles_without_spills(tokens, rank, stages, dtype, architectures):
    kind, tile = launch.kind_of(tokens, rank), launch.tile_of(tokens, rank, 2 if dtype == "bf16" else 4)
    assert tile.stages == stages
    width = {triton_kernels.MEAN: 1, triton_kernels.DENSE: tokens}.get(kind, rank)
    constants = {"C": 1024, "L": stages, "BP": tile.tokens, "BC": tile.channels, "R": width, "BR": launch.padded(width)}
    constants |= {"KIND": kind, "DROPS_MEAN": True, "PRECISION": "tf32"}
    has_dot = kind in (triton_kernels.LOW_RANK, triton_kernels.DENSE)
    for kernel, more in (
        (triton_kernels.dual_view_sums_kernel, {"K": 4}),
        (triton_kernels.dual_view_backward_kernel, {}),
    ):
        for arch in architectures:
            resources = aot(kernel, types_of(kernel, dtype), constants | more, tile.warps, arch, num_stages=1)
            assert_sound(resources, arch, has_dot)


def test_the_finishing_kernel_compiles():
    kernel = triton_kernels.dual_view_finish_kernel
    constants = {"K": 4, "L": 2, "BP": 256, "EPS": 1e-12, "NOISE": 1e-12}
    for arch in ARCHITECTURES:
        assert_sound(aot(kernel, types_of(kernel, "fp32"), constants, 1, arch), arch, False)


# -- as PyTorch operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
def test_the_operators_pass_opcheck(stages, filtered):
    s = [torch.randn(2, 9, 16, requires_grad=True) for _ in range(2 * stages)]
    basis = basis_of((3, 3), [(0, 0), (0, 1)]) if filtered else None
    torch.library.opcheck(ops.dual_view, (s[:stages], s[stages:], torch.randn(2, 9, 16), basis, [0.5, 0.2] * stages))
    coef = torch.rand(stages, 2, 4, 9)
    inputs = ([x.detach() for x in s[:stages]], [x.detach() for x in s[stages:]], torch.randn(2, 9, 16), basis, coef)
    torch.library.opcheck(ops.dual_view_backward, (torch.randn(stages, 2), *inputs))


@pytest.mark.parametrize("path", ["operator", "api"])
def test_torch_compiles_it_without_a_break(path):
    def loss(a, b, t):
        if path == "api":
            return dual_view_loss(a, b, t, weights=(0.5, 0.2)).sum()
        return ops.dual_view([a], [b], t, None, [0.5, 0.2])[0].sum()

    a, b = (torch.randn(2, 9, 16, requires_grad=True) for _ in range(2))
    t = torch.randn(2, 9, 16)
    expected = loss(a, b, t)
    gradients = torch.autograd.grad(expected, (a, b))
    compiled = torch.compile(loss, fullgraph=True)(a, b, t)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, (a, b)), gradients)


@pytest.mark.parametrize("filtered", [False, True])
def test_torch_compiles_what_a_gpu_runs_without_a_break(filtered):
    """Traced on tensors that only claim to be on a GPU."""
    with FakeTensorMode():
        s, f, t = (torch.empty(2, 49, 64, device="cuda") for _ in range(3))
        basis = torch.empty(49, 4, device="cuda") if filtered else None
    calls = []

    def backend(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(dual_view_loss, fullgraph=True, backend=backend)
    assert compiled(s, f, t, basis, (0.5, 0.2)).shape == (2,)
    assert any("scalekd_ds.dual_view" in call for call in calls)


# -- dispatch and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "rank", "expected"),
    [
        ("cpu", torch.float32, 49, None, "reference"),
        ("cuda", torch.float32, 49, None, "triton"),
        ("cuda", torch.bfloat16, 1024, None, "triton"),
        ("cuda", torch.float16, 256, 4, "triton"),
        ("cuda", torch.float64, 49, None, "reference"),
        ("cuda", torch.float32, 1025, None, "reference"),
        ("cuda", torch.float32, 256, 65, "reference"),
    ],
)
def test_device_dtype_and_sizes_choose_the_implementation(device, dtype, tokens, rank, expected):
    assert implementation(device, {dtype, torch.float32} - {None}, tokens, rank) == expected


def test_cpu_tensors_go_to_the_reference(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "dual_view_loss", lambda *a: called.append(1) or torch.zeros(1, 2))
    dual_view_loss(*(torch.randn(1, 4, 8) for _ in range(3)))
    assert called == [1]


def tensors(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: dual_view_loss(x, x, x[0]), r"t has shape \(4, 8\): it must be \(batch, tokens, channels\)"),
        (lambda x: dual_view_loss(x, tensors(2, 4, 9), x), r"s_frequency has shape \(2, 4, 9\): it must equal t's"),
        (lambda x: dual_view_loss(x.to("meta"), x, x), "s_spatial is on meta: it must be on t's device, cpu"),
        (lambda x: dual_view_loss(x.long(), x, x), "s_spatial has dtype torch.int64: it must be a floating"),
        (lambda x: dual_view_loss(x, x.mT.contiguous().mT, x), "s_frequency has strides .*channels must be contiguous"),
        (lambda x: dual_view_loss(x, x, x, tensors(5, 2)), r"filter has shape \(5, 2\): it must be \(4, rank\)"),
        (lambda x: dual_view_loss(x, x, x, torch.eye(4)), "filter has rank 4: it cuts everything; it must be 1 to 3"),
        (lambda x: dual_view_loss(x, x, x, torch.eye(4)[:, :0]), "filter has rank 0: it cuts nothing"),
        (lambda x: dual_view_loss(x, x, x, torch.eye(4, 2, device="meta")), "filter is on meta"),
        (lambda x: dual_view_loss([x, x], [x], x, weights=[(1, 1)]), "s_spatial has 2 stages, s_frequency 1 and weig"),
        (lambda x: dual_view_loss([x], [x], x, weights=[1.0]), "a pair for each stage"),
        (lambda x: dual_view_loss(x, x, x, weights=(1.0,)), r"weights is \(1.0,\): it must be \(spatial, frequency\)"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(tensors(2, 4, 8))
    assert "\n" not in str(error.value)
