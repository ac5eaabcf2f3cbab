"""What a user can get wrong: one clear line, a status of 2, no traceback, and nothing written."""

import json
import re
import shutil
import sys

import pytest
from forking import forked
from image_fixtures import make_dataset, make_folder
from launching import ROOT, alone, environment, errors_of, launch
from tiny_run import TEACHER, supervised_arguments

from scalekd_ds.engine import ds_config
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.training.run_dir import make_run_dir

TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_dataset(tmp_path_factory.mktemp("data"), train=12, val=6, classes=3, size=(32, 32))
    make_folder(root / "one", {"only": 3})
    (root / "empty").mkdir()
    return root


def error_of(*args: str) -> str:
    with pytest.raises(UserError) as error:
        parse_run([str(a) for a in args])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--recipe", "fashion-scalkd"), "unknown recipe 'fashion-scalkd'. Did you mean 'fashion-scalekd'"),
        (("--lr", "1"), "unknown argument '--lr'. Did you mean '--optim.lr'?"),
        (("--image_size", "32"), "unknown argument '--image_size'. Did you mean '--data.image_size'?"),
        (("--deepspeed",), "unknown argument '--deepspeed'. Did you mean '--run.ds_config'?"),
        (("--data.rot", "x"), "unknown argument '--data.rot'. Did you mean '--data.root'"),
        (("--lr", "1"), "unknown argument '--lr'"),
        (("--data.train_images", "many"), "--data.train_images is 'many': it must be int"),
        (("--optim.name", "adam"), "--optim.name is 'adam': it must be one of ['sgd', 'adamw', 'lamb']"),
        (("--optim.lr", "-1"), "optim.lr is -1.0: it must be positive"),
        (("--distill.kd_weight", "1.5"), "distill.kd_weight is 1.5: it must be 0 to 1"),
        (("--global_batch_size", "0"), "global_batch_size is 0"),
        (("--data.crop_scale", "[0.5, 0.1]"), "data.crop_scale is (0.5, 0.1)"),
        (("--seed", str(2**70)), f"seed is {2**70}: it must be of less than 62 bits"),
        (("--run.stop_after", "0"), "run.stop_after is 0: it must be at least 1"),
        (("--optim.betas", "[1.5, 0.9]"), "optim.betas is (1.5, 0.9): it must be two rates in [0, 1)"),
        (("--optim.eps", "-1"), "optim.eps is -1.0"),
        (("--optim.momentum", "1"), "optim.momentum is 1.0"),
        (("--schedule.min_lr", "-1"), "schedule.min_lr is -1.0"),
        (("--schedule.gamma", "0"), "schedule.gamma is 0.0"),
        (("--data.threads", "100000"), "data.threads is 100000: it must be at most 1024"),
        (("--data.prefetch", "100000"), "data.prefetch is 100000: it must be at most 100"),
        (("--label_smoothing.x", "1"), "unknown argument '--label_smoothing.x'. Did you mean '--label_smoothing'"),
        (("--config", "/nowhere.json"), "config file '/nowhere.json' does not exist"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(args, words):
    assert words in error_of(*args)


def test_a_dumped_config_starts_the_same_run(tmp_path):
    dumped = tmp_path / "run.json"
    done = forked(TRAIN, "--recipe", "swin_l-resnet50-traditional", "--optim.lr", 0.2, "--dump-config", dumped)
    assert done.returncode == 0, done.stderr
    direct, _ = parse_run(["--recipe", "swin_l-resnet50-traditional", "--optim.lr", "0.2"])
    again, _ = parse_run(["--config", str(dumped)])
    assert again == direct
    values = json.loads(dumped.read_text())
    values["optim"]["rl"] = 1
    dumped.write_text(json.dumps(values))
    assert "rl" in error_of("--config", str(dumped))
    dumped.write_text("{")
    assert "is not JSON" in error_of("--config", str(dumped))


def test_recipes_are_listed_and_help_is_given():
    done = alone(TRAIN, "--list-recipes")
    assert done.returncode == 0
    assert re.search(r"^fashion-scalekd +A slim ResNet", done.stdout, re.M)
    assert "torch" not in done.stderr
    done = forked(TRAIN, "--help")
    assert done.returncode == 0 and "--schedule.warmup_epochs" in done.stdout


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"zero_optimisation": {}}', "does not know the key 'zero_optimisation'. Did you mean 'zero_optimization'"),
        ('{"elasticity": {"enabled": true}}', "elasticity has no place in a run"),
        ('{"zero_optimization": {"stage": 3, "mics_shard_size": 2}}', "MiCS"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage is 7"),
        ('{"zero_optimization": {"stagee": 1}}', "zero_optimization.stagee"),
        ('{"zero_optimization.stage": 2}', """'zero_optimization.stage': write "zero_optimization": {"stage": ..."""),
        (
            '{"zero_optimization": {"offload_optimizer.device": "cpu"}}',
            "'zero_optimization.offload_optimizer.device': write",
        ),
        ('{"bf16.enabled": true}', "does not know the key 'bf16.enabled': write"),
        ('{"elasticity.enabled": true}', "does not know the key 'elasticity.enabled': write"),
        ('{".": 1}', "does not know the key '.'"),
        ('{"zero_optimization": 1}', "zero_optimization is 1"),
        ('{"gradient_clipping": 1.0}', "sets 'gradient_clipping', which is the recipe's"),
        ('{"optimizer": {"type": "Adam"}}', "sets 'optimizer', which is the recipe's"),
    ],
)
def test_a_bad_deepspeed_config_is_refused(tmp_path, config, words):
    path = tmp_path / "ds.json"
    path.write_text(config)
    with pytest.raises(UserError) as error:
        ds_config.read(str(path))
    assert words in str(error.value)


