"""A step on CUDA tensors without a GPU: devices, host syncs, blocking copies and launches of whole pairs."""

import re

import pytest
from cuda_cases import CASES, MEASURED, PAIRS
from launching import ROOT
from pretending import run_cases, skip_reason

# file -> (syncs of a step, why)
SYNCS = {
    "scalekd_ds/training/nonfinite.py": (
        1,
        "the check for NaN and inf, by which a step is skipped; with ZeRO it is DeepSpeed's own",
    ),
}
# kernels of one part that a step may launch at most: of the measured ones, and 5% for other versions of PyTorch and timm
BUDGET = ROOT / "docs" / "performance.md"
PARTS = {"teacher", "student", "projectors", "losses", "backward", "optimizer", "else"}

# of the five pairs at full depth, half a minute each, a Swin and a ViT as teachers are enough for every change, and so is
# one of each kind of teacher among the shallow ones
SLOW = {"BEiT-L → ViT-B", "EVA-L → ViT-B", "Swin-L → Mixer-S"}
SLOW |= {"EVA-02 → DeiT III", "SigLIP → MobileNet v3", "CLIP → MobileNet v1", "PVT v2 → RegNet"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


@pytest.fixture(scope="module")
def found(asked, tmp_path_factory):
    return run_cases([name for name in PAIRS if name in asked("name")], tmp_path_factory.mktemp("pretending"))


def check_step(found):
    """What must hold of every step."""
    assert "error" not in found, found["error"]
    where = {place.partition(":")[0] for place in found["syncs"]}
    assert where <= set(SYNCS), found["syncs"]
    for file, (limit, why) in SYNCS.items():
        count = sum(n for place, n in found["syncs"].items() if place.startswith(file))
        assert count <= limit, f"{found['syncs']}: {why}"
    assert found["copies"] == {}
    assert found["watching"] == {"syncs": {}, "copies": {}}
    assert {device for _, device in found["losses"].values()} == set(found["devices"])
    assert {dtype for dtype, _ in found["losses"].values()} == {"torch.float32"}
    assert found["launches"].keys() <= PARTS


def check_evaluation(found):
    """An evaluation waits once, at its end: all of its counts are fetched together."""
    assert found["evaluation"]["copies"] == {}
    # four numbers, of the student and again of the teacher
    assert {re.sub(r":\d+", "", place): count for place, count in found["evaluation"]["syncs"].items()} == {
        "scalekd_ds/evaluation/accuracy.py aten::_local_scalar_dense": 8
    }


@pytest.mark.parametrize("name", marked(PAIRS))
def test_a_step_of_a_pair_mixes_no_devices_and_waits_for_nothing(found, name):
    check_step(found[name])
    if PAIRS[name].evaluates:
        check_evaluation(found[name])


@pytest.mark.parametrize("name", marked(PAIRS))
def test_no_attention_gets_a_head_size_that_its_backward_does_not_take(found, name):
    taken = {kernel: size for kernel, size, _ in found[name]["attention"]}
    assert not any("cudnn" in kernel and 128 < size < 256 for kernel, size in taken.items()), taken


def budgets():
    """Pair -> part -> kernels, from the table in docs/performance.md."""
    lines = [line for line in BUDGET.read_text().splitlines() if line.startswith("|")]
    head = next(i for i, line in enumerate(lines) if line.startswith("| launches of a step"))
    parts = [cell.strip() for cell in lines[head].strip("|").split("|")][1:]
    rows = {}
    for line in lines[head + 2 :]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name not in MEASURED:
            break
        rows[name] = dict(zip(parts, (int(cell.replace(",", "")) for cell in cells), strict=True))
    return rows


def test_the_table_of_launches_names_every_measured_pair():
    assert budgets().keys() == MEASURED.keys()


@pytest.mark.parametrize("name", marked(MEASURED))
def test_a_step_launches_no_more_kernels_than_its_budget(found, name):
    budget, launches = budgets()[name], found[name]["launches"]
    assert sum(budget[part] for part in budget if part != "all") == budget["all"]
    for part in PARTS:
        assert launches.get(part, 0) <= 1.05 * budget["rest" if part == "else" else part], part
    # a table that nobody kept up would allow anything
    assert sum(launches.values()) >= 0.9 * budget["all"]


def test_every_pair_is_among_the_cases():
    assert len(PAIRS) >= 12 and PAIRS.keys() <= CASES.keys()
