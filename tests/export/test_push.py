"""A student that is published on a hub, by the hub's own library, and loaded from it by timm; and what is refused."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import huggingface_hub
import pytest
import tiny_run
import torch
import yaml
from fake_hub import GROUP, TOKEN, USER, Repository, fake_hub
from forking import forked
from huggingface_hub import ModelCard
from launching import LIMIT, ROOT, environment, free_port
from safetensors.torch import load_file

from scalekd_ds.commands.dispatch import dispatch
from scalekd_ds.data import fashion
from scalekd_ds.errors import UserError
from scalekd_ds.export.origin import datasets, origin_of, published_name
from scalekd_ds.export.student import load_student
from scalekd_ds.recipes.command_line import parse_run

NAME = f"{USER}/small-student"
FILES = {"README.md", "config.json", "model.json", "model.safetensors"}
pytestmark = pytest.mark.usefixtures("one_thread")
# of whoever trains, on whose disk the run is
PERSON = "alice-of-the-laboratory"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs of ScaleKD with a moving average, in the folder of a person."""
    home = tmp_path_factory.mktemp("push") / PERSON
    data = tiny_run.images(home / "pictures")
    words = tiny_run.arguments(data, home / "runs" / "mine", "--ema.decay", 0.5, "--optim.lr", 0.002)
    done = forked(ROOT / "launch" / "train.py", *words, "--run.pictures", 0, "--run.progress", "none")
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "runs" / "mine"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and a user who has a token for it and the older storage of large files."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    # the switch silences the rest of this process
    monkeypatch.setattr("scalekd_ds.commands.push.on_cpu", lambda: None)
    with fake_hub() as hub:
        yield hub


def push(hub, source, name=NAME, *words):
    return dispatch(["push", str(source), name, "--endpoint", hub.url, *map(str, words)])


def refused(hub, source, name=NAME, *words) -> str:
    with pytest.raises(UserError) as error:
        push(hub, source, name, *words)
    assert error.value.status == 2 and "\n" not in str(error.value)
    return str(error.value)


def of_user(hub, tmp_path, **more) -> dict[str, str]:
    """The environment of a user of the hub, who starts with nothing downloaded."""
    there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    return environment(PYTHONPATH=str(ROOT), **there, **more)


# -- what goes up ----------------------------------------------------------------------------------------------------

LOAD = """
import sys, timm, torch
model = timm.create_model(f"hf-hub:{sys.argv[1]}", pretrained=True).eval()
images = torch.load(sys.argv[2])
torch.save({"logits": model(images).detach(), "cfg": model.pretrained_cfg}, sys.argv[3])
"""


def test_timm_loads_what_was_pushed_with_logits_equal_bit_for_bit(hub, run, tmp_path, capsys):
    push(hub, run, NAME, "--license", "mit")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"timm.create_model('hf-hub:{NAME}', pretrained=True)" in printed.out and "no licence" not in printed.out
    student = load_student(run / "student.safetensors")
    images = student.example_images(5)
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOAD, NAME, tmp_path / "images.pt", tmp_path / "out.pt"]
    env = of_user(hub, tmp_path, HF_HUB_DISABLE_XET="1")
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    given = torch.load(tmp_path / "out.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(given["logits"], student.model(images))
    assert given["cfg"]["mean"] == student.card["mean"] and given["cfg"]["label_names"] == student.card["classes"]
    assert given["cfg"]["input_size"] == [3, 32, 32]


def test_four_files_go_up_in_one_commit_and_a_second_push_uploads_what_has_changed(hub, run):
    push(hub, run)
    repository = hub.repositories[NAME]
    assert set(repository.files) == FILES | {".gitattributes"} and not repository.private
    ours, theirs = load_file(run / "student.safetensors"), repository.files["model.safetensors"]
    assert len(repository.branches["main"]) == 2 and len(theirs) > sum(t.nbytes for t in ours.values())
    push(hub, run)
    assert len(repository.branches["main"]) == 2 and hub.asked(f"/lfs/{NAME}") == 1
    push(hub, run, NAME, "--license", "apache-2.0", "--message", "with a licence")
    *_, commit = (content for _, path, content in hub.requests if "/commit/" in path)
    header, *files = map(json.loads, commit.splitlines())
    assert header["value"]["summary"] == "with a licence"
    assert [(line["key"], line["value"]["path"]) for line in files] == [("file", "README.md")]


def test_the_card_has_results_recipe_teacher_and_licence(hub, run):
    push(hub, run, NAME, "--license", "apache-2.0")
    text = hub.repositories[NAME].files["README.md"].decode()
    data, results = ModelCard(text).data, json.loads((run / "results.json").read_text())
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert {"scalekd", "knowledge-distillation", "timm"} <= set(data.tags)
    top1 = next(result for result in data.eval_results if result.metric_name == "top-1")
    assert top1.metric_value == round(results["top1"], 3) and top1.dataset_name == "pictures"
    teacher = json.loads((run / "student.json").read_text())["teacher"]
    for words in (
        f'timm.create_model("hf-hub:{NAME}"',
        f"| top-1 | {results['top1']:.2f}% |",
        f"| top-1 of the student's own weights, and of their average | {results['student_top1']:.2f}%",
        f"| validation images | {results['val_images']} |",
        "moving average, decay 0.5",
        f"| teacher | {teacher} |",
        "| teacher's weights | random weights |",
        "| images | 32x32: ",
        "`apache-2.0`.",
        "## Limits",
        "@inproceedings{fan2024scalekd",
    ):
        assert words in text, words
    assert "To be filled in" not in text


def test_the_cards_command_is_the_run_again(hub, run):
    push(hub, run)
    text = hub.repositories[NAME].files["README.md"].decode()
    command = re.search(r"^    scalekd train .*?(?=\n\n)", text, re.S | re.M)[0]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:4] == ["scalekd", "train", "--recipe", "fashion-scalekd"] and "DIR" in words
    again, _ = parse_run(words[2:])
    was, now = (json.loads(json.dumps(c)) for c in (json.loads((run / "config.json").read_text()), again.as_dict()))
    # where a run writes is nobody else's business
    for config in (was, now):
        config.pop("run")
        config["data"].pop("root")
    assert now == was