def test_numbers_as_the_tutorials_write_them_are_whole(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8}}')
    found = ds_config.read(str(path))["zero_optimization"]
    assert all(type(value) is int for value in found.values()), found


def test_shipped_deepspeed_configs_have_their_stage_bf16_and_the_runs_batches():
    for stage in range(4):
        config = ds_config.read(f"zero{stage}")
        assert ds_config.stage_of(config) == stage
        assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
        cfg, _ = parse_run(["--optim.clip", "2.5"])
        merged = ds_config.merge(config, cfg, 4)
        assert merged["gradient_clipping"] == 2.5
        assert merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 4 == 256
    assert ds_config.merge(config, parse_run([])[0], 1)["gradient_clipping"] == 0.0
    with pytest.raises(UserError, match=r"'zero9' is neither a file nor in ds_configs/. Did you mean 'zero"):
        ds_config.read("zero9")


def test_a_global_batch_that_ranks_cannot_share_is_refused():
    cfg, _ = parse_run(["--global_batch_size", "10", "--micro_batch_size", "4"])
    assert cfg.batches(1) == (2, 5)
    assert cfg.batches(2) == (1, 5)
    with pytest.raises(UserError, match="global_batch_size is 10, which 3 ranks cannot share evenly"):
        cfg.batches(3)


