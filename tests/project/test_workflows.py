"""The workflows: after their schemas, of the Makefile's targets alone, and at the versions that the package declares."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from launching import LIMIT, ROOT, make

GITHUB = ROOT / ".github"
WORKFLOWS = {path.name: path for path in sorted((GITHUB / "workflows").glob("*.yml"))}
MAKEFILE = (ROOT / "Makefile").read_text()
PACKAGING = "".join((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
# steps that are no target, and why
OTHER_STEPS = {
    'git config --global --add safe.directory "$GITHUB_WORKSPACE"': "in a container the checkout is another user's, "
    "whose repository git refuses to read",
}
# variables of jobs that are none of the Makefile's, and who reads them
OTHER_VARIABLES = {"OUT": "benchmarks/harness.py"}
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS.values(),
    "custom.github-workflows-require-timeout": WORKFLOWS.values(),
    "vendor.dependabot": [GITHUB / "dependabot.yml"],
    "vendor.github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


def content(name):
    """A workflow, whose key `on` YAML 1.1 takes for true."""
    found = yaml.safe_load(WORKFLOWS[name].read_text())
    return {"on" if key is True else key: value for key, value in found.items()}


def jobs(name):
    return content(name)["jobs"].items()


def steps(name, key):
    """(job, value of `key`) of each step that has it."""
    return [(job, step[key]) for job, about in jobs(name) for step in about["steps"] if key in step]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schemas(schema):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is missing: pip install -e '.[dev]'")
    # its schemas come with it
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_nothing():
    if not shutil.which("actionlint"):
        pytest.skip("actionlint is not on PATH: it is a program in Go, which no wheel carries")
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_step_is_a_target_of_the_makefile(name):
    commands = [command for _, command in steps(name, "run") if command not in OTHER_STEPS]
    for command in commands:
        make, *words = shlex.split(command)
        assert make == "make", f"{command}: a step is a target of the Makefile, or in OTHER_STEPS with its reason"
        targets = [word for word in words if "=" not in word]
        assert targets, command
        for variable in [word.split("=")[0] for word in words if "=" in word]:
            assert f"$({variable}" in MAKEFILE, f"{command}: the Makefile has no variable {variable}"
        # without .PHONY, make would be content with a folder of that name
        for target in targets:
            assert re.search(rf"^\.PHONY:.* {re.escape(target)}( |$)", MAKEFILE, re.M), (
                f"the Makefile has no target {target}"
            )
    variables = {name for _, about in jobs(name) for name in about.get("env", {})}
    for variable in variables - set(OTHER_VARIABLES):
        assert f"$({variable}" in MAKEFILE, f"the Makefile has no variable {variable}"
    assert commands


def test_each_other_step_and_variable_is_used():
    used = {command for name in WORKFLOWS for _, command in steps(name, "run")}
    assert set(OTHER_STEPS) <= used
    for variable, reader in OTHER_VARIABLES.items():
        assert f'environ.get("{variable}")' in (ROOT / reader).read_text()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_alone_and_ends(name):
    workflow = content(name)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    # what may write is the publication of the site, and nothing that runs our code
    for job, about in jobs(name):
        assert about["timeout-minutes"] <= 360
        if "permissions" in about:
            assert (name, job) == ("docs.yml", "publish")
            assert not [step for step in about["steps"] if "run" in step]


def test_actions_are_the_hosts_own_at_one_version_each():
    used = {use for name in WORKFLOWS for _, use in steps(name, "uses")}
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", use) for use in used), used
    assert len({use.split("@")[0] for use in used}) == len(used), f"two versions of one action: {sorted(used)}"


def test_the_tests_run_at_the_declared_versions():
    matrix = dict(jobs("tests.yml"))["cpu"]["strategy"]["matrix"]["include"]
    supported = {entry["python"] for entry in matrix if not entry.get("experimental")}
    oldest_python = re.search(r'(?:python_requires|requires-python)\s*=\s*">=(\d+\.\d+)', PACKAGING)[1]
    assert min(supported, key=lambda v: [*map(int, v.split("."))]) == oldest_python
    # a version is named among the package's classifiers once it has to pass
    classifiers = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", PACKAGING))
    assert classifiers in (set(), supported)
    oldest_torch = re.search(r'"torch>=([\d.]+)"', PACKAGING)[1]
    versions = {entry["torch"] for entry in matrix if not entry.get("experimental")}
    assert versions == {f"{oldest_torch}.0", ""}


def test_other_jobs_run_at_a_version_that_is_tested():
    matrix = dict(jobs("tests.yml"))["cpu"]["strategy"]["matrix"]["include"]
    supported = {f"python:{entry['python']}-bookworm" for entry in matrix if not entry.get("experimental")}
    for name in WORKFLOWS:
        for job, about in jobs(name):
            image = about.get("container")
            image = image["image"] if isinstance(image, dict) else image
            assert image is None or image in supported or (name, job) == ("tests.yml", "cpu")


def test_the_gpus_workflow_is_started_by_hand_alone():
    """A runner of one's own runs whatever a pull request says: it must never be started by one."""
    assert list(content("gpu.yml")["on"]) == ["workflow_dispatch"]
    for name in set(WORKFLOWS) - {"gpu.yml"}:
        assert all("self-hosted" not in about["runs-on"] for _, about in jobs(name))
        assert "pull_request_target" not in content(name)["on"]


def test_the_gpus_workflow_runs_the_parts_that_the_benchmarks_name():
    inputs = content("gpu.yml")["on"]["workflow_dispatch"]["inputs"]
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    parts = re.findall(r"^    .*benchmarks/gpu\.py --part (\w+) --minutes", readme, re.M)
    assert len(parts) == 4 and inputs["parts"]["default"].split() == parts
    for name, value in (("GPU_PARTS", inputs["parts"]["default"]), ("GPU_MINUTES", inputs["minutes"]["default"])):
        assert re.search(rf"^{name} \?= {re.escape(value)}$", MAKEFILE, re.M)
    # as make writes the command, with the environment that the workflow sets
    command = make("-n", "gpu", "GPU_PARTS=correct step", "GPU_MINUTES=7").stdout.splitlines()[-1]
    assert command.endswith("benchmarks/gpu.py --part correct step --minutes 7")
    (upload,) = [step["with"] for step in dict(jobs("gpu.yml"))["gpu"]["steps"] if "with" in step]
    assert upload["path"].rstrip("/") == dict(jobs("gpu.yml"))["gpu"]["env"]["OUT"]


def test_dependabot_looks_where_there_is_something():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    files = {"pip": "setup.py", "github-actions": ".github/workflows", "docker": "Dockerfile*"}
    assert {update["package-ecosystem"] for update in updates} == set(files)
    for update in updates:
        folder = ROOT / update["directory"].lstrip("/")
        assert list(folder.glob(files[update["package-ecosystem"]])), update
        assert update["schedule"] == {"interval": "weekly"} and update["groups"]
