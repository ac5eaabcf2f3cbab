"""Hosts files and environment files of any content: a UserError of one line, or what DeepSpeed reads the same and safely."""

import random
import re
import subprocess

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from scalekd_ds.cluster.env_file import parse_env
from scalekd_ds.cluster.hosts import MOST_SLOTS, read_hosts
from scalekd_ds.errors import UserError

CASES = 2000
NAMES = [
    "node1",
    "gpu-b.example.org",
    "10.0.0.7",
    "a_b",
    "NODE1",
    "-oX=y",
    "a;b",
    "$(id)",
    "`id`",
    "a b",
    "a,b",
    "r@n",
    "::1",
]
NAMES += [
    "n[1-9]",
    "\u00e9",
    "%h",
    "a'b",
    'a"b',
    "a\\b",
    "a\0b",
    "*",
    "~",
    "x" * 254,
    ".",
    "a.",
    "localhost",
    "\ufeffn",
    "a#b",
    "",
]
SLOTS = [
    "slots=1",
    "slots=8",
    "slots=0",
    "slots=-1",
    "slots=",
    "slots",
    "slots=1 x",
    "slots=9999999999",
    "Slots=1",
    "slots=\u0661",
]
SLOTS += [
    "slots=1#c",
    "slots=1 # c",
    "slots=01",
    "slots=1.5",
    "slots=1e3",
    "",
    "gpus=2",
    "slots=4 max_slots=8",
    "slots=1\x0b",
]
ENDS = ["\n", "\n", "\n", "\r\n", "\r", "\x0b", "\x85", "\u2028", "\n\n", "\n# c\n", "\n#\xff\n", "", " "]
ASSIGNED = ["A", "NCCL_IB_HCA", "a", "A;B", "1A", "A B", "", "_", "\u00c4", "A\0", " A"]
VALUES = [
    "eth0",
    "",
    "a b",
    "$(id)",
    "`id`",
    '"',
    "'",
    "\\",
    "a;b&c|d",
    "%h",
    "!x",
    "\u00e9",
    "\0",
    " x",
    "x ",
    "=",
    "#",
    "x" * 5000,
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, put in or taken out."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 2, 8))):
        where = rng.randrange(len(data) + 1)
        data[where : where + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


def content(rng: random.Random, left: list[str], between: list[str], right: list[str]) -> bytes:
    if rng.random() < 0.15:
        return rng.randbytes(rng.randrange(64))
    good = rng.random() < 0.5
    lines = []
    for _ in range(rng.randrange(5)):
        # half of the files are of good words, so that many are accepted
        first, last = (rng.choice(words[:3] if good else words) for words in (left, right))
        lines.append(first + rng.choice(between) + last + ("\n" if good else rng.choice(ENDS)))
    data = "".join(lines).encode("utf-8", errors="replace")
    return data if good and rng.random() < 0.5 else mutated(rng, data)


def test_any_hosts_file_is_refused_in_one_line_or_read_as_deepspeed_reads_it(tmp_path):
    rng = random.Random(20240601)
    path = tmp_path / "hosts"
    accepted = 0
    good_name = re.compile(rb"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
    for case in range(CASES):
        data = content(rng, NAMES, [" ", "\t", "  ", "\u00a0"] if case % 3 else [" "], SLOTS)
        path.write_bytes(data)
        try:
            hosts = read_hosts(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        accepted += 1
        assert all(good_name.fullmatch(name.encode()) for name in hosts), data
        assert all(1 <= slots <= MOST_SLOTS for slots in hosts.values()), data
        # the launcher sees the same nodes in the same order
        assert list(hosts.items()) == list(fetch_hostfile(str(path)).items()), data
    print(f"{accepted} of {CASES} hosts files accepted")
    assert CASES / 20 < accepted < CASES / 2


def test_any_environment_file_is_refused_in_one_line_or_harmless_to_a_shell(tmp_path):
    rng = random.Random(20240602)
    accepted: list[tuple[str, str]] = []
    files = 0
    for _ in range(CASES):
        data = content(rng, ASSIGNED, ["="], VALUES)
        try:
            values = parse_env(data, "env")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        files += 1
        # the launcher's reader ends with a traceback on anything else
        lines = data.decode().replace("\r\n", "\n").replace("\r", "\n").splitlines()
        assert all("=" in line for line in lines), data
        for name, value in values.items():
            assert re.fullmatch(rb"[A-Z_][A-Z0-9_]*", name.encode()), data
            assert not re.search(rb"[\"'`$\\!%\x00-\x1f\x7f-\xff]", value.encode()), data
        accepted += values.items()
    print(f"{files} of {CASES} environment files accepted")
    assert CASES / 20 < files < CASES / 2
    # one shell reads them all as the launcher would write them, and gives back what went in
    distinct = sorted(set(accepted))
    script = "".join(f'{name}="{value}"; printf \'%s\\n\' "${name}"\n' for name, value in distinct)
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{value}\n" for _, value in distinct) and done.stderr == ""


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 100, b"#" * 100, b"\n" * 1000, b"a slots=1" * 10_000])
def test_odd_files_are_refused_in_one_line(data, tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_hosts(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
