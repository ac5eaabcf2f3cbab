"""A run whose views come again, with images mixed by view."""

import json

import numpy as np
import pytest
import tiny_run
from forking import forked
from image_fixtures import make_dataset
from launching import ROOT


def test_the_losses_of_a_model_that_stands_still_come_again_with_the_views(tmp_path):
    """Batches are the whole set, of an odd number of images, which mixing within a batch would refuse."""
    make_dataset(tmp_path / "data", train=33, val=3, classes=3, size=(32, 32))
    words = tiny_run.supervised_arguments(
        *(tmp_path / "data", tmp_path / "run", "--global_batch_size", 33, "--micro_batch_size", 33),
        *("--student_kwargs", json.dumps(tiny_run.RESNET), "--schedule.epochs", 4, "--optim.lr", 1e-12),
        *("--data.views", 2, "--data.view_seed", 5, "--data.mix_by", "view", "--data.mixup", 0.8, "--data.cutmix", 1.0),
        *("--data.random_erasing", 0.5, "--run.log_every", 1, "--run.eval_every", 0, "--run.pictures", 0),
    )
    done = forked(ROOT / "launch" / "train.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = np.array([loss for _, loss in sorted(tiny_run.scalars(tmp_path / "run")["loss/ce"].items())])
    assert len(losses) == 4
    # the same images in another order; other ones are further apart
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5) and abs(losses[0] / losses[1] - 1.0) > 1e-3
