"""The encoder on several ranks: gradients averaged by DDP, in an order that a resumed run repeats."""

from __future__ import annotations

import inspect

import torch

from protomem import distributed


def data_parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`module` with its gradients averaged over ranks (DDP); `module` itself in a single process.

    Buffers are not broadcast at every step: BatchNorm statistics are averaged where they are used (protomem/state.py).
    """
    if distributed.world_size() == 1:
        return module
    ddp = torch.nn.parallel.DistributedDataParallel
    # torch 2.13 renamed the switch; before it has only the old one.
    renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters
    switch = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    ids = [device.index] if device.type == "cuda" else None
    return ddp(module, device_ids=ids, gradient_as_bucket_view=True, **switch)


def settle_buckets(model: torch.nn.Module, encoder: torch.nn.Module, size: int, device: torch.device) -> None:
    """DDP re-orders its gradient buckets after its first backward, and with three or more ranks their order decides how float
    sums round. One empty pass before the first step lets a resumed run round as the uninterrupted one.

    model: `data_parallel` of encoder, which takes images [b, 3, size, size].
    """
    kept = [b.clone() for b in encoder.buffers()]
    model(torch.zeros(2, 3, size, size, device=device)).sum().mul(0).backward()
    for buffer, value in zip(encoder.buffers(), kept):
        buffer.copy_(value)
