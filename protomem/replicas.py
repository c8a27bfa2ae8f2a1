"""What must be equal on all ranks: the configuration at the start, and on request the replicated state while training."""

from __future__ import annotations

import json
import socket

import torch
from omegaconf import DictConfig, OmegaConf

import protomem
from protomem import checkpointing, distributed, state
from protomem.errors import UserError

PIECE = 1 << 20  # elements that are hashed at once


def end_all(message: str) -> None:
    """End every rank for a reason that all of them know: rank 0 says it."""
    raise UserError(message) if distributed.rank() == 0 else SystemExit(2)


# --- the configuration ---------------------------------------------------------------------------------------------


def _flat(node, prefix: str = "") -> dict[str, str]:
    if not isinstance(node, dict):
        return {prefix[:-1]: json.dumps(node)}
    return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}{name}.").items()}


def check_config(config: DictConfig) -> None:
    """Raise UserError (SystemExit on other ranks than 0) if a rank was started with another configuration, or another
    version of protomem or torch, than rank 0. Collective."""
    own = _flat(OmegaConf.to_container(config))
    own |= {"protomem's version": protomem.__version__, "torch's version": torch.__version__}
    first = distributed.broadcast_object(own)
    key = next((k for k in {**first, **own} if own.get(k) != first.get(k)), None)
    found = distributed.gather_objects(key and (socket.gethostname(), key, own.get(key)))
    for rank, different in enumerate(found):
        if different:
            host, key, value = different
            end_all(
                f"rank {rank} ({host}) was started with {key}={value}, rank 0 with {first.get(key)}; start all ranks with "
                "the same configuration and the same versions"
            )


# --- the state -----------------------------------------------------------------------------------------------------


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A 0-d int64 hash in [0, 2^62) of a tensor's bits and their order; nothing waits for the device."""
    bits = tensor.detach().contiguous().view(-1)
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE].long()
        place = torch.arange(start, start + len(piece), device=bits.device)
        # Odd factors, so that every bit counts; products wrap around at 2^64.
        total = total + (piece * (2 * place + 1) + (piece >> 7) * (place * 40503 + 1)).sum()
    return total & ((1 << 62) - 1)


def check_run(run) -> None:
    """Every distributed.check_every steps: `check_state` of all of a run that should be equal. Collective."""
    every = run.config.distributed.check_every
    if not every or run.step % every or run.context.world_size == 1:
        return
    modules = checkpointing.modules(run)
    # BatchNorm statistics are each rank's own between checkpoints.
    encoders = [part for part in ("encoder", "key_encoder") if part in modules]
    own = {f"{part}.{k}" for part in encoders for k, _ in modules[part].named_buffers()}
    tensors = state.named_state(modules, run.optimizers)
    tensors = {k: v.to(run.device) for k, v in tensors.items() if k not in own and not state.is_rows(k, v)}
    position = torch.tensor([run.step, run.learning_rate(run.step)], dtype=torch.float64, device=run.device)
    check_state({"step and learning rate": position, **tensors}, run.step)


def check_state(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Compare tensors that should be equal on all ranks by one small all-reduce; waits for the device. Collective.

    Raises UserError (SystemExit on other ranks than 0) that names the first that differs, and on which ranks.
    """
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    least, most = distributed.all_reduce(torch.cat([own, -own]), "min").chunk(2)
    different = (least != -most).nonzero().flatten().tolist()
    if not different:
        return
    name = list(tensors)[different[0]]
    values = distributed.gather_objects((socket.gethostname(), int(own[different[0]])))
    usual = max((v for _, v in values), key=[v for _, v in values].count)
    ranks = [f"rank {r} ({host})" for r, (host, v) in enumerate(values) if v != usual]
    end_all(
        f"step {step}: {name} on {', '.join(ranks)} is not what the other ranks have ({len(different)} of {len(tensors)} "
        "replicated tensors differ); a rank computes something else: start again from the last checkpoint, without that "
        "machine if it happens again"
    )
