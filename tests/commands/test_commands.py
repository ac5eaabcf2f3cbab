"""The scalekd command: its help, its mistakes, what a shell completes, and the launcher that it starts."""

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace

import pytest
from launching import LIMIT, ROOT, environment

from scalekd_ds import config
from scalekd_ds.commands.dispatch import dispatch, usage
from scalekd_ds.commands.train import add_launcher_arguments, launcher_command
from scalekd_ds.commands.train import main as train
from scalekd_ds.commands.verbs import GROUPS, VERBS, module_of
from scalekd_ds.errors import UserError
from scalekd_ds.recipes import RECIPES, command_line

HELP = """
import sys
from scalekd_ds.commands.dispatch import dispatch
try:
    dispatch({arguments})
except SystemExit:
    pass
print("imported:", *sorted({{"torch", "timm", "deepspeed", "nvidia", "transformers"}} & set(sys.modules)))
"""


def scalekd(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "scalekd_ds", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def one_line(done) -> str:
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


# -- help ------------------------------------------------------------------------------------------------------------


def test_help_of_train_lists_its_fields():
    done = scalekd("train", "--help")
    assert done.returncode == 0 and "--distill.kd_weight" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_nothing_heavy_and_ends_with_examples(verb):
    code = HELP.format(arguments=[verb, "--help"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, imported = done.stdout.strip().splitlines()
    assert imported == "imported:"
    assert shown[0].startswith(f"usage: scalekd {verb}")
    # those that are longer than a line go on in the next, as a shell takes them
    examples = shown[shown.index("examples:") + 1 :]
    assert max(map(len, examples)) <= 80
    whole = re.sub(r" \\\n +", " ", "\n".join(examples))
    assert [line.strip() for line in whole.splitlines()] == list(VERBS[verb].examples)


def test_usage_names_every_verb_in_the_order_of_a_users_work():
    text = usage()
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(set(grouped)) == len(grouped) and set(VERBS) == set(grouped)
    shown = [line.split()[0] for line in text.splitlines() if re.match(r"  \S", line)]
    assert shown == grouped
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.about)}$", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
    assert scalekd("--help").stdout == text
    assert scalekd("--version").stdout.startswith("scalekd_ds ")


def docstring_of(kind: type, field: str) -> str:
    """The first words that its docstring has for a field."""
    return re.search(rf"^\s+{field}: (.+?)$", kind.__doc__, re.M)[1]


def test_help_of_train_has_every_field_with_its_docstring_in_its_group():
    text = " ".join(module_of("train").parser().format_help().split())
    groups = {
        name: kind.default_factory
        for name, kind in config.RunConfig.__dataclass_fields__.items()
        if isinstance(kind.default_factory, type) and name != "student_kwargs" and name != "teacher_kwargs"
    }
    assert {"data", "distill", "optim", "schedule", "ema", "run"} <= set(groups)
    starts = [text.index(f"--{name}.*: ") for name in groups]
    assert starts == sorted(starts)
    for name, kind in groups.items():
        assert f"--{name}.*: {kind.__doc__.strip().splitlines()[0].rstrip('.')[:40]}" in text
        for field in kind.__dataclass_fields__:
            section = text[text.index(f"--{name}.*: ") :]
            assert f"--{name}.{field} " in section
            # long words break at hyphens
            words = docstring_of(kind, field).split()[:4]
            assert " ".join(words) in text, (name, field, words)
    for field in set(config.RunConfig.__dataclass_fields__) - set(groups):
        assert f"--{field} " in text and " ".join(docstring_of(config.RunConfig, field).split()[:4]) in text


@pytest.mark.parametrize("example", [e for verb in VERBS.values() for e in verb.examples if e.startswith("scalekd")])
def test_every_example_of_a_verb_parses(example):
    _, verb, *words = shlex.split(example, comments=True)
    if verb == "train":
        launcher = module_of("completion").Parser(add_help=False)
        add_launcher_arguments(launcher)
        words = launcher.parse_known_args(words)[1]
        assert command_line.parse_run(words)[0].recipe in RECIPES
        return
    left = module_of(verb).parser().parse_known_args(words)[1]
    assert VERBS[verb].takes_run or not left
    if left:
        assert command_line.parse_run(left)[0].recipe in RECIPES


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "unknown verb 'trian'. Did you mean 'train'?"),
        (["consolidat", "x"], "Did you mean 'consolidate'?"),
        (["prepare_dta"], "Did you mean 'prepare-data'?"),
        (["evaluate", "m", "--dta", "d"], "the following arguments are required: --data"),
        (["evaluate", "m", "--data", "d", "--theads", "2"], "unknown argument '--theads'. Did you mean '--threads'"),
        (["export", "a", "b"], "the following arguments are required: --format"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["recipes", "all"], "unknown argument 'all'"),
        (["train", "--recipe", "fashion-scale"], "unknown recipe 'fashion-scale'. Did you mean 'fashion-scalekd'"),
        (["train", "--gpu", "2"], "unknown argument '--gpu'. Did you mean '--gpus'"),
        (["train", "--gpus", "two"], "argument --gpus: invalid int value: 'two'"),
        (["train", "--gpus", "0"], "--gpus is 0: it must be at least 1"),
        (["train", "--gpus", "2", "--hostfile", "launch/hosts"], "--gpus and --hostfile are both given"),
        (["train", "--hostfile", "nowhere/hosts"], "nowhere/hosts"),
        (["train", "--deepspeed-args", "--x"], "argument --deepspeed-args: expected one argument"),
        (["train", "--deepspeed-args=--x"], "--deepspeed-args is given without --gpus or --hostfile"),
        (["train", "--gpus", "2", "--deepspeed-args='"], "No closing quotation"),
    ],
)
def test_a_mistake_is_named_in_one_line(words, told):
    with pytest.raises(UserError) as error:
        dispatch(words)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_ends_with_one_line_and_status_2():
    assert one_line(scalekd("trian")).startswith("error: unknown verb 'trian'. Did you mean 'train'?")


