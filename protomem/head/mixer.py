"""Features mixed into prototype rows (VPL), a block of rows at a time; see `Injection` in protomem/head/contract.py.

A row w with the feature q and the weight l takes part as norm((1 - l) w/|w| + l q) = v / |v| with v = w + c q and
c = l |w| / (1 - l), or l / (1 - l) where rows are unit already. For the length of a block's GEMMs v stands in the place of w,
in the shard itself, and w comes back bit for bit: nothing larger than a block is made, and the cost follows the number of
injected rows. Of a gradient d v, with c a function of |w|, reaches w, with e = w / |w|,

    d w = d v - <d v, e> e                 unit rows, which are not divided by their norm: d w = d v

Where asking which rows are injected would wait for the device, and where most are, all rows of a block take this road, in
scratch memory, those with l = 0 as v = w.

The batch's own rows are mixed in protomem/head/targets.py. Legend: B global batch, C prototype rows of this rank, K rows of
a block, D feature size.
"""

from __future__ import annotations

import functools

import torch

from protomem.head.contract import Columns, inverse_norm

ASKS = {"cpu"}  # devices that are asked which rows are injected


class Mixer:
    """The injection of one forward or backward pass. x [B, D] gives dtype and device; block: most rows at a time.

    inverse_w [C]: 1 / |w|, 1 for unit rows; the forward pass collects it for the backward pass.
    """

    def __init__(self, columns: Columns, x: torch.Tensor, block: int, inverse_w: torch.Tensor | None = None):
        i = columns.injection
        self.rows, self.unit = columns.rows, columns.unit
        self.features, self.place, self.weight = i.features, i.row, i.weight.to(x.dtype)
        self.dtype, self.block = x.dtype, block
        self.odds = self.weight / (1 - self.weight)
        self.injected = self.weight.nonzero().squeeze(1) if x.device.type in ASKS else None
        if self.injected is not None:  # ascending; those of block k stand from edges[k] to edges[k + 1]. Never on a GPU: `ASKS`
            self.edges = torch.searchsorted(self.injected, torch.arange(0, len(self.rows) + block, block)).tolist()
        self.inverse_w = x.new_empty(len(self.rows)) if inverse_w is None else inverse_w
        self.room = [x.new_empty(block, x.shape[1]) for _ in range(3)]  # for w, v, gradient
        self.swapped = None

    # --- a block ---------------------------------------------------------------------------------------------------

    def put(self, start: int, stop: int, inverse: torch.Tensor | None = None) -> torch.Tensor:
        """The block of rows start:stop [K, D], in the sums' precision, with v in the place of w, until `restore`.

        inverse [C] (forward): holds 1 / |w| of these rows, or 1, and gets 1 / |v| where they are injected.
        """
        block, at, self.active = self.rows[start:stop], slice(start, stop), None
        if self.injected is not None:
            first, last = self.edges[start // self.block : start // self.block + 2]
            if 4 * (last - first) <= stop - start:  # above, gathering them costs more than a pass over all (measured)
                at = self.injected[first:last]
                self.active = at - start
        if inverse is not None:
            self.inverse_w[start:stop] = inverse[start:stop]
        odds, self.inverse = self.odds[at], self.inverse_w[at]
        w = self.w = self._take(self.rows, at, self.room[0])
        q = self._take(self.features, at if self.place is None else self.place[at], self.room[1])
        v = self.v = torch.addcmul(w, q, (odds / self.inverse)[:, None], out=self.room[1][: len(odds)])
        self.mixed = odds > 0 if self.active is None else None
        if inverse is not None:
            inverse[at] = inverse_norm(v) if self.mixed is None else torch.where(self.mixed, inverse_norm(v), inverse[at])
        if self.active is None:
            return v
        mixed = block.to(self.dtype)  # a copy of rows that are stored in bf16, else the shard itself
        if mixed is block:
            self.swapped = block
        return mixed.index_copy_(0, self.active, v)

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
        along = along * self.mixed if everything else along[self.active]
        g.addcmul_(self.v, along[:, None])
        if not self.unit:
            projection = torch.mul(g, self.w, out=self.v).sum(1) * self.inverse.square()
            g.addcmul_(self.w, projection[:, None], value=-1)
        if before is not None:
            g.add_(before)
        if not everything:
            grad.index_copy_(0, self.active, g)


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
