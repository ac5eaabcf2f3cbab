"""Policies for a whole batch on its device, against timm's and Pillow's functions image by image: the same pixels.

They are compared bit for bit. On a CPU it is PyTorch that is compared; tests/kernels/test_policy.py compares Triton's kernels.
"""

import numpy as np
import pytest
import torch
from policy_pixels import BICUBIC, BILINEAR, FILL, MOST, batch_of, largest_differences

from scalekd_ds.data.on_device import apply_plan, plan_batch
from scalekd_ds.data.policy import Op, Policy, apply_ops

FACTORS = (0.0, 0.1, 0.55, 1.0, 1.3, 1.9, 1.99)
# every operation with arguments from one end of its range to the other, and those at which Pillow goes another way
ARGUMENTS = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), (None,)),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), FACTORS),
    **{f"{name}Increasing": FACTORS[1:6] for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    "Desaturate": (0.5, 0.7, 1.0),
    "Posterize": (0, 1, 3, 4, 8),
    "PosterizeIncreasing": (0, 2, 4),
    "PosterizeOriginal": (4, 6, 8),
    "Solarize": (0, 26, 128, 255, 256, 12.5),
    "SolarizeIncreasing": (0, 30, 256),
    "SolarizeAdd": (0, 55, 110),
    "GaussianBlur": (0.1, 0.5, 1.0, 1.5, 2.0),
    "Rotate": (-30.0, -7.3, 0.0, 12.5, 30.0, 45.0, 90.0, -90.0, 101.25, -135.0),
    "ShearX": (-0.3, -0.07, 0.0, 0.15, 0.99),
    "ShearY": (-0.99, -0.3, 0.11, 0.3),
    "TranslateXRel": (-0.45, 0.01, 0.2, 0.45),
    "TranslateYRel": (-0.33, 0.0, 0.45),
    "TranslateX": (-32.0, 1.0, 17.0667),
    "TranslateY": (-3.2, 0.5, 32.0),
}


@pytest.mark.parametrize("side", [17, 40])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_operation_gives_pillows_pixels(name, side):
    drawn = [
        [Op(name, () if argument is None else (argument,), resample)]
        for argument in ARGUMENTS[name]
        for resample in (BILINEAR, BICUBIC)
        for _ in range(5)
    ]
    found = largest_differences(drawn, side)
    assert found.max() <= MOST, drawn[int(found.argmax())]


def test_every_operation_that_a_policy_may_draw_is_among_them():
    names = {name.removesuffix("Increasing") for name in ARGUMENTS}
    rng = np.random.default_rng(0)
    for name in ("rand-m9-n9-p1.0", "rand-m9-n9-p1.0-inc1", "rand-m9-n9-p1.0-t3a", "original", "v0", "trivial"):
        policy = Policy(name)
        drawn = {op.name.removesuffix("Increasing") for _ in range(300) for op in policy.draw(rng)}
        assert len(drawn) > 2 and drawn <= names, drawn - names


POLICIES = [
    *("rand-m9-mstd0.5-inc1", "rand-m10-n4-p0.9", "rand-m9-n3-p1.0-t3a"),
    *("original", "original-mstd0.5", "originalr", "v0", "v0r-mstd0.5", "trivial"),
]


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("name", ["", *POLICIES])
def test_a_policy_gives_pillows_pixels(name, jitter):
    if not name and not jitter:
        assert plan_batch([Policy("").draw(np.random.default_rng(0))] * 3, 40) is None
        return
    policy, rng = Policy(name, (jitter,) * 3), np.random.default_rng(7)
    drawn = [policy.draw(rng) for _ in range(40)]
    assert any(drawn)
    found = largest_differences(drawn, 41)
    # one level before a table may be many behind it
    assert MOST > 0 or found.max() == 0, drawn[int(found.argmax())]
    assert np.median(found) <= MOST


def test_at_the_size_that_is_trained_on():
    policy, rng = Policy("rand-m9-n2-mstd0.5-inc1", interpolation="bicubic"), np.random.default_rng(3)
    assert np.median(largest_differences([policy.draw(rng) for _ in range(16)], 224)) <= MOST


def test_images_without_operations_and_operations_before_others_stay_in_order():
    # Invert twice is nothing; Solarize before Invert is another image than behind it
    order, other = [Op("Solarize", (100,)), Op("Invert")], [Op("Invert"), Op("Solarize", (100,))]
    drawn = [[], [Op("Invert"), Op("Invert")], order, other, []]
    images = batch_of(1, 24).repeat(5, 0)
    found = torch.from_numpy(images.copy())
    plan = plan_batch(drawn, 24)
    apply_plan(found, plan, plan.buffer, torch.zeros(3, dtype=torch.uint8))
    for place in (0, 1, 4):
        assert np.array_equal(found[place], images[place])
    assert not np.array_equal(found[2], found[3])
    assert np.array_equal(found[2], apply_ops(images[2], order, FILL))


@pytest.mark.parametrize("op", [Op("GaussianBlurRand", (1.0,)), Op("GaussianBlur", (9.0,))])
def test_an_operation_that_no_policy_draws_is_named(op):
    with pytest.raises(ValueError, match=r"GaussianBlurRand cannot be applied|a blur of 9\.0 pixels"):
        plan_batch([[op]], 32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_a_gpu_gives_the_pixels_of_the_cpu(name):
    policy, rng = Policy(name, (0.4,) * 3), np.random.default_rng(5)
    drawn = [policy.draw(rng) for _ in range(64)]
    plan, fill = plan_batch(drawn, 224), torch.tensor(FILL, dtype=torch.uint8)
    on_cpu = torch.from_numpy(batch_of(64, 224))
    on_gpu = on_cpu.cuda()
    apply_plan(on_cpu, plan, plan.buffer, fill)
    apply_plan(on_gpu, plan, plan.buffer.cuda(), fill.cuda())
    assert torch.equal(on_gpu.cpu(), on_cpu)
