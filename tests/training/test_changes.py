"""A run that goes on with other settings: each difference is honoured and said, honoured in silence, or refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pair
import tiny_run
from forking import forked, forked_ranks
from image_fixtures import make_dataset
from launching import ROOT
from safetensors.torch import load_file, save_file

from scalekd_ds.checkpoint.layout import checkpoints_of, read_state
from scalekd_ds.checkpoint.manifest import write_manifest
from scalekd_ds.checkpoint.plain_weights import write_student
from scalekd_ds.config import RunConfig
from scalekd_ds.data import StreamSampler
from scalekd_ds.errors import UserError
from scalekd_ds.training.changes import REFUSED, SILENT, WITHOUT_EFFECT, config_changes, flat_fields

FIELDS = sorted(flat_fields(RunConfig().as_dict()))


def other(value):
    """A value unlike another, of any type: `config_changes` compares and does not check."""
    return [value, "another"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_honoured_said_or_refused(name):
    before = RunConfig().as_dict()
    after = json.loads(json.dumps(before))
    group, _, key = name.rpartition(".")
    place = after[group] if group else after
    place[key] = other(place[key])
    if name in REFUSED or name == "teacher":
        with pytest.raises(UserError, match=rf"--{name} is .*, and was .* when step8 was written.*start a new run"):
            config_changes(before, after, Path("step8"))
        return
    lines = config_changes(before, after, Path("step8"))
    if name in SILENT:
        assert lines == []
    elif name in WITHOUT_EFFECT:
        assert lines == [f"{name} has no effect: {WITHOUT_EFFECT[name]}"]
    else:
        assert len(lines) == 1 and lines[0].startswith(f"{name} is ") and "\n" not in lines[0]
    assert config_changes(before, before, Path("step8")) == []


def test_the_rules_name_fields_that_exist():
    assert set(FIELDS) >= set(REFUSED) | SILENT | set(WITHOUT_EFFECT)
    # a field of an older release that is gone, and one that is new
    before = RunConfig().as_dict()
    after = json.loads(json.dumps(before))
    before["gone"] = 1
    del before["data"]["class_order"], before["loss"]
    assert config_changes(before, after, Path("step8")) == []


@pytest.mark.parametrize("batches", [(8, 16), (16, 8), (8, 24), (24, 8), (4, 6)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_stream_goes_on_where_it_was_at_another_global_batch(batches, repeats):
    """Over all ranks, no image of the stream is left out and none comes twice."""
    size, steps = 37, 9
    one, two = batches

    def taken(batch, steps, offset):
        for step in steps:
            for rank in range(2):
                sampler = StreamSampler(size, 3, batch, batch // 2, rank, 2, repeats, offset=offset)
                yield from zip(*(array.tolist() for array in sampler.indices(step, 0)), strict=True)

    seen = list(taken(one, range(steps), 0))
    seen += list(taken(two, range(steps, steps + 10), steps * one - steps * two))
    whole = list(taken(2, range(len(seen) // 2), 0))
    assert len(seen) == len(whole) == steps * one + 10 * two
    assert sorted(seen) == sorted(whole)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """32 images, and a run over four epochs of them in batches of 8 that was stopped after 8 of its 16 steps."""
    root = tmp_path_factory.mktemp("resumed")
    make_dataset(root / "data", train=32, val=9, classes=3, size=(32, 32))
    done = forked(ROOT / "launch" / "train.py", *command(root / "data", root / "run"), "--run.stop_after", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def command(data, run, *more):
    first = ("--student_kwargs", json.dumps(tiny_run.RESNET), "--schedule.epochs", 4, "--optim.lr", 1e-3)
    log = ("--run.log_every", 1, "--run.eval_every", 0, "--schedule.warmup_epochs", 0.5, "--optim.base_batch", "null")
    return tiny_run.supervised_arguments(data, run, *first, *log, *more)


@pytest.fixture
def stopped(place, tmp_path):
    """A copy of the run and its images, which a test may change."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "data", tmp_path / "data")
    return tmp_path


def go_on(stopped, *more, ranks=1):
    words = command(stopped / "data", stopped / "run", "--run.resume", "auto", *more)
    if ranks == 1:
        return forked(ROOT / "launch" / "train.py", *words)
    return forked_ranks(ROOT / "launch" / "train.py", *words, ranks=ranks)


def rates(run):
    return tiny_run.scalars(run)["optim/lr"]


