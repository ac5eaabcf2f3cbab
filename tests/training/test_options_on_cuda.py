"""Every option of the method, and what else changes a step, on CUDA tensors without a GPU."""

import dataclasses

import pytest
from cuda_cases import CASES, OPTIONS, OTHERS
from pretending import run_cases, skip_reason
from test_step_on_cuda import check_evaluation, check_step

from scalekd_ds.config import DistillConfig

# what a number alone changes, and what pairs of `test_step_on_cuda` have, too: two seconds each
SLOW = {
    "KD alone of the logits",
    "temperature",
    "softmax scale",
    "one view of the stage before",
    "heads",
    "LAMB",
    "AdamW",
}
SLOW |= {"float16", "models on the second GPU before"}

pytestmark = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


@pytest.fixture(scope="module")
def found(asked, tmp_path_factory):
    return run_cases(
        [name for name in [*OPTIONS, *OTHERS] if name in asked("name")], tmp_path_factory.mktemp("pretending")
    )


def test_every_option_is_tried_at_another_value_than_its_default():
    tried = {name for case in OPTIONS.values() for name in case.options}
    assert tried == {field.name for field in dataclasses.fields(DistillConfig)}
    assert all(getattr(DistillConfig(), n) != v for case in OPTIONS.values() for n, v in case.options.items())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in [*OPTIONS, *OTHERS]]
)
def test_a_step_mixes_no_devices_and_waits_for_nothing(found, name):
    check_step(found[name])
    if CASES[name].evaluates:
        check_evaluation(found[name])
    assert found[name]["devices"] == [f"cuda:{CASES[name].device}"]


@pytest.mark.parametrize("name", ["Triton's attention", "Triton's attention on the second GPU"])
def test_triton_is_launched_where_the_table_says_so(found, name):
    launched = found[name]["operations"]
    assert launched["cap_forward_kernel"] == 2
    assert launched["dual_view_sums_kernel"] == launched["dual_view_backward_kernel"] == 1
    # no projector's, whose heads have 8 channels
    assert all(size != 8 for _, size, _ in found[name]["attention"])
