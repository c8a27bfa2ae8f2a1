"""What every benchmark writes beside its numbers: machine, versions, date; and how ranks are started."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import torch


def machine() -> dict:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0] if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": gpu or f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def spread(values: list[float]) -> dict:
    return {"repeats": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        names = dict.fromkeys(k for row in rows for k in (*row, *machine()))
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in {**machine(), **row}.items()} for row in rows
        )
    print(f"wrote {path}")


def start_ranks(script: str, ranks: int, arguments: list[str], more_env: dict[str, str] = {}) -> None:
    """Run `script --worker ...` on `ranks` processes with torchrun's variables, one thread each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= more_env
    command = [sys.executable, script, "--worker", *arguments]
    workers = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
    if any([w.wait() for w in workers]):
        raise SystemExit("a rank failed")