def test_nothing_private_goes_up(hub, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    config, card = (json.loads((other / name).read_text()) for name in ("config.json", "student.json"))
    config |= {"teacher": f"/home/{PERSON}/big.ckpt", "teacher_weights": f"~{PERSON}/teacher.pth"}
    config |= {"student_weights": f"../{PERSON}/start.pt", "teacher_kwargs": {"checkpoint_path": f"/home/{PERSON}/x"}}
    config["data"] |= {"root": f"/home/{PERSON}/pictures", "train": f"/home/{PERSON}/train"}
    config["run"] |= {"ds_config": f"/home/{PERSON}/fast.json"}
    card["teacher"] = f"local-dir:/home/{PERSON}/big"
    (other / "config.json").write_text(json.dumps(config))
    (other / "student.json").write_text(json.dumps(card))
    for source in (run, other):
        push(hub, source)
        files = hub.repositories[NAME].files
        assert set(files) == FILES | {".gitattributes"}
        sent = [b" ".join((path.encode(), content)) for _, path, content in hub.requests]
        for secret in (PERSON, str(tmp_path), TOKEN, "exp_avg", "/home/"):
            assert not any(secret.encode() in content for content in [*files.values(), *sent]), secret
        texts = " ".join(content.decode() for name, content in files.items() if not name.endswith(".safetensors"))
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", texts)
    readme = files["README.md"].decode()
    assert "| teacher | local-dir:big |" in readme and "the file `teacher.pth`" in readme
    assert "--teacher_weights teacher.pth" in readme and "--run.ds_config fast.json" in readme


def test_data_that_the_hub_has_goes_by_its_name_there():
    assert datasets({"classes": [*fashion.CLASSES]}, None) == ["zalando-datasets/fashion_mnist"]
    assert datasets({"classes": [f"n{number:08d}" for number in range(1000)]}, None) == ["ILSVRC/imagenet-1k"]
    assert datasets({"classes": ["cat", "dog"]}, None) == []
    assert datasets({"classes": ["a"]}, {"data": {"train": "hf:org/pictures:train"}}) == ["org/pictures"]


def test_a_teachers_weights_have_their_licence():
    teacher = origin_of("swin_large_patch4_window7_224.ms_in22k_ft_in1k", "pretrained")
    assert (teacher.hub_id, teacher.license) == ("timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", "mit")
    assert origin_of("hf-hub:org/model@v2", "pretrained").hub_id == "org/model"
    assert origin_of("resnet18", "/home/me/mine.pth").text == "the file `mine.pth`"
    assert origin_of("mixer_b14_224", "pretrained").hub_id is None


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/me/teacher.pth.tar", "teacher.pth.tar"),
        ("runs/mine/student.safetensors", "student.safetensors"),
        ("local-dir:/home/me/model", "local-dir:model"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
        ("vit_large_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m"),
        ("hf:org/pictures:train", "hf:org/pictures:train"),
        ({"a": ["~me/x", 1, None]}, {"a": ["x", 1, None]}),
    ],
)
def test_a_published_name_has_no_folders_of_a_user(value, published):
    assert published_name(value) == published


