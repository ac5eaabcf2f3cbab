"""CAP against the official AttentionProjector: outputs, every gradient and BatchNorm's statistics (golden a*, b*)."""

import pytest
import torch
import torch.nn.functional as F
from golden_files import golden, relative_error
from golden_map import projector_name, projector_state
from torch.utils._python_dispatch import TorchDispatchMode

from scalekd_ds.projector.convolution import PatchConv
from scalekd_ds.projector.cross_attention import CrossAttentionProjector
from scalekd_ds.projector.pair import ProjectorPair

CASES = [
    "a1_cap_self_7x7_w1_s5",
    "a4_cap_self_8x8_w2_s1",
    "a7_cap_convnext_self_7x7_w1_s1",
    "b1_cap_query_q7_k14_s5",
    "b4_cap_query_q7_k7_s5_v2",
]
# analytically zero: a bias before train-mode BatchNorm, and a shift that softmax does not see
ZERO = {"conv.bias", "k.bias"}


def build(case, dtype=torch.float32):
    file = golden(case)
    meta = file.meta
    layer_norm = "fmd_convnext" in meta["module"]
    cap = CrossAttentionProjector(
        meta["student_dims"],
        meta["teacher_dims"],
        meta["pos_hw"],
        meta["query_hw"],
        meta["num_heads"],
        meta["softmax_scale"],
        learned_query=meta["self_query"],
        norm="layer" if layer_norm else "batch",
        windows=meta["window_shapes"],
    )
    cap.load_state_dict(projector_state(file.below("param") | file.below("buffer_before")))
    return file, cap.to(dtype), ZERO - ({"conv.bias"} if layer_norm else set())


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_statistics_are_the_official_ones(case):
    file, cap, zero = build(case)
    x = file["input.x"].clone().requires_grad_()
    query = file["input.query"].clone().requires_grad_() if "input.query" in file.tensors else None

    cap.eval()
    with torch.no_grad():
        assert relative_error(cap(x, query), file["output.out_eval"]) < 1e-5

    cap.train()
    out = cap(x, query)
    assert relative_error(out, file["output.out"]) < 1e-5
    loss = (out * file["input.cotangent"]).sum()
    assert abs(loss.item() - file["output.loss"].item()) < 5e-5
    loss.backward()
    assert relative_error(x.grad, file["grad_input.x"]) < 1e-5
    if query is not None:
        assert relative_error(query.grad, file["grad_input.query"]) < 1e-5
    grads = {name: p.grad for name, p in cap.named_parameters()}
    compared = projector_state(file.below("grad_param"))
    assert set(compared) == set(grads)
    for name, expected in compared.items():
        if name in zero:
            assert grads[name].abs().max() < 1e-4, name
        else:
            assert relative_error(grads[name], expected) < 1e-5, name
    state = cap.state_dict()
    for official, expected in file.below("buffer_after").items():
        assert relative_error(state[projector_name(official)], expected) < 1e-6, official


@pytest.mark.parametrize("case", CASES)
def test_the_attention_block_is_the_official_one(case):
    file, cap, _ = build(case)
    cap.train()
    attended = cap.attend(file["input.x"], file.tensors.get("input.query"))
    assert relative_error(attended, file["inter.pos_attention"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_loss_in_float64_is_the_official_one(case):
    file, cap, _ = build(case, torch.float64)
    cap.train()
    query = file.tensors.get("input.query")
    out = cap(file["input.x"].double(), None if query is None else query.double())
    loss = (out * file["input.cotangent"].double()).sum()
    assert loss.item() == pytest.approx(file["output.loss64"].item(), rel=1e-9)


def test_the_learned_query_is_not_repeated_over_the_batch():
    cap = CrossAttentionProjector(8, 16, (4, 4), (2, 2), 4)
    seen = []
    cap.query_mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    cap(torch.randn(6, 8, 4, 4))
    assert seen == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 5}, "num_heads is 5"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"windows": (3, 3)}, "windows is (3, 3)"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        CrossAttentionProjector(8, 16, (4, 4), (4, 4), **({"num_heads": 4} | arguments))
    assert words in str(error.value)


def test_wrong_inputs_are_named():
    cap = CrossAttentionProjector(8, 16, (4, 4), (2, 2), 4)
    with pytest.raises(ValueError, match=r"grid \(5, 5\)"):
        cap(torch.randn(1, 8, 5, 5))
    with pytest.raises(ValueError, match="learned one"):
        cap(torch.randn(1, 8, 4, 4), torch.randn(1, 4, 16))
    given = CrossAttentionProjector(8, 16, (4, 4), (2, 2), 4, learned_query=False)
    with pytest.raises(ValueError, match="query is missing"):
        given(torch.randn(1, 8, 4, 4))