def test_a_verb_may_be_written_with_underscores(capsys):
    with pytest.raises(SystemExit) as end:
        dispatch(["prepare_data", "--help"])
    assert end.value.code == 0 and "usage: scalekd prepare-data" in capsys.readouterr().out


# -- the launcher ----------------------------------------------------------------------------------------------------


def given(gpus=None, hostfile=None, more=""):
    return Namespace(gpus=gpus, hostfile=hostfile, deepspeed_args=more)


def test_the_launcher_gets_the_module_and_the_run(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    run = ["--recipe", "fashion-ce", "--student_kwargs.layers", "[1, 1, 1, 1]"]
    first, second = launcher_command(given(2), run), launcher_command(given(2), run)
    # DeepSpeed's launcher, whose lines of each process are left out
    assert first[:6] == [sys.executable, "-m", "scalekd_ds.commands.launcher", "--quiet", "--num_accelerators", "2"]
    assert first[first.index("--module") :] == ["--module", "scalekd_ds.commands.train", *run]
    port = first.index("--master_port") + 1
    assert first[port] != second[port]
    monkeypatch.chdir(tmp_path)
    nodes = tmp_path / "hosts"
    nodes.write_text("node1 slots=8\nnode2 slots=8\n")
    command = launcher_command(given(hostfile=str(nodes), more="--launcher pdsh"), run)
    assert command[3:] == [
        "--quiet",
        "--hostfile",
        str(nodes),
        "--launcher",
        "pdsh",
        "--module",
        "scalekd_ds.commands.train",
        *run,
    ]
    # who wants them gets them
    assert "--quiet" not in launcher_command(given(2, more="--log_level debug"), run)
    monkeypatch.setenv("SCALEKD_VERBOSE", "1")
    assert "--quiet" not in launcher_command(given(2), run)
    # this machine alone has no need of ssh
    assert "--no_ssh_check" in launcher_command(given(hostfile=str(ROOT / "launch" / "hosts")), run)


def test_other_nodes_cannot_start_in_a_folder_with_a_blank(tmp_path, monkeypatch):
    """DeepSpeed has the nodes' shells change to it, unquoted; one machine needs no shell."""
    folder, hosts = tmp_path / "two words", tmp_path / "hosts"
    folder.mkdir()
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="has a blank, and DeepSpeed's launcher cannot start other nodes"):
        launcher_command(given(hostfile=str(hosts)), [])
    assert "--num_accelerators" in launcher_command(given(2), [])
    assert "--no_ssh_check" in launcher_command(given(hostfile=str(ROOT / "launch" / "hosts")), [])


