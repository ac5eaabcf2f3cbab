"""Hosts files: read as DeepSpeed reads them, or refused in one line before any ssh."""

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from launching import ROOT, alone, errors_of

from scalekd_ds.cluster.hosts import MOST_SLOTS, parse_hosts, read_hosts
from scalekd_ds.errors import UserError

TRAIN = ROOT / "launch" / "train.py"


def refused(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    with pytest.raises(UserError) as error:
        parse_hosts(data, "hosts")
    message = str(error.value)
    assert "\n" not in message and len(message) < 250 and message.startswith("hosts file 'hosts'")
    return message


def test_a_good_file_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "# büro, two racks\n\nnode1 slots=8\n  gpu-b.example.org\tslots=4  # half of it\r\n10.0.0.7 slots=1\nb_2 slots=08\n"
    )
    assert read_hosts(path) == {"node1": 8, "gpu-b.example.org": 4, "10.0.0.7": 1, "b_2": 8}
    assert read_hosts(path) == dict(fetch_hostfile(str(path)))
    assert list(read_hosts(path)) == list(fetch_hostfile(str(path)))


def test_the_repositorys_own_file_is_read():
    assert read_hosts(ROOT / "launch" / "hosts") == {"localhost": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("node2", "'node2' has no slots"),
        ("node2 slots=0", "slots is 0"),
        (f"node2 slots={MOST_SLOTS + 1}", f"it must be 1 to {MOST_SLOTS}"),
        ("node2 slots=999999999999999999999", "unknown word"),
        ("node2 slots=-1", "unknown word 'slots=-1'"),
        ("node2 slots=four", "unknown word 'slots=four'"),
        ("node2 slots=\u0664", "unknown word"),
        ("node2 slots = 4", "unknown word '='"),
        ("node2 slots=4 max_slots=8", "unknown word 'max_slots=8'"),
        ("node2 gpus=4", "unknown word 'gpus=4'"),
        ("slots=4 node2", "unknown word 'node2'"),
        ("node1 slots=4", "is on line 1 already"),
        ("NODE1 slots=4", "is on line 1 already"),
        ("node2;reboot slots=4", "is no host name"),
        ("$(reboot) slots=4", "is no host name"),
        ("`id` slots=4", "is no host name"),
        ("a&b slots=4", "is no host name"),
        ("a|b slots=4", "is no host name"),
        ("a,b slots=4", "is no host name"),
        ("-oProxyCommand=reboot slots=4", "is no host name"),
        ("^hosts slots=4", "is no host name"),
        ("node% slots=4", "is no host name"),
        ("root@node2 slots=4", "~/.ssh/config"),
        ("fe80::1 slots=4", "IPv6"),
        ("node[2-9] slots=4", "one node a line"),
        ("\ufeffnode2 slots=4", "is no host name"),
        ("n\u00f6de slots=4", "is no host name"),
        ("a" * 300 + " slots=4", "is no host name"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line, says):
    message = refused(f"node1 slots=1\n# a comment\n{line}\n")
    assert says in message and "line 3:" in message


def test_line_numbers_are_those_of_an_editor():
    assert "line 4:" in refused("node1 slots=1\r\n\r\n\r\nnode2\r\n")
    assert "line 2:" in refused(b"node1 slots=1\nnode2\xff slots=1\n")


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n"])
def test_an_empty_file_is_refused(content):
    assert "names no node" in refused(content)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for path, says in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(UserError, match=says):
            read_hosts(path)
    large = tmp_path / "large"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_hosts(large)


# `test_a_hosts_file_that_does_not_exist_is_refused` takes the same way
@pytest.mark.slow
def test_a_training_rank_refuses_what_deepspeed_passes_over(tmp_path):
    """`max_slots` means nothing to DeepSpeed, which would train on one rank without a word."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1 max_slots=8\n")
    launcher = ("--hostfile", hosts, "--no_ssh_check", "--master_addr", "127.0.0.1")
    command = ("deepspeed.launcher.runner", *launcher, TRAIN, "--recipe", "fashion-ce", "--data.root", tmp_path)
    done = alone("-m", *command)
    errors = errors_of(done)
    assert done.returncode == 2 and len(errors) == 1 and "unknown word 'max_slots=8'" in errors[0], done.stderr
