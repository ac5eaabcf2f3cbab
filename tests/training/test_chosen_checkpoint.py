"""Which checkpoint a run goes on from: whatever `run.resume` names and whatever lies in the folders, never the wrong one."""

import json
import os
import shutil

import pytest
import tiny_run
from forking import forked
from image_fixtures import make_dataset
from launching import ROOT

from scalekd_ds.checkpoint.layout import LATEST, of_checkpoint, read_latest, read_state
from scalekd_ds.checkpoint.load import choose_checkpoint, leave_later
from scalekd_ds.checkpoint.manifest import write_manifest
from scalekd_ds.checkpoint.saver import Saver
from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.config.run_dir import RunDirConfig
from scalekd_ds.errors import UserError
from scalekd_ds.training.run_dir import check_apart, make_run_dir

TRAIN = ROOT / "launch" / "train.py"


def command(place, run, *more):
    words = ("--student_kwargs", json.dumps(tiny_run.RESNET), "--schedule.epochs", 3, "--run.eval_every", 0)
    return tiny_run.supervised_arguments(place / "data", place / run, *words, "--run.pictures", 0, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """16 images, weights to begin with, and a run from them with checkpoints of steps 2 and 4 of its six."""
    place = tmp_path_factory.mktemp("chosen")
    make_dataset(place / "data", train=16, val=6, classes=2, size=(32, 32))
    first = forked(TRAIN, *command(place, "first", "--run.stop_after", 1))
    assert first.returncode == 0, first.stderr
    more = ("--student_weights", place / "first" / "student.safetensors", "--run.save_every", 2, "--run.stop_after", 4)
    second = forked(TRAIN, *command(place, "run", *more))
    assert second.returncode == 0, second.stderr
    return place


@pytest.fixture
def place(done, tmp_path):
    shutil.copytree(done, tmp_path / "place")
    return tmp_path / "place"


def step(place, number):
    return place / "run" / "checkpoints" / f"step{number:08d}"


@pytest.mark.parametrize(
    "named", ["run", "run/", "run/checkpoints", "run/checkpoints/step00000004", "run/../run/checkpoints/step00000004/"]
)
def test_a_run_and_its_newest_checkpoint_are_the_same(place, named, monkeypatch):
    monkeypatch.chdir(place)
    for run_dir in (place / "run", place / "another"):
        assert choose_checkpoint(run_dir, named).resolve() == step(place, 4)
        assert choose_checkpoint(run_dir, str(place / named)).resolve() == step(place, 4)


@pytest.mark.parametrize(
    "named", ["latest", "true", "step00000004", "", "nowhere/x", "data", "run/latest.json", "n" * 300]
)
def test_what_is_no_checkpoint_is_refused(place, named, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(
        UserError, match=r"(does not exist|is a file): --run.resume is auto, never|holds no checkpoint: give"
    ):
        choose_checkpoint(place / "run", named)


def test_a_run_is_not_mixed_up_with_another(place):
    shutil.copytree(place / "run", place / "copy")
    for checkpoint in (step(place, 2), step(place, 4), place / "run", place / "first"):
        with pytest.raises(
            UserError, match="copy holds checkpoints of its own, the last step00000004: choose another --run"
        ):
            choose_checkpoint(place / "copy", str(checkpoint))
        assert choose_checkpoint(place / "new", str(checkpoint)) is not None
    # links lead to the same folder
    (place / "link").symlink_to(place / "run")
    assert choose_checkpoint(place / "link", str(step(place, 2))).resolve() == step(place, 2)


def test_a_run_that_goes_back_does_not_lose_what_it_trains_from_there(place):
    """`auto` would go on from the later checkpoints of before; of all that was trained nothing is deleted."""
    for lr, last in ((2e-3, 3), (3e-3, 3)):
        more = ("--optim.lr", lr, "--run.save_every", 1, "--run.stop_after", last, "--run.resume", step(place, 2))
        back = forked(TRAIN, *command(place, "run", *more))
        assert back.returncode == 0, back.stderr
        assert "the checkpoints after step00000002 are left behind as left-step0000000" in back.stdout
    on = forked(TRAIN, *command(place, "run", "--optim.lr", 3e-3, "--run.resume", "auto", "--run.stop_after", 4))
    assert on.returncode == 0 and "from here on" not in on.stdout, on.stdout + on.stderr
    assert f"resuming {place / 'run'} from step00000003" in on.stdout
    found = sorted(path.name for path in (place / "run" / "checkpoints").glob("[!.]*"))
    assert found == ["left-step00000003", "left-step00000004", "step00000003", "step00000004"]
    # what was left behind can be gone on with elsewhere
    left = place / "run" / "checkpoints" / "left-step00000004"
    assert choose_checkpoint(place / "new", str(left)) == left
    assert leave_later(place / "run", step(place, 4)) is None and leave_later(place / "new", left) is None
    shutil.copytree(step(place, 4), step(place, 3 + 2))
    assert "as left-step00000004-2, left-step00000005 in" in leave_later(place / "run", step(place, 3))
    assert read_latest(place / "run" / LATEST) == "step00000003"
    # beside others of the run, whose steps are of another history
    with pytest.raises(UserError, match="holds checkpoints of its own, the last step00000003: choose another"):
        choose_checkpoint(place / "run", str(left))


@pytest.mark.parametrize("name", ["best", "run/checkpoints/best", "zz", "."])
def test_a_checkpoint_has_its_own_name_by_whatever_path_it_is_given(place, name, monkeypatch):
    """By its name others are later than it, and are left behind."""
    monkeypatch.chdir(step(place, 2) if name == "." else place)
    if name != ".":
        (place / name).symlink_to(step(place, 2))
    chosen = choose_checkpoint(place / "run", name)
    assert chosen == step(place, 2)
    assert "after step00000002 are left behind as left-step00000004 in" in leave_later(place / "run", chosen)
    assert step(place, 2).is_dir() and read_latest(place / "run" / LATEST) == "step00000002"


@pytest.mark.parametrize("damage", ["cut off", "missing", "empty"])
def test_what_is_said_of_a_damaged_checkpoint_works(place, damage):
    file = step(place, 4) / "student.safetensors"
    if damage == "empty":
        step(place, 5).mkdir()
    elif damage == "missing":
        (step(place, 4) / "engine.json").unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"; --run.resume \S+ goes on from the one before it") as error:
        choose_checkpoint(place / "run", "auto")
    chosen = choose_checkpoint(place / "run", str(error.value).split("--run.resume ")[1].split()[0])
    assert chosen == step(place, 4 if damage == "empty" else 2)
    leave_later(place / "run", chosen)
    assert choose_checkpoint(place / "run", "auto") == chosen
    (chosen / "manifest.json").unlink()
    if damage != "empty":
        with pytest.raises(UserError, match="no finished checkpoint; restore it, or start a new run"):
            choose_checkpoint(place / "run", "auto")


def test_a_checkpoint_that_a_run_deletes_meanwhile_is_a_newer_one(place):
    def use(checkpoint):
        if checkpoint == step(place, 4):
            step(place, 4).rename(step(place, 5))
        return read_state(checkpoint)["step"], checkpoint.name

    assert of_checkpoint(place / "run", use) == (4, "step00000005")
    with pytest.raises(FileNotFoundError):
        of_checkpoint(step(place, 4), use)


def test_only_the_checkpoints_of_a_run_are_deleted(tmp_path):
    folder = tmp_path / "checkpoints"
    others = ["step00000001-good", "step00000001 (copy)", "steps", "left-step00000002"]
    for name in [*others, "step00000002", "step00000003", "step00000004"]:
        (folder / name).mkdir(parents=True)
    # one was moved to another disk, which has it still
    shutil.copytree(folder / "step00000002", tmp_path / "disk" / "kept")
    (folder / "step00000001").symlink_to(tmp_path / "disk")
    saver = Saver(tmp_path, 1, 0)
    saver._delete_old()
    saver.finish()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, "step00000004"])
    assert (tmp_path / "disk" / "kept").is_dir()


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "5", "null", '{"checkpoint": 5}', '{"checkpoint": null}', '{"checkpoint": ["x"]}',
                '{"checkpoint": ""}', '{"checkpoint": "../x"}', '{"checkpoint": {}}', "[" * 100_000, "\0" * 100]
)  # fmt: skip
def test_a_damaged_name_of_the_newest_is_said(place, content):
    (place / "run" / LATEST).write_text(content)
    with pytest.raises(UserError, match=r"latest.json is damaged .*: give the checkpoint as --run.resume PATH"):
        choose_checkpoint(place / "run", "auto")
    assert choose_checkpoint(place / "run", str(step(place, 4))) == step(place, 4)


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_checkpoint_under_the_name_of_another_step_is_named(place, number):
    shutil.copytree(step(place, 4), step(place, number))
    for resume in ("auto", str(step(place, number))):
        if number == 9:
            with pytest.raises(UserError, match=r"step00000009 is the checkpoint of step 4: rename it to step00000004"):
                choose_checkpoint(place / "run", resume)
        elif resume == "auto":
            assert choose_checkpoint(place / "run", resume) == step(place, 4)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "5", '{"state": 5, "cards": {}}', '{"state": {}, "cards": []}', "[" * 100_000,
                '{"state": {"step": 99}, "cards": {}}', '{"state": {"config": {}}, "cards": {}}',
                '{"state": {"world_size": 7}, "cards": {}}', '{"state": {"accuracy": 7.5}, "cards": {}}',
                '{"state": {"best": {"top1": "x"}}, "cards": {}}', '{"state": {"top1": [1]}, "cards": {}}']
)  # fmt: skip
def test_what_was_measured_cannot_change_what_a_checkpoint_is_of(place, content):
    file = step(place, 4) / "evaluation.json"
    assert choose_checkpoint(place / "run", "auto") == step(place, 4) and file.is_file()
    file.write_text(content)
    with pytest.raises(UserError, match=r"evaluation.json is damaged \(.*\): remove it; it holds accuracies alone"):
        choose_checkpoint(place / "run", "auto")
    file.unlink()
    assert choose_checkpoint(place / "run", "auto") == step(place, 4)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "5", "null", '{"step": 4}', '{"world_size": 1}', '{"step": "x", "world_size": 1}']
)
def test_a_state_that_somebody_has_written_is_said(place, content):
    (step(place, 4) / "state.json").write_text(content)
    (step(place, 4) / "evaluation.json").unlink()
    (step(place, 4) / "manifest.json").unlink()
    write_manifest(step(place, 4))
    with pytest.raises(UserError, match=r"state.json is damaged .*; --run.resume .*step00000002 goes on from the one"):
        choose_checkpoint(place / "run", "auto")


