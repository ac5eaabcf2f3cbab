"""Examines all nodes at once: their facts and clocks, then transfers in a ring, then one all-reduce.

Each part has a time limit, and together they take less than a minute on CPUs, and a minute or two on GPUs.
"""

from __future__ import annotations

import asyncio
import os
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

# time limits of connecting and collecting facts, and of a transfer; and how long a node sends
FACTS_TIMEOUT_S, TRANSFER_TIMEOUT_S = 25.0, 10.0
# of the all-reduce on CPUs and on GPUs, whose contexts are made first, and further seconds for each node
REDUCE_TIMEOUT_S, GPU_REDUCE_TIMEOUT_S, NODE_TIMEOUT_S = 20.0, 60.0, 0.5
# of loading torch before that, which many processes of a node read from a shared disk at once
START_TIMEOUT_S = 60.0
SEND_S = 1.0
_CLOCK_ROUNDS = 5
# stands for a node's name in problems of the machine that the doctor runs on
HERE = "this machine"

T = TypeVar("T")


@dataclass
class Report:
    """What was found on the nodes.

    Attributes:
        hosts: Node -> slots, in the order of the hosts file.
        facts: Node -> facts of its agent, without nodes that did not answer.
        offsets: Node -> (seconds that its clock is ahead of this machine's, uncertainty in seconds).
        rates: (from, to) -> Gbit/s.
        all_reduce_s: Seconds of the all-reduce on the slowest node, or None if it was left out or failed.
        backend: `nccl`, beside which gloo was tried as well, or `gloo`; None without an all-reduce.
        networks: Node -> the network that NCCL took there, where it says so.
        problems: What is wrong.
        seconds: How long the examination took.
    """

    hosts: Mapping[str, int]
    facts: dict[str, Facts] = field(default_factory=dict)
    offsets: dict[str, tuple[float, float]] = field(default_factory=dict)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    all_reduce_s: float | None = None
    backend: str | None = None
    networks: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    def problems_of(self, host: str) -> list[str]:
        """The texts of a node's problems."""
        return [problem.text for problem in self.problems if problem.host == host]

    @property
    def passed(self) -> dict[str, int]:
        """Node -> slots of the nodes without a problem."""
        bad = {problem.host for problem in self.problems}
        return {host: slots for host, slots in self.hosts.items() if host not in bad}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON, in bytes, seconds and Gbit/s."""
        return {
            "hosts": {
                host: {
                    "slots": slots,
                    "problems": self.problems_of(host),
                    "facts": self.facts.get(host),
                    "clock": self.offsets.get(host),
                }
                for host, slots in self.hosts.items()
            },
            "problems_here": self.problems_of(HERE),
            "bandwidth": [{"from": a, "to": b, "gbit_per_s": rate} for (a, b), rate in self.rates.items()],
            "all_reduce": {"backend": self.backend, "seconds": self.all_reduce_s, "nccl_networks": self.networks},
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
    reduce_timeout: float | None = None,
) -> Report:
    """Examines every node of a hosts file at once, to find out whether a job can start there.

    Args:
        hosts: Node -> slots, from `read_hosts`.
        ssh: Words of the command that takes a node's name and a command for its shell; empty runs on this machine.
        exports: Name -> value of the variables that the launcher will export.
        data: Key -> path of the data that every node must have.
        run_dir: The run's folder.
        limits: The limits; None takes the defaults.
        skip: Checks to leave out: `bandwidth`, `all-reduce`.
        reduce_timeout: Seconds for the all-reduce, from the moment when the ranks have loaded torch; None takes 20 s on
            CPUs and 60 s on GPUs, and half a second for each node.

    Returns:
        What was found. Failures of nodes are problems in the report, and raise nothing.
    """
    started = time.monotonic()
    report = Report(hosts)
    if ssh and len(hosts) > 1 and not shutil.which("pdsh") and Path(ssh[0]).name == "ssh":
        report.problems.append(
            Problem(HERE, "pdsh is not installed, and the launcher starts the nodes with it: install it")
        )
    asyncio.run(_examine(report, ssh, exports, data, run_dir, limits or Limits(), set(skip), reduce_timeout))
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
    reduce_timeout: float | None,
) -> None:
    nodes = {name: Node(name, command_for(name, ssh, exports)) for name in report.hosts}

    async def collect(node: Node) -> tuple[Facts, tuple[float, float]]:
        await node.start()
        facts = await node.ask("facts", FACTS_TIMEOUT_S, data=data, run_dir=run_dir, data_seconds=8.0)
        return facts, await _clock_offset(node)

    try:
        answers = await _on_all_nodes(report, nodes.values(), collect)
        report.facts = {name: facts for name, (facts, _) in answers.items()}
        report.offsets = {name: offset for name, (_, offset) in answers.items()}
        report.problems += _problems_from_facts(report, limits)
        if unexported := checks.export_problem(report.facts, os.environ.get("GLOO_SOCKET_IFNAME")):
            report.problems.append(Problem(HERE, unexported))
        reachable = [nodes[name] for name in report.facts]
        if "bandwidth" not in skip and len(reachable) > 1:
            await _measure_bandwidth(report, reachable)
            report.problems += checks.bandwidth_problems(report.rates, limits)
        if "all-reduce" not in skip and reachable:
            await _all_reduce(report, reachable, reduce_timeout)
    finally:
        await asyncio.gather(*(node.close() for node in nodes.values()))


async def _on_all_nodes(
    report: Report, nodes: Iterable[Node], work: Callable[[Node], Awaitable[T]], prefix: str = ""
) -> dict[str, T]:
    """Runs `work` on all nodes at once: node -> its result. Each node that fails adds a problem to the report."""
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


async def _clock_offset(node: Node) -> tuple[float, float]:
    """(seconds that the node's clock is ahead, uncertainty in seconds), from the fastest of several round trips."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        sent = time.time()
        node_time = (await node.ask("clock", 5))["time"]
        round_trip = time.time() - sent
        rounds.append((round_trip / 2, node_time - sent - round_trip / 2))
    uncertainty, offset = min(rounds)
    return offset, uncertainty


def _problems_from_facts(report: Report, limits: Limits) -> list[Problem]:
    hosts, facts = report.hosts, report.facts
    return [
        *checks.code_problems(facts),
        *checks.version_problems(facts),
        *checks.gpu_problems(hosts, facts, limits),
        *checks.capacity_problems(hosts, facts, limits),
        *checks.clock_problems(report.offsets, limits),
        *checks.data_problems(facts),
        *checks.gloo_problems(hosts, facts),
    ]


async def _measure_bandwidth(report: Report, nodes: list[Node]) -> None:
    """Every node sends to the next one for a second, all at once, which loads the network as the rings of NCCL do."""
    tokens = {node.name: secrets.token_hex(32) for node in nodes}
    address = {node.name: report.facts[node.name]["address"] for node in nodes}

    async def listen(node: Node) -> int:
        if address[node.name] is None:
            raise NodeError("it has no address but its loopback: `hostname -I` there must print one")
        request = {"address": address[node.name], "token": tokens[node.name], "seconds": TRANSFER_TIMEOUT_S - 1}
        return (await node.ask("listen", 10, **request))["port"]

    ports = await _on_all_nodes(report, nodes, listen, "bandwidth: ")
    next_of = {node.name: nodes[(i + 1) % len(nodes)].name for i, node in enumerate(nodes)}

    async def transfer(node: Node) -> None:
        target = next_of[node.name]
        if target not in ports:
            return
        request = {"address": address[target], "port": ports[target], "token": tokens[target], "seconds": SEND_S}
        try:
            await node.ask("send", TRANSFER_TIMEOUT_S, **request)
        except NodeError as error:
            raise NodeError(
                f"it cannot send to {target} at {address[target]} ({error}): let every port through between the nodes"
            ) from None

    sent = await _on_all_nodes(report, nodes, transfer)
    received = await _on_all_nodes(
        report,
        [node for node in nodes if node.name in ports and any(next_of[source] == node.name for source in sent)],
        lambda node: node.ask("received", TRANSFER_TIMEOUT_S),
        "bandwidth: ",
    )
    for source, target in next_of.items():
        if source in sent and target in received:
            transferred = received[target]
            report.rates[source, target] = transferred["bytes"] * 8e-9 / max(transferred["seconds"], 1e-9)


async def _all_reduce(report: Report, nodes: list[Node], seconds: float | None) -> None:
    """One all-reduce over all ranks on GPUs, or over one rank of each node on CPUs, at the master address of a real job."""
    gpus = checks.needs_gpus(report.hosts, report.facts)
    report.backend = "nccl" if gpus else "gloo"
    if seconds is None:
        seconds = (GPU_REDUCE_TIMEOUT_S if gpus else REDUCE_TIMEOUT_S) + NODE_TIMEOUT_S * len(nodes)
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
        count = min(report.hosts[node.name], len(report.facts[node.name]["gpus"])) if gpus else 1
        ranks[node.name] = [(world_size + local, local) for local in range(count)]
        world_size += count
    env = {
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "DOCTOR_BACKEND": report.backend,
        "DOCTOR_SECONDS": str(seconds),
    }
    code = Path(reduce.__file__).read_text()

    async def join(node: Node) -> dict[str, Any]:
        request = {"code": code, "ranks": ranks[node.name], "env": env, "seconds": seconds}
        return await node.ask("reduce", seconds + START_TIMEOUT_S + 5, **request, start_seconds=START_TIMEOUT_S)

    joined = await _on_all_nodes(report, [node for node in nodes if ranks[node.name]], join, "all-reduce: ")
    report.networks = {name: answer["nccl"] for name, answer in joined.items() if answer["nccl"]}
    if len(joined) == len(nodes):
        report.all_reduce_s = max(answer["seconds"] for answer in joined.values())
