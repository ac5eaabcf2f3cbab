"""Swin's and Swin v2's attention in a frozen teacher: timm's numbers, and timm's own where a block is not what it seems."""

import copy
import pickle
import re

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn
from zoo import make_teacher

from scalekd_ds.models.window_attention import FrozenSwinBlock, FrozenSwinV2Block, fuse_window_attention

NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
BLOCKS = (SwinTransformerBlock, SwinTransformerV2Block)
# map, window, shift
MAPS = {
    "whole": ((7, 7), 7, 0),
    "windows": ((8, 8), 4, 0),
    "shifted": ((8, 8), 4, 2),
    "shifted by one": ((9, 9), 3, 1),
    "not square": ((4, 12), 4, 2),
    "clamped on one axis": ((4, 9), 6, 3),
    "clamped": ((3, 5), 7, 3),
    "padded": ((10, 13), 4, 0),
    "padded and shifted": ((10, 13), 4, 2),
}


def block(kind, grid, window, shift, **kwargs):
    """A timm block with weights that its initialisation would leave at zero."""
    torch.manual_seed(0)
    try:
        made = kind(32, grid, num_heads=2, window_size=window, shift_size=shift, **kwargs)
    except RuntimeError as error:
        # the static mask of Swin v2, until timm 1.0.27 at the earliest
        pytest.skip(f"timm {timm.__version__} has no shifted windows that reach beyond the map: {error}")
    for name, p in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.5)
        elif "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return made.eval().requires_grad_(False)


def fused(timms):
    ours = copy.deepcopy(timms)
    assert fuse_window_attention(ours) is None
    assert type(ours) in (FrozenSwinBlock, FrozenSwinV2Block)
    return ours


def forward_and_backward(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, x, upstream)[0]


def relative(ours, theirs):
    """The largest difference, of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_has_timms_numbers(kind, case):
    timms = block(kind, *MAPS[case])
    x = torch.randn(2, *MAPS[case][0], 32)
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        ours, theirs = fused(timms).to(dtype), copy.deepcopy(timms).to(dtype)
        for a, b in zip(*(forward_and_backward(m, x.to(dtype)) for m in (ours, theirs)), strict=True):
            assert a.dtype == dtype and relative(a, b) < limit
        with torch.no_grad():
            # takes another path where no gradient is asked for
            assert relative(ours(x.to(dtype)), theirs(x.to(dtype))) < limit


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("case", ["shifted", "padded and shifted"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_autocast_is_no_further_from_float64_than_timms(kind, case, lowered):
    timms = block(kind, *MAPS[case])
    ours, x = fused(timms), torch.randn(4, *MAPS[case][0], 32)
    if lowered:
        ours.attn.hold(torch.bfloat16)
    exact = forward_and_backward(copy.deepcopy(timms).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        both = [forward_and_backward(m, x) for m in (ours, timms)]
    for a, b, c in zip(*both, exact, strict=True):
        assert a.dtype == b.dtype and (a - c).norm() < 1.1 * (b - c).norm()


@pytest.mark.parametrize("kwargs", [{"qkv_bias": False}, {"dynamic_mask": True}])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_other_settings_have_timms_numbers(kind, kwargs):
    timms = block(kind, (10, 13), 4, 2, **kwargs)
    x = torch.randn(2, 10, 13, 32)
    assert relative(fused(timms)(x), timms(x)) < 1e-6


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_map_of_another_size_is_left_to_timm(kind):
    timms = block(kind, (8, 8), 4, 2, dynamic_mask=True)
    ours, x = fused(timms), torch.randn(2, 12, 6, 32)
    assert torch.equal(ours(x), timms(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_dropout_of_the_attention_is_left_to_timm(kind):
    timms = block(kind, (8, 8), 4, 2, attn_drop=0.5).train()
    ours, x = fused(timms), torch.randn(2, 8, 8, 32)
    both = []
    for m in (ours, timms):
        torch.manual_seed(0)
        both.append(m(x))
    assert torch.equal(*both)


# -- what may happen to a frozen model ------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def teacher(request):
    torch.manual_seed(0)
    return make_teacher(request.param, depths=(2, 2, 2, 1))


def blocks_of(teacher):
    return [b for layer in teacher.model.layers for b in layer.blocks]


def of_timm(teacher):
    """A timm model with the teacher's weights, sizes and types."""
    model = copy.deepcopy(teacher.model)
    kind = SwinTransformerBlock if isinstance(blocks_of(teacher)[0], FrozenSwinBlock) else SwinTransformerV2Block
    for layer in model.layers:
        for b in layer.blocks:
            b.attn.__class__, b.__class__ = type(b.attn).__mro__[2], kind
    return model


