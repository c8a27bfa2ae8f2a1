"""The batch's own rows: their cosines and their gradients, in the sums' precision. [B, D] work that the back ends share."""

from __future__ import annotations

import torch

from protomem.head.contract import Columns, inverse_norm


def _features(columns: Columns, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [B, 1] of the feature that is mixed into each sample's own row, the feature [B, D]); weight 0 where another
    rank has the row."""
    i, row = columns.injection, columns.target.clamp_min(0)
    weight = (i.weight[row] * (columns.target >= 0)).to(dtype)[:, None]
    return weight, i.features[row if i.row is None else i.row[row]].to(dtype)


def own_prototypes(x: torch.Tensor, own: torch.Tensor | None, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """(the target rows [B, D] unit and without features, what cos_y is taken with [B, D]); zero where another rank has them."""
    owned = (columns.target >= 0)[:, None]
    mine = torch.zeros_like(x)
    if len(columns.rows):
        mine = columns.rows[columns.target.clamp_min(0)].to(x.dtype) * owned
    if not columns.unit:
        mine = mine * inverse_norm(mine)[:, None]
    plain = mine
    if columns.injection is not None and len(columns.rows):
        weight, feature = _features(columns, x.dtype)
        v = (1 - weight) * mine + weight * feature
        mine = torch.where(weight > 0, v * inverse_norm(v)[:, None], mine)
    if own is not None:
        mine = torch.where(columns.uses_own[:, None], own * owned, mine)
    return plain, mine


def own_gradients(
    x: torch.Tensor, g_cos: torch.Tensor, columns: Columns, has_own: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(d loss / d own [B, D] or None, what of g_cos [B] reaches the target rows)."""
    if not has_own:
        return None, g_cos
    return x * (g_cos * ((columns.target >= 0) & columns.uses_own))[:, None], g_cos * ~columns.uses_own


def target_gradients(
    x: torch.Tensor,
    g_row: torch.Tensor,
    cos_y: torch.Tensor,
    mine: torch.Tensor,
    plain: torch.Tensor,
    inverse: torch.Tensor,
    columns: Columns,
) -> torch.Tensor:
    """[B, D]: what reaches the target rows through cos_y; 0 where another rank has them. inverse [C]: 1 / |row as the head
    sees it|."""
    tangent = x - cos_y[:, None] * mine
    if columns.unit:  # rows that count as they are: d cos_y / d w is x, and with a feature what is tangential of it
        tangent = x if columns.injection is None else torch.where(_features(columns, x.dtype)[0] > 0, tangent, x)
    elif columns.injection is not None:
        tangent = tangent - (tangent * plain).sum(1, keepdim=True) * plain
    share = (columns.target >= 0).to(x.dtype) * inverse[columns.target.clamp_min(0)]
    return (tangent * g_row[:, None] * share[:, None]).to(columns.rows.dtype)


def add_to_targets(gradients: torch.Tensor, columns: Columns, grad: torch.Tensor, start: int = 0) -> None:
    """Add `target_gradients` [B, D] to the gradient grad [K, D] of rows start:start + K. No host sync: what has no place
    there adds zeros, to different rows, because GPUs take additions to one row in turn."""
    row, count = columns.target - start, len(grad)
    inside = (row >= 0) & (row < count) & (columns.target >= 0)
    anywhere = torch.arange(len(row), device=row.device) % count
    grad.index_add_(0, torch.where(inside, row, anywhere), gradients.masked_fill(~inside[:, None], 0))