def expected_rate(epoch, lr=1e-3, epochs=4, warmup=0.5):
    return lr * 0.5 * (1 + np.cos(np.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize(
    ("batch", "ranks", "last"),
    [(16, 2, 12), (4, 1, 24), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((16, 1, 12), (24, 1, 11)))],
)
def test_another_global_batch_goes_on_by_images(stopped, batch, ranks, last):
    done = go_on(stopped, "--global_batch_size", batch, "--micro_batch_size", 4, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"global_batch_size is {batch} from here on, and was 8" in done.stdout
    results = json.loads((stopped / "run" / "results.json").read_text())
    assert results["step"] == results["total_steps"] == last
    assert results["images"] == 64 + (last - 8) * batch >= 128
    # the rate follows the images seen, from one start to the next
    found = rates(stopped / "run")
    assert sorted(found) == list(range(1, last + 1))
    for step in range(9, last + 1):
        images = 64 + (step - 8) * batch
        # the last step is the end of the cosine, also where it goes beyond the last epoch
        rate = expected_rate(images / 32, epochs=results["images"] / 32)
        assert found[step] == pytest.approx(rate, abs=1e-8), step
    seen = tiny_run.scalars(stopped / "run")["data/images_seen"]
    assert [seen[step] for step in (8, 9)] == [64, 64 + batch]
    state = read_state(checkpoints_of(stopped / "run")[-1])
    assert state["samples"] == results["images"]
    assert json.loads((stopped / "run" / "config.json").read_text())["global_batch_size"] == batch


def test_the_same_command_says_nothing_and_another_rate_is_taken(stopped):
    kept = shutil.copytree(stopped / "run", stopped / "kept")
    done = go_on(stopped)
    assert done.returncode == 0 and "from here on" not in done.stdout, done.stdout
    assert rates(stopped / "run")[12] == pytest.approx(expected_rate(3), abs=1e-8)
    shutil.rmtree(stopped / "run")
    os.rename(kept, stopped / "run")
    done = go_on(stopped, "--optim.lr", 5e-4, "--optim.weight_decay", 0.1, "--run.log_every", 2)
    assert "optim.lr is 0.0005 from here on, and was 0.001" in done.stdout
    assert "optim.weight_decay is 0.1 from here on, and was 0.05" in done.stdout
    assert "log_every" not in done.stdout
    assert rates(stopped / "run")[12] == pytest.approx(expected_rate(3, lr=5e-4), abs=1e-8)


def test_what_cannot_go_on_is_refused_and_costs_nothing(stopped):
    before = sorted(path.relative_to(stopped) for path in (stopped / "run").rglob("*"))
    wide = json.dumps(tiny_run.RESNET | {"channels": [8, 8, 16, 32]})
    for more, says in (
        (("--student", "resnet34"), "--student is resnet34, and was resnet18 when step00000008 was written"),
        (("--student_kwargs", wide), "--student_kwargs is"),
        (("--seed", 5), "--seed is 5, and was 0"),
        (("--optim.name", "sgd"), "--optim.name is sgd, and was adamw"),
    ):
        done = go_on(stopped, *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert says in done.stderr and done.stderr.count("error:") == 1
    os.rename(stopped / "data" / "train" / "class_1", stopped / "data" / "train" / "class_x")
    os.rename(stopped / "data" / "val" / "class_1", stopped / "data" / "val" / "class_x")
    done = go_on(stopped)
    assert done.returncode == 2
    assert (
        "data.train" in done.stderr
        and "'class_x'" in done.stderr
        and "only in the checkpoint, the first 'class_1'" in done.stderr
    )
    assert before == sorted(path.relative_to(stopped) for path in (stopped / "run").rglob("*"))


def test_other_images_are_said_and_used(stopped):
    for path in sorted((stopped / "data" / "train").rglob("*.jpg"))[:8]:
        path.unlink()
    done = go_on(stopped)
    assert done.returncode == 0, done.stderr
    assert "data.train has 24 images from here on, and had 32; epochs are counted in the new number" in done.stdout
    # four epochs of 24 images are 12 steps
    assert json.loads((stopped / "run" / "results.json").read_text())["step"] == 12


def test_classes_in_another_order_keep_the_checkpoints(stopped):
    """The names 9 and 10 change places where their order changes; the outputs keep their meaning."""
    done = go_on(stopped, "--data.class_order", "natural")
    assert done.returncode == 0, done.stderr
    table = [f"{path.relative_to(stopped / 'data')},{path.parent.name}" for path in (stopped / "data").rglob("*.jpg")]
    for split in ("train", "val"):
        rows = [row for row in table if row.startswith(split)]
        (stopped / "data" / f"{split}.csv").write_text("\n".join(["path,label", *rows]))
    (stopped / "data" / "classes.txt").write_text("class_2\nclass_0\nclass_1\n")
    done = go_on(stopped, "--data.train", "train.csv", "--data.val", "val.csv", "--schedule.epochs", 5)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint list the same classes in another order" in done.stdout
    card = json.loads((stopped / "run" / "student.json").read_text())
    assert card["classes"] == ["class_0", "class_1", "class_2"]


def test_another_deepspeed_json_is_said(stopped):
    done = go_on(stopped, "--run.ds_config", "zero2", "--run.stop_after", 9)
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed's zero_optimization.stage is 2 from here on, and was 1" in done.stdout
    assert "DeepSpeed's torch_autocast.enabled is True from here on, and was " in done.stdout
    assert "train_batch_size" not in done.stdout
    done = go_on(stopped, "--run.ds_config", "zero2", "--run.stop_after", 10, "--run.monitors", "csv")
    assert done.returncode == 0 and "from here on" not in done.stdout, done.stdout


def test_other_packages_are_said(stopped):
    checkpoint = checkpoints_of(stopped / "run")[-1]
    state = read_state(checkpoint)
    assert state["packages"]["torch"] and state["data.train"]["count"] == 32
    state["packages"]["torch"] = "1.0"
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    done = go_on(stopped, "--run.stop_after", 9)
    assert done.returncode == 0, done.stderr
    assert "packages have changed since the checkpoint: torch " in done.stdout and "(was 1.0)" in done.stdout
    # a checkpoint of an earlier release, which recorded none of it
    checkpoint = checkpoints_of(stopped / "run")[-1]
    state = read_state(checkpoint)
    for key in ("packages", "data.train", "data.val", "teacher_digest", "samples"):
        del state[key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    done = go_on(stopped, "--run.stop_after", 10)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_step_has_all_its_micro_batches_where_it_had_others_before(stopped):
    """DeepSpeed finds the end of a step by the number of all micro batches, which another start has not made in this size."""
    for batch, micro, accumulation in ((24, 4, 6), (40, 8, 5)):
        done = go_on(
            stopped, "--global_batch_size", batch, "--micro_batch_size", micro, "--run.stop_after", 9 + (micro == 8)
        )
        assert done.returncode == 0, done.stderr
        engine = json.loads((checkpoints_of(stopped / "run")[-1] / "engine.json").read_text())
        assert engine["counters"]["micro_steps"] % accumulation == 0


def test_accuracies_are_of_the_images_that_are_there(stopped):
    """A run that is done is measured again where its validation set has changed, and not where it has not."""
    kept = shutil.copytree(stopped / "data" / "val", stopped / "kept")
    make_dataset(stopped / "more", train=1, val=30, classes=3, size=(32, 32))
    shutil.rmtree(stopped / "data" / "val")
    os.rename(stopped / "more" / "val", stopped / "data" / "val")
    anew = "they are measured anew, and so is the best one"
    for val, images, said in ((None, 30, True), (None, 30, False), (kept, 9, True)):
        if val is not None:
            shutil.rmtree(stopped / "data" / "val")
            os.rename(val, stopped / "data" / "val")
        done = go_on(stopped, "--run.stop_after", 8)
        assert done.returncode == 0 and (anew in done.stdout) == said, done.stdout + done.stderr
        assert ("data.val has 30 images from here on, and had 9" in done.stdout) == (images == 30)
        results = json.loads((stopped / "run" / "results.json").read_text())
        assert results["val_images"] == images and results["best"] == {"top1": results["top1"], "step": 8}
    done = go_on(stopped, "--data.eval_resize", 40, "--run.stop_after", 9, "--schedule.epochs", 5)
    assert done.returncode == 0 and anew in done.stdout, done.stdout + done.stderr
    # what is left of the end before is not under the name of this one's
    before = json.loads((stopped / "run" / "results.before.json").read_text())
    assert (before["step"], json.loads((stopped / "run" / "results.json").read_text())["step"]) == (8, 9)


def test_a_teacher_may_move_and_not_change(stopped):
    teacher = tiny_pair.teacher(num_classes=3, img_size=32)
    classes = [f"class_{i}" for i in range(3)]
    card = {"architecture": "swin_tiny_patch4_window7_224", "model_kwargs": tiny_run.SWIN, "num_classes": 3}
    card |= {"classes": classes, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    write_student(stopped / "t.safetensors", teacher.state_dict(), card)
    words = ("--distill.features", "false", "--micro_batch_size", 8)
    run = command(stopped / "data", stopped / "distilled", "--teacher", stopped / "t.safetensors", *words)
    done = forked(ROOT / "launch" / "train.py", *run, "--run.stop_after", 2)
    assert done.returncode == 0, done.stderr
    (stopped / "elsewhere").mkdir()
    for suffix in (".safetensors", ".json"):
        os.rename(stopped / f"t{suffix}", stopped / "elsewhere" / f"t{suffix}")
    moved = [str(stopped / "elsewhere" / "t.safetensors") if "t.safetensors" in str(word) else word for word in run]
    done = forked(ROOT / "launch" / "train.py", *moved, "--run.resume", "auto", "--run.stop_after", 3)
    assert done.returncode == 0 and "from here on" not in done.stdout, done.stderr
    weights = load_file(stopped / "elsewhere" / "t.safetensors")
    weights["norm.weight"] = weights["norm.weight"] * 1.5
    save_file(weights, stopped / "elsewhere" / "t.safetensors")
    done = forked(ROOT / "launch" / "train.py", *moved, "--run.resume", "auto", "--run.stop_after", 4)
    assert done.returncode == 2
    assert "the teacher's weights are not those that the checkpoint was trained with" in done.stderr
    without = command(stopped / "data", stopped / "distilled", *words, "--run.resume", "auto")
    done = forked(ROOT / "launch" / "train.py", *without)
    assert done.returncode == 2 and "--teacher is none, and was " in done.stderr
