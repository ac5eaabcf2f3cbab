"""What a plan counts on tensors without storage, against a real step: bytes of tensors, without a library's workspace."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from plan_cases import CLASSES, PAIRS, config_of, counted, counted_pair, pair_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scalekd_ds.build import build_distiller
from scalekd_ds.config import DistillConfig, RunConfig
from scalekd_ds.distiller import ScaleKD
from scalekd_ds.engine.teacher_placement import PLACEMENTS, persistence_threshold
from scalekd_ds.plan.choose import placement_that_fits
from scalekd_ds.plan.communication import collectives
from scalekd_ds.plan.fake_step import LiveBytes, parameters_and_buffers
from scalekd_ds.plan.measure import build_on_meta, from_cache, measure
from scalekd_ds.plan.memory import Layout, memory_parts
from scalekd_ds.recipes import RECIPES
from scalekd_ds.teacher_cache.headless import headless_teacher, teacher_parts
from scalekd_ds.watching.mfu import flop_per_image

pytestmark = pytest.mark.usefixtures("one_thread")


def drop_gradient(parameter):
    # complete gradients are a part of the plan of their own
    parameter.grad = None


class RealStep:
    """Steps of a pair on real tensors of `images` images."""

    def __init__(self, cfg: RunConfig, images: int, dtype: torch.dtype | None) -> None:
        self.distiller: ScaleKD = build_distiller(cfg, 10, verbose=False).train()
        self.dtype = dtype
        if dtype is not None:
            self.distiller.teacher.lower_precision(dtype)
        for parameter in self.distiller.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        self.batch, self.labels = torch.randn(images, 3, 64, 64), torch.randint(10, (images,))

    def __call__(self, hooks=None) -> None:
        targets = self.distiller.teacher_targets(self.batch)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None), hooks or nullcontext():
            loss = self.distiller(self.batch, self.labels, targets)["loss/total"]
        loss.backward()

    def saved(self) -> int:
        """Bytes that autograd saves for the backward pass, each storage once, parameters and buffers left out."""
        held = {t.untyped_storage().data_ptr() for t in parameters_and_buffers(self.distiller)}
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        self(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in held)

    def peak(self) -> int:
        """Largest bytes of tensors that are alive at once, the batch among them."""
        with LiveBytes(parameters_and_buffers(self.distiller)) as live:
            live.add(self.batch)
            live.add(self.labels)
            self()
        return live.peak

    def allocated(self) -> int:
        """Largest bytes that PyTorch's allocator on the CPU has given out at once: tensors, and what libraries asked for."""
        # the first step of a process allocates what stays
        self()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self()
        live = peak = 0
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak + self.batch.untyped_storage().nbytes() + self.labels.untyped_storage().nbytes()


@pytest.mark.parametrize("images", [2, 12])
@pytest.mark.parametrize("name", PAIRS)
def test_tensors_under_autocast_are_those_of_a_real_step(name, images):
    """Within 0.2%: fake kernels give BatchNorm's statistics in 16 bits, real ones in 32."""
    measured, step = counted_pair(name, torch.bfloat16), RealStep(pair_of(name), images, torch.bfloat16)
    assert measured.saved(images) == pytest.approx(step.saved(), rel=2e-3)
    assert measured.peak(images) == pytest.approx(step.peak(), rel=2e-3)


@pytest.mark.parametrize("images", [2, 12])
@pytest.mark.parametrize("name", PAIRS)
def test_tensors_in_float32_are_those_of_a_real_step(name, images):
    """To the byte."""
    measured, step = counted_pair(name, None), RealStep(pair_of(name), images, None)
    assert measured.saved(images) == step.saved()
    assert measured.peak(images) == step.peak()


@pytest.mark.parametrize("name", PAIRS)
def test_the_allocator_holds_these_tensors_and_a_librarys_workspace(name):
    """What convolutions and products ask for beside their tensors is another on each processor: not more than the tensors."""
    images = 12
    peak, allocated = counted_pair(name, None).peak(images), RealStep(pair_of(name), images, None).allocated()
    assert peak <= allocated <= 2 * peak


@pytest.mark.parametrize("name", PAIRS)
def test_flop_are_those_of_a_real_step(name):
    """What a plan's times are made of: `benchmarks/plan_time.py` sets them against the clock."""
    images, measured = 2, counted_pair(name, None)
    step = RealStep(pair_of(name), images, None)
    with FlopCounterMode(display=False) as counter:
        step()
    assert measured.teacher_flop(images) + measured.student_flop(images) == counter.get_total_flops()


