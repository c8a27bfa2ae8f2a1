"""Several rows for an identity (sub-centres): the nearest counts, and it alone has a gradient; see `Columns` in
protomem/head/contract.py.

Legend: B global batch, I identities, K rows of each, one below the other; D feature size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from protomem.head.contract import Columns, inverse_norm


def pool(z: torch.Tensor, centers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest [B, I], which of the K rows it is [B, I] int8; of equal ones the first) of z [B, I * K]."""
    z = z.view(len(z), -1, centers)
    best, at = z[..., 0].clone(), torch.zeros(z.shape[:2], dtype=torch.int8, device=z.device)
    for k in range(1, centers):  # torch's max over a short last dimension takes four times as long on a CPU (measured)
        at.masked_fill_(z[..., k] > best, k)
        torch.maximum(best, z[..., k], out=best)
    return best, at


def spread(p: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out [B, I * K]: p [B, I] at the places `at` of `pool`, 0 elsewhere."""
    k = torch.arange(out.shape[1] // max(1, p.shape[1]), dtype=at.dtype, device=at.device)
    torch.mul(p[..., None], at[..., None] == k, out=out.view(*p.shape, -1))
    return out


def nearest_targets(x: torch.Tensor, columns: Columns) -> torch.Tensor:
    """The row [B] of each sample's identity that is nearest to it, -1 where another rank owns it. x [B, D]; no gradient."""
    target, k = columns.target, columns.centers
    if k == 1 or not len(columns.rows):
        return target
    rows = columns.rows.view(-1, k, x.shape[1])[target.clamp_min(0)].to(x.dtype)
    cos = torch.bmm(rows, x.detach()[..., None]).squeeze(2) * inverse_norm(rows.flatten(0, 1)).view(-1, k)
    return torch.where(target >= 0, target * k + cos.argmax(1), -1)


def resolved(x: torch.Tensor, columns: Columns) -> Columns:
    """The columns with the nearest row of each identity in the place of its number: what the back ends work with."""
    return columns if columns.centers == 1 else replace(columns, target=nearest_targets(x, columns))
