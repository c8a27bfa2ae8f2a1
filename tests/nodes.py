"""Nodes that can be lost, on one machine: each is a network namespace with an address and a hostname of its own.

Needs root and iproute2 (installed from Debian's archive where it is missing). Names are unique to this process; only what
was made and started here is ever removed or ended.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import debian

ADDRESS = "10.77.0.{}"


def need_namespaces() -> None:
    """Skip the test, with the reason, where nodes cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("nodes are network namespaces, which only root can make")
    if reason := debian.why_not(("ip", "nsenter", "unshare"), ("iproute2", "util-linux")):
        pytest.skip(reason)


def _ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


class Node:
    """One machine: `start` runs a command on it in a session of its own; `processes` are all that run on it."""

    def __init__(self, name: str, folder: Path, namespace: str):
        self.name, self.folder, self.namespace = name, folder, namespace

    def start(self, *command, **env) -> subprocess.Popen:
        """Its output goes to `folder/NAME.log`. The process id is that of the command: every program here calls exec."""
        # Not `ip netns exec`, which mounts another /sys. torchrun's agents know their own machine by its hostname.
        become = 'mount --bind "$1" /etc/hosts; hostname "$0"; shift; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "sh", "-c", become]
        with open(self.folder / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(
                [*enter, self.name, str(self.folder / "hosts"), *command],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace, check=False).stdout.split()]

    def log(self) -> str:
        path = self.folder / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end_all(self) -> None:
        deadline = time.monotonic() + 10
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def nodes(folder: Path, *names: str):
    """Two nodes joined by a cable (a veth pair). Everything on them is killed, and they are removed, at the end."""
    need_namespaces()
    made = [Node(name, folder, f"pm{os.getpid()}{name}") for name in names]
    hosts = "".join(f"{ADDRESS.format(i + 1)} {name}\n" for i, name in enumerate(names))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
    try:
        try:
            for node in made:
                _ip("netns", "add", node.namespace)
            first, second = (node.namespace for node in made)
            _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
            for i, node in enumerate(made):
                _ip("-n", node.namespace, "addr", "add", ADDRESS.format(i + 1) + "/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", node.namespace, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made
    finally:
        for node in made:
            node.end_all()
            _ip("netns", "delete", node.namespace, check=False)
