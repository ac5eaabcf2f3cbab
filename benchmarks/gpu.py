#!/usr/bin/env python3
"""Everything that only a GPU can show, in parts, as one archive: `python benchmarks/gpu.py [--part NAME ...]`.

Each part runs in a process of its own within its time, and leaves one JSON and one log. They go into one tar under $OUT, or
else benchmarks/results, which is written again after every part. A part that fails, or for which no time is left, does not
stop the others. A part that lacks something says in one line what to lay where. `--dry-run` walks all parts on the CPU and
on CUDA tensors without a GPU. The exit status is 1 after a failure, else 2 where a part lacked something.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_summary
import harness
import torch
from gpu_parts import commands, needs

# of starting a part, ending it and packing
_SPARE_S = 8.0
# files of a part that are larger stay out of the archive
_LARGEST = 4 << 20


def environment(out: Path) -> dict[str, str]:
    """Of the parts: this checkout, not an installed package, and the commands of what lies on PYTHONPATH."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    paths = [str(harness.ROOT / "benchmarks"), str(harness.ROOT), *given]
    # `pip install --target` puts commands there
    bins = [str(Path(entry) / "bin") for entry in given if (Path(entry) / "bin").is_dir()]
    return {
        **os.environ,
        "OUT": str(out),
        "PATH": os.pathsep.join([*bins, str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def attempt(name: str, work: Path, left: float, dry: bool) -> dict[str, Any]:
    """Runs a part if it has what it needs and time is left, and says in a line what became of it."""
    part = gpu_parts.PARTS[name]
    if lacks := needs.missing(part.needs, dry):
        found = {"part": name, "status": "lacks", "lacks": lacks}
    elif left < 10.0:
        found = {"part": name, "status": "not started", "failed": f"{max(0.0, left):.0f} s left"}
    else:
        # without a GPU, a busy machine may take long for what shows no speed
        seconds = left if dry else min(left, 60.0 * part.minutes)
        print(f"-- {name}, at most {seconds:.0f} s", flush=True)
        found = run_part(name, work, seconds, dry)
    reason = "; ".join(found.get("lacks", [])) or found.get("failed")
    took = f" after {found['seconds']:.0f} s" if "seconds" in found else ""
    print(f"-- {name}: {found['status']}{took}{f': {reason}' if reason else ''}", flush=True)
    (work / name).mkdir(exist_ok=True)
    harness.write_json(work / name / f"{name}.json", found)
    return found


def run_part(name: str, work: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Runs one part, whose log and JSON lie in the folder `work`/NAME, and returns what is known of it."""
    folder = work / name
    folder.mkdir()
    command = [sys.executable, "-m", "gpu_parts", name, folder, seconds, *(["--dry-run"] if dry else [])]
    begin = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        process = commands.start(command, environment(folder), stdout=log, stderr=log)
        try:
            # the part itself ends in time, unless something in it hangs
            status = commands.status_of(process, seconds + _SPARE_S / 2)
        except BaseException:
            commands.kill_tree(process)
            raise
    path = folder / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if status and "failed" not in found:
        found["failed"] = f"ended with {status}"
    found = {"part": name, "status": "failed" if "failed" in found else "done"} | found
    return found | {"seconds": round(time.monotonic() - begin, 1)}


def pack(work: Path, archive: Path, results: dict[str, dict[str, Any]], run: dict[str, Any]) -> None:
    """Writes the archive of all parts so far, whole or not at all."""
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    listed = {
        name: {key: found.get(key) for key in ("status", "failed", "lacks", "seconds")}
        for name, found in results.items()
    }
    content = json.dumps({**run, "parts": listed}, indent=1).encode()
    with tarfile.open(temporary, "w:gz") as tar:
        entry = tarfile.TarInfo("run.json")
        entry.size, entry.mtime = len(content), time.time()
        tar.addfile(entry, io.BytesIO(content))
        for path in sorted(work.rglob("*")):
            if path.is_file() and path.relative_to(work).parts[0] in results and path.stat().st_size <= _LARGEST:
                tar.add(path, str(path.relative_to(work)))
    os.replace(temporary, archive)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part",
        nargs="+",
        choices=gpu_parts.PARTS,
        metavar="NAME",
        help="all, if not given: " + ", ".join(gpu_parts.PARTS),
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="all parts together end within this time")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, without a GPU; shows that every line runs")
    parser.add_argument("--out", help="folder of the archive; else $OUT, else benchmarks/results")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    began = datetime.datetime.now(datetime.UTC)
    deadline = time.monotonic() + 60.0 * args.minutes
    out = harness.results_dir(args.out)
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f"gpu-{began:%Y%m%d-%H%M%S}.tar.gz"
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry_run else "cpu")
    run = {"machine": harness.machine(device), "dry_run": args.dry_run, "began": began.isoformat(timespec="seconds")}
    results: dict[str, dict[str, Any]] = {}
    # a folder of this run alone: what an earlier one has measured is never taken for this one's
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        # one after the other where times are measured
        with ThreadPoolExecutor(3 if args.dry_run else 1) as pool:

            def one(name: str) -> tuple[str, dict[str, Any]]:
                return name, attempt(name, work, deadline - time.monotonic() - _SPARE_S, args.dry_run)

            for name, found in pool.map(one, args.part or gpu_parts.PARTS):
                results[name] = found
                pack(work, archive, results, run)
    gpu_summary.print_summary(results)
    print(f"wrote {archive}, {archive.stat().st_size / 2**20:.1f} MiB")
    states = {found["status"] for found in results.values()}
    sys.exit(1 if states & {"failed", "not started"} else 2 if "lacks" in states else 0)


if __name__ == "__main__":
    main()
