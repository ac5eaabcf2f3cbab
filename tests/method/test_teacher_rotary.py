"""DINOv3's rotary embedding: held by a frozen teacher, with timm's own numbers."""

import copy
import pickle

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from zoo import make_teacher

NAME = "vit_small_patch16_dinov3"
GRID = (4, 4)


@pytest.fixture
def teacher():
    return make_teacher(NAME)


def made(rope, grid=GRID):
    """What timm makes at each call."""
    return RotaryEmbeddingDinoV3._create_embed(rope, list(grid), no_aug=True)


@pytest.fixture
def makes(monkeypatch):
    """The grids of the embeddings that are made, in order."""
    grids, create = [], RotaryEmbeddingDinoV3._create_embed
    monkeypatch.setattr(
        RotaryEmbeddingDinoV3,
        "_create_embed",
        lambda self, grid, *a, **k: grids.append(grid) or create(self, grid, *a, **k),
    )
    return grids


def test_a_step_makes_no_embedding_and_has_timms_numbers(teacher, makes):
    images, tokens = torch.randn(2, 3, 64, 64), torch.randn(2, 16, 48, requires_grad=True)

    def step():
        targets, out = teacher.targets(images), teacher.last_stage(tokens)
        return targets.tokens, targets.logits, out, *torch.autograd.grad(out.sum(), tokens)

    ours = step()
    assert makes == []
    teacher.model.rope.__class__ = RotaryEmbeddingDinoV3
    teacher.model.rope.feat_shape = None
    theirs = step()
    assert makes == [GRID, GRID]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_hold_it_too(teacher, makes, duplicate):
    images = torch.randn(1, 3, 64, 64)
    expected = teacher.targets(images).tokens
    assert torch.equal(duplicate(teacher).targets(images).tokens, expected)
    assert makes == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_conversion_makes_it_anew_instead_of_rounding_it(teacher, dtype):
    rope = teacher.model.rope
    teacher.to(dtype)
    # what timm would make of periods of this type
    expected = made(rope)
    assert expected.dtype == rope.periods.dtype != torch.bfloat16
    assert torch.equal(rope.get_embed(shape=GRID), expected)
    assert torch.equal(rope.get_embed(), expected)


def test_it_moves_with_the_model(teacher):
    teacher.to("meta")
    assert teacher.model.rope.get_embed(shape=GRID).device.type == "meta"


def test_other_grids_are_made_as_before(teacher, makes):
    rope = teacher.model.rope
    assert torch.equal(rope.get_embed(shape=(3, 5)), made(rope, (3, 5)))
    assert makes[0] == (3, 5)
    assert torch.equal(rope.get_embed(shape=GRID), made(rope))


def test_a_teacher_in_train_mode_still_draws_its_augmentation(makes):
    teacher = make_teacher(NAME, train_mode=True, rope_rescale_coords=2.0)
    draws = [teacher.model.rope.get_embed(shape=GRID) for _ in range(2)]
    assert not torch.equal(*draws)
    teacher.model.eval()
    assert torch.equal(teacher.model.rope.get_embed(shape=GRID), made(teacher.model.rope))


def test_the_state_dict_stays_as_it_was(teacher):
    assert not [name for name in teacher.state_dict() if "rope" in name]
