"""Mixing by view: what is drawn, what is made of it, and what happens where a partner is bad."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from loading import CPU, RAW, take

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler, TrainLoader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.view_mix import _mix_by_mask, _mix_one_by_one, draw_mix, mix_images, pack_mixes, soft_targets
from scalekd_ds.errors import UserError


def draws(count, size=50, side=32, **options):
    cfg = DataConfig(image_size=side, mix_by="view", **options)
    return [draw_mix(cfg, 3, i // size, i % size, size) for i in range(count)]


def loader(source, cfg, micro, device=CPU):
    return TrainLoader(source, cfg, StreamSampler(len(source), 0, micro, micro, 0, 1), device, *RAW)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixed_images_are_those_asked_for(alpha):
    count = 4000
    found = draws(count, mixup=alpha, cutmix=alpha, mix_probability=0.7)
    mixed = [each for each in found if each is not None]
    # within five standard deviations
    assert len(mixed) / count == pytest.approx(0.7, abs=5 * np.sqrt(0.7 * 0.3 / count))
    cut = [each for each in mixed if each.weight == 0.0 and each.share > 0.0]
    assert len(cut) / len(mixed) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(len(mixed)))
    shares = np.array([each.share for each in mixed if each.box == (0, 0, 32, 32)])
    assert shares.mean() == pytest.approx(0.5, abs=5 * shares.std() / np.sqrt(len(shares)))
    # the variance of Beta(a, a)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert all(each.share == 1.0 - each.box[2] * each.box[3] / 32**2 for each in cut)


def test_partners_are_any_other_image_and_boxes_any_place():
    found = draws(8000, size=20, cutmix=1.0)
    pairs = np.zeros((20, 20))
    for i, each in enumerate(found):
        pairs[i % 20, each.partner] += 1
    assert (np.diag(pairs) == 0).all()
    others = pairs[~np.eye(20, dtype=bool)]
    expected = 8000 / 380
    # chi-squared with 379 degrees of freedom: 469 is its 0.1% tail
    assert ((others - expected) ** 2 / expected).sum() < 469
    shown = np.zeros((32, 32))
    for _, _, (y, x, h, w), _ in found:
        assert 0 <= y <= y + h <= 32 and 0 <= x <= x + w <= 32
        shown[y : y + h, x : x + w] += 1
    # timm's boxes are cut at the edge: the middle is covered most, and each quarter as often
    quarters = [shown[:16, :16], shown[:16, 16:], shown[16:, :16], shown[16:, 16:]]
    assert np.ptp([q.sum() for q in quarters]) / shown.sum() < 0.02 and shown.min() > 0


@pytest.mark.parametrize("seed", [-3, 0, 2**61])
def test_a_draw_is_a_function_of_seed_view_and_sample(seed):
    cfg = DataConfig(mix_by="view", mixup=0.8, cutmix=1.0)
    one = draw_mix(cfg, seed, 2, 5, 1000)
    assert one == draw_mix(cfg, seed, 2, 5, 1000)
    others = [draw_mix(cfg, *each, 1000) for each in ((seed + 1, 2, 5), (seed, 3, 5), (seed, 2, 6))]
    assert len({one, *others}) == 4


def test_one_way_of_mixing_alone_is_taken():
    assert all(each.box == (0, 0, 32, 32) and 0.0 < each.weight < 1.0 for each in draws(50, mixup=1.0))
    assert all(each.weight == 0.0 for each in draws(50, cutmix=1.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_gpus_way_gives_the_bits_of_the_way_of_a_cpu(memory_format):
    mixes = draws(12, side=16, mixup=0.8, cutmix=1.0, mix_probability=0.7)
    count = len(mixes) - mixes.count(None)
    images = torch.randn(12 + count, 3, 16, 16).to(memory_format=memory_format)
    packed = pack_mixes(mixes)
    expected, others = images[:12].clone(), iter(images[12:])
    for place, mix in enumerate(mixes):
        if mix is not None:
            y, x, h, w = mix.box
            whole = mix.weight * expected[place] + (1.0 - mix.weight) * next(others)
            expected[place, :, y : y + h, x : x + w] = whole[:, y : y + h, x : x + w]
    results = []
    for way in (_mix_one_by_one, _mix_by_mask):
        given = images.clone()
        way(given[:12], given[12:], packed)
        torch.testing.assert_close(given[:12], expected)
        results.append(given[:12])
    assert torch.equal(*results)
    assert torch.equal(mix_images(images.clone(), packed), results[0])
    assert pack_mixes([None]) is None


def test_targets_are_in_the_proportion_of_the_images(source):
    cfg = DataConfig(image_size=32, mix_by="view", mixup=0.8, cutmix=1.0, mix_probability=0.6)
    images, targets = take(loader(source, cfg, 12), 1)[0]
    indices, views = StreamSampler(12, 0, 12, 12, 0, 1).indices(0, 0)
    plain = take(loader(source, DataConfig(image_size=32), 12), 1)[0][0]
    alone = dict(zip(indices.tolist(), plain, strict=True))
    assert targets.shape == (12, 2) and targets.dtype == torch.float32 and images.shape == (12, 3, 32, 32)
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    mixed = 0
    for index, view, image, target in zip(indices.tolist(), views.tolist(), images, targets, strict=True):
        mix = draw_mix(cfg, 0, view, index, 12)
        expected, shares = alone[index].clone(), torch.zeros(2)
        shares[source.labels[index]] += 1.0 if mix is None else mix.share
        if mix is not None:
            mixed += 1
            shares[source.labels[mix.partner]] += 1.0 - mix.share
            y, x, h, w = mix.box
            inside = mix.weight * expected + (1 - mix.weight) * alone[mix.partner]
            expected[:, y : y + h, x : x + w] = inside[:, y : y + h, x : x + w]
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(target, shares)
    assert 0 < mixed < 12


def test_an_image_mixed_with_one_of_its_class_keeps_its_target():
    mix = next(each for each in draws(10, mixup=1.0) if each.share != 0.5)
    torch.testing.assert_close(soft_targets(np.array([1, 1]), [mix], 3), torch.tensor([[0.0, 1.0, 0.0]]))


def test_a_bad_partner_is_replaced_as_a_bad_sample_is(tmp_path, capfd):
    make_folder(tmp_path, {"a": 6, "b": 6})
    source = index_folder(tmp_path, "data.train")
    cfg = DataConfig(image_size=16, mix_by="view", cutmix=1.0, max_bad_share=0.1)
    sampler = StreamSampler(12, 0, 2, 2, 0, 1)
    indices, views = sampler.indices(0, 0)
    whole = take(loader(source, cfg, 2), 1)[0]
    bad = next(
        mix.partner
        for index, view in zip(indices.tolist(), views.tolist(), strict=True)
        if (mix := draw_mix(cfg, 0, view, index, 12)).partner not in indices and 0.0 < mix.share < 1.0
    )
    Path(source.paths[bad]).write_bytes(b"II*\x00" + bytes(200))
    batches = loader(source, cfg, 2)
    images, targets = take(batches, 1)[0]
    # its class is the same one, its pixels are not
    assert torch.equal(targets, whole[1]) and not torch.equal(images, whole[0])
    assert list(batches.bad_files.reasons) == [bad]
    assert capfd.readouterr().err.count("another of its class takes its place") == 1
    assert torch.equal(images, take(loader(source, cfg, 2), 1)[0][0])


def test_the_replacement_of_a_bad_partner_is_that_of_a_bad_sample_in_the_same_view(tmp_path):
    source = index_folder(make_folder(tmp_path, {"a": 8, "b": 1}), "data.train")
    bad = 3
    Path(source.paths[bad]).write_bytes(b"")
    mixed = DataConfig(image_size=16, mix_by="view", cutmix=1.0, max_bad_share=0.2)
    plain, views = DataConfig(image_size=16, max_bad_share=0.2), 4
    sampler, alone, replaced = StreamSampler(9, 0, 9, 9, 0, 1), {}, set()
    for view, (images, _) in enumerate(take(loader(source, plain, 9), views)):
        alone |= {
            (index, view): image for index, image in zip(sampler.indices(view, 0)[0].tolist(), images, strict=True)
        }
    for view, (images, _) in enumerate(take(loader(source, mixed, 9), views)):
        for index, image in zip(sampler.indices(view, 0)[0].tolist(), images, strict=True):
            mix = draw_mix(mixed, 0, view, index, 9)
            if index != bad and mix.partner == bad:
                y, x, h, w = mix.box
                # what stands at the place of the bad image itself
                assert torch.equal(image[:, y : y + h, x : x + w], alone[bad, view][:, y : y + h, x : x + w])
                replaced |= {view} if h * w else set()
    assert replaced - {0}, "a partner was bad in a later view"


def test_a_single_image_has_nothing_to_be_mixed_with(tmp_path):
    source = index_folder(make_folder(tmp_path, {"a": 1}), "data.train")
    with pytest.raises(UserError, match=r"data\.mix_by is 'view', and there is one training image"):
        loader(source, DataConfig(mix_by="view", mixup=1.0), 1)
    assert loader(source, DataConfig(mix_by="view"), 1) is not None


def test_an_odd_batch_is_mixed_by_view(source):
    images, targets = take(loader(source, DataConfig(image_size=16, mix_by="view", mixup=1.0), 5), 1)[0]
    assert images.shape == (5, 3, 16, 16) and targets.shape == (5, 2)
