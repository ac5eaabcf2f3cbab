"""Sent to each node over ssh and run there by its Python: answers requests, one line of JSON each, until stdin ends.

It imports nothing but the standard library and nothing of scalekd_ds: the node may have other code, or none.
"""

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

# a login shell may print things of its own before an answer
MARK = "scalekd-doctor:"
PACKAGES = ("torch", "deepspeed", "timm", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
SOURCES = (".py", ".json", ".sh")
BLOCK = 1 << 20


def run(command, seconds=10):
    """Standard output of a program, or None where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        return done.stdout if done.returncode == 0 else None
    return None


def versions():
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # torch's own word for its CUDA, without the seconds that its import takes
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        with contextlib.suppress(OSError), open(os.path.join(os.path.dirname(spec.origin), "version.py")) as file:
            said = re.search(r"^cuda\b.*=\s*'([\d.]+)'", file.read(), re.M)
            found["cuda"] = said[1] if said else None
    return found


def gpus():
    """({"name", "driver", "total", "free"} of each GPU, in bytes; an error where the driver does not answer)."""
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


def code():
    """The package that a job in this folder would import: where, a hash of its files and of launch/, the commit."""
    spec = importlib.util.find_spec("scalekd_ds")
    if spec is None or not spec.origin:
        return {"folder": None, "hash": None, "commit": None}
    folder = os.path.dirname(spec.origin)
    digest = hashlib.sha256()
    for top, label in ((folder, "scalekd_ds"), (os.path.join(os.getcwd(), "launch"), "launch")):
        # the kernels are behind a link
        for here, folders, files in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(name for name in files if name.endswith(SOURCES)):
                path = os.path.join(here, name)
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
                    digest.update(f"{label}/{os.path.relpath(path, top)} {content}\n".encode(errors="surrogateescape"))
    # a file system of another owner is no reason to hold back the commit
    git = ["git", "-c", f"safe.directory={os.path.dirname(folder)}", "-C", os.path.dirname(folder)]
    commit = run([*git, "rev-parse", "HEAD"])
    return {"folder": folder, "hash": digest.hexdigest(), "commit": commit.strip() if commit else None}


def memory():
    with open("/proc/meminfo") as file:
        said = dict(line.split(":", 1) for line in file)
    return int(said["MemAvailable"].split()[0]) << 10


def disk(path):
    """Free bytes, for this user, where `path` is or would be made."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


def index_of(path):
    """A hash of the index's names, labels and lengths, or None where no index was built yet."""
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
            # not the stamp: copies of the same data have other times of modification
            for member in ("names.npy", "codes.npy", "lengths.npy"):
                digest.update(file.read(member))
            return digest.hexdigest()
    return None


def count_files(path, deadline):
    """Files below a folder, or those that a pattern of shards may mean; None where counting takes too long."""
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        pattern = re.sub(r"\{[^}]*\}|\*", "\0", os.path.basename(path))
        wanted = re.compile(".*".join(map(re.escape, pattern.split("\0"))))
        return sum(bool(wanted.fullmatch(name)) for name in os.listdir(os.path.dirname(path)))
    files, waiting = 0, [path]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    files += 1
        if time.monotonic() > deadline:
            return None
    return files


def data(paths, seconds):
    """For each of the data's places: whether it can be read, its files and its index."""
    found = {}
    deadline = time.monotonic() + seconds
    for key, path in paths.items():
        try:
            files = count_files(path, deadline)
        except OSError as error:
            found[key] = {"error": f"{path!r}: {error.strerror}"}
            continue
        found[key] = {"error": f"{path!r}: no such file"} if files == 0 else {"files": files, "index": index_of(path)}
    return found


def first_address():
    """What DeepSpeed's launcher takes for the master's address."""
    return ((run(["hostname", "-I"]) or "").split() or [None])[0]


def own_address():
    """The address by which the name in the hosts file led here."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4 and connection[2] not in ("127.0.0.1", "::1"):
        # a scheduler hands on the variable of the machine that the user came in by
        with contextlib.suppress(OSError):
            free_port(connection[2])
            return connection[2]
    return first_address()


def facts(request):
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
    }


def listening(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=8)


class Listener:
    """Takes the bytes of one peer that knows the token, on one address and for some seconds."""

    def __init__(self, address, token, seconds):
        self.socket = listening(address)
        self.port = self.socket.getsockname()[1]
        self.token, self.deadline = bytes.fromhex(token), time.monotonic() + seconds
        self.result = {"error": "no peer came"}
        self.thread = threading.Thread(target=self.take, daemon=True)
        self.thread.start()

    def take(self):
        with self.socket:
            peer = self.meet()
        if peer is not None:
            with peer:
                self.result = self.count(peer)

    def meet(self):
        while time.monotonic() < self.deadline:
            self.socket.settimeout(max(0.01, self.deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                peer, _ = self.socket.accept()
                if self.greeted(peer):
                    return peer
                peer.close()
        return None

    def greeted(self, peer):
        # a stranger may not keep the peer waiting
        peer.settimeout(1)
        said = b""
        with contextlib.suppress(OSError):
            while len(said) < len(self.token) and (part := peer.recv(len(self.token) - len(said))):
                said += part
        return hmac.compare_digest(said, self.token)

    def count(self, peer):
        peer.settimeout(3)
        buffer, total, started = bytearray(BLOCK), 0, time.monotonic()
        try:
            while (got := peer.recv_into(buffer)) and time.monotonic() < self.deadline:
                total += got
        except OSError as error:
            return {"error": f"the connection broke after {total} bytes: {error}"}
        return {"bytes": total, "seconds": time.monotonic() - started}


def send(address, port, token, seconds):
    block = bytes(BLOCK)
    with socket.create_connection((address, port), timeout=5) as peer:
        peer.sendall(bytes.fromhex(token))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            peer.sendall(block)
    return {}


def free_port(address):
    with listening(address) as probe:
        return {"port": probe.getsockname()[1]}


def reduce(code, ranks, env, seconds):
    """Runs the program that joins an all-reduce, once for each (rank, local rank), and returns what went wrong."""
    workers = []
    for rank, local_rank in ranks:
        each = {**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        workers.append(subprocess.Popen([sys.executable, "-c", code], env=each, text=True, **pipes))
    deadline = time.monotonic() + seconds
    results = []
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=max(0.1, deadline - time.monotonic()))
            last = (output.strip().splitlines() or ["no output"])[-1]
            if worker.returncode:
                return {"error": last[-300:]}
            results.append(json.loads(last))
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {seconds:.0f} s"}
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    return {"seconds": max(result["seconds"] for result in results)}


def main():
    # nothing of this outlives its launcher for long, whatever becomes of that
    signal.alarm(120)
    listener = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "clock":
                answer = {"time": time.time()}
            elif what == "facts":
                answer = facts(request)
            elif what == "listen":
                listener = Listener(**request)
                answer = {"port": listener.port}
            elif what == "received":
                listener.thread.join(max(0.1, listener.deadline - time.monotonic()))
                answer = listener.result
            elif what == "send":
                answer = send(**request)
            elif what == "free_port":
                answer = free_port(**request)
            elif what == "reduce":
                answer = reduce(**request)
            else:
                answer = {"error": f"unknown request {what!r}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
