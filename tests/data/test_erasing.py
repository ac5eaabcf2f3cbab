"""Random erasing: the way of a GPU, in a fixed number of kernels, gives the numbers of the way of a CPU."""

import numpy as np
import pytest
import torch

from scalekd_ds.data.erasing import Boxes, ErasedBox, _erase_by_mask, erase, pack_boxes

# corners, edges, a single pixel, a row, and images that keep all of theirs
BOXES = [(0, 0, 3, 5), None, (9, 2, 7, 14), (15, 15, 1, 1), None, (4, 0, 1, 15), (1, 6, 15, 10)]


def drawn(fill: str) -> list[ErasedBox | None]:
    rng = np.random.default_rng(0)

    def noise(h: int, w: int) -> np.ndarray | None:
        return rng.standard_normal((3, h, w), dtype=np.float32) if fill == "noise" else None

    return [None if box is None else ErasedBox(box, noise(*box[2:])) for box in BOXES]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fill", ["noise", "zero"])
def test_boxes_are_filled_and_nothing_else(fill, memory_format):
    images = torch.randn(len(BOXES), 3, 16, 16).to(memory_format=memory_format)
    expected = images.clone()
    for image, each in zip(expected, drawn(fill), strict=True):
        if each is not None:
            y, x, h, w = each.box
            image[:, y : y + h, x : x + w] = 0.0 if each.noise is None else torch.from_numpy(each.noise)
    boxes = pack_boxes(drawn(fill))
    for way in (erase, _erase_by_mask):
        ours = images.clone()
        way(ours, boxes)
        assert torch.equal(ours, expected), way
        assert ours.is_contiguous(memory_format=memory_format)


def test_a_batch_without_a_box_has_nothing_to_copy():
    assert pack_boxes([None, None]) is None and pack_boxes([]) is None


def test_noise_is_packed_without_what_is_not_erased():
    boxes = pack_boxes(drawn("noise"))
    assert isinstance(boxes, Boxes) and boxes.table.shape == (5, 5) and boxes.table.dtype == torch.int64
    assert len(boxes.noise) == sum(3 * box[2] * box[3] for box in BOXES if box is not None)
    assert pack_boxes(drawn("zero")).noise is None
