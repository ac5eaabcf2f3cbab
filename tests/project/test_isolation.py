"""A test does not run under what the one before it has set in their process."""

import logging
import os


def test_that_sets_what_verbs_set():
    os.environ["SCALEKD_LEFT_BEHIND"] = "1"
    os.environ["OMP_NUM_THREADS"] = "77"
    logging.disable(logging.WARNING)


def test_that_runs_after_it():
    assert "SCALEKD_LEFT_BEHIND" not in os.environ and os.environ["OMP_NUM_THREADS"] != "77"
    assert logging.root.manager.disable < logging.WARNING
