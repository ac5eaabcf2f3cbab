"""The notebooks run from their first cell to their last, on what an installed package has, and are kept without outputs."""

import ast
import json
import re
import sys

import pytest
from launching import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# of one cell, on a machine that is busy with other tests
CELL_SECONDS = 300


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def is_shell(cell):
    return cell["cell_type"] == "code" and "".join(cell["source"]).startswith("%%bash")


def check_quickstart(text, folder):
    """The teacher and both students are better than chance, and timm's student is the run's."""
    shares = [float(share) for share in re.findall(r"^(?:teacher|student): ([\d.]+)% of", text, re.M)]
    assert len(shares) == 2 and min(shares) > 35
    found, said = re.search(r"^([\d.]+)% of .* the run's own evaluation said ([\d.]+)%", text, re.M).groups()
    # one image of 200 may be rounded to the other side
    assert abs(float(found) - float(said)) <= 0.5 and float(found) > 35
    assert (folder / "quickstart_files" / "run" / "results.json").is_file()


def check_own_data(text, folder):
    """All images are split, and what is exported answers as the student does."""
    assert "{'train': 96, 'val': 24}" in text and "the same answers: True" in text
    assert (folder / "own_data_files" / "exported" / "config.json").is_file()


CHECKS = {"quickstart": check_quickstart, "own_data": check_own_data}


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    """They would be in every diff, with pictures and the names of somebody's folders."""
    content = json.loads(path.read_text())
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert content["metadata"]["language_info"] == {"name": "python"}
    # as json writes it, so that a change of one cell is a small diff
    assert path.read_text() == json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_needs_no_repository(path):
    """A wheel has neither launch/ nor tests/."""
    code = ["".join(cell["source"]) for cell in cells(path, "code")]
    python = [text for text in code if not text.startswith("%%")]
    modules = set()
    for node in ast.walk(ast.parse("\n".join(python))):
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    installed = {"matplotlib", "numpy", "timm", "torch", "PIL", "safetensors", "scalekd_ds", "tensorboard"}
    assert modules <= installed | sys.stdlib_module_names
    assert not any(word in text for text in code for word in ("launch/", "examples/", "tests/", "benchmarks/"))
    # prose between cells of code, none of which is a page long
    assert cells(path, "markdown") and max(len(text.splitlines()) for text in code) < 50


# a start of a command costs ten seconds of a processor; those whose results no later cell takes are left to `make test-slow`
@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        pytest.param("quickstart", (), marks=pytest.mark.slow),
        ("own_data", ("scalekd prepare-data", "scalekd plan", "scalekd evaluate")),
        pytest.param("own_data", (), marks=pytest.mark.slow),
    ],
    ids=["quickstart", "own_data-shorter", "own_data"],
)
def test_a_notebook_runs(name, left_out, tmp_path):
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[notebooks]'")
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    count = len(notebook.cells)
    notebook.cells = [
        cell for cell in notebook.cells if not any(command in cell.source for command in left_out if is_shell(cell))
    ]
    assert len(notebook.cells) == count - len(left_out)
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=where)
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 2
    CHECKS[name]("".join(output.get("text", "") for output in outputs), tmp_path)
