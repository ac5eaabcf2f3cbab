"""The loaders on a GPU against those on the CPU: pixels, labels, boxes and policies, resumes, and who waits for whom.

Pixels are 0 to 255. JPEGs are decoded by other code there, and every resize is DALI's, where training on a CPU takes
PyTorch's: on a CPU these two differ by up to 5 levels at a few pixels.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_fixtures import picture
from loading import eval_loader, take, train_loader

from scalekd_ds.config import DataConfig
from scalekd_ds.data.eval_loader import LEFT_OUT
from scalekd_ds.data.sources.image_folder import index_folder

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
PIXELS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
POLICY = "rand-m9-n2-mstd0.5-inc1"
# reserved memory for the largest image of a test, not of ImageNet
SMALL = {"largest_image": (512, 512), "threads": 2}
FORMS = {
    "png": {},
    # without and with colours at half the resolution
    "444.jpg": {"quality": 95, "subsampling": 0},
    "420.jpg": {"quality": 95, "subsampling": 2},
}


def folder(root: Path, form: str, size: tuple[int, int], count: int = 12):
    """A source of two classes of images around `size`, or of exactly that where it is a square."""
    rng = np.random.default_rng(0)
    for place in range(count):
        height, width = size if size[0] == size[1] else (s + int(rng.integers(0, 40)) for s in size)
        path = root / "ab"[place % 2] / f"{place:02d}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, height, width).save(path, **FORMS[form])
    return index_folder(root, "data.train")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {form: folder(tmp_path_factory.mktemp("images"), form, (200, 260)) for form in FORMS}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """PNGs of 32x32, whose pixels are the same on every device where nothing is resized."""
    return folder(tmp_path_factory.mktemp("squares"), "png", (32, 32))


def on_both(make, count, *args, **options):
    """Batches of the GPU, on the host, and of the CPU."""
    gpu, cpu = (take(make(*args, device=device, **options), count) for device in (GPU, torch.device("cpu")))
    for images, labels in gpu:
        assert images.device == labels.device == GPU
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
    return [(images.cpu(), labels.cpu()) for images, labels in gpu], cpu


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Mean and largest difference, and the share of values that differ by more than 2."""
    found = (ours - theirs).abs()
    return found.mean().item(), found.max().item(), (found > 2.0).float().mean().item()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_sees_the_pixels_of_the_cpu(sources, form, interpolation):
    cfg = DataConfig(image_size=112, eval_resize=128, interpolation=interpolation, **SMALL)
    for (ours, our_labels), (theirs, labels) in zip(*on_both(eval_loader, 3, sources[form], cfg, 5), strict=True):
        assert torch.equal(our_labels, labels)
        mean, most, over = difference(ours, theirs)
        assert mean < (1.0 if form == "420.jpg" else 0.6), (mean, most, over)
        # a JPEG's waves are rounded otherwise there, and colours at half the resolution are enlarged by the decoder
        assert most <= {"png": 2.0, "444.jpg": 4.0, "420.jpg": 12.0}[form], (mean, most, over)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("form", ["png", "444.jpg"])
@pytest.mark.parametrize("random_crop", [True, False])
def test_training_sees_the_crops_and_flips_of_the_cpu(sources, form, interpolation, random_crop):
    cfg = DataConfig(image_size=64, interpolation=interpolation, random_crop=random_crop, **SMALL)
    for (ours, our_labels), (theirs, labels) in zip(*on_both(train_loader, 4, sources[form], cfg, 6), strict=True):
        assert torch.equal(our_labels, labels)
        mean, most, over = difference(ours, theirs)
        # a crop or a flip that is another one is a mean of tens
        assert mean < 0.6 and over < 0.01 and most <= 10.0, (mean, most, over)


@pytest.mark.parametrize("fill", ["noise", "zero"])
@pytest.mark.parametrize("policy", ["", POLICY])
def test_erased_boxes_are_at_the_same_place_with_the_same_noise(sources, fill, policy):
    cfg = DataConfig(image_size=64, random_erasing=0.7, erasing_fill=fill, auto_augment=policy, **SMALL)
    loader = train_loader(sources["png"], cfg, 6, pixels=PIXELS)
    gpu, cpu = on_both(train_loader, 3, sources["png"], cfg, 6, pixels=PIXELS)
    erased = 0
    for number, ((ours, _), (theirs, _)) in enumerate(zip(gpu, cpu, strict=True)):
        boxes = loader._prepare_batch(number).drawn.boxes
        for place, y, x, h, w in [] if boxes is None else boxes.table.tolist():
            box = (place, slice(None), slice(y, y + h), slice(x, x + w))
            assert torch.equal(ours[box], theirs[box])
            erased += 1
    assert erased > 6


