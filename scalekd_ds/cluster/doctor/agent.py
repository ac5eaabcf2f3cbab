"""The doctor's agent: sent to each node over ssh and run there by its Python.

It reads requests from stdin, one line of JSON each, and prints one line of JSON for each, until stdin ends. It imports the
standard library alone, and nothing of scalekd_ds: the node may have other code, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

# starts every answer, since a login shell may print lines of its own
MARK = "scalekd-doctor:"
PACKAGES = ("torch", "deepspeed", "timm", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
SOURCES = (".py", ".json", ".sh")
BLOCK = 1 << 20


def run(command: Sequence[str], seconds: float = 10) -> str | None:
    """Standard output of a program, or None if it fails, does not exist, or runs longer than `seconds`."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        return done.stdout if done.returncode == 0 else None
    return None


def versions() -> dict[str, str | None]:
    """Name -> version of Python, the installed packages of `PACKAGES`, and `cuda`, for which torch was built."""
    found: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # read from torch's version file, because importing torch takes seconds
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        with contextlib.suppress(OSError), open(os.path.join(os.path.dirname(spec.origin), "version.py")) as file:
            match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", file.read(), re.M)
            found["cuda"] = match[1] if match else None
    return found


def gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs, and an error message or None.

    Returns:
        A list with `name`, `driver`, and the memory `total` and `free` in bytes of each GPU, which is empty without
        nvidia-smi, and an error message if nvidia-smi fails.
    """
    if not shutil.which("nvidia-smi"):
        return [], None
    fields = "name,driver_version,memory.total,memory.free"
    answer = run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 20)
    if answer is None:
        return [], "nvidia-smi fails: the driver does not answer"
    found = []
    for line in answer.splitlines():
        with contextlib.suppress(ValueError):
            name, driver, total, free = (part.strip() for part in line.split(","))
            found.append({"name": name, "driver": driver, "total": int(total) << 20, "free": int(free) << 20})
    return found, None


def code() -> dict[str, str | None]:
    """The scalekd_ds that a job in this folder would import.

    Returns:
        Its `folder`, a `hash` of its source files and those of launch/, and its git `commit`; each is None if unknown.
    """
    spec = importlib.util.find_spec("scalekd_ds")
    if spec is None or not spec.origin:
        return {"folder": None, "hash": None, "commit": None}
    folder = os.path.dirname(spec.origin)
    digest = hashlib.sha256()
    for top, label in ((folder, "scalekd_ds"), (os.path.join(os.getcwd(), "launch"), "launch")):
        # scalekd_ds/kernels is a symbolic link
        for here, folders, files in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(name for name in files if name.endswith(SOURCES)):
                path = os.path.join(here, name)
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
                    digest.update(f"{label}/{os.path.relpath(path, top)} {content}\n".encode(errors="surrogateescape"))
    # git refuses a checkout of another owner unless it is declared safe
    git = ["git", "-c", f"safe.directory={os.path.dirname(folder)}", "-C", os.path.dirname(folder)]
    commit = run([*git, "rev-parse", "HEAD"])
    return {"folder": folder, "hash": digest.hexdigest(), "commit": commit.strip() if commit else None}


def memory() -> int:
    """Available host memory in bytes."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def disk(path: str) -> int:
    """Bytes that are free for this user on the file system where `path` is or would be made."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


def index_hash(path: str) -> str | None:
    """A hash of the names, labels and lengths in the data set's index, or None if no index was built yet."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "scalekd_ds")
    key = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    suffix = ".scalekd_index.npz"
    beside = (
        os.path.join(path, suffix)
        if os.path.isdir(path)
        else f"{os.path.dirname(path)}/.{os.path.basename(path)}{suffix}"
    )
    for place in (beside, os.path.join(home, f"{key}.npz")):
        with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(place) as file:
            digest = hashlib.sha256()
            # the time stamp is left out, since copies of the same data have other modification times
            for member in ("names.npy", "codes.npy", "lengths.npy"):
                digest.update(file.read(member))
            return digest.hexdigest()
    return None


def count_files(path: str, deadline: float) -> int | None:
    """Number of files below a folder, or of those that match a pattern of shards; None if `deadline` passes meanwhile."""
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        pattern = re.sub(r"\{[^}]*\}|\*", "\0", os.path.basename(path))
        wanted = re.compile(".*".join(map(re.escape, pattern.split("\0"))))
        return sum(bool(wanted.fullmatch(name)) for name in os.listdir(os.path.dirname(path)))
    files, pending = 0, [path]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                else:
                    files += 1
        if time.monotonic() > deadline:
            return None
    return files


