"""Inspecting on a GPU: models run there, and no tensor of theirs meets one of the CPU before the sheet is drawn."""

import os
import subprocess
import sys

import pytest
from launching import LIMIT, ROOT

sys.path.append(str(ROOT / "benchmarks"))
import fake_cuda


def test_models_run_on_the_gpu_and_the_sheet_is_drawn_on_the_cpu(tmp_path):
    if reason := fake_cuda.available():
        pytest.skip(reason)
    environment = fake_cuda.environment(tmp_path)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "helpers")
    command = [sys.executable, str(ROOT / "tests" / "workers" / "inspect_on_fake_cuda.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu"]