def test_patches_are_those_of_a_convolution():
    x = torch.randn(2, 5, 4, 3)
    assert PatchConv(5).patches(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        patches = PatchConv(5).patches(x)
    unfolded = F.unfold(x.bfloat16(), 3, padding=1).transpose(1, 2).unflatten(1, (4, 3))
    assert torch.equal(patches, unfolded)


def test_patches_are_as_accurate_as_the_convolution_in_16_bits(monkeypatch):
    torch.manual_seed(0)
    cap = CrossAttentionProjector(48, 64, (7, 7), (5, 5), 4)
    x = torch.randn(16, 48, 7, 7, requires_grad=True)
    upstream = torch.randn(16, 25, 64)

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = cap(x)
        wanted = [x, cap.conv.weight, cap.norm.weight, cap.pos_embed, cap.k.weight, cap.query.weight]
        return out, *torch.autograd.grad((out.float() * upstream).sum(), wanted)

    exact, by_patches = run(False), run(True)
    monkeypatch.setattr(cap.conv, "patches", lambda x: None)
    by_convolution = run(True)
    for ours, theirs, expected in zip(by_patches, by_convolution, exact, strict=True):
        assert relative_error(ours.float(), expected) < 1.5 * relative_error(theirs.float(), expected)


def test_a_channels_last_map_becomes_tokens_without_a_copy():
    pair = ProjectorPair(
        {name: CrossAttentionProjector(16, 32, (7, 7), (5, 5), 4) for name in ("spatial", "frequency")}
    )
    x = torch.randn(3, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    tokens = pair._keys(x, pair._weights([]))
    # rows of both views' channels side by side: a copy would have left rows of 16
    assert tokens.shape == (2, 3 * 49, 16) and tokens.stride() == (16, 32, 1)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_pair_in_one_pass_equals_its_projectors(learned, norm):
    pair = ProjectorPair(
        {n: CrossAttentionProjector(8, 16, (6, 5), (4, 4), 4, 5.0, learned, norm) for n in ("spatial", "frequency")}
    ).double()
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    queries = None if learned else torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    leaves = [x, *pair.parameters()] + ([] if learned else [queries])
    results = []
    for run in (
        lambda: pair.stacked(x, queries),
        lambda: pair.one_by_one(x, [None] * 2 if learned else queries.unbind(0)),
    ):
        before = {name: buffer.clone() for name, buffer in pair.named_buffers()}
        out = run()
        results.append((out, *torch.autograd.grad((out * upstream).sum(), leaves)))
        after = {name: buffer.clone() for name, buffer in pair.named_buffers()}
        results.append(tuple(after.values()))
        pair.load_state_dict(before, strict=False)
    for ours, theirs in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_weights_are_cast_and_joined_by_one_operation_on_a_list(monkeypatch):
    """The same numbers as a cast of all of them joined, bit for bit, in one reading and one writing of each."""
    pair = ProjectorPair({n: CrossAttentionProjector(8, 16, (6, 5), (4, 4), 4, 5.0) for n in ("spatial", "frequency")})
    x, upstream = torch.randn(3, 8, 6, 5, requires_grad=True), torch.randn(2, 3, 16, 16)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            out = pair.stacked(x)
        return out, *torch.autograd.grad((out.float() * upstream).sum(), [x, *pair.parameters()])

    with Calls():
        ours = run()
    # weights of the products and those of the norms, statistics, and the gradients
    assert called.count(torch.ops.aten._foreach_copy_) == 4
    # of the statistics, and of the gradients of keys and values
    assert called.count(torch.ops.aten.cat) == called.count(torch.ops.aten.stack) == 1
    joined = lambda groups, dtype: [torch.cat(list(group)).to(dtype) for group in groups]  # noqa: E731
    monkeypatch.setattr("scalekd_ds.projector.pair.joined", joined)
    theirs = run()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_passes_before_their_backward_passes_keep_their_own_weights():
    pair = ProjectorPair({n: CrossAttentionProjector(8, 16, (6, 5), (4, 4), 4, 5.0) for n in ("spatial", "frequency")})
    x = torch.randn(3, 8, 6, 5)
    parameters = list(pair.eval().parameters())
    once = torch.autograd.grad(pair.stacked(x).square().sum(), parameters)
    first, second = pair.stacked(x), pair.stacked(2 * x)
    second.sum().backward()
    for ours, expected in zip(torch.autograd.grad(first.square().sum(), parameters), once, strict=True):
        assert torch.equal(ours, expected)