def test_a_rank_starts_no_launcher_of_its_own(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a launcher started"):
        train(["--recipe", "fashion-ce", "--gpus", "2"])


# -- completion ------------------------------------------------------------------------------------------------------

ASK = """
source <(scalekd completion bash) || exit 1
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_TYPE=9 COMPREPLY=()
    read -ra COMP_WORDS <<<"$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    function=$(complete -p scalekd | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    "$function" scalekd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "$line => ${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def command_on_path(tmp_path_factory):
    """An environment that has the console command, as an installation would make it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "scalekd"
    script.write_text(f"#!{sys.executable}\nfrom scalekd_ds.commands.dispatch import main\nmain()\n")
    script.chmod(0o755)
    env = environment()
    return {**env, "PATH": f"{folder}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(ROOT)}


def completions(lines, env, cwd):
    done = subprocess.run(
        ["bash", "-c", ASK, "ask", *lines], env=env, cwd=cwd, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    answers = [line.partition(" => ") for line in done.stdout.splitlines()]
    assert [line for line, _, _ in answers] == lines
    return [answer.split() for _, _, answer in answers]


def test_bash_completes_verbs_flags_recipes_and_deepspeed_files(command_on_path, tmp_path):
    (tmp_path / "hosts.txt").write_text("localhost slots=1\n")
    (tmp_path / "runs").mkdir()
    lines = {
        "scalekd ": [*VERBS],
        "scalekd tra": ["train"],
        "scalekd train --recipe fashion-": [name for name in RECIPES if name.startswith("fashion-")],
        "scalekd train --recipe swin_l-vit_b": ["swin_l-vit_b16-advanced"],
        "scalekd train --optim.w": ["--optim.weight_decay"],
        "scalekd train --run.ds_config zero": ["zero0", "zero1", "zero2", "zero3"],
        "scalekd train --loss ": ["ce", "bce"],
        "scalekd train --data.root run": ["runs/"],
        "scalekd train --ema.evaluate ": ["true", "false"],
        "scalekd train --hostf": ["--hostfile"],
        "scalekd train --hostfile ho": ["hosts.txt"],
        "scalekd plan --recipe eva_l-res": ["eva_l-resnet50-advanced"],
        "scalekd plan --gpu-": ["--gpu-memory"],
        "scalekd plan --distill.cu": ["--distill.cut"],
        "scalekd doctor --skip ba": ["bandwidth"],
        "scalekd evaluate --thr": ["--threads"],
        "scalekd export --format torch": ["torchscript", "torch_export"],
        "scalekd push run": ["runs/"],
        "scalekd push --dry": ["--dry-run"],
        "scalekd prepare-data fash": ["fashion-mnist"],
        "scalekd nonsense ": [],
    }
    for line, answer in zip(lines, completions(list(lines), command_on_path, tmp_path), strict=True):
        assert sorted(answer) == sorted(lines[line]), line


def test_bash_and_zsh_get_scripts_of_their_own(command_on_path):
    script = dict.fromkeys(("bash", "zsh"))
    for shell in script:
        done = subprocess.run(["scalekd", "completion", shell], env=command_on_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        script[shell] = done.stdout
    assert "compinit" in script["zsh"] and "compinit" not in script["bash"].splitlines()[0]
