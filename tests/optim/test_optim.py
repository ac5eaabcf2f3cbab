"""Parameter groups, schedules, LAMB."""

import math

import pytest
import timm
import timm.optim
import torch
from tiny_pair import student, teacher
from torch import nn

from scalekd_ds import ScaleKD
from scalekd_ds.config import OptimConfig, ScheduleConfig
from scalekd_ds.optim.lamb import Lamb
from scalekd_ds.optim.optimizers import build_optimizer, param_groups
from scalekd_ds.optim.schedule import build_schedule, learning_rate_factor


def names_without_decay(module, cfg=None):
    names = {id(p): n for n, p in module.named_parameters()}
    groups = param_groups(module, cfg or OptimConfig(weight_decay=0.05))
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in module.parameters())
    return {names[id(p)] for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}


def test_biases_norms_and_embeddings_are_free_of_decay():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
    free = names_without_decay(vit)
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= free
    assert not {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} & free
    swin = teacher()
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in names_without_decay(swin)
    pair = ScaleKD(student(), swin, image_size=64, verbose=False)
    free = names_without_decay(pair)
    assert {"projectors.s3.spatial.query.weight", "projectors.s4.frequency.pos_embed", "student.bn1.weight"} <= free
    assert not {"projectors.s3.spatial.q.weight", "student.fc.weight"} & free


def test_frozen_parameters_are_in_no_group_and_everything_may_decay():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[0].bias.requires_grad_(False)
    groups = param_groups(net, OptimConfig("sgd", weight_decay=1e-4, no_decay="none"))
    assert [len(g["params"]) for g in groups] == [3]
    assert groups[0]["weight_decay"] == 1e-4


def test_groups_may_be_those_of_the_published_files():
    """The published Mixer files list .cls_token and .pos_embed by name; ResNet's and MobileNet's exempt nothing."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
    pair = ScaleKD(student(), teacher(), image_size=64, verbose=False)
    by_name = OptimConfig(weight_decay=0.05, no_decay="embeddings")
    assert names_without_decay(vit, by_name) == {"pos_embed", "cls_token"}
    embeddings = {f"projectors.{stage}.{view}.pos_embed" for stage in ("s3", "s4") for view in ("spatial", "frequency")}
    assert names_without_decay(pair, by_name) == embeddings
    assert names_without_decay(pair, OptimConfig(weight_decay=0.05, no_decay="none")) == set()
    # a model's own wish is heard: Swin-V2's logit scales are neither one-dimensional nor embeddings
    swin_v2 = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)
    )
    assert "layers.0.blocks.0.attn.logit_scale" in names_without_decay(swin_v2)


def test_cosine_with_warmup_has_its_known_factors():
    cfg = ScheduleConfig("cosine", epochs=10, warmup_epochs=2, warmup_factor=0.1, min_lr=1e-4)

    def factor(step):
        return learning_rate_factor(step, cfg, 10, 100, 1e-2)

    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(0.55)
    assert factor(20) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.01 + 0.99 * 0.5)
    assert factor(100) == pytest.approx(0.01)
    assert factor(120) == pytest.approx(0.01)
    assert factor(40) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.25)))


def test_multistep_counts_epochs_not_steps():
    cfg = ScheduleConfig("multistep", epochs=100, milestones=(30, 60, 90), gamma=0.1)
    # 12.5 steps an epoch: the milestone at epoch 30 is step 375
    values = [learning_rate_factor(s, cfg, 12.5, 1250, 0.1) for s in (0, 374, 375, 749, 750, 1125, 1249)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 1e-3, 1e-3])


def test_a_constant_schedule_warms_up_step_by_step():
    cfg = ScheduleConfig("constant", epochs=10, warmup_epochs=1, warmup_factor=0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = build_schedule(optimizer, cfg, 4, 40, 0.5)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_lamb_is_timms_where_nothing_is_sharded():
    nets = []
    for make in (
        lambda groups: timm.optim.Lamb(groups, lr=0.02, eps=1e-6, max_grad_norm=None),
        lambda groups: Lamb(groups, lr=0.02, eps=1e-6),
    ):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 19), nn.LayerNorm(19), nn.ReLU(), nn.Linear(19, 5))
        optimizer = make(param_groups(net, OptimConfig(weight_decay=0.1)))
        for _ in range(6):
            optimizer.zero_grad()
            net(torch.randn(16, 7)).square().mean().backward()
            optimizer.step()
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=1e-7)


def test_each_name_of_the_config_builds_its_optimizer():
    net = nn.Linear(2, 2)
    kinds = {name: type(build_optimizer(net, OptimConfig(name))) for name in ("sgd", "adamw", "lamb")}
    assert kinds == {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lamb": Lamb}
