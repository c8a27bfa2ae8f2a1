"""Features mixed into prototype rows (VPL), a block of rows at a time; see `Injection` in protomem/head/contract.py.

A row w with the feature q and the weight l > 0 takes part as v / |v|, where v = a w + l q and a = (1 - l) / |w|, or 1 - l if
rows are unit already. For the length of a block's GEMMs v stands in the place of w, in the shard itself, and w comes back
bit for bit: nothing larger than a block is made, and the cost follows the number of injected rows. What reaches w of a
gradient d v, with e = w / |w|:

    d w = a (d v - <d v, e> e)             unit rows, which are not divided by their norm: d w = (1 - l) d v

Where asking which rows are injected would wait for the device, all rows of a block take this road, most with l = 0 and so
a = 1, v = w, in scratch memory.

Legend: C prototype rows of this rank, K rows of a block, k of these that are mixed, D feature size.
"""

from __future__ import annotations

import functools

import torch

from protomem.head.contract import Columns, inverse_norm
from protomem.head.operands import Operands

ASKS = {"cpu"}  # devices that are asked which rows are injected


class Mixer:
    """The injection of one forward or backward pass. x [B, D] gives dtype and device; block: most rows at a time."""

    def __init__(self, columns: Columns, operands: Operands, x: torch.Tensor, block: int):
        i = columns.injection
        self.rows, self.unit, self.target = columns.rows, columns.unit, columns.target
        self.features, self.place, self.weight = i.features, i.row, i.weight.to(x.dtype)
        self.operands, self.dtype, self.asks = operands, x.dtype, x.device.type in ASKS
        self.room = [x.new_empty(block, x.shape[1]) for _ in range(3)]  # for w, v, gradient
        self.swapped = None

    # --- a block ---------------------------------------------------------------------------------------------------

    def put(self, start: int, stop: int, inverse: torch.Tensor | None = None) -> torch.Tensor:
        """Rows start:stop as an operand [K, D] with v in the place of w, until `restore`. 1 / |v| goes into inverse [C]."""
        block, weight = self.rows[start:stop], self.weight[start:stop]
        self.active = weight.nonzero().squeeze(1) if self.asks else None
        if self.active is not None and 4 * len(self.active) > len(weight):
            self.active = None  # from a quarter on gathering them costs more than a pass over all (measured)
        at = slice(start, stop) if self.active is None else self.active + start
        share = self.share = self.weight[at]
        w = self.w = self._take(self.rows, at, self.room[0])
        self.inverse_w = None if self.unit else inverse_norm(w)
        self.a = 1 - share if self.unit else torch.where(share > 0, (1 - share) * self.inverse_w, 1)
        q = self._take(self.features, at if self.place is None else self.place[at], self.room[1])
        v = self.v = torch.mul(q, share[:, None], out=self.room[1][: len(share)])
        v.addcmul_(w, self.a[:, None])
        if inverse is not None:
            inverse[at] = torch.where(share > 0, inverse_norm(v), inverse[at])
        if self.active is None:
            return self.operands.prepare(v)
        operand = self.operands.prepare(block)
        if operand is block:
            self.swapped = block
        return operand.index_copy_(0, self.active, self.operands.prepare(v))

    def _take(self, source: torch.Tensor, at, room: torch.Tensor) -> torch.Tensor:
        if isinstance(at, slice) or source.dtype != self.dtype:
            return source[at].to(self.dtype)
        return torch.index_select(source, 0, at, out=room[: len(at)])

    def restore(self) -> None:
        """The shard as it was."""
        if self.swapped is not None:
            self.swapped.index_copy_(0, self.active, self.w)
            self.swapped = None

    def take_out(self, grad: torch.Tensor) -> torch.Tensor:
        """What earlier terms left in the mixed rows of a block's gradient [K, D], which are zeroed: it is d w already."""
        if self.active is None:
            before = grad.clone()
            grad.zero_()
            return before
        before = grad.index_select(0, self.active)
        grad.index_fill_(0, self.active, 0)
        return before

    def carry(self, grad: torch.Tensor, along: torch.Tensor, before: torch.Tensor | None) -> None:
        """Turn the mixed rows of a block's gradient [K, D] from d v, which still lacks along v (along [K]), to d w."""
        everything = self.active is None
        g = grad if everything else torch.index_select(grad, 0, self.active, out=self.room[2][: len(self.active)])
        along = along * (self.share > 0) if everything else along[self.active]
        g.addcmul_(self.v, along[:, None])
        if not self.unit:
            projection = torch.mul(g, self.w, out=self.v).sum(1) * self.inverse_w.square()
            g.addcmul_(self.w, projection[:, None], value=-1)
        g.mul_(self.a[:, None])
        if before is not None:
            g.add_(before)
        if not everything:
            grad.index_copy_(0, self.active, g)

    # --- the batch's own rows --------------------------------------------------------------------------------------

    def mix_targets(self, mine: torch.Tensor) -> torch.Tensor:
        """What the target rows [B, D] (unit; zero where another rank owns them) are with their features."""
        share, place = self._targets()
        v = (1 - share) * mine + share * self.features[place].to(self.dtype)
        return torch.where(share > 0, v * inverse_norm(v)[:, None], mine)

    def carry_targets(self, x: torch.Tensor, cos_y: torch.Tensor, mine: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """d cos_y / d w [B, D] of the target rows, up to the factor 1 / |v|; mine: what `mix_targets` made of plain."""
        share, _ = self._targets()
        bent = x - cos_y[:, None] * mine
        if self.unit:
            return torch.where(share > 0, (1 - share) * bent, x)
        inverse = inverse_norm(self.rows[self.target.clamp_min(0)].to(self.dtype))[:, None]
        return torch.where(share > 0, (1 - share) * inverse * (bent - (bent * plain).sum(1, keepdim=True) * plain), bent)

    def _targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(share [B, 1], row in `features` [B]) of each sample's own row; share 0 where another rank owns it."""
        row = self.target.clamp_min(0)
        share = self.weight[row] * (self.target >= 0)
        return share[:, None], row if self.place is None else self.place[row]


def restoring(method):
    """Whatever happens inside, rows that `ctx.mixer` has swapped come back."""

    @functools.wraps(method)
    def run(ctx, *args):
        ctx.mixer = None
        try:
            return method(ctx, *args)
        finally:
            if ctx.mixer is not None:
                ctx.mixer.restore()
            ctx.mixer = None

    return run
