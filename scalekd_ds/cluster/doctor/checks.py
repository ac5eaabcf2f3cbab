"""Finds what is wrong with nodes: plain functions from the facts that their agents report to problems."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

GIB = 1 << 30
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """The limits beyond which a node has a problem.

    Attributes:
        memory: Least free host memory for each rank, in GiB.
        disk: Least free disk space where `run.dir` is, in GiB.
        gpu_free: Least share of each GPU's memory that no other process holds.
        skew: Most seconds by which clocks may differ.
        bandwidth: Least bandwidth from one node to the next, in Gbit/s; 0 checks no bandwidth.
        slow: Least share of the median bandwidth that a link must have, unless `bandwidth` is 0.
    """

    memory: float = 2.0
    disk: float = 10.0
    gpu_free: float = 0.9
    skew: float = 1.0
    bandwidth: float = 1.0
    slow: float = 0.25


@dataclass(frozen=True)
class Problem:
    """A problem of one node: its name, and one line on what is wrong and what to do."""

    host: str
    text: str


def needs_gpus(hosts: Mapping[str, int], facts: Mapping[str, Facts]) -> bool:
    """Whether the job will run on GPUs, as DeepSpeed decides: by DS_ACCELERATOR, else if any node has a GPU."""
    accelerators = {facts[name]["accelerator"] for name in facts} - {None}
    return "cpu" not in accelerators and (bool(accelerators) or any(facts[name]["gpus"] for name in facts))


def differences(
    facts: Mapping[str, Facts], what: str, cure: str, get: Callable[[Facts], Hashable], show: Callable[[Any], str] = str
) -> Iterator[Problem]:
    """Yields a problem for every node whose value differs from the most common one; in a tie the first node is right.

    Args:
        facts: Node -> its facts.
        what: What the value is called in the message.
        cure: What to do about it, the end of the message.
        get: Takes the value out of a node's facts.
        show: Formats a value for the message.
    """
    values = {name: get(node) for name, node in facts.items()}
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    # Counter keeps the order of first appearance, and max returns the first of several maxima
    common = max(counts, key=counts.__getitem__)
    for name, value in values.items():
        if value != common:
            others = "most others have" if len(values) > 2 else f"{next(iter(values))} has"
            yield Problem(name, f"{what} is {show(value)}, {others} {show(common)}: {cure}")


def _version_of(package: str, node: Facts) -> Any:
    return node["versions"].get(package)


def _of_data(key: str, part: str, node: Facts) -> Any:
    return node["data"][key][part]


def version_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Yields versions of Python, packages, CUDA and drivers that differ between nodes."""
    packages = dict.fromkeys(key for node in facts.values() for key in node["versions"])
    for package in packages:
        cure = f"install the same {package} there"
        yield from differences(facts, package, cure, partial(_version_of, package), _or_missing)
        if package == "torch" and all(node["versions"].get("torch") is None for node in facts.values()):
            yield Problem(next(iter(facts)), "torch is installed nowhere: pip install -e . on every node")
    drivers = {name: node for name, node in facts.items() if node["gpus"]}
    yield from differences(
        drivers, "the driver", "install the same driver there", lambda node: node["gpus"][0]["driver"]
    )


def code_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Yields nodes on which scalekd_ds is missing or differs from the others'."""
    cure = "copy the repository there again (git pull, or rsync)"
    for name, node in facts.items():
        if node["code"]["hash"] is None:
            yield Problem(name, "scalekd_ds cannot be imported there: put the repository at the same path")
    importable = {name: node for name, node in facts.items() if node["code"]["hash"] is not None}
    yield from differences(
        importable, "the code's hash", cure, lambda node: node["code"]["hash"], lambda value: value[:12]
    )
    known = {name: node for name, node in importable.items() if node["code"]["commit"] is not None}
    yield from differences(known, "the commit", cure, lambda node: node["code"]["commit"], lambda value: value[:12])


def gpu_problems(hosts: Mapping[str, int], facts: Mapping[str, Facts], limits: Limits) -> Iterator[Problem]:
    """Yields nodes with fewer GPUs than slots, with another kind of GPU than the others, or with GPUs in use."""
    for name, node in facts.items():
        if node["gpu_error"]:
            yield Problem(name, f"{node['gpu_error']}: load the driver's module or reboot the node")
        elif needs_gpus(hosts, facts) and len(node["gpus"]) < hosts[name]:
            yield Problem(
                name,
                f"it has {len(node['gpus'])} GPUs for slots={hosts[name]}: lower slots in the hosts file, or set "
                "DS_ACCELERATOR=cpu with --write-env",
            )
        for number, gpu in enumerate(node["gpus"][: hosts[name]]):
            if gpu["free"] < limits.gpu_free * gpu["total"]:
                yield Problem(
                    name,
                    f"GPU {number} has {gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free: end what else runs "
                    "there (nvidia-smi names it)",
                )
    kinds = {name: node for name, node in facts.items() if node["gpus"]}
    cure = "leave it out, or the others wait for the slower kind"
    yield from differences(kinds, "the GPU", cure, lambda node: node["gpus"][0]["name"])


