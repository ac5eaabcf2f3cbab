"""How often a run evaluates: as often as it was asked to, whatever the batch makes of an epoch."""

import itertools
import math
from types import SimpleNamespace

import pytest

from scalekd_ds.config import RunConfig
from scalekd_ds.training.trainer import evaluation_is_due


def evaluated(images: int, batch: int, every: float, epochs: float, images_before: int = 0) -> list[int]:
    """The steps after which a run evaluates."""
    cfg = RunConfig(global_batch_size=batch)
    cfg.run.eval_every = every
    run = SimpleNamespace(cfg=cfg, steps_per_epoch=images / batch)
    steps = []
    for step in range(1, -(-round(epochs * images) // batch) + 1):
        run.images = images_before + step * batch
        if evaluation_is_due(run):
            steps.append(step)
    return steps


@pytest.mark.parametrize("epochs", [1, 7, 100])
def test_each_interval_is_followed_by_an_evaluation(epochs):
    for images, batch, every in itertools.product(
        (10, 26, 40, 41, 1000), (1, 8, 10, 16), (0.1, 1 / 3, 0.5, 1, 1.5, 2, 10)
    ):
        steps, total = evaluated(images, batch, every, epochs), -(-epochs * images // batch)
        # the first step that reaches each multiple of the interval; several that fall on one step are one evaluation
        count = int(total * batch / (every * images) + 1e-6)
        wanted = {math.ceil(number * every * images / batch - 1e-9) for number in range(1, count + 1)}
        assert steps == sorted(wanted), (images, batch, every)


def test_what_is_no_interval_of_steps_is_not_rounded_away():
    # 26 images in batches of 10 are 2.6 steps; rounded to 3, a hundred epochs had 86 evaluations
    assert len(evaluated(26, 10, 1, 100)) == 100
    assert evaluated(40, 8, 1, 3) == [5, 10, 15]
    assert evaluated(40, 8, 0.01, 1) == [1, 2, 3, 4, 5]
    for every in (1e-9, 1e-300, 1e-320, 5e-324):
        assert evaluated(40, 8, every, 1) == [1, 2, 3, 4, 5]
    assert evaluated(40, 8, 0, 3) == evaluated(40, 8, 1e300, 3) == []
    # a run that goes on at another batch, 3 images into its second epoch
    assert evaluated(40, 10, 1, 3, images_before=43) == [4, 8, 12]
