"""A cluster of nodes on this one machine, for tests: `with Cluster(2, tmp_path) as cluster: ...`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from launching import LIMIT

SCRIPT = Path(__file__).with_name("netns_cluster.sh")
# tool -> the Debian package that has it
TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


def skip_reason() -> str | None:
    """Why no cluster can be made here, or None where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [f"{tool} ({package})" for tool, package in TOOLS.items() if not shutil.which(tool, path=path)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    # a container may hold root back from this
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"], capture_output=True
    )
    return None if probe.returncode == 0 else "this machine does not allow network namespaces"


class Cluster:
    """Nodes named node1, node2, ... with an sshd each, over one file system. Leaving the block removes them.

    Attributes:
        hostfile: The hosts file for the launcher, one slot a node.
        env: This process's environment with a PATH whose `ssh` reaches the nodes.
    """

    def __init__(self, nodes: int, tmp_path: Path):
        self.nodes = nodes
        self.state = tmp_path / "cluster"
        self.hostfile = self.state / "hosts"
        path = f"{self.state / 'bin'}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        self.env = {**os.environ, "PATH": path, "CLUSTER_DIR": str(self.state)}

    def _script(self, *args: str, **kwargs) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SCRIPT, *args], env=self.env, text=True, stdin=subprocess.DEVNULL, **kwargs)

    def __enter__(self) -> Cluster:
        up = self._script("up", str(self.nodes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if up.returncode:
            self._script("down")
            raise RuntimeError(f"no cluster: {up.stdout.strip()}")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._script("down", check=True)

    def run(self, node: int, cmd: list[str], timeout: float = LIMIT) -> subprocess.CompletedProcess[str]:
        """Runs `cmd` on node `node` (from 1), whether or not its link is up."""
        return self._script("exec", str(node), *cmd, capture_output=True, timeout=timeout)

    def cut(self, node: int) -> None:
        """Takes the node's link down; its processes run on."""
        self._script("cut", str(node), check=True)

    def heal(self, node: int) -> None:
        """Puts the node's link back."""
        self._script("heal", str(node), check=True)

    def crash(self, node: int) -> None:
        """Kills every process of the node at once."""
        self._script("crash", str(node), check=True)