def test_an_exported_folder_goes_up_with_the_words_that_its_owner_wrote(hub, run, tmp_path, capsys):
    out = tmp_path / "mine"
    dispatch(["push", str(run), NAME, "--dry-run", "--out", str(out)])
    assert not hub.requests and "README.md" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    readme = out / "README.md"
    readme.write_text(readme.read_text().replace("## Limits", "It was made for birds.\n\n## Limits"))
    (out / "notes.txt").write_text("mine alone")
    (out / "optimizer.pt").write_bytes(b"0")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    push(hub, out, f"{GROUP}/birds", "--license", "mit")
    assert "left at home: notes.txt, optimizer.pt" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    files = hub.repositories[f"{GROUP}/birds"].files
    assert set(files) == FILES | {".gitattributes"} and files["model.safetensors"] == before["model.safetensors"]
    text = files["README.md"].decode()
    assert "It was made for birds." in text and yaml.safe_load(text.split("---")[1])["license"] == "mit"
    with pytest.raises(UserError, match="exists already: --overwrite"):
        dispatch(["push", str(run), NAME, "--dry-run", "--out", str(out)])
    dispatch(["push", str(run), NAME, "--dry-run", "--out", str(out), "--overwrite"])
    assert "birds" not in readme.read_text()


def test_what_export_wrote_goes_up_as_a_repository(hub, run, tmp_path):
    dispatch_export(run, tmp_path / "timm")
    push(hub, tmp_path / "timm", NAME, "--license", "mit")
    text = hub.repositories[NAME].files["README.md"].decode()
    assert f"hf-hub:{NAME}" in text and "FOLDER" not in text and "`mit`." in text


def dispatch_export(run, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scalekd_ds.commands.export.on_cpu", lambda: None)
        dispatch(["export", "--format", "timm", str(run), str(out)])


def test_private_and_a_branch_are_made_as_asked(hub, run):
    push(hub, run, NAME, "--private", "--revision", "v1")
    repository = hub.repositories[NAME]
    assert repository.private and set(repository.branches) == {"main", "v1"}
    assert set(repository.branches["v1"][-1]) == FILES | {".gitattributes"} and len(repository.branches["main"]) == 1
    # again, on what is there
    push(hub, run, NAME, "--private", "--revision", "v1")
    hub.repositories[NAME] = Repository()
    assert "is there already and public" in refused(hub, run, NAME, "--private")
    assert set(hub.repositories[NAME].files) == {".gitattributes"}


def test_the_command_uploads_to_the_hubs_newer_storage(hub, run, tmp_path):
    """With the storage's own library, which keeps in a folder here what it would send to a server of its own."""
    hub.xet = f"local://{tmp_path}/xet"
    env = of_user(hub, tmp_path)
    command = [sys.executable, str(ROOT / "launch" / "push.py"), str(run), NAME]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    first, *files, told = done.stdout.strip().splitlines()
    assert f"/{NAME}/commit/" in first and told.startswith("no licence is given")
    assert {line.split()[0] for line in files} == FILES
    assert hub.asked(f"/lfs/{NAME}") == 0 and hub.asked("xet-write-token") >= 1
    kept = sum(path.stat().st_size for path in (tmp_path / "xet").rglob("*") if path.is_file())
    assert kept > 0.5 * (run / "student.safetensors").stat().st_size


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_without_a_token_one_line_comes_before_anything_else(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    line = refused(hub, tmp_path / "nowhere", NAME)
    assert line.startswith("there is no token for the hub") and "hf auth login" in line and not hub.requests
    command = [sys.executable, "-m", "scalekd_ds", "push", str(tmp_path), NAME]
    env = environment(PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "hf"))
    env = {name: value for name, value in env.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == f"error: {line}\n"


@pytest.mark.parametrize("name", ["student", "me/", "/student", "a/b/c", "me/two words", "me/..", "me/a--b", "mé/x"])
def test_a_name_that_no_hub_takes(hub, run, name):
    assert f"the repository is {name!r}: it must be OWNER/NAME" in refused(hub, run, name) and not hub.requests


def test_arguments_that_cannot_be(hub, run):
    assert "--license is 'Apache 2.0': it must be an identifier" in refused(hub, run, NAME, "--license", "Apache 2.0")
    assert "--out and --overwrite are for --dry-run" in refused(hub, run, NAME, "--out", "x")
    with pytest.raises(UserError, match=r"--endpoint is 'nowhere': it must be the address of a hub"):
        dispatch(["push", str(run), NAME, "--endpoint", "nowhere"])
    assert not hub.requests


def test_sources_that_are_no_finished_run(hub, run, tmp_path):
    told = {"nowhere": "'nowhere' does not exist"}
    for name, lacks in (("results.json", "it has no results.json"), ("student.safetensors", "it has no student.saf")):
        copy = shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("tensorboard"))
        (copy / name).unlink()
        told[copy] = lacks
    told[next((run / "checkpoints").glob("step*"))] = "is a checkpoint: `scalekd export --format timm"
    told[run / "student.safetensors"] = "is a file: give the folder of a finished run"
    (tmp_path / "empty").mkdir()
    told[tmp_path / "empty"] = "is no run's folder"
    dispatch_export(run, tmp_path / "exported")
    (tmp_path / "exported" / "config.json").unlink()
    told[tmp_path / "exported"] = "has no config.json: a hub takes what `scalekd export --format timm` writes"
    for source, words in told.items():
        assert words in refused(hub, source), source
    assert not hub.requests


def test_damaged_sources(hub, run, tmp_path):
    dispatch_export(run, tmp_path / "right")
    for name, content, words in (
        ("README.md", "---\nlicense: [\n---\nhello\n", "has no metadata that can be read"),
        ("config.json", "{", "config.json is damaged"),
        ("model.safetensors", "", "model.safetensors"),
    ):
        copy = shutil.copytree(tmp_path / "right", tmp_path / f"wrong {name}")
        (copy / name).write_text(content)
        assert words in refused(hub, copy), name
    assert not hub.repositories


# -- a hub that refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("whoami", 401, "refuses the token with 401"),
        ("whoami", 503, "fails with 503 (as the test asked for): start the same command again later"),
        ("repos/create", 403, "refuses to write me/small-student with 403"),
        ("repos/create", 500, "fails with 500"),
        ("repos/create", 429, "fails with 429"),
        ("preupload", 403, "refuses to write me/small-student with 403"),
        (f"/lfs/{NAME}", 403, "refuses to write me/small-student with 403"),
        ("commit", 500, "fails with 500"),
        ("commit", 413, "refuses me/small-student with 413 (as the test asked for). Nothing was published."),
        ("whoami", 404, "answers 404 (as the test asked for): it is no hub"),
    ],
)
def test_a_hub_that_refuses_ends_in_one_line_and_leaves_nothing_half(hub, run, part, status, words):
    hub.failures = {part: [status] * 3}
    line = refused(hub, run)
    assert f"{hub.url} {words}" in line
    assert NAME not in hub.repositories or set(hub.repositories[NAME].files) == {".gitattributes"}
    hub.failures = {}
    push(hub, run)
    assert set(hub.repositories[NAME].files) == FILES | {".gitattributes"}


