"""What is wrong with nodes, from what their agents said: plain functions from facts to problems."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """From where on a node has a problem.

    Attributes:
        memory: Free GiB a rank.
        disk: Free GiB where run.dir is.
        gpu_free: Share of each GPU's memory that nobody else holds.
        skew: Seconds by which clocks may differ.
        bandwidth: Gbit/s from one node to the next; 0 asks for none.
        slow: A link with less than this share of the median is a problem, where any bandwidth is asked for.
    """

    memory: float = 2.0
    disk: float = 10.0
    gpu_free: float = 0.9
    skew: float = 1.0
    bandwidth: float = 1.0
    slow: float = 0.25


@dataclass(frozen=True)
class Problem:
    """One line for one node: what is wrong and what to do."""

    host: str
    text: str


def needs_gpus(hosts: Mapping[str, int], facts: Mapping[str, Facts]) -> bool:
    """Whether the job is one of GPUs, as DeepSpeed will decide: told so, or any node has one."""
    told = {facts[name]["accelerator"] for name in facts} - {None}
    return "cpu" not in told and (bool(told) or any(facts[name]["gpus"] for name in facts))


def differences(
    facts: Mapping[str, Facts], what: str, cure: str, get: Callable[[Facts], Hashable], show: Callable[[Any], str] = str
) -> Iterator[Problem]:
    """A problem for every node whose value is not what most nodes have; of equally many, what the first node has."""
    values = {name: get(said) for name, said in facts.items()}
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    # Counter keeps the order of first appearance, and max takes the first of equals
    common = max(counts, key=counts.__getitem__)
    for name, value in values.items():
        if value != common:
            others = "most others have" if len(values) > 2 else f"{next(iter(values))} has"
            yield Problem(name, f"{what} is {show(value)}, {others} {show(common)}: {cure}")


def version_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Python, packages, CUDA and drivers that differ between nodes."""
    packages = dict.fromkeys(key for said in facts.values() for key in said["versions"])
    for package in packages:
        cure = f"install the same {package} there"
        yield from differences(facts, package, cure, lambda said, p=package: said["versions"].get(p), _or_missing)
        if package == "torch" and all(said["versions"].get("torch") is None for said in facts.values()):
            yield Problem(next(iter(facts)), "torch is installed nowhere: pip install -e . on every node")
    drivers = {name: said for name, said in facts.items() if said["gpus"]}
    yield from differences(
        drivers, "the driver", "install the same driver there", lambda said: said["gpus"][0]["driver"]
    )


def code_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Nodes that would run other code."""
    cure = "copy the repository there again (git pull, or rsync)"
    for name, said in facts.items():
        if said["code"]["hash"] is None:
            yield Problem(name, "scalekd_ds cannot be imported there: put the repository at the same path")
    there = {name: said for name, said in facts.items() if said["code"]["hash"] is not None}
    yield from differences(there, "the code's hash", cure, lambda said: said["code"]["hash"], lambda value: value[:12])
    known = {name: said for name, said in there.items() if said["code"]["commit"] is not None}
    yield from differences(known, "the commit", cure, lambda said: said["code"]["commit"], lambda value: value[:12])


def gpu_problems(hosts: Mapping[str, int], facts: Mapping[str, Facts], limits: Limits) -> Iterator[Problem]:
    """Too few GPUs for the slots, unlike ones, or ones that somebody else uses."""
    for name, said in facts.items():
        if said["gpu_error"]:
            yield Problem(name, f"{said['gpu_error']}: load the driver's module or reboot the node")
        elif needs_gpus(hosts, facts) and len(said["gpus"]) < hosts[name]:
            yield Problem(
                name,
                f"it has {len(said['gpus'])} GPUs for slots={hosts[name]}: lower slots in the hosts file, or set "
                "DS_ACCELERATOR=cpu with --write-env",
            )
        for number, gpu in enumerate(said["gpus"][: hosts[name]]):
            if gpu["free"] < limits.gpu_free * gpu["total"]:
                yield Problem(
                    name,
                    f"GPU {number} has {gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free: end what else runs "
                    "there (nvidia-smi names it)",
                )
    kinds = {name: said for name, said in facts.items() if said["gpus"]}
    cure = "leave it out, or the others wait for the slower kind"
    yield from differences(kinds, "the GPU", cure, lambda said: said["gpus"][0]["name"])


def room_problems(hosts: Mapping[str, int], facts: Mapping[str, Facts], limits: Limits) -> Iterator[Problem]:
    """Too little free memory for the ranks, or disk for the run."""
    for name, said in facts.items():
        asked = limits.memory * hosts[name]
        if said["memory"] < asked * GIB:
            yield Problem(
                name,
                f"{said['memory'] / GIB:.1f} GiB of memory are free, {asked:.1f} are asked for: end what else runs there "
                "(--min-memory sets it)",
            )
        if said["disk"] < limits.disk * GIB:
            yield Problem(
                name,
                f"{said['disk'] / GIB:.1f} GiB are free where the run's folder goes, {limits.disk:.1f} are asked for: make "
                "room (--min-disk sets it)",
            )


def clock_problems(offsets: Mapping[str, tuple[float, float]], limits: Limits) -> Iterator[Problem]:
    """Clocks that differ from the middle node's by more than the limit and what the measurement leaves open.

    Args:
        offsets: (seconds ahead of this machine's clock, +- what the round trip leaves open) of each node.
    """
    if not offsets:
        return
    middle = statistics.median_low(ahead for ahead, _ in offsets.values())
    for name, (ahead, doubt) in offsets.items():
        if abs(ahead - middle) - doubt > limits.skew:
            yield Problem(name, f"its clock is {ahead - middle:+.1f} s off the others': start chrony or ntpd there")


def data_problems(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Data that is missing on a node, or is not the same on all."""
    for key in dict.fromkeys(key for said in facts.values() for key in said["data"]):
        for name, said in facts.items():
            if "error" in said["data"][key]:
                yield Problem(name, f"{key}: {said['data'][key]['error']}: mount or copy the data there")
        for part, what in (("files", "the number of files"), ("index", "the index's hash")):
            # not counted in time, or not indexed yet, is no difference
            there = {n: said for n, said in facts.items() if said["data"][key].get(part) is not None}
            cure = "copy the data there again"
            yield from differences(
                there,
                f"{key}: {what}",
                cure,
                lambda said, k=key, p=part: said["data"][k][p],
                lambda value: str(value)[:12],
            )


def bandwidth_problems(rates: Mapping[tuple[str, str], float], limits: Limits) -> Iterator[Problem]:
    """Links that are slow by themselves or beside the others.

    Args:
        rates: (from, to) -> Gbit/s.
    """
    if not rates or limits.bandwidth == 0:
        return
    middle = statistics.median(rates.values())
    for (source, target), rate in rates.items():
        if rate < limits.bandwidth:
            yield Problem(
                source,
                f"it sends {rate:.2f} Gbit/s to {target}, {limits.bandwidth:g} are asked for: look at the network "
                "(--min-bandwidth sets it)",
            )
        elif rate < limits.slow * middle:
            yield Problem(
                source, f"it sends {rate:.2f} Gbit/s to {target}, others {middle:.2f}: look at its cable or port"
            )


def _or_missing(value: object) -> str:
    return "missing" if value is None else str(value)
