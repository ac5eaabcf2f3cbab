"""Micro batches that are smaller than asked for."""

import pytest
from torch import nn

from scalekd_ds.config import RunConfig
from scalekd_ds.errors import UserError
from scalekd_ds.training.micro_batch import micro_batch_notice

BATCHNORM, LAYERNORM = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("batch", "micro", "world", "words"),
    [
        (256, 128, 1, None),
        (256, 128, 8, None),
        (8, 128, 8, "a rank has one image of a step, of which BatchNorm takes its statistics: --student_sync_bn true"),
        (31, 1, 1, None),
        (
            34,
            16,
            1,
            "no divisor above 2 up to micro_batch_size 16: each step has 17 micro batches of 2; --global_batch_size 48",
        ),
        (60, 16, 2, "30 images a rank, which has no divisor above 15"),
    ],
)
def test_a_smaller_micro_batch_is_said(batch, micro, world, words):
    notice = micro_batch_notice(RunConfig(global_batch_size=batch, micro_batch_size=micro), world, BATCHNORM)
    assert notice is None if words is None else words in notice and "\n" not in notice


@pytest.mark.parametrize(("batch", "world", "even"), [(31, 1, 32), (62, 2, 64), (17, 1, 32)])
def test_one_image_for_batchnorm_is_refused_with_a_batch_that_works(batch, world, even):
    cfg = RunConfig(global_batch_size=batch, micro_batch_size=16)
    with pytest.raises(UserError, match=f"of one image. Choose --global_batch_size {even}, or"):
        micro_batch_notice(cfg, world, BATCHNORM)
    assert RunConfig(global_batch_size=even, micro_batch_size=16).batches(world)[0] == 16
    assert "micro batches of 1" in micro_batch_notice(cfg, world, LAYERNORM)


def test_statistics_over_all_ranks_are_of_more_than_one_image():
    cfg = RunConfig(global_batch_size=62, micro_batch_size=16)
    assert "micro batches of 1" in micro_batch_notice(cfg, 2, nn.Sequential(nn.SyncBatchNorm(3)))
    with pytest.raises(UserError, match="of one image"):
        # the projectors' own are not synchronised
        micro_batch_notice(cfg, 2, nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3)))