@pytest.mark.parametrize("augment_on", ["device", "host"])
def test_a_policy_gives_the_pixels_of_the_cpu(squares, augment_on):
    cfg = DataConfig(
        image_size=32,
        random_crop=False,
        auto_augment=POLICY,
        augment_on=augment_on,
        random_erasing=0.5,
        **SMALL,
    )
    plain = take(train_loader(squares, replace(cfg, auto_augment="", random_erasing=0.0), 6, pixels=PIXELS), 4)
    gpu, cpu = on_both(train_loader, 4, squares, cfg, 6, pixels=PIXELS)
    for (ours, our_labels), (theirs, labels), (bare, _) in zip(gpu, cpu, plain, strict=True):
        assert torch.equal(our_labels, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours - bare).abs().mean() > 0.1


def test_a_policy_after_a_crop_is_near_that_of_the_cpu(sources):
    # brightness, contrast and saturation, which at most double a difference
    cfg = DataConfig(image_size=64, color_jitter=(0.2, 0.2, 0.2), **SMALL)
    for (ours, _), (theirs, _) in zip(*on_both(train_loader, 4, sources["png"], cfg, 6), strict=True):
        mean, most, over = difference(ours, theirs)
        assert mean < 1.2 and most <= 20.0, (mean, most, over)


@pytest.mark.parametrize("policy", ["", POLICY])
def test_a_resumed_run_gets_the_same_batches(sources, policy):
    cfg = DataConfig(image_size=64, auto_augment=policy, random_erasing=0.5, **SMALL)
    whole = take(train_loader(sources["png"], cfg, 4, device=GPU), 7)
    rest = take(train_loader(sources["png"], cfg, 4, start_step=4, device=GPU), 3)
    for (images, labels), (again, labels_again) in zip(whole[4:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


@pytest.mark.parametrize("policy", ["", POLICY])
def test_a_batch_keeps_its_values_while_further_ones_are_made(sources, policy):
    cfg = DataConfig(image_size=64, auto_augment=policy, random_erasing=0.5, **SMALL)
    batches = iter(train_loader(sources["444.jpg"], cfg, 4, device=GPU))
    held = [next(batches) for _ in range(3)]
    copies = [(images.clone(), labels.clone()) for images, labels in held]
    for _ in range(12):
        next(batches)
    for (images, labels), (images_then, labels_then) in zip(held, copies, strict=True):
        assert torch.equal(images, images_then) and torch.equal(labels, labels_then)
    batches.close()


def test_several_epochs_of_training_and_evaluation_end(sources):
    cfg = DataConfig(image_size=64, random_erasing=0.25, **SMALL)
    source = sources["420.jpg"]
    training, evaluation = train_loader(source, cfg, 4, device=GPU), eval_loader(source, cfg, 5, device=GPU)
    batches = iter(training)
    for _ in range(4):
        labels = torch.cat([next(batches)[1] for _ in range(3)])
        assert sorted(labels.tolist()) == sorted(source.labels.tolist())
        seen = torch.cat([labels for _, labels in evaluation])
        assert sorted(seen[seen >= 0].tolist()) == sorted(source.labels.tolist())
    training.close()
    assert next(batches, None) is None


def test_an_evaluation_gives_its_memory_back(sources):
    cfg = DataConfig(image_size=64, **SMALL)
    batches = iter(train_loader(sources["420.jpg"], cfg, 4, device=GPU))
    loader, free = eval_loader(sources["420.jpg"], cfg, 5, device=GPU), []
    # the first one also loads the decoder's library
    for _ in range(3):
        list(loader)
        next(batches)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(GPU)[0])
    assert free[2] >= free[0] - 2**24
    batches.close()


def test_a_file_that_is_cut_off_is_left_out_as_on_the_cpu(tmp_path):
    source = folder(tmp_path, "420.jpg", (200, 260))
    damaged = Path(source.paths[3])
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    cfg = DataConfig(image_size=64, max_bad_share=0.5, **SMALL)
    gpu, cpu = on_both(eval_loader, 3, source, cfg, 4)
    for (ours, our_labels), (theirs, labels) in zip(gpu, cpu, strict=True):
        assert torch.equal(our_labels, labels)
        assert difference(ours, theirs)[0] < 1.0
    assert sum((labels == LEFT_OUT).sum().item() for _, labels in gpu) == 1
    loader = train_loader(source, cfg, 4, device=GPU)
    take(loader, 6)
    assert 3 in loader.bad_files


@contextlib.contextmanager
def errors_at_syncs():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [{}, {"auto_augment": POLICY}, {"auto_augment": POLICY, "augment_on": "host"}],
    ids=["crop", "policy", "policy on the host"],
)
def test_the_next_batch_does_not_wait_for_the_step_before(sources, options):
    cfg = DataConfig(image_size=64, random_erasing=0.7, **options, **SMALL)
    batches = iter(train_loader(sources["444.jpg"], cfg, 6, pixels=PIXELS, device=GPU))
    # memory is allocated by the first batches, for which CUDA may wait
    for _ in range(12):
        next(batches)
    torch.cuda.synchronize()
    # a step of some two seconds
    torch.cuda._sleep(4_000_000_000)
    step = torch.cuda.Event()
    step.record()
    with errors_at_syncs():
        images, labels = next(batches)
        unfinished = not step.query()
    assert unfinished, "next() came back only when the step before was over"
    assert torch.isfinite(images).all() and (labels >= 0).all()
    batches.close()