# (arguments, words) of whole runs in one process; each is refused before any training
RUNS = {
    "no data": (("--data.root", "{data}/nowhere"), "data.train: the folder"),
    "empty data": (("--data.root", "{data}", "--data.train", "empty"), "has no class folders"),
    "one class": (("--data.root", "{data}", "--data.train", "one"), "has one class, 'only'"),
    "student": (
        ("--data.root", "{data}", "--student", "resnet5O"),
        "unknown timm model 'resnet5O'. Did you mean 'resnet50'",
    ),
    "teacher": (("--data.root", "{data}", "--teacher", "swin_tinny"), "unknown timm model 'swin_tinny'"),
    "teacher file": (
        ("--data.root", "{data}", "--teacher", "no.safetensors"),
        "weights file 'no.safetensors' does not exist",
    ),
    "no last stage": (("--data.root", "{data}", "--teacher", "resnet18"), "ResNet cannot be a ScaleKD teacher"),
    "image size": (
        ("--data.root", "{data}", "--teacher_image_size", "33"),
        "cannot take 33x33 images: its patches are 4x4",
    ),
    "classes": (
        ("--data.root", "{data}", "--teacher_kwargs.num_classes", "10"),
        "the teacher has 10 classes and the student 3: logit KD needs the same",
    ),
    "heads": (
        ("--data.root", "{data}", "--distill.heads_s4", "5"),
        "num_heads is 5: it must divide the teacher's width, 48",
    ),
    "resume": (("--data.root", "{data}", "--run.resume", "nowhere"), "checkpoint 'nowhere' does not exist"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_cannot_start_ends_in_one_line(data, tmp_path, case):
    args, words = RUNS[case]
    kwargs = {k: v for k, v in TEACHER.items() if case != "image size" or k != "img_size"}
    if case in ("no last stage", "teacher file", "teacher"):
        kwargs = {}
    run_dir = tmp_path / "run"
    done = forked(
        TRAIN,
        *("--recipe", "fashion-scalekd", "--data.train_images", "null", "--global_batch_size", 4),
        *("--run.dir", run_dir, "--teacher", "swin_tiny_patch4_window7_224", "--teacher_weights", "none"),
        *("--teacher_kwargs", json.dumps(kwargs)),
        *(a.format(data=data) for a in args),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    errors = errors_of(done)
    assert len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_both_ranks_end_at_once_with_one_line(data):
    done = launch(TRAIN, "--recipe", "fashion-ce", "--data.root", data / "nowhere")
    assert done.returncode == 2
    errors = errors_of(done)
    assert len(errors) == 1 and "does not exist" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_hosts_file_that_does_not_exist_is_refused(data):
    launcher = ("--hostfile", "nowhere/hosts")
    done = launch(TRAIN, "--recipe", "fashion-ce", "--data.root", data, ranks=1, launcher=launcher)
    assert done.returncode == 2
    assert "hosts file 'nowhere/hosts' does not exist" in errors_of(done)[0]
    assert "Traceback" not in done.stderr


def run_arguments(data, run_dir):
    return supervised_arguments(data, run_dir, "--global_batch_size", 4, "--schedule.epochs", 1)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run; the damage is done to copies of it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = forked(TRAIN, *run_arguments(data, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "manifest", "vanished"])
def test_a_damaged_checkpoint_is_named(data, finished, tmp_path, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    checkpoint = next((run_dir / "checkpoints").iterdir())
    named = states = checkpoint / "shards_rank0.safetensors"
    if damage == "flipped":
        contents = bytearray(states.read_bytes())
        contents[len(contents) // 2] ^= 0xFF
        states.write_bytes(contents)
    elif damage == "cut":
        states.write_bytes(states.read_bytes()[:100])
    elif damage == "missing":
        states.unlink()
    elif damage == "manifest":
        named = checkpoint / "manifest.json"
        named.write_text("{")
    else:
        named = checkpoint
        checkpoint.rename(run_dir / "elsewhere")
    done = forked(TRAIN, *run_arguments(data, run_dir), "--run.resume", "auto")
    assert done.returncode == 2, done.stdout
    assert str(named) in errors_of(done)[0] and "Traceback" not in done.stderr
    consolidated = forked(ROOT / "launch" / "consolidate.py", run_dir, tmp_path / "out.safetensors")
    assert consolidated.returncode == 2 and len(errors_of(consolidated)) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_mistakes_of_evaluate_and_consolidate_are_named(data, tmp_path):
    evaluate, consolidate = ROOT / "launch" / "evaluate.py", ROOT / "launch" / "consolidate.py"
    for script, args, words in (
        (evaluate, ("resnet5O", "--data", data), "unknown timm model"),
        (evaluate, ("resnet18", "--weights", "none", "--data", data), "has 1000 classes and"),
        (evaluate, ("no.safetensors", "--data", data), "does not exist"),
        (consolidate, (tmp_path, tmp_path / "x.safetensors"), "holds no checkpoint"),
        (consolidate, (tmp_path, tmp_path / "x.pt"), "must end in .safetensors"),
    ):
        done = forked(script, *args)
        assert done.returncode == 2, done.stderr
        assert words in errors_of(done)[0] and "Traceback" not in done.stderr


def test_environment_of_the_tests_is_the_tests_own():
    """The launcher that these tests start is the one beside the interpreter that runs them."""
    assert environment()["PATH"].startswith(sys.prefix)


def test_a_runs_folder_is_its_users_alone(tmp_path):
    made = make_run_dir(tmp_path / "runs" / "mine")
    assert made.stat().st_mode & 0o777 == 0o700
    # one that is there keeps what its owner has set
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)
    assert make_run_dir(shared).stat().st_mode & 0o777 == 0o750
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="which cannot be made"):
        make_run_dir(file / "run")
