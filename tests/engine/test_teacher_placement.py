"""Teachers that no GPU holds beside its student: sharded over ranks and offloaded, held against replicas on the same ranks."""

import json

import pytest
from forking import forked_ranks
from launching import ROOT, WORKERS
from tiny_run import arguments, images, scalars

from scalekd_ds.checkpoint.layout import resolve_checkpoint
from scalekd_ds.checkpoint.plain_weights import read_weights, weights_file
from scalekd_ds.config import RunDirConfig
from scalekd_ds.errors import UserError
from scalekd_ds.teacher import Teacher

WORKER = WORKERS / "teacher_worker.py"
TRAIN = ROOT / "launch" / "train.py"
OTHERS = ["vit,offload,fp32", "dinov3,sharded,bf16"]
CASES = {
    2: [f"{name},sharded,fp32" for name in ("vit", "swin", "beit", "dinov3", "convnext")] + OTHERS,
    3: ["vit,sharded,fp32", "dinov3,sharded,fp32"],
}
# the last stage alone
HEADLESS = ["headless-vit,sharded,fp32", "headless-swin,offload,bf16"]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda ranks: f"{ranks} ranks")
def compared(request, tmp_path_factory):
    """case -> what each rank saw."""
    out = tmp_path_factory.mktemp("teachers")
    cases = [*CASES[request.param], *HEADLESS]
    done = forked_ranks(WORKER, "--out", out, "--cases", *cases, ranks=request.param)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(request.param)]
    return request.param, {case: [rank[case] for rank in ranks] for case in ranks[0]}


def test_a_sharded_or_offloaded_teacher_equals_its_replica_bit_for_bit(compared):
    """Every loss of three steps, every weight after them, targets, logits, the last stage and its input's gradient; the
    ranks other than the first had built other weights, and have rank 0's."""
    ranks, results = compared
    for case in CASES[ranks]:
        for seen in results[case]:
            assert seen["differ"] == [], case
            # seven losses a step, four tensors of the teacher, and the student's and four projectors' parameters
            assert seen["compared"] > 100


def test_each_rank_holds_its_share(compared):
    ranks, results = compared
    for case in CASES[ranks]:
        for seen in results[case]:
            assert seen["replica"] == seen["whole"] or "bf16" in case
            # buffers, such as the position biases and masks of a Swin's windows, are whole on every rank
            share = (seen["whole"] - seen["buffers"]) / ranks + seen["buffers"]
            assert seen["resting"] == pytest.approx(share, rel=0.05), case


def test_the_most_that_a_rank_holds_is_as_planned(compared):
    """Share, what is kept whole, and two blocks, looked at whenever a module runs."""
    ranks, results = compared
    for case in CASES[ranks]:
        if "offload" in case or case.startswith(("swin", "convnext")):
            # a CPU's offloaded share is where its device's memory is; these two are little more than two blocks
            continue
        for seen in results[case]:
            assert seen["peak"] == pytest.approx(seen["planned"], rel=0.1), case


def test_a_last_stage_alone_is_sharded_as_a_whole_teacher_is(compared):
    """Three steps, whose targets are given, against the whole teacher's; each rank holds its share before and after them."""
    ranks, results = compared
    for case in HEADLESS:
        for seen in results[case]:
            assert seen["differ"] == [] and seen["compared"] > 100, case
            assert seen["resting"] == pytest.approx(seen["weights"] / ranks, rel=0.1), case
            assert seen["afterwards"] == seen["resting"], case


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


def run_losses(data, run_dir, config, placement):
    more = ("--run.ds_config", config, "--run.teacher_placement", placement, "--run.stop_after", 6)
    done = forked_ranks(TRAIN, *arguments(data, run_dir, *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (f"teacher: {placement}" in done.stdout) == (placement != "replica")
    state = read_weights(weights_file(resolve_checkpoint(run_dir), None))
    assert sum(v.numel() for v in state.values()) < 500_000
    return {name: values for name, values in scalars(run_dir).items() if name.startswith(("loss/", "val/"))}


def test_a_run_with_a_sharded_teacher_is_the_run_with_its_replica(data, tmp_path):
    """Under autocast, an evaluation of the teacher between the steps: every loss and every accuracy, to the bit."""
    losses = {where: run_losses(data, tmp_path / where, "zero1", where) for where in ("replica", "sharded")}
    assert losses["sharded"] == losses["replica"]


@pytest.mark.slow
def test_an_offloaded_teacher_beside_a_sharded_student_gives_its_replicas_losses(data, tmp_path):
    """Two engines with ZeRO-3's hooks; DeepSpeed's own linear layer in the student's rounds otherwise than torch's."""
    losses = {where: run_losses(data, tmp_path / where, "zero3", where) for where in ("replica", "offload")}
    for step, value in losses["replica"]["loss/total"].items():
        assert losses["offload"]["loss/total"][step] == pytest.approx(value, rel=1e-3)


def test_a_sharded_teacher_is_not_compiled():
    teacher = Teacher("vit_tiny_patch16_224", weights="none", img_size=32, embed_dim=24, depth=2, num_heads=2)
    teacher.engine = (object(),)
    with pytest.raises(UserError, match="the teacher is to be compiled and is sharded"):
        teacher.compile()


def test_the_default_placement_is_auto():
    assert RunDirConfig().teacher_placement == "auto"
