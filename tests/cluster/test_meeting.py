"""Where ranks meet: a port or an address that cannot be used ends with one line that says what to type."""

import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run
from forking import forked_with
from launching import LIMIT, ROOT, environment, free_port, run

from scalekd_ds.cluster import rendezvous
from scalekd_ds.cluster.ranks import rank_variables
from scalekd_ds.errors import UserError

TRAIN = ROOT / "launch" / "train.py"


@contextmanager
def held(family=socket.AF_INET, address=""):
    """A port that another program listens on."""
    with socket.socket(family) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = free_port()
        holder.bind((address, port))
        holder.listen()
        yield port


def arguments(tmp_path) -> list:
    return tiny_run.supervised_arguments(tiny_run.images(tmp_path / "data"), tmp_path / "run", "--schedule.epochs", 1)


def rank(number: int, port, address="127.0.0.1") -> dict[str, str]:
    job = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return job | {"RANK": str(number), "LOCAL_RANK": str(number)}


@pytest.mark.parametrize("port", ["0", "70000", "65536", "http", "-5", "1e4", "29500.0", " ", "0x7000", "295 00"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_port_that_is_none_is_refused(port, number):
    with pytest.raises(UserError, match="MASTER_PORT"):
        rank_variables(rank(number, port))


@pytest.mark.parametrize("port", ["1", "29500", "65535", " 29500 "])
def test_a_port_that_is_one_is_taken(port):
    assert int(rank_variables(rank(0, port))["MASTER_PORT"]) == int(port)


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, ""), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")],
    ids=["any", "localhost", "any of IPv6"],
)
def test_a_port_in_use_is_named_with_what_to_type(monkeypatch, family, address):
    with held(family, address) as port:
        for name, value in rank(0, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"port {port} of .* is in use .*--master_port PORT"):
            rendezvous.check_meeting_place()
        # the others only connect to it, as do torchrun's ranks
        monkeypatch.setenv("RANK", "1")
        rendezvous.check_meeting_place()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        rendezvous.check_meeting_place()


def test_a_port_that_a_run_has_just_left_can_be_used(monkeypatch):
    with held() as port, socket.create_connection(("127.0.0.1", port)):
        pass
    for name, value in rank(0, port).items():
        monkeypatch.setenv(name, value)
    rendezvous.check_meeting_place()


@pytest.mark.parametrize("address", ["no-such-node.invalid", "node 1", "256.1.1.1", "x" * 80, "ä..b"])
def test_an_address_that_nobody_knows_is_named(monkeypatch, address):
    monkeypatch.setattr(rendezvous, "_RESOLVE_S", 0.0)
    for name, value in rank(1, 29511, address).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR is .*a name that nobody knows here"):
        rendezvous.check_meeting_place()


def test_a_name_that_becomes_known_is_waited_for(monkeypatch):
    found, ask = [], socket.getaddrinfo

    def later(*args, **kwargs):
        found.append(args)
        if len(found) < 2:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", later)
    for name, value in rank(1, 29511).items():
        monkeypatch.setenv(name, value)
    rendezvous.check_meeting_place()
    assert len(found) == 2


def one_line(done, *pieces: str) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in text, text[-3000:]
    # under the launcher another rank may have its own to say
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert lines and all(piece in lines[0] for piece in pieces), text[-3000:]


def test_a_run_whose_port_is_in_use_ends_with_a_line(tmp_path):
    with held() as port:
        one_line(forked_with([rank(0, port)], TRAIN, *arguments(tmp_path)), f"port {port} of", "--master_port PORT")


STARTS = {
    "deepspeed": ["deepspeed", "--num_accelerators", 2, "--master_port", "PORT", TRAIN],
    "--gpus": [sys.executable, "-m", "scalekd_ds", "train", "--gpus", 2, "--deepspeed-args", "--master_port PORT"],
    "torchrun of c10d": [
        "torchrun",
        "--nproc_per_node",
        2,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "127.0.0.1:0",
        TRAIN,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
def test_launchers_at_a_port_in_use(tmp_path, how):
    with held() as port:
        words = [str(word).replace("PORT", str(port)) for word in STARTS[how]]
        done = run([*words, *arguments(tmp_path)], LIMIT, environment(PYTHONPATH=str(ROOT)))
    if "PORT" in str(STARTS[how]):
        one_line(done, f"port {port} of", "--master_port PORT")
    else:
        # it chooses a port that is free
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_address_that_leads_nowhere_ends_with_a_line(tmp_path, number):
    """Nobody answers in a network that is for documentation alone, or somebody does who is no rank."""
    with held() as port:
        address = "192.0.2.1" if number == 0 else "127.0.0.1"
        where = free_port() if number == 0 else port
        done = forked_with([rank(number, where, address)], TRAIN, *arguments(tmp_path), timeout=400)
    one_line(done, f"did not meet at {address}:{where}", "MASTER_ADDR must be rank 0's node")


def test_a_privileged_port_is_named():
    if os.geteuid() != 0 or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80:
        pytest.skip("this is tried as root turned into another user, where ports below 1024 are root's")
    code = (
        "import encodings.idna, os\nfrom scalekd_ds.cluster import rendezvous\nfrom scalekd_ds.errors import run_cli\n"
        "os.setuid(65534)\nrun_cli(rendezvous.check_meeting_place)"
    )
    one_line(run([sys.executable, "-c", code], LIMIT, environment(**rank(0, 80))), "MASTER_PORT is 80", "only root")


def test_what_keeps_ranks_from_meeting_here_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")
    for text, says in (
        (
            "[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: eth77",
            "GLOO_SOCKET_IFNAME is 'eth77'",
        ),
        (
            "The server socket has failed to bind. code: -24, name: EMFILE, message: too many open files",
            "raise `ulimit -n`",
        ),
    ):
        with pytest.raises(UserError, match=says), rendezvous.meeting():
            raise RuntimeError(text)