def check(teacher, size=(64, 64), limit=2e-6):
    images = torch.randn(2, 3, *size, dtype=next(teacher.parameters()).dtype)
    with torch.no_grad():
        theirs = of_timm(teacher).forward_features(images).flatten(1, 2)
    assert relative(teacher.targets(images).tokens, theirs) < limit


def test_every_block_of_a_teacher_is_fused_and_its_state_dict_is_timms(teacher):
    assert all(isinstance(b, FrozenSwinBlock | FrozenSwinV2Block) for b in blocks_of(teacher))
    theirs = of_timm(teacher)
    assert list(teacher.model.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in teacher.model.named_modules()] == [name for name, _ in theirs.named_modules()]
    check(teacher)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_have_the_same_bits(teacher, duplicate, lowered):
    if lowered:
        teacher.lower_precision(torch.bfloat16)
        assert {b.attn.window_constant.dtype for b in blocks_of(teacher)} == {torch.bfloat16}
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(duplicate(teacher).targets(images).tokens, teacher.targets(images).tokens)


def test_weights_that_are_loaded_later_are_those_that_it_uses(teacher):
    state = {k: torch.rand_like(v) - 0.5 if v.is_floating_point() else v for k, v in teacher.model.state_dict().items()}
    before = blocks_of(teacher)[1].attn.window_constant
    teacher.model.load_state_dict(state)
    assert not torch.equal(blocks_of(teacher)[1].attn.window_constant, before)
    check(teacher)


def test_conversions_build_the_constant_from_the_weights(teacher):
    check(teacher.double(), limit=1e-13)
    teacher.to(torch.bfloat16).to("meta")
    assert {(b.attn.window_constant.dtype, b.attn.window_constant.device.type) for b in blocks_of(teacher)} == {
        (torch.bfloat16, "meta")
    }


def test_another_size_of_images_is_followed(teacher):
    teacher.model.set_input_size((96, 64), window_size=(3, 4))
    attn = blocks_of(teacher)[1].attn
    assert attn.grid == (24, 16) and attn.takes(torch.empty(1, 24, 16, 24))
    check(teacher, (96, 64))


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_compiled_without_a_break(kind):
    ours, x = fused(block(kind, (8, 8), 4, 2)), torch.randn(2, 8, 8, 32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), ours(x))
    # with a gradient, as in the last stage
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x.requires_grad_()), ours(x))


# -- what is not timm's ---------------------------------------------------------------------------------------------


class OwnBlock(SwinTransformerBlock):
    def _attn(self, x):
        return x


def subclass(b):
    b.__class__ = OwnBlock


def own_bias(b):
    b.attn._get_rel_pos_bias = lambda: torch.zeros(1, 1, 16, 16)


def own_mask(b):
    b.attn_mask = torch.zeros_like(b.attn_mask)


def another_window(b):
    b.attn.set_window_size((3, 3))


def own_layer(b):
    b.attn.qkv = nn.Sequential(b.attn.qkv)


def hooked(b):
    b.attn.attn_drop.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (subclass, "it is a OwnBlock"),
        (own_bias, "a method of its attention was replaced"),
        (own_mask, "its mask is not that of shifted windows"),
        (another_window, r"its attention was built for windows of \(3, 3\) and it has \(4, 4\)"),
        (own_layer, "its attention has layers of its own"),
        (hooked, "its attention has hooks"),
    ],
)
def test_a_block_that_is_not_timms_keeps_its_own_attention_and_one_line_says_so(change, words):
    model = timm.create_model(
        NAMES[0], img_size=64, window_size=4, embed_dim=24, num_heads=(1, 2, 3, 6), depths=(2, 1, 1, 1)
    )
    odd = model.layers[0].blocks[1]
    change(odd)
    kept = type(odd)
    notice = fuse_window_attention(model)
    assert "\n" not in notice
    assert notice.startswith(
        "1 of 5 blocks of the teacher (SwinTransformer) keep their own, slower attention: layers.0.blocks.1"
    )
    assert re.search(words, notice)
    assert type(odd) is kept and isinstance(model.layers[0].blocks[0], FrozenSwinBlock)
