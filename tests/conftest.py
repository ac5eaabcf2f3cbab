"""Fixtures and environment that every test shares."""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

# before torch is imported: two cores, which pytest's workers share. A worker has its parent's setting, and more threads than
# cores wait for each other: the suite would take half as long again
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# as an activated environment has it: `python`, `deepspeed` and the `ninja` that DeepSpeed looks for
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# inductor finds the kernels of another instruction set in its cache again, and they corrupt memory
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/inductor-{os.getuid()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}",
)

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import pytest
import torch

# under `nohup`, or behind a script's `&`, the processes that tests start and signal would ignore these two; a handler is
# not inherited
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# a minute and more each: begun first, so that no worker is left alone with one of them at the end
LONGEST = [
    "test_train",
    "test_two_nodes",
    "test_supervise",
    "test_gpu_parts",
    "test_engine_bytes",
    "test_ema",
    "test_step_on_cuda",
    "test_faults",
    "test_plan",
    "test_counted_step",
    "test_watching",
    "test_teacher_placement",
    "test_options_on_cuda",
    "test_notebooks",
    "test_push",
    "test_changes",
    "test_wheel",
    "test_time_limits",
    "test_site",
]


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module")
def asked(request):
    """A function: the values of a parameter with which tests of this file will run, for a fixture that works for them."""

    def values(parameter):
        specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
        return {spec.params[parameter] for spec in specs if spec is not None and parameter in spec.params}

    return values


@pytest.fixture
def one_thread():
    """Models as small as the tests' are several times faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _process_left_as_found():
    """Verbs that run in the tests' process set variables and silence logging, and the next test would run under them."""
    variables, silenced = dict(os.environ), logging.root.manager.disable
    yield
    logging.disable(silenced)
    # pytest's own names the phase of the test
    for name in os.environ.keys() - variables.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value