def data(paths: Mapping[str, str], seconds: float) -> dict[str, dict[str, Any]]:
    """Key -> `files` (their number) and `index` (its hash) of each path, or `error` if it cannot be read.

    Args:
        paths: Key -> path.
        seconds: Time for counting files, all paths together.
    """
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    for key, path in paths.items():
        try:
            files = count_files(path, deadline)
        except OSError as error:
            found[key] = {"error": f"{path!r}: {error.strerror}"}
            continue
        found[key] = {"error": f"{path!r}: no such file"} if files == 0 else {"files": files, "index": index_hash(path)}
    return found


def first_address() -> str | None:
    """The first address of `hostname -I`, which DeepSpeed's launcher takes as the master's; None if there is none."""
    return next(iter((run(["hostname", "-I"]) or "").split()), None)


def own_address() -> str | None:
    """The address at which ssh reached this node, else its first address."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4 and connection[2] not in ("127.0.0.1", "::1"):
        # a scheduler may pass on the variable of the login node, whose address cannot be bound here
        with contextlib.suppress(OSError):
            free_port(connection[2])
            return connection[2]
    return first_address()


def follow_nccl(environment: MutableMapping[str, str], interfaces: Collection[str] | None = None) -> None:
    """Sets GLOO_SOCKET_IFNAME to the interface that NCCL_SOCKET_IFNAME names, where it is not set; ranks do the same.

    A job on GPUs reduces over NCCL, and needs gloo as well, for the flags of its signals. NCCL looks for an interface by
    itself, while gloo takes the one whose address this machine's name resolves to. NCCL takes lists, exclusions and
    beginnings of names, too, which are left alone.

    Args:
        environment: `os.environ`, or variables that are laid over it.
        interfaces: Names of this machine's interfaces; None asks the system.
    """
    named = environment.get("NCCL_SOCKET_IFNAME", "")
    named = named[1:] if named.startswith("=") else named
    if environment.get("GLOO_SOCKET_IFNAME") or not re.fullmatch(r"[A-Za-z0-9_.-]+", named):
        return
    known = [name for _, name in socket.if_nameindex()] if interfaces is None else interfaces
    if named in known:
        environment["GLOO_SOCKET_IFNAME"] = named


def gloo_address() -> str:
    """What gloo takes to connect the ranks: the interface that is set, else the address of this machine's name."""
    environment = dict(os.environ)
    follow_nccl(environment)
    if environment.get("GLOO_SOCKET_IFNAME"):
        return environment["GLOO_SOCKET_IFNAME"]
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    # where nobody knows the name
    return "127.0.0.1"


def facts(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answers `facts`: everything about this node that the doctor checks."""
    found, error = gpus()
    return {
        "hostname": socket.gethostname(),
        "versions": versions(),
        "executable": sys.executable,
        "accelerator": os.environ.get("DS_ACCELERATOR"),
        "gpus": found,
        "gpu_error": error,
        "code": code(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory(),
        "disk": disk(request["run_dir"]),
        "data": data(request["data"], request["data_seconds"]),
        "address": own_address(),
        "master": first_address(),
        "gloo": gloo_address(),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
    }


def listening(address: str) -> socket.socket:
    """A server socket on a free port of `address`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=8)