def test_a_rank_whose_file_is_in_no_manifest_is_missed(place):
    state = json.loads((step(place, 4) / "state.json").read_text()) | {"world_size": 2}
    (step(place, 4) / "state.json").write_text(json.dumps(state))
    (step(place, 4) / "manifest.json").unlink()
    write_manifest(step(place, 4))
    with pytest.raises(UserError, match=r"shards_rank1.safetensors is missing: .* is of 2 ranks"):
        choose_checkpoint(place / "run", "auto")


def test_a_folder_behind_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "run").symlink_to("/nowhere/scratch")
    with pytest.raises(UserError, match="a link to '/nowhere/scratch', which is not there: mount it"):
        make_run_dir(tmp_path / "run")
    (tmp_path / "real").mkdir()
    (tmp_path / "good").symlink_to("real")
    assert make_run_dir(tmp_path / "good").is_dir()
    # a whole run would else be trained before it is seen
    (tmp_path / "real" / "checkpoints").symlink_to("/nowhere/scratch")
    with pytest.raises(
        UserError, match=r"checkpoints go to .*, a link to '/nowhere/scratch', which is not there: mount it"
    ):
        make_run_dir(tmp_path / "good")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.dir is .*file', which is no folder: move it away"):
        make_run_dir(tmp_path / "file")


