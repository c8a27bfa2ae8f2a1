"""Programs that a test needs, from Debian's packages: installed once, by whichever test process comes first."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def why_not(programs, packages) -> str | None:
    """Install `packages` if any of `programs` is missing; the reason why that cannot be done, if there is one."""
    with open(Path(tempfile.gettempdir()) / "protomem-tests-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # apt-get fails while another one runs
        missing = [name for name in programs if not shutil.which(name)]
        if not missing:
            return None
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            return f"{', '.join(missing)} not installed, and only root can install {' '.join(packages)} by apt-get"
        quiet = dict(capture_output=True, text=True, timeout=300, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
            try:
                done = subprocess.run(["apt-get", *command], **quiet)
            except subprocess.TimeoutExpired:
                return f"apt-get {command[0]} did not end within 300 s"
            if done.returncode:
                return f"apt-get {command[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
    return None
