"""All nodes at once: facts, clocks, a ring of transfers and one all-reduce, each within its time."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scalekd_ds.cluster.doctor import checks, reduce
from scalekd_ds.cluster.doctor.checks import Facts, Limits, Problem
from scalekd_ds.cluster.doctor.remote import Node, NodeError, command_for

# seconds: together less than a minute
CONNECT, SEND, TRANSFER, REDUCE = 25.0, 1.0, 10.0, 20.0
_CLOCK_ROUNDS = 5
HERE = "this machine"

T = TypeVar("T")


@dataclass
class Report:
    """What was seen, by node, in the order of the hosts file."""

    hosts: Mapping[str, int]
    facts: dict[str, Facts] = field(default_factory=dict)
    offsets: dict[str, tuple[float, float]] = field(default_factory=dict)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    reduced: float | None = None
    backend: str | None = None
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, host: str) -> list[str]:
        return [problem.text for problem in self.problems if problem.host == host]

    @property
    def passed(self) -> dict[str, int]:
        """The nodes without a problem, and their slots."""
        bad = {problem.host for problem in self.problems}
        return {host: slots for host, slots in self.hosts.items() if host not in bad}

    def as_dict(self) -> dict[str, Any]:
        """Plain data; bytes, seconds and Gbit/s."""
        return {
            "hosts": {
                host: {
                    "slots": slots,
                    "problems": self.of(host),
                    "facts": self.facts.get(host),
                    "clock": self.offsets.get(host),
                }
                for host, slots in self.hosts.items()
            },
            "problems_here": self.of(HERE),
            "bandwidth": [{"from": a, "to": b, "gbit_per_s": rate} for (a, b), rate in self.rates.items()],
            "all_reduce": {"backend": self.backend, "seconds": self.reduced},
            "passed": list(self.passed),
            "seconds": self.seconds,
        }


def examine(
    hosts: Mapping[str, int],
    ssh: Sequence[str],
    exports: dict[str, str],
    data: dict[str, str],
    run_dir: str = ".",
    limits: Limits | None = None,
    skip: Iterable[str] = (),
) -> Report:
    """Asks every node of a hosts file at once whether a job can start there.

    Args:
        hosts: As from `read_hosts`.
        ssh: The command that takes a node's name and a command for its shell; empty runs on this machine.
        exports: What the launcher will export.
        data: Key -> path of what the nodes must hold.
        run_dir: Where the run's folder will be.
        limits: From where on there is a problem; None takes the defaults.
        skip: `bandwidth` and `all-reduce`.

    Returns:
        What was found; nothing is raised for a node that fails.
    """
    started = time.monotonic()
    report = Report(hosts)
    if ssh and len(hosts) > 1 and not shutil.which("pdsh") and Path(ssh[0]).name == "ssh":
        report.problems.append(
            Problem(HERE, "pdsh is not installed, and the launcher starts the nodes with it: install it")
        )
    asyncio.run(_examine(report, ssh, exports, data, run_dir, limits or Limits(), set(skip)))
    report.seconds = time.monotonic() - started
    return report


async def _examine(
    report: Report,
    ssh: Sequence[str],
    exports: dict[str, str],
    data: dict[str, str],
    run_dir: str,
    limits: Limits,
    skip: set[str],
) -> None:
    nodes = {name: Node(name, command_for(name, ssh, exports)) for name in report.hosts}

    async def look(node: Node) -> tuple[Facts, tuple[float, float]]:
        await node.start()
        said = await node.ask("facts", CONNECT, data=data, run_dir=run_dir, data_seconds=8.0)
        return said, await _offset(node)

    try:
        answers = await _all(report, nodes.values(), look)
        report.facts = {name: said for name, (said, _) in answers.items()}
        report.offsets = {name: offset for name, (_, offset) in answers.items()}
        report.problems += _from_facts(report, limits)
        there = [nodes[name] for name in report.facts]
        if "bandwidth" not in skip and len(there) > 1:
            await _ring(report, there)
            report.problems += checks.bandwidth_problems(report.rates, limits)
        if "all-reduce" not in skip and there:
            await _reduce(report, there)
    finally:
        await asyncio.gather(*(node.close() for node in nodes.values()))


async def _all(
    report: Report, nodes: Iterable[Node], work: Callable[[Node], Awaitable[T]], prefix: str = ""
) -> dict[str, T]:
    """`work` on all nodes at once; what it returned by node, and a problem for each that failed."""
    nodes = list(nodes)
    results = await asyncio.gather(*map(work, nodes), return_exceptions=True)
    done = {}
    for node, result in zip(nodes, results, strict=True):
        if isinstance(result, NodeError):
            report.problems.append(Problem(node.name, f"{prefix}{result}"))
        elif isinstance(result, BaseException):
            raise result
        else:
            done[node.name] = result
    return done


async def _offset(node: Node) -> tuple[float, float]:
    """(seconds that the node's clock is ahead, +- half of the round trip), of the quickest round of a few."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        sent = time.time()
        there = (await node.ask("clock", 5))["time"]
        took = time.time() - sent
        rounds.append((took / 2, there - sent - took / 2))
    doubt, ahead = min(rounds)
    return ahead, doubt


def _from_facts(report: Report, limits: Limits) -> list[Problem]:
    hosts, facts = report.hosts, report.facts
    return [
        *checks.code_problems(facts),
        *checks.version_problems(facts),
        *checks.gpu_problems(hosts, facts, limits),
        *checks.room_problems(hosts, facts, limits),
        *checks.clock_problems(report.offsets, limits),
        *checks.data_problems(facts),
    ]


async def _ring(report: Report, nodes: list[Node]) -> None:
    """Every node sends to the next for a second, all at once: that is how the ranks' rings load the network."""
    tokens = {node.name: secrets.token_hex(32) for node in nodes}
    address = {node.name: report.facts[node.name]["address"] for node in nodes}

    async def listen(node: Node) -> int:
        if address[node.name] is None:
            raise NodeError("it has no address but its loopback: `hostname -I` there must print one")
        request = {"address": address[node.name], "token": tokens[node.name], "seconds": TRANSFER - 1}
        return (await node.ask("listen", 10, **request))["port"]

    ports = await _all(report, nodes, listen, "bandwidth: ")
    pairs = {node.name: nodes[(i + 1) % len(nodes)].name for i, node in enumerate(nodes)}

    async def transfer(node: Node) -> None:
        target = pairs[node.name]
        if target not in ports:
            return
        request = {"address": address[target], "port": ports[target], "token": tokens[target], "seconds": SEND}
        try:
            await node.ask("send", TRANSFER, **request)
        except NodeError as error:
            raise NodeError(
                f"it cannot send to {target} at {address[target]} ({error}): let every port through between the nodes"
            ) from None

    sent = await _all(report, nodes, transfer)
    arrived = await _all(
        report,
        [node for node in nodes if node.name in ports and any(pairs[a] == node.name for a in sent)],
        lambda node: node.ask("received", TRANSFER),
        "bandwidth: ",
    )
    for source, target in pairs.items():
        if source in sent and target in arrived:
            got = arrived[target]
            report.rates[source, target] = got["bytes"] * 8e-9 / max(got["seconds"], 1e-9)


async def _reduce(report: Report, nodes: list[Node]) -> None:
    """One all-reduce over every rank on GPUs, over one rank a node on CPUs, meeting where the launcher will make them meet."""
    gpus = checks.needs_gpus(report.hosts, report.facts)
    report.backend = "nccl" if gpus else "gloo"
    first = nodes[0]
    master = report.facts[first.name]["master"] if len(nodes) > 1 else "127.0.0.1"
    if master is None:
        report.problems.append(Problem(first.name, "all-reduce: `hostname -I` prints no address there: give it one"))
        return
    try:
        port = (await first.ask("free_port", 10, address=master))["port"]
    except NodeError as error:
        report.problems.append(Problem(first.name, f"all-reduce: {error}"))
        return
    ranks: dict[str, list[tuple[int, int]]] = {}
    world_size = 0
    for node in nodes:
        here = min(report.hosts[node.name], len(report.facts[node.name]["gpus"])) if gpus else 1
        ranks[node.name] = [(world_size + local, local) for local in range(here)]
        world_size += here
    env = {
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "DOCTOR_BACKEND": report.backend,
        "DOCTOR_SECONDS": str(REDUCE - 2),
    }
    code = Path(reduce.__file__).read_text()

    async def join(node: Node) -> float:
        request = {"code": code, "ranks": ranks[node.name], "env": env, "seconds": REDUCE}
        return (await node.ask("reduce", REDUCE + 5, **request))["seconds"]

    joined = await _all(report, [node for node in nodes if ranks[node.name]], join, "all-reduce: ")
    if len(joined) == len(nodes):
        report.reduced = max(joined.values())
