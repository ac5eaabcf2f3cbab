"""All tests that are marked `gpu`, eight at a time; the JUnit file has each of them."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness

from gpu_parts import commands


def run(folder: Path, seconds: float, dry: bool, save: Callable[[dict], None]) -> dict[str, Any]:
    """Raises RuntimeError if a test failed, or none ran where there is a GPU."""
    tests = sorted(path for path in (harness.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    if dry:
        # skipped for want of a GPU, all of them
        tests = [path for path in tests if path.stem == "test_benchmark_timing"]
    junit = folder / "correct.xml"
    command = [sys.executable, "-m", "pytest", *tests, "-m", "gpu", "-v", "--durations", 15, "-p", "no:cacheprovider"]
    # a file that needs a package which is not there must not stop the others
    command += ["--continue-on-collection-errors", "--junitxml", junit]
    if not dry and importlib.util.find_spec("xdist"):
        command += ["-n", 8]
    # an interrupted pytest still writes the JUnit file
    status = commands.status_of(commands.start(command), seconds - 20.0, last=signal.SIGINT)
    found = read_junit(junit) if junit.is_file() else read_log(folder / "correct.log")
    found |= {"files": [str(path.relative_to(harness.ROOT)) for path in tests], "status_of_pytest": status}
    save(found)
    if status or found["failed_tests"] or not (dry or found["passed"]):
        raise RuntimeError(f"pytest ended with {status}: {found['passed']} passed, {len(found['failed_tests'])} failed")
    return found


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and what each failed test said first."""
    cases = ElementTree.parse(path).getroot().findall(".//testcase")
    failed, skipped = {}, {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            if (said := case.find(kind)) is not None:
                failed[name] = " ".join((said.get("message") or said.text or "").split())[:300]
        if (said := case.find("skipped")) is not None:
            skipped[name] = said.get("message")
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed_tests": failed,
        "skipped_tests": skipped,
        "slowest_s": max((float(case.get("time") or 0.0) for case in cases), default=0.0),
    }


def read_log(path: Path) -> dict[str, Any]:
    """The same from the lines of `pytest -v`, of a run that was killed."""
    said = path.read_text() if path.is_file() else ""
    # `[gw3] PASSED tests/...::name` with several workers, `tests/...::name PASSED` with one
    found = re.findall(r"(PASSED|FAILED|ERROR) (tests/\S+)", said)
    found += [(verdict, name) for name, verdict in re.findall(r"^(tests/\S+::\S.*?) (PASSED|FAILED|ERROR)", said, re.M)]
    failed = {name: "see the log" for verdict, name in found if verdict != "PASSED"}
    return {"passed": sum(verdict == "PASSED" for verdict, _ in found), "failed_tests": failed, "skipped_tests": {}}
