"""Runs and DeepSpeed JSONs of any content: a UserError of one line, or a run that reads back the same."""

import json
import random

import pytest

from scalekd_ds.config import RunConfig
from scalekd_ds.config.parser import read_config
from scalekd_ds.engine import ds_config
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run

# the long version takes a minute
TIMES = pytest.mark.parametrize("cases", [100, pytest.param(600, marks=pytest.mark.slow)])
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    -1e-9,
    "",
    "auto",
    "x" * 300,
    "\u2028",
    "1",
    "null",
    [],
    [1],
    [0.1, 0.9],
]
VALUES += [
    [3, 2, 1],
    {},
    {"a": 1},
    {"__class__": "os.system"},
    "../../etc",
    "$(id)",
    "none",
    "zero3",
    float("nan"),
    2**70,
]


def fields(values, prefix=()):
    """Paths of every field of nested dicts."""
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from fields(value, (*prefix, name))


def damaged(rng, values):
    """A copy with a few fields of other content, misspelt, missing or new."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(fields(values)))
        place = values
        for name in path[:-1]:
            place = place[name]
        kind = rng.randrange(4)
        if kind == 0:
            del place[path[-1]]
        elif kind == 1:
            place[path[-1] + rng.choice("xX_ ")] = place.pop(path[-1])
        else:
            place[path[-1]] = rng.choice(VALUES)
    return values


def one_line(error):
    text = str(error.value if hasattr(error, "value") else error)
    return "\n" not in text.strip() and len(text) > 10


@TIMES
def test_damaged_runs_are_refused_in_one_line_or_read_back_the_same(tmp_path, cases):
    rng, path, kept = random.Random(0), tmp_path / "run.json", 0
    whole = json.loads(json.dumps(RunConfig().as_dict()))
    for _ in range(cases):
        path.write_text(json.dumps(damaged(rng, whole)))
        try:
            run = read_config(path)
        except UserError as error:
            assert one_line(error), error
            continue
        kept += 1
        again = tmp_path / "again.json"
        again.write_text(json.dumps(run.as_dict()))
        assert json.dumps(read_config(again).as_dict()) == json.dumps(run.as_dict())
    assert 0.05 * cases < kept < 0.95 * cases


@TIMES
def test_damaged_files_are_refused_in_one_line(tmp_path, cases):
    rng, path = random.Random(1), tmp_path / "run.json"
    whole = json.dumps(RunConfig().as_dict()).encode()
    refused = 0
    for _ in range(cases):
        text = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 6))
        path.write_bytes(bytes(text))
        try:
            read_config(path)
        except UserError as error:
            refused += 1
            assert one_line(error), error
    assert refused > 0.9 * cases


@TIMES
def test_damaged_flags_are_refused_in_one_line(capsys, cases):
    rng = random.Random(2)
    names = [".".join(path) for path in fields(RunConfig().as_dict())]
    refused = 0
    for _ in range(cases // 2):
        name = rng.choice(names)
        if rng.random() < 0.2:
            name += rng.choice("xX_")
        value = rng.choice(VALUES)
        try:
            parse_run([f"--{name}={value if isinstance(value, str) else json.dumps(value)}"])
        except UserError as error:
            refused += 1
            assert one_line(error), error
    assert refused > 0.3 * cases // 2
    assert capsys.readouterr().out == ""


@TIMES
def test_damaged_deepspeed_files_are_refused_in_one_line(tmp_path, cases):
    rng, path = random.Random(3), tmp_path / "ds.json"
    whole = ds_config.read("zero3")
    refused = 0
    for _ in range(cases):
        path.write_text(json.dumps(damaged(rng, whole)))
        try:
            config = ds_config.read(str(path))
        except UserError as error:
            refused += 1
            assert one_line(error), error
            continue
        try:
            assert ds_config.stage_of(config) in (0, 1, 2, 3)
            ds_config.merge(config, RunConfig(), 1)
            ds_config.autocast_dtype(config)
        except UserError as error:
            assert one_line(error), error
    assert refused > 0.3 * cases


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{", "\0", "{}" * 2, '{"a": {"b": {}}}'])
def test_json_that_is_no_run_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_config(path)
    assert one_line(told)
