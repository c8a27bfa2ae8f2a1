"""What each rank tells about itself, and what must be the same on all of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

import protomem
from protomem import distributed
from protomem.environment import _cpu_name, environment
from protomem.preflight import ranks

COMPARED = ("torch", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "triton", "apex")


@dataclass(frozen=True)
class Problem:
    """One reason why a training should not start here. ranks: those at fault."""

    check: str
    text: str
    ranks: list[int]


def of_this_rank(context: distributed.Context, config: DictConfig | None, config_error: str | None) -> dict:
    found = environment()
    versions = {"python": found["python"], "protomem": found["protomem"]}
    versions |= {name: found["packages"].get(name) for name in COMPARED}
    versions |= {"CUDA": found["cuda"], "NCCL": _nccl(), "cuDNN": torch.backends.cudnn.version(), "driver": driver_version()}
    return {
        "rank": context.rank,
        "local_rank": context.local_rank,
        "host": ranks.host(),
        "versions": versions,
        "source": source_hash(Path(protomem.__file__).parent),
        "config": hashlib.sha256(OmegaConf.to_yaml(config).encode()).hexdigest()[:16] if config is not None else None,
        "config_error": config_error,
        "device": _device(context.device),
        "device_wanted": config.distributed.device if config is not None else "auto",
    }


def source_hash(package: Path) -> str:
    """Of names and contents of all Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def driver_version() -> str | None:
    """Of NVIDIA's kernel driver; None where there is none."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[0] if found else None


def _nccl() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


def _device(device: torch.device) -> dict:
    """name, memory in bytes, which card it is on its host (uuid), and how many cards this process sees."""
    if device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"type": "cpu", "name": _cpu_name(), "memory": memory, "uuid": None, "visible": torch.cuda.device_count()}
    card = torch.cuda.get_device_properties(device)
    visible = torch.cuda.device_count()
    return {"type": "cuda", "name": card.name, "memory": card.total_memory, "uuid": str(card.uuid), "visible": visible}


# --- what must agree -----------------------------------------------------------------------------------------------


def who(chosen: list[int], facts: list[dict]) -> str:
    """node1 (rank 3), node2 (ranks 4, 5)"""
    by_host = defaultdict(list)
    for rank in chosen:
        by_host[facts[rank]["host"]].append(str(rank))
    return ", ".join(f"{name} (rank{'s' * (len(own) > 1)} {', '.join(own)})" for name, own in by_host.items())


def agree(check: str, what: str, values: list, facts: list[dict], cure: str) -> list[Problem]:
    """One problem for every value that differs from the most frequent one (of several: that of the lowest rank)."""
    groups = defaultdict(list)
    for rank, value in enumerate(values):
        groups[value].append(rank)
    usual = max(groups, key=lambda value: (len(groups[value]), -groups[value][0]))
    return [
        Problem(check, f"{what} is {value} on {who(own, facts)}, {usual} on the others; {cure}", own)
        for value, own in groups.items()
        if value != usual
    ]


def compare(facts: list[dict]) -> list[Problem]:
    """Versions, source, config and devices of all ranks (in rank order)."""
    out = []
    for name in facts[0]["versions"]:
        out += agree("versions", name, [f["versions"][name] for f in facts], facts, "install the same everywhere")
    out += agree("source", "the hash of protomem's files", [f["source"] for f in facts], facts, "use the same checkout")
    out += agree("config", "the hash of the config", [f["config"] for f in facts], facts, "use the same files and values")
    return out + devices(facts)


def devices(facts: list[dict]) -> list[Problem]:
    """The same kind and memory everywhere, a card of its own for each rank, and no rank left on the CPU beside GPUs."""
    out = []
    shown = [f"{f['device']['name']} ({f['device']['memory'] / 1e9:.0f} GB)" for f in facts]
    out += agree("devices", "the device", shown, facts, "training goes at the pace of the slowest")
    by_host, by_card = defaultdict(list), defaultdict(list)
    for rank, f in enumerate(facts):
        by_host[f["host"]].append(rank)
        if f["device"]["uuid"]:
            by_card[f["host"], f["device"]["uuid"]].append(rank)
    for (_, uuid), own in by_card.items():
        if len(own) > 1:
            out.append(Problem("devices", f"one GPU ({uuid}) is used by {who(own, facts)}; start one rank per GPU", own))
    for own in by_host.values():
        visible = max(facts[rank]["device"]["visible"] for rank in own)
        left = [rank for rank in own if facts[rank]["device"]["type"] == "cpu" and facts[rank]["device_wanted"] != "cpu"]
        if visible and left:
            text = f"{visible} GPUs visible, {len(own)} ranks on {who(left, facts)}, which would train on the CPU"
            out.append(Problem("devices", f"{text}; start as many ranks as GPUs, or set distributed.device=cpu", left))
    return out


def disk(path: Path, needed: float, existing: float) -> tuple[float, Problem | None]:
    """(free bytes where `path` is or will be, the problem if they and `existing` bytes of older checkpoints are too few)."""
    there = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free + existing >= needed:
        return free, None
    text = f"{path} has {free / 1e9:.2f} GB free, checkpoints need {needed / 1e9:.2f} GB; free some, or lower checkpoint.keep"
    return free, Problem("disk", text, [0])