class Listener:
    """Receives from one peer on a free port, in a thread, and measures the rate.

    A connection that does not send the token first is closed, and the next one is awaited.

    Args:
        address: The address to listen on.
        token: The secret that the peer sends first, in hexadecimal.
        seconds: Time until it gives up.
    """

    def __init__(self, address: str, token: str, seconds: float) -> None:
        self.socket = listening(address)
        self.port = self.socket.getsockname()[1]
        self.token, self.deadline = bytes.fromhex(token), time.monotonic() + seconds
        self.result = {"error": "no peer came"}
        self.thread = threading.Thread(target=self.receive_from_peer, daemon=True)
        self.thread.start()

    def receive_from_peer(self) -> None:
        """Body of the thread: leaves the bytes and seconds of the transfer, or an error, in `result`."""
        with self.socket:
            peer = self.accept()
        if peer is not None:
            with peer:
                self.result = self.receive(peer)

    def accept(self) -> socket.socket | None:
        """The connection of the first peer that knows the token, or None after the deadline."""
        while time.monotonic() < self.deadline:
            self.socket.settimeout(max(0.01, self.deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                peer, _ = self.socket.accept()
                if self.authenticate(peer):
                    return peer
                peer.close()
        return None

    def authenticate(self, peer: socket.socket) -> bool:
        """Whether the peer sends the token, within a second: another connection must not keep the real peer waiting."""
        peer.settimeout(1)
        received = b""
        with contextlib.suppress(OSError):
            while len(received) < len(self.token) and (part := peer.recv(len(self.token) - len(received))):
                received += part
        return hmac.compare_digest(received, self.token)

    def receive(self, peer: socket.socket) -> dict[str, Any]:
        """Counts the `bytes` and `seconds` until the peer closes the connection or the deadline passes."""
        peer.settimeout(3)
        buffer, total, started = bytearray(BLOCK), 0, time.monotonic()
        try:
            while (count := peer.recv_into(buffer)) and time.monotonic() < self.deadline:
                total += count
        except OSError as error:
            return {"error": f"the connection broke after {total} bytes: {error}"}
        return {"bytes": total, "seconds": time.monotonic() - started}


def send(address: str, port: int, token: str, seconds: float) -> dict[str, Any]:
    """Answers `send`: sends the token, and then zeros for some seconds, to another node's `Listener`."""
    block = bytes(BLOCK)
    with socket.create_connection((address, port), timeout=5) as peer:
        peer.sendall(bytes.fromhex(token))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            peer.sendall(block)
    return {}


def free_port(address: str) -> dict[str, int]:
    """Answers `free_port`: a port of `address` that is free now."""
    with listening(address) as probe:
        return {"port": probe.getsockname()[1]}


def reduce(
    code: str, ranks: Iterable[tuple[int, int]], env: Mapping[str, str], seconds: float, start_seconds: float
) -> dict[str, Any]:
    """Answers `reduce`: runs the program that takes part in an all-reduce, one process for each rank of this node.

    Args:
        code: The program's source, that of doctor/reduce.py.
        ranks: (rank, local rank) of each process.
        env: Variables for the processes.
        seconds: Time for the all-reduce, which the program counts itself from the moment when it has loaded torch.
        start_seconds: Time for that.

    Returns:
        The `seconds` of the slowest, and `nccl`, the network that NCCL says it takes, or None; or an `error`.
    """
    signal.alarm(int(seconds + start_seconds) + 120)
    base = {**os.environ, **env}
    follow_nccl(base)
    if env["DOCTOR_BACKEND"] == "nccl" and "NCCL_DEBUG" not in base:
        base["NCCL_DEBUG"], base["NCCL_DEBUG_SUBSYS"] = "INFO", "INIT,NET"
    workers = []
    for rank, local_rank in ranks:
        worker_env = {**base, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        workers.append(subprocess.Popen([sys.executable, "-c", code], env=worker_env, text=True, **pipes))
    # a process that hangs says itself in which part, a moment before it is killed
    deadline = time.monotonic() + seconds + start_seconds
    outputs = []
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if worker.returncode:
                return {"error": (output.strip().splitlines() or ["no output"])[-1][-300:]}
            outputs.append(output)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {seconds + start_seconds:.0f} s"}
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    return reduced(outputs)


def reduced(outputs: Sequence[str]) -> dict[str, Any]:
    """The answer of `reduce` from what its processes have printed, NCCL among it."""
    # a library may print at its end, after the result
    lines = [line for output in outputs for line in output.splitlines()]
    results = [json.loads(line) for line in lines if line.startswith('{"seconds"')]
    if len(results) != len(outputs):
        return {"error": "a rank ended without its result"}
    network = next((found for line in lines if (found := re.search(r"NET/\w+ ?: Using (.+)", line))), None)
    return {"seconds": max(r["seconds"] for r in results), "nccl": network[1].strip()[:100] if network else None}


def main() -> None:
    """Answers requests until stdin ends."""
    # ends this process after two minutes, should the doctor be killed and leave the connection open
    signal.alarm(120)
    # after `listen`, which comes first, a Listener
    listener: Any = None
    answer: dict[str, Any]
    for line in sys.stdin.buffer:
        request = json.loads(line)
        action = request.pop("do")
        try:
            if action == "clock":
                answer = {"time": time.time()}
            elif action == "facts":
                answer = facts(request)
            elif action == "listen":
                listener = Listener(**request)
                answer = {"port": listener.port}
            elif action == "received":
                listener.thread.join(max(0.1, listener.deadline - time.monotonic()))
                answer = listener.result
            elif action == "send":
                answer = send(**request)
            elif action == "free_port":
                answer = free_port(**request)
            elif action == "reduce":
                answer = reduce(**request)
            else:
                answer = {"error": f"unknown request {action!r}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