def capacity_problems(hosts: Mapping[str, int], facts: Mapping[str, Facts], limits: Limits) -> Iterator[Problem]:
    """Yields nodes with too little free host memory for their ranks, or too little free disk space for the run."""
    for name, node in facts.items():
        asked = limits.memory * hosts[name]
        if node["memory"] < asked * GIB:
            yield Problem(
                name,
                f"{node['memory'] / GIB:.1f} GiB of memory are free, {asked:.1f} are asked for: end what else runs there "
                "(--min-memory sets it)",
            )
        if node["disk"] < limits.disk * GIB:
            yield Problem(
                name,
                f"{node['disk'] / GIB:.1f} GiB are free where the run's folder goes, {limits.disk:.1f} are asked for: make "
                "room (--min-disk sets it)",
            )


def clock_problems(offsets: Mapping[str, tuple[float, float]], limits: Limits) -> Iterator[Problem]:
    """Yields nodes whose clock differs from the median by more than the limit and the measurement's uncertainty.

    Args:
        offsets: Node -> (seconds ahead of this machine's clock, uncertainty in seconds).
        limits: The limits.
    """
    if not offsets:
        return
    median = statistics.median_low(offset for offset, _ in offsets.values())
    for name, (offset, uncertainty) in offsets.items():
        if abs(offset - median) - uncertainty > limits.skew:
            yield Problem(name, f"its clock is {offset - median:+.1f} s off the others': start chrony or ntpd there")


def data_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Yields nodes on which data is missing, or has other files or another index than on most nodes."""
    for key in dict.fromkeys(key for node in facts.values() for key in node["data"]):
        for name, node in facts.items():
            if "error" in node["data"][key]:
                yield Problem(name, f"{key}: {node['data'][key]['error']}: mount or copy the data there")
        for part, what in (("files", "the number of files"), ("index", "the index's hash")):
            # nodes that did not finish counting, or have no index yet, are not compared
            comparable = {n: node for n, node in facts.items() if node["data"][key].get(part) is not None}
            cure = "copy the data there again"
            yield from differences(
                comparable,
                f"{key}: {what}",
                cure,
                partial(_of_data, key, part),
                lambda value: str(value)[:12],
            )


def gloo_problems(hosts: Mapping[str, int], facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Yields nodes of several at which gloo, which a job on GPUs needs too, would listen where no other node reaches it."""
    if len(hosts) < 2:
        return
    for name, node in facts.items():
        # an interface's name is no address
        if node["gloo"] == "::1" or re.fullmatch(r"127\.\d+\.\d+\.\d+", node["gloo"]):
            yield Problem(
                name,
                f"its name {node['hostname']} resolves to {node['gloo']} there, which no other node reaches, and gloo takes: "
                "correct its /etc/hosts, or name the interface with --write-env GLOO_SOCKET_IFNAME=eth0",
            )


def export_problem(facts: Mapping[str, Facts], here: str | None) -> str | None:
    """What to do where GLOO_SOCKET_IFNAME is set to `here` on this machine alone, since the launcher does not pass it on."""
    if not here or not facts or any(node["gloo_interface"] for node in facts.values()):
        return None
    return (
        f"GLOO_SOCKET_IFNAME is {here} here, and no node gets it, since the launcher passes on NCCL's variables alone: "
        f"--write-env GLOO_SOCKET_IFNAME={here}"
    )


def bandwidth_problems(rates: Mapping[tuple[str, str], float], limits: Limits) -> Iterator[Problem]:
    """Yields nodes that send to the next node below the limit, or much slower than the median link.

    Args:
        rates: (from, to) -> Gbit/s.
        limits: The limits.
    """
    if not rates or limits.bandwidth == 0:
        return
    median = statistics.median(rates.values())
    for (source, target), rate in rates.items():
        if rate < limits.bandwidth:
            yield Problem(
                source,
                f"it sends {rate:.2f} Gbit/s to {target}, {limits.bandwidth:g} are asked for: look at the network "
                "(--min-bandwidth sets it)",
            )
        elif rate < limits.slow * median:
            yield Problem(
                source, f"it sends {rate:.2f} Gbit/s to {target}, others {median:.2f}: look at its cable or port"
            )


def _or_missing(value: object) -> str:
    return "missing" if value is None else str(value)
