"""What an entry of a teacher cache keeps of tokens and logits, and how a damaged one is told."""

import numpy as np
import pytest
import torch

from scalekd_ds.losses import dual_view_loss, logit_kd
from scalekd_ds.teacher_cache.records import (
    ABSENT,
    Layout,
    checksums,
    decode,
    encode,
    pack,
    quantise,
    reasons_of,
    to_numpy,
    unpack,
)


def stored(layout, tokens, logits, key=7):
    """The records of answers, and what is read of them."""
    fields = {name: to_numpy(value) for name, value in encode(layout, tokens, logits).items()}
    fields["colour"] = np.zeros((len(tokens), 3), np.float32)
    records = pack(layout, np.arange(len(tokens)), {}, fields, key)
    return records, decode(layout, unpack(layout, records))


def test_floats_come_back_as_they_were():
    tokens, logits = torch.randn(3, 16, 24), torch.randn(3, 10)
    _, (found, found_logits) = stored(Layout((16, 24), "fp32", 10, None), tokens, logits)
    assert torch.equal(found, tokens) and torch.equal(found_logits, logits)
    _, (found, _) = stored(Layout((16, 24), "bf16", 10, None), tokens, logits)
    assert torch.equal(found, tokens.bfloat16().float())


def test_eight_bits_are_within_half_a_step_and_cut_nothing_off():
    tokens = torch.randn(4, 49, 32) * torch.logspace(-6, 6, 32) + torch.logspace(6, -6, 32)
    tokens[:, :, 3], tokens[:, :, 4] = 0.0, -7.0
    scale, middle, values = quantise(tokens)
    back = values.float() * scale.float()[:, None] + middle.float()[:, None]
    rounding = 1e-6 * tokens.abs().amax(1, keepdim=True)
    assert ((back - tokens).abs() <= scale.float()[:, None] * 0.50001 + rounding).all()
    assert values.abs().max() <= 127
    assert torch.equal(back[:, :, 3], tokens[:, :, 3]) and torch.equal(back[:, :, 4], tokens[:, :, 4])


def test_eight_bits_keep_what_varies_of_channels_that_are_far_from_zero():
    """Tokens that hardly differ over the grid, as of a teacher that sees next to nothing in an image."""
    tokens = torch.randn(4, 49, 32) * 0.01 + 100.0 * torch.randn(32)
    scale, middle, values = quantise(tokens)
    back = values.float() * scale.float()[:, None] + middle.float()[:, None]
    left = [t - t.mean(1, keepdim=True) for t in (tokens, back)]
    # float32 itself has steps of 4e-6 at 100
    assert (1 - torch.cosine_similarity(*left, -1)).max() < 1e-3
    assert (1 - torch.cosine_similarity(tokens, back, -1)).max() < 1e-6


def test_targets_in_eight_bits_change_the_dual_view_loss_by_less_than_a_thousandth():
    torch.manual_seed(0)
    # as in real transformers, some channels are far larger than the others
    teacher = torch.randn(4, 49, 96) * torch.logspace(-1, 2, 96) + torch.randn(96)
    student = torch.randn(4, 49, 96, 1).squeeze(-1)
    _, (found, _) = stored(Layout((49, 96), "int8", 0, None), teacher, None)
    exact, kept = (dual_view_loss(student, student, t, (7, 7), (1.0, 1.0)) for t in (teacher, found))
    for before, now in zip(exact, kept, strict=True):
        assert abs(now - before) / before < 1e-3
    assert (1 - torch.cosine_similarity(teacher, found, -1)).mean() < 5e-5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_largest_logits_keep_the_loss_of_a_teacher_that_is_sure(temperature):
    torch.manual_seed(0)
    logits, student = torch.randn(8, 1000), torch.randn(8, 1000)
    logits[torch.arange(8)[:, None], torch.randint(0, 1000, (8, 20))] += 8.0
    layout = Layout(None, "int8", 1000, 64)
    _, (tokens, found) = stored(layout, torch.empty(8, 0), logits)
    assert tokens is None
    assert torch.allclose(found.softmax(-1).sum(-1), torch.ones(8))
    top = logits.topk(64).indices
    assert torch.allclose(found.softmax(-1).gather(1, top), logits.softmax(-1).gather(1, top), atol=1e-6)
    exact, kept = (logit_kd(student, t, temperature) for t in (logits, found))
    assert abs(kept - exact) / exact < (2e-3 if temperature == 1.0 else 2e-2)


def test_top_logits_of_many_classes_have_wide_numbers():
    layout = Layout(None, "int8", 70_000, 3)
    logits = torch.randn(2, 70_000)
    logits[:, 69_999] = 30.0
    _, (_, found) = stored(layout, torch.empty(2, 0), logits)
    assert found.argmax(-1).tolist() == [69_999, 69_999]


def test_a_flipped_bit_another_view_and_another_cache_have_other_checksums():
    layout = Layout((4, 8), "int8", 5, None)
    records, _ = stored(layout, torch.randn(2, 4, 8), torch.randn(2, 5), key=1)
    assert (checksums(records, 1) == records["checksum"]).all()
    assert (checksums(records, 2) != records["checksum"]).all()
    raw = records.view(np.uint8).reshape(2, -1)
    for place in range(layout.dtype.itemsize):
        raw[1, place] ^= 1
        assert (checksums(records, 1) == records["checksum"]).tolist() == [True, False]
        raw[1, place] ^= 1


def test_an_image_that_could_not_be_used_has_its_reason_for_an_answer():
    layout = Layout((4, 8), "int8", 5, None)
    fields = {name: to_numpy(v) for name, v in encode(layout, torch.randn(3, 4, 8), torch.randn(3, 5)).items()}
    fields["colour"] = np.ones((3, 3), np.float32)
    records = pack(layout, np.array([7, 8, 9]), {8: "is cut off"}, fields, 0)
    assert records["sample"].tolist() == [7, ABSENT, 9]
    assert reasons_of(records) == {1: "is cut off"}
    assert (checksums(records, 0) == records["checksum"]).all()


def test_an_entry_has_the_bytes_that_are_planned():
    from scalekd_ds.teacher_cache.sizes import entry_bytes

    for tokens in (None, (49, 1536)):
        for store in ("int8", "bf16", "fp32"):
            for classes, top in ((0, None), (1000, None), (1000, 64), (70_000, 8)):
                layout = Layout(tokens, store, classes, top)
                p, c = tokens or (0, 0)
                assert layout.dtype.itemsize == entry_bytes(p, c, classes, store, top)
    # ImageNet-1K with Swin-L in 8 bits
    assert 96e9 < 1_281_167 * Layout((49, 1536), "int8", 1000, 64).dtype.itemsize < 106e9
