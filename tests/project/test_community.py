"""What people look for around a project: its changelog, policies, forms and hooks say what is there."""

import json
import os
import pickle
import re

import pytest
import torch
import yaml
from launching import ROOT

import scalekd_ds
from scalekd_ds.errors import UserError
from scalekd_ds.models.build import build_model
from scalekd_ds.models.weights_file import read_content

GITHUB = ROOT / ".github"
DOCUMENTS = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")]
MAKEFILE = (ROOT / "Makefile").read_text()
REPOSITORY = "https://github.com/scalekd-ds/scalekd_ds"


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_leads_to_what_is_there(path):
    links = re.findall(r"(?:\]\(|<)(https://[^)>]+|[\w./-]+)[)>]", path.read_text())
    assert links
    for link in links:
        assert re.match(r"https://|#", link) or (path.parent / link).exists(), f"{path.name} leads to {link}"


def test_forms_lead_to_what_is_there():
    text = "".join(path.read_text() for path in sorted(GITHUB.rglob("*.*")) if path.suffix in (".yml", ".md"))
    files = re.findall(rf"{REPOSITORY}/blob/main/([\w./-]+)", text) + re.findall(r"\b(docs/\w+\.md|\w+\.md)\b", text)
    assert len(files) > 4
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert set(re.findall(r"https://[\w./-]+", text)) <= {
        *(f"{REPOSITORY}/blob/main/{name}" for name in files),
        f"{REPOSITORY}/security/advisories/new",
    }


def test_the_changelog_is_in_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.M)
    assert versions[:2] == ["Unreleased", scalekd_ds.__version__]
    assert re.findall(r"^\[([^\]]+)\]: https://", text, re.M) == versions
    kinds = set(re.findall(r"^### (.+)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Not seen yet"}


def test_commands_for_contributors_are_targets():
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "contributing.md"):
        targets = re.findall(r"^    make ([\w-]+)", path.read_text(), re.M)
        assert targets
        for target in targets:
            assert re.search(rf"^(\.PHONY:.* |){target}\b", MAKEFILE, re.M), target
    assert "](docs/contributing.md)" in (ROOT / "CONTRIBUTING.md").read_text()
    assert "](../CONTRIBUTING.md)" in (ROOT / "docs" / "contributing.md").read_text()


def test_hooks_call_the_tools_of_lint():
    """A hook with a version of its own would say something else than CI."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert all(hook["language"] == "system" for hook in hooks)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    tools = {" ".join(found) for found in re.findall(r"\$\(BIN\)/([\w-]+)(?: (check|format))?", lint)}
    called = {
        " ".join(found)
        for hook in hooks
        for found in re.findall(r"\.venv/bin/([\w-]+)(?: (check|format))?", hook["entry"])
    }
    assert {tool.strip() for tool in tools} == {tool.strip() for tool in called} - {"python"}
    for hook in hooks:
        for name in re.findall(r"tests/\S+\.py", hook["entry"]):
            assert (ROOT / name).is_file()


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors", "pkl"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_no_code_of_a_weights_file_is_run(tmp_path, suffix, writer):
    """As SECURITY.md says."""
    path, made = tmp_path / f"model.{suffix}", tmp_path / "made"
    content = {"state_dict": {"weight": torch.zeros(2)}, "more": Hostile(made)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError):
        read_content(path)
    assert not made.exists()
    # read without the restriction, it would have been
    if (writer, suffix) == ("torch", "pth"):
        torch.load(path, weights_only=False)
        assert made.is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_no_code_of_a_folder_of_the_hub_is_run(tmp_path, name):
    """Weights beside a config.json are timm's to read, and a script beside them is nobody's."""
    made = tmp_path / "made"
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": {"tag": "x"}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"weight": Hostile(made)}, folder / name)
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(made)!r})")
    with pytest.raises(UserError):
        build_model(f"local-dir:{folder}", weights="pretrained")
    assert not made.exists()
