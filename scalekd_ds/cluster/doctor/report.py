"""Prints the doctor's report: a table with a row for each node, and a line for each problem."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scalekd_ds.cluster.doctor.checks import GIB
from scalekd_ds.cluster.doctor.examine import Report
from scalekd_ds.names import one_line

_COLUMNS = (
    "host",
    "slots",
    "python",
    "torch",
    "CUDA",
    "driver",
    "GPUs",
    "memory",
    "disk",
    "clock",
    "files",
    "sends",
    "",
)


def print_report(console: Console, report: Report) -> None:
    """Prints the table, the problems and a summary line; a row ends with OK if its node has no problem.

    In a terminal that is too narrow for the table, each node has a paragraph in its place.
    """
    rows = [_row(report, host) for host in report.hosts]
    table = Table(*_COLUMNS, title=f"looked at in {report.seconds:.1f} s", title_justify="left")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal or Console(width=1000).measure(table).maximum <= console.width:
        console.print(table, highlight=False)
    else:
        console.print(f"looked at in {report.seconds:.1f} s", highlight=False)
        for host, *values, verdict in rows:
            facts = ", ".join(f"{name} {value}" for name, value in zip(_COLUMNS[1:-1], values, strict=True) if value)
            lines = textwrap.wrap(facts, console.width - 4)
            console.print(
                "\n".join([f"{host}: {verdict}", *(f"    {line}" for line in lines)]), markup=False, highlight=False
            )
    if report.all_reduce_s is not None:
        console.print(f"all-reduce of 1 MiB over {report.backend}: {1e3 * report.all_reduce_s:.1f} ms", highlight=False)
    if len(report.facts) > 1:
        ways = [f"{host} {_ways(report, host)}" for host in report.facts]
        console.print(f"gloo connects by {', '.join(ways)}", markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems:
        # unwrapped, so that grep finds whole problems
        console.print(f"{problem.host}: {escape(one_line(problem.text))}", highlight=False, soft_wrap=True)
    count = len(report.problems)
    verdict = "a job can start" if not count else f"{count} problem{'s' if count > 1 else ''}"
    console.print(f"{len(report.passed)} of {len(report.hosts)} nodes pass: {verdict}", highlight=False)


def _ways(report: Report, host: str) -> str:
    """The interface or address that gloo takes on a node, and the network that NCCL takes."""
    network = report.networks.get(host)
    return one_line(report.facts[host]["gloo"] + (f" (NCCL by {network})" if network else ""))


def _row(report: Report, host: str) -> list[str]:
    facts = report.facts.get(host)
    verdict = "problem" if report.problems_of(host) else "OK"
    if facts is None:
        return [host, str(report.hosts[host]), *[""] * (len(_COLUMNS) - 3), verdict]
    versions, gpus = facts["versions"], facts["gpus"]
    offset, uncertainty = report.offsets[host]
    files = [str(part.get("files", "?")) for part in facts["data"].values()]
    rates = [rate for (source, _), rate in report.rates.items() if source == host]
    return [
        host,
        str(report.hosts[host]),
        versions["python"],
        versions.get("torch", "none"),
        versions.get("cuda") or "none",
        gpus[0]["driver"] if gpus else "none",
        f"{len(gpus)} x {gpus[0]['name']}" if gpus else "none",
        f"{facts['memory'] / GIB:.0f} GiB",
        f"{facts['disk'] / GIB:.0f} GiB",
        f"{1e3 * offset:+.0f} +- {1e3 * uncertainty:.0f} ms",
        " ".join(files),
        f"{rates[0]:.1f} Gbit/s" if rates else "",
        verdict,
    ]
