"""Who started this process, as which of how many ranks, and which device it takes."""

from __future__ import annotations

import os

import torch

from protomem import slurm
from protomem.errors import UserError


def detect_launcher(env=os.environ) -> tuple[str, int, int, int]:
    """Return (launcher, rank, world size, local rank): torchrun's variables win, then Slurm's, then a single process."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # The tasks of the step, not of the job: the shell of an allocation for four has SLURM_NTASKS=4 and is one process.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "slurm", int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return "single", 0, 1, 0


def ranks_here(launcher: str, env=os.environ) -> int:
    """How many of the ranks are on this machine, as the launcher says."""
    if launcher == "slurm" and "SLURM_STEP_TASKS_PER_NODE" in env:
        return slurm.tasks_of_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env.get("SLURM_NODEID", 0)))
    return int(env.get("LOCAL_WORLD_SIZE", 1))


def choose_device(name: str, local_rank: int, local_world: int = 1) -> torch.device:
    """`auto` takes the local rank's GPU if each of this machine's ranks has one, else the CPU; `cpu` and `cuda` are taken
    at their word. A rank that sees a single GPU of its own (Slurm's --gpus-per-task=1) takes that one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU; use device=cpu or install a CUDA build of torch")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if "SLURM_LOCALID" in os.environ and "RANK" not in os.environ and count == 1:
        return torch.device("cuda", 0)
    if local_world > count:
        if name == "auto":
            return torch.device("cpu")
        raise UserError(f"device=cuda: {local_world} ranks on this machine, {count} GPUs visible; start fewer ranks")
    return torch.device("cuda", local_rank)