def test_a_scaled_down_dinov3_is_planned_whole():
    """All that one rank holds: weights, gradients, AdamW's moments and teacher to the byte, and a real step's tensors."""
    cfg, images = pair_of("dinov3 to resnet"), 5
    measured = counted_pair("dinov3 to resnet", torch.bfloat16)
    parts = memory_parts(measured, cfg, Layout.of({"zero_optimization": {"stage": 0}}, 1, "replica"), images)
    step = RealStep(cfg, images, torch.bfloat16)
    distiller = step.distiller
    peak = step.peak()
    optimizer = torch.optim.AdamW(distiller.parameters())
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [t for p in distiller.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    tensors += [*distiller.buffers(), *distiller.teacher.parameters(), *distiller.teacher.buffers()]
    static = sum(t.numel() * t.element_size() for t in tensors)
    # between the batch sizes that were counted the peak is taken for a straight line
    assert sum(parts.values()) - parts["images"] == pytest.approx(static + peak, rel=0.1)
    assert sum(parts[k] for k in ("parameters", "gradients", "optimizer", "teacher", "buffers")) == static


def test_a_sharded_or_offloaded_teacher():
    measured, cfg = counted_pair("dinov3 to resnet", torch.bfloat16), pair_of("dinov3 to resnet")
    teacher = measured.teacher
    layouts = {where: Layout.of({}, 4, where) for where in ("replica", "sharded", "offload")}
    held = {where: memory_parts(measured, cfg, layout, 1)["teacher"] for where, layout in layouts.items()}
    whole = 2 * teacher.block + teacher.buffers + teacher.kept_whole
    assert held["replica"] == teacher.bytes + teacher.buffers
    # each parameter's share is rounded up to an element
    assert 0 <= held["sharded"] - whole - teacher.bytes / 4 < 4 * len(teacher.parameters)
    assert held["offload"] == whole
    sent = {where: collectives(measured, cfg, layout, 3)[1:] for where, layout in layouts.items()}
    assert sent["replica"] == []
    once = 3 * (teacher.bytes - teacher.kept_whole + 2 * teacher.last_stage)
    assert teacher.kept_whole < 0.05 * teacher.bytes
    assert [(t.operation, t.bytes) for t in sent["sharded"]] == [("all_gather", once)]
    # of an offloaded one each rank brings its share, and gathers
    assert [(t.operation, t.bytes) for t in sent["offload"]] == [("all_gather", once), ("host_to_device", once // 4)]


def test_the_last_stage_that_tpp_reads():
    """Of a ViT of 4 blocks the last one; of a Swin the last layer and the norm."""
    distiller = build_on_meta(pair_of("dinov3 to resnet"), 10)
    small = persistence_threshold(distiller.teacher)
    block = sum(p.numel() * 4 for p in distiller.teacher.model.blocks[-1].parameters() if p.numel() > small)
    teacher = counted_pair("dinov3 to resnet", None).teacher
    assert (teacher.last_stage, teacher.block) == (block, block)
    teacher = build_on_meta(pair_of("swin to vit"), 10).teacher
    large = [p for p in teacher.model.layers[-1].parameters() if p.numel() > persistence_threshold(teacher)]
    assert counted_pair("swin to vit", None).teacher.last_stage == sum(p.numel() * 4 for p in large)


def test_the_real_dinov3_is_counted_without_its_memory():
    """6.7 B parameters; timm's own count, from its documentation of the model."""
    cfg = replace(
        RECIPES["swin_l-resnet50-traditional"](),
        teacher="vit_7b_patch16_dinov3",
        teacher_image_size=224,
        distill=DistillConfig(kd_weight=0.0),
    )
    distiller = build_on_meta(cfg, 1000)
    assert sum(p.numel() for p in distiller.teacher.parameters()) == pytest.approx(6716e6, rel=1e-3)
    assert all(p.is_meta for p in distiller.teacher.parameters())


def test_counting_leaves_no_fake_constants_behind():
    """The losses cache their DCT bases: one made of fake tensors would break the next real step."""
    cfg = replace(config_of("adamw"), distill=DistillConfig(cut=2))
    assert measure(cfg, CLASSES, None).numel == counted(False).numel
    losses = build_distiller(cfg, CLASSES, verbose=False)(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert losses["loss/total"].isfinite()


@pytest.fixture(params=PAIRS)
def given(request):
    """(name, distiller, images, labels, targets) of a pair that is given its teacher's targets."""
    torch.manual_seed(0)
    distiller = build_distiller(pair_of(request.param), 10, verbose=False).train()
    for parameter in distiller.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    images, labels = torch.randn(12, 3, 64, 64), torch.randint(10, (12,))
    return request.param, distiller, images, labels, distiller.teacher_targets(images)


def test_tensors_and_flop_are_those_of_a_step_that_is_given_its_targets(given):
    """To the byte. The last stage's own passes (TPP) are counted, and the targets' are not."""
    name, distiller, images, labels, targets = given
    with FlopCounterMode(display=False) as flop, LiveBytes(parameters_and_buffers(distiller)) as live:
        for tensor in (images, labels, *targets):
            live.add(tensor)
        distiller(images, labels, targets)["loss/total"].backward()
    whole = counted_pair(name, None)
    measured = from_cache(whole, 1)
    assert measured.peak(12) == live.peak
    assert measured.teacher_flop(12) == 0
    assert measured.student_flop(12) == flop.get_total_flops()
    assert measured.saved == whole.saved
    assert whole.peak(12) == max(whole.targets_peak(12), whole.peak_from_targets(12))
    shape = whole.targets
    assert targets.tokens.shape == (12, shape.tokens, shape.dim)
    assert targets.logits.shape == (12, shape.classes)


def test_what_is_left_of_the_teacher_is_its_last_stage(given):
    """Its weights to the byte of those that a run from a cache builds, which keeps small tables of the trunk besides."""
    name, distiller, *_ = given
    headless = headless_teacher(*teacher_parts(distiller.teacher))
    measured = from_cache(counted_pair(name, None), 1)
    held = sum(p.numel() * p.element_size() for p in headless.parameters())
    buffers, kept = measured.teacher.buffers, sum(b.numel() * b.element_size() for b in headless.buffers())
    assert measured.teacher.bytes == held
    assert 0 <= kept - buffers < 0.02 * held
    cfg, layouts = pair_of(name), {where: Layout.of({}, 4, where) for where in PLACEMENTS}
    parts = {where: memory_parts(measured, cfg, layout, 1)["teacher"] for where, layout in layouts.items()}
    assert parts["replica"] == held + buffers
    # it is gathered for TPP's two passes, and no more
    large = held - measured.teacher.kept_whole
    assert 0 < measured.teacher.kept_whole < 0.05 * held
    sent = {where: collectives(measured, cfg, layout, 3)[1:] for where, layout in layouts.items()}
    assert sent["replica"] == []
    assert [(t.operation, t.bytes) for t in sent["sharded"]] == [("all_gather", 3 * 2 * large)]


def test_a_run_with_a_cache_is_measured_without_its_targets():
    """The folder is not read: a plan is made before there is a cache."""
    cfg = pair_of("swin to vit")
    cached, whole = replace(cfg, teacher_cache="/nowhere"), counted_pair("swin to vit", None)
    measured = measure(cached, 10, None, on_gpu=False)
    # int8 tokens, a scale and a middle for each channel, ten logits, and 24 bytes of head and checksum
    shape = whole.targets
    assert measured == from_cache(whole, (shape.tokens + 4) * shape.dim + 4 * 10 + 24)
    assert flop_per_image(cached, 10, 2, None) == whole.student_flop(2) / 2


def test_a_teacher_of_which_logits_alone_are_read():
    cfg = pair_of("dinov3 to resnet")
    without = replace(cfg, distill=replace(cfg.distill, features=False), teacher_cache="/nowhere")
    measured = measure(without, 10, None, on_gpu=False)
    assert measured.teacher.bytes == measured.teacher.buffers == 0
    assert measured.read == 4 * 10 + 24
    assert collectives(measured, without, Layout.of({}, 1, "offload"), 1) == []


def test_a_teacher_that_a_cache_stands_in_for_need_not_be_sharded(monkeypatch):
    """In a memory between what a run takes with its teacher on every rank and what one from a cache takes."""
    cfg, whole = pair_of("dinov3 to resnet"), counted_pair("dinov3 to resnet", None)
    # a hundred trunks, beside which the rest is small
    trunk = replace(whole.teacher, parameters=whole.teacher.parameters * 100)
    whole, layout = replace(whole, teacher=trunk), Layout.of({}, 4, "replica")
    needed = [sum(memory_parts(measured, cfg, layout, 2).values()) for measured in (from_cache(whole, 1), whole)]
    memory = (sum(needed) / 2 / 2**30 + 2.0) / 0.95
    for cached, chosen in ((False, "sharded"), (True, "replica")):
        measured = from_cache(whole, 1) if cached else whole
        monkeypatch.setattr("scalekd_ds.plan.choose.measure", lambda *_, m=measured: m)
        assert placement_that_fits(cfg, {}, 10, 4, memory) == chosen