@pytest.mark.parametrize("where", ["train", "val", "train/run", "val/run", "link", "train/../val/x"])
def test_a_run_among_the_classes_is_refused(tmp_path, where, monkeypatch):
    for split in ("train", "val"):
        (tmp_path / split / "class_0" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("train")
    monkeypatch.chdir(tmp_path)
    for run_dir, root in ((where, "."), (str(tmp_path / where), str(tmp_path)), (where, str(tmp_path))):
        with pytest.raises(UserError, match=r"run.dir is .*, where data.(train|val) has its classes"):
            check_apart(RunConfig(data=DataConfig(root=root), run=RunDirConfig(dir=run_dir)))
    for run_dir in (".", "run", "train/class_0/run", "nowhere/run"):
        check_apart(RunConfig(data=DataConfig(root=str(tmp_path)), run=RunDirConfig(dir=run_dir)))
    check_apart(RunConfig(data=DataConfig(train="hf:x", val="hf:y"), run=RunDirConfig(dir="run")))


def test_a_run_that_ends_where_another_was_does_not_start_over(place):
    """It trains no step, and has a checkpoint of its own all the same."""
    for resume in (step(place, 4), "auto"):
        done = forked(TRAIN, *command(place, "third", "--run.resume", resume, "--run.stop_after", 4))
        assert done.returncode == 0 and f"resuming {place / 'third'} from step00000004" in done.stdout, done.stderr
        found = read_state(place / "third" / "checkpoints" / "step00000004")
        assert found["evaluated_step"] == 4 and found["accuracy"] == read_state(step(place, 4))["accuracy"]


def test_what_a_run_began_with_is_not_needed_any_more(place):
    os.remove(place / "first" / "student.safetensors")
    file = place / "first" / "student.safetensors"
    on = forked(TRAIN, *command(place, "run", "--student_weights", file, "--run.resume", "auto"))
    assert on.returncode == 0 and "from here on" not in on.stdout, on.stderr
    assert json.loads((place / "run" / "results.json").read_text())["step"] == 6


def test_a_student_that_is_a_file_may_move(place):
    def words(file, *more):
        given = command(place, "second", "--student", file, "--student_weights", file, "--student_kwargs", "{}", *more)
        return given

    first = place / "first" / "student.safetensors"
    begun = forked(TRAIN, *words(first, "--run.stop_after", 2))
    assert begun.returncode == 0, begun.stderr
    kept = read_state(place / "second" / "checkpoints" / "step00000002")["config"]["student"]
    shutil.rmtree(place / "first")
    moved = place / "second" / "checkpoints" / "step00000002" / "student.safetensors"
    on = forked(TRAIN, *words(moved, "--run.resume", "auto"))
    assert on.returncode == 0, on.stderr
    assert f"student is {moved} from here on, and was {kept}" in on.stdout
