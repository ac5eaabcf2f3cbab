"""Views in a finite list of batches, the last of which is short, with the indices of their images."""

import numpy as np
import pytest
import torch
from image_fixtures import make_folder
from loading import CPU, RAW, take

from scalekd_ds.config import DataConfig
from scalekd_ds.data import StreamSampler, TrainLoader
from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.view_loader import ViewLoader

POLICY = {"auto_augment": "rand-m9-n2-mstd0.5"}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "mix_by": "view"}
WAYS = {
    "crop": {},
    "no crop": {"random_crop": False},
    "policy": {**POLICY, "random_erasing": 0.5, **MIXED},
    "policy without crop": {**POLICY, "random_crop": False},
    "mixed without crop": {"random_crop": False, "random_erasing": 0.5, **MIXED},
}


class InTurn:
    """Every sample of view 0 in turn, then those of view 1; the last batch of a view is short."""

    accumulation = 1

    def __init__(self, size, micro_batch, view_seed=0):
        self.size, self.micro_batch, self.view_seed = size, micro_batch, view_seed

    def indices(self, step, micro):
        assert micro == 0
        view, batch = divmod(step, -(-self.size // self.micro_batch))
        first = batch * self.micro_batch
        chosen = np.arange(first, min(first + self.micro_batch, self.size))
        return chosen, np.full(len(chosen), view)


def in_turn(source, cfg, micro, start=0, count=None):
    sampler = InTurn(len(source), micro)
    per_view = -(-len(source) // micro)
    return ViewLoader(source, cfg, sampler, CPU, *RAW, start, 2 * per_view - start if count is None else count)


@pytest.mark.parametrize("way", WAYS)
def test_all_views_come_once_in_their_order_also_in_short_batches(source, way):
    cfg = DataConfig(image_size=16, views=2, **WAYS[way])
    sampler = StreamSampler(12, 0, 12, 12, 0, 1, views=2)
    expected = {}
    for step, (images, _) in enumerate(take(TrainLoader(source, cfg, sampler, CPU, *RAW), 2)):
        for index, view, image in zip(*sampler.indices(step, 0), images, strict=True):
            expected[int(view), int(index)] = image
    batches = list(in_turn(source, cfg, 5))
    assert [len(images) for images, _, _ in batches] == [5, 5, 2, 5, 5, 2]
    keys = iter(sorted(expected))
    for images, ordered, real in batches:
        assert ordered.dtype == real.dtype == np.int64 and np.array_equal(ordered, real)
        for image, index in zip(images, ordered.tolist(), strict=True):
            view, same = next(keys)
            assert same == index and torch.equal(image, expected[view, index])


def test_it_starts_and_ends_at_any_batch(source):
    cfg = DataConfig(image_size=16)
    whole = list(in_turn(source, cfg, 5))
    part = in_turn(source, cfg, 5, start=2, count=3)
    assert len(part) == 3
    for ours, theirs in zip(list(part), whole[2:5], strict=True):
        assert torch.equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert list(in_turn(source, cfg, 5, start=6)) == []


@pytest.mark.parametrize("damage", [b"", b"II*\x00" + bytes(200)], ids=["found by the reader", "found by the decoder"])
@pytest.mark.parametrize("options", [{}, MIXED])
def test_a_bad_file_is_known_by_the_image_that_is_shown_for_it(tmp_path, damage, options):
    make_folder(tmp_path, {"a": 6, "b": 5})
    source = index_folder(tmp_path, "data.train")
    (tmp_path / "b" / "002.jpg").write_bytes(damage)
    batches = in_turn(source, DataConfig(image_size=16, max_bad_share=0.1, **options), 4)
    found = list(batches)
    ordered, real = (np.concatenate([batch[part] for batch in found]) for part in (1, 2))
    assert ordered.tolist() == [*range(11)] * 2
    assert set(ordered[ordered != real]) == {8} == set(batches.bad_files.reasons)
    assert (source.labels[ordered] == source.labels[real]).all()


def test_batches_of_accumulated_steps_are_refused(source):
    with pytest.raises(ValueError, match="the sampler has 2 in each"):
        ViewLoader(source, DataConfig(), StreamSampler(12, 0, 12, 6, 0, 1), CPU, *RAW, 0, 1)
