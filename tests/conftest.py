"""Fixtures and environment that every test shares."""

import os
import sys
from pathlib import Path

# before torch is imported: two cores, which pytest's workers share
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

# minutes each: begun first, so that no worker is left alone with one of them at the end
LONGEST = [
    "test_train",
    "test_plan",
    "test_two_nodes",
    "test_teacher_placement",
    "test_ema",
    "test_zero_optim",
    "test_faults",
]


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
