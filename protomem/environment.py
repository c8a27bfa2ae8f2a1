"""What a result depends on besides the config: versions, commit, machine, world size, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import protomem
from protomem import distributed
from protomem.redact import hide_argument

PACKAGES = (
    *("torch", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "omegaconf", "simplejpeg", "pillow"),
    *("matplotlib", "rich", "wandb", "tensorboard", "triton", "apex"),
)


def environment() -> dict:
    """What the numbers depend on besides the config: versions, git commit, machine, world size, command line.

    `commit` is None where protomem is not run from a git checkout of its own; "+" marks uncommitted changes.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "protomem": protomem.__version__,
        "commit": _git_commit(Path(protomem.__file__).parent),
        "python": platform.python_version(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "world_size": distributed.world_size(),
        "command": shlex.join(hide_argument(argument) for argument in sys.argv),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit(package: Path) -> str | None:
    def git(*arguments):
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed below somebody else's repository: not our commit
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