def test_a_wrong_token_and_what_is_anothers(hub, run, monkeypatch):
    hub.repositories["others/student"] = Repository()
    for name in ("others/student", "others/new"):
        assert f"refuses to write {name} with 403 (you have no rights to write what is others's)" in refused(
            hub, run, name
        )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused(hub, run)
    assert "refuses the token with 401: it is wrong, or has run out" in line and "hf_wrong" not in line
    # nothing was asked for after that
    assert hub.requests[-1][1] == "/api/whoami-v2"


def test_a_licence_that_the_hub_does_not_know(hub, run):
    assert 'refuses the metadata of README.md ("license" must be one of' in refused(hub, run, NAME, "--license", "mine")
    assert hub.asked(f"/lfs/{NAME}") == 0


def test_a_moment_of_trouble_is_outlived(hub, run):
    hub.failures = {"preupload": [503]}
    push(hub, run)
    assert set(hub.repositories[NAME].files) == FILES | {".gitattributes"}


def test_no_network(hub, run, monkeypatch):
    hub.url = f"http://127.0.0.1:{free_port()}"
    assert f"the hub {hub.url} cannot be reached (Connection refused)" in refused(hub, run)
    hub.url = "http://no-such-host.invalid"
    assert "the hub http://no-such-host.invalid cannot be reached (" in refused(hub, run)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in refused(hub, run)


def test_an_address_that_is_no_hub(hub, run, tmp_path):
    """A proxy's page, or a server of something else, answers whatever it is asked."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        line = refused(hub, run)
    finally:
        server.shutdown()
        server.server_close()
    assert line.startswith(f"{hub.url} does not answer as a hub does")


@pytest.mark.parametrize(("found", "told"), [(None, "which is missing"), ("0.36.2", "and this is 0.36.2")])
def test_the_extra_is_named_where_the_library_is_missing_or_old(hub, run, monkeypatch, found, told):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("scalekd_ds.commands.push.version", version)
    assert f"push needs huggingface_hub 1.16 or newer, {told}: pip install 'scalekd_ds[hub]'" in refused(hub, run)
    assert not hub.requests and '"hub": ["huggingface_hub>=1.16"]' in (ROOT / "setup.py").read_text()


def test_the_script_of_the_verb_may_be_run():
    assert (ROOT / "launch" / "push.py").stat().st_mode & 0o111
