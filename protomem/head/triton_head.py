"""The triton head: the blocked head's mathematics with fused kernels, for NVIDIA GPUs. Not yet measured on a GPU.

The classes are cut into chunks of K rows, so small that what a chunk's products hand to each other stays in the GPU's L2
cache. Forward, for each chunk:

    operands   rows w [K, D] fp32 ─► 1 / |w| [K], and with bf16 operands v [K, D] bf16, with features mixed in (VPL)
    logits     x v^T, tile by tile [BM, BN] in registers: times 1 / |v_j| and s; target, empty rows and padding hidden;
               filter; exp ─► each row's maximum and sum in the tile [T, B], optional nearest row,
               e [B, K] = exp(z - the tile's maximum), bf16 with bf16 operands
    merge      the tiles' statistics ─► running maximum and sum of each row [B]
    add_dx     d x [B, D] = d x exp(old - new maximum) + (e exp(tile's - new maximum) / |v_j|) v        if x has a gradient

so that d x / (d loss / d lse) is complete, up to a factor per row, when the forward ends: e of a chunk is needed again for
the prototypes' gradient only. It is kept for as many chunks as fit in store_mb; the backward computes the others again.
Constant rows (a memory without prototype gradients) keep nothing and have no product left in the backward.
Backward, for each chunk, if the rows have a gradient:

    (operands and logits again, where e was not kept)
    row_grads  G [K, D] = (e exp(tile's maximum - lse) g_i)^T x / |v_j|, fp32
    finish     G + what the batch's own rows get from cos_y; d w = G - (G · v) v / |v|^2, and the features' mixing back
               ─► the shard's gradient, written or added to. With optimizer.fuse_prototypes the same kernel (finish_sgd,
               finish_adamw) takes the optimizer's step ─► rows and optimizer state, and no gradient is written

Logits are never stored, and the softmax is exact whatever the scale: exponentials are taken relative to the maximum of their
own tile of BN classes, so none overflows and what underflows is e^-87 of its tile's largest. No constant shift is needed:
the maxima cost one reduction in registers and B C / BN numbers.

The prototypes' gradient is put off until the gradient of the embeddings is on its way to the other ranks.

A chunk at B = 1024, D = 512, K = 8192 (the default there: 2 K (B + D) bytes = 24 MiB), bf16 operands:
    FLOPs   2 B K D = 8.6 G for each of the three products; a fourth where e is computed again
    bytes   of HBM: w 16.8 MB read in the forward; in the backward w 16.8 MB read and d w 16.8 MB written (and read, by a second
            loss term); e 16.8 MB written and 16.8 MB read if it is kept, else w once more;
            a step of SGD with momentum after that: 83.9 MB (w, d w, momentum read; w, momentum written); inside `finish`: w
            and momentum read and written, 67.1 MB in all for 117.4 (AdamW: 100.7 for 151.0);
            of L2, besides: v 8.4 MB; e written once and read D / BD = 4 times; partial sums of d x 2.1 MB times their number
            (4 on 132 processors) and G 16.8 MB, both written and read
Four kernels are launched for a chunk forward and two backward, with the step or without; four where e is computed again. At 10
microseconds a launch that is not far from the time of the products themselves at this shape: `block` is the first thing to
measure.
benchmarks/kernels.py checks the gradients on a GPU and then measures.

With sub-centres (`centers` rows for an identity) a tile [BM, BN] is of identities. The logits kernel takes the products with
their first rows, their second ones and so on, and keeps the largest cosine and which it was in registers: the maxima and sums,
e [B, K / centers] and with it the winners [B, K / centers] (int8 with bf16 operands, else int32) are per identity. add_dx and
row_grads take e for the winner and 0 for the other rows, so each product still has the FLOPs of all rows. Chunks are whole
identities. At B = 1024, D = 512 and three sub-centres, bf16 operands, a chunk is K = 12288 rows of 4096 identities (2 B + B +
2 * 3 D bytes each, 24 MiB):
    FLOPs   2 B K D = 12.9 G for each product
    bytes   of HBM: w 25.2 MB, read and written as above; of L2, besides: v 12.6 MB; e 8.4 MB and winners 4.2 MB, read `centers`
            times as often as above, 3 D / BD = 12 times

Legend: B global batch, C prototype rows of this rank, K rows of a chunk, D feature size, T tiles in a chunk of BN rows, or
identities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protomem import distributed
from protomem.errors import UserError
from protomem.head import kernels
from protomem.head.centers import resolved
from protomem.head.contract import Columns, Negatives, combine
from protomem.head.operands import Operands
from protomem.head.targets import own_gradients, own_prototypes
from protomem.head.triton_rows import HIDDEN, fill_sink, live_gradient

PROCESSORS = 132  # of an H100, where none is asked
L2_BYTES = 24 * 2**20  # of exponentials and operands in a chunk, both bf16 (our default: half of an H100's cache)


@dataclass(frozen=True)
class Tiles:
    """m, n, d: a program's part of the batch, the rows, the features; k: of the summed dimension that is loaded at a time."""

    m: int
    n: int
    d: int
    k: int
    warps: int
    stages: int


# Chosen to fit the shared memory of compute capability 8.0 (163 KiB) without spilling registers, not by measurement; what else
# may be tried on a GPU: protomem/head/tuning.py.
TILES = {"bf16": Tiles(128, 128, 128, 64, 8, 3), "fp32": Tiles(64, 64, 64, 32, 8, 2)}
# With sub-centres: n identities. Besides the sums, registers hold the largest so far and which it was.
CENTER_TILES = {"bf16": Tiles(128, 64, 128, 64, 8, 3), "fp32": Tiles(64, 64, 64, 32, 8, 2)}
INTERPRETED = Tiles(16, 16, 16, 16, 1, 1)


def default_tiles(precision: str, centers: int = 1) -> Tiles:
    return (TILES if centers == 1 else CENTER_TILES)[precision]


def check(device: torch.device | str | None = None) -> None:
    """Raise UserError where the kernels cannot run. device: where the embeddings will be; None: a GPU if there is one."""
    kernels.load()
    if kernels.interpreted():
        return
    if device is not None and torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise UserError("head.backend=triton needs an NVIDIA GPU; use head.backend=blocked")


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Every kernel starts here. The last positional arguments of a kernel are its constants."""
    kernel[grid](*args, **constants)


def chunk_rows(batch: int, size: int, tile: int, centers: int = 1) -> int:
    """Rows of a chunk, see above; at least eight tiles of `tile` identities."""
    each = 2 * batch + 2 * centers * size + (batch if centers > 1 else 0)
    return centers * max(8 * tile, L2_BYTES // each // tile * tile)


class _Chunks:
    """What the passes of one call share: the cut into chunks, and a chunk's kernels."""

    def __init__(self, x, columns: Columns, scale: float, filter_above: float | None, half: bool, block: int, tiles=None):
        self.rows, self.make, self.updates = kernels.load()
        self.columns, self.scale, self.filter_above, self.half = columns, scale, filter_above, half
        self.emulated, many = kernels.interpreted(), columns.centers
        self.tiles = tiles or (INTERPRETED if self.emulated else default_tiles("bf16" if half else "fp32", many))
        self.centers = many
        (self.b, self.d), self.c = x.shape, len(columns.rows)
        n = self.tiles.n * many  # rows of a tile
        self.k = min(-(-(block or chunk_rows(self.b, self.d, self.tiles.n, many)) // n) * n, -(-self.c // n) * n)
        self.t = self.k // n
        self.starts = range(0, self.c, self.k) if self.c else ()
        self.dtype = torch.bfloat16 if half else torch.float32
        # On compute capability 10.0 Triton 3.7 makes TF32 of an exact fp32 product where an operand was computed from numbers
        # of less than 32 bits (triton-lang/triton issue 10176).
        self.winner = torch.int8 if half else torch.int32
        self.x = x.detach().to(self.dtype).contiguous()
        self.width = 1 << (self.d - 1).bit_length()
        self.target = (columns.target if many == 1 else columns.target // many).contiguous()  # -1 stays -1
        self.valid = None if columns.valid is None else columns.valid.contiguous().view(torch.uint8)
        mixed = columns.injection is not None
        self.copied = mixed or columns.rows.dtype != self.dtype
        self.operand = x.new_empty(self.k, self.d, dtype=self.dtype) if self.copied else None
        self.options = dict(num_warps=self.tiles.warps, num_stages=self.tiles.stages)
        self.product = dict(CENTERS=many, HALF=half, EMULATE=self.emulated, **self.options)

    def bytes_kept(self) -> int:
        """Of one chunk's exponentials, with sub-centres which was the nearest, and maxima."""
        each = self.dtype.itemsize + (self.winner.itemsize if self.centers > 1 else 0)
        return self.b * (self.k // self.centers * each + 4 * self.t)

    def exps(self, chunks: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Of each chunk (exponentials [B, K / centers], which sub-centre was the nearest; None where there is one)."""
        shape = chunks, self.b, self.k // self.centers
        winners = self.x.new_empty(shape, dtype=self.winner).unbind() if self.centers > 1 else [None] * chunks
        return list(zip(self.x.new_empty(shape).unbind(), winners))

    def per_tile(self, *chunks: int, dtype=torch.float32) -> torch.Tensor:
        return self.x.new_empty(*chunks, self.t, self.b, dtype=dtype)

    def span(self, start: int) -> tuple[int, int, int]:
        """(first row, end, tiles) of the chunk that starts there."""
        stop = min(start + self.k, self.c)
        return start, stop, -(-(stop - start) // (self.tiles.n * self.centers))

    def _mixing(self, start: int, stop: int):
        """(features, place, shares) of rows start:stop for the kernels, None without injection."""
        i = self.columns.injection
        if i is None:
            return None, None, None
        share = i.weight[start:stop]
        return (i.features, i.row[start:stop], share) if i.row is not None else (i.features[start:stop], None, share)

    def _by_row(self, rows: int) -> tuple[tuple[int], dict]:
        """(grid, constants) of kernels that take whole rows [rows, D]."""
        each = max(1, 4096 // self.width) if not self.emulated else 8
        return (-(-rows // each),), dict(R=each, WIDTH=self.width, UNIT=self.columns.unit)

    def operands(self, start: int, inverse: torch.Tensor) -> torch.Tensor:
        """v [K, D] of the chunk; writes its part of inverse [C]."""
        start, stop, _ = self.span(start)
        rows = self.columns.rows[start:stop]
        if self.copied or not self.columns.unit:
            grid, constants = self._by_row(stop - start)
            args = (rows, *self._mixing(start, stop), self.operand, inverse[start:stop], stop - start, self.d)
            launch(self.rows.operands, grid, *args, HALF=self.half, EMULATE=self.emulated, **constants)
        return self.operand if self.copied else rows

    def logits(self, start, v, inverse, threshold, exps, top, total, share=None, best=None, best_at=None) -> None:
        """The statistics [T, B] of the chunk, and what `exps` says; see the kernel. From here on identities are counted."""
        start, stop, t = self.span(start)
        tiles, many = self.tiles, self.centers
        valid = None if self.valid is None else self.valid[start:stop]
        kept = exps or (None, None)
        tensors = (self.x, v, inverse[start:stop], self.target, valid, threshold, *kept, top, total, share, best, best_at)
        numbers = (self.scale, self.filter_above, start // many, self.b, (stop - start) // many, self.d, self.k // many)
        grid = (-(-self.b // tiles.m), t)
        launch(self.make.logits, grid, *tensors, *numbers, BM=tiles.m, BN=tiles.n, BK=tiles.k, **self.product)

    def merge(self, start: int, tops, sums, shares, bests, ats, top, total, share, rescale, best, best_at) -> None:
        start, _, t = self.span(start)
        args = (tops, sums, shares, bests, ats, top, total, share, rescale, best, best_at, start // self.centers, self.b, t)
        width = 1 << (t - 1).bit_length()
        each = max(1, min(64, 4096 // width)) if not self.emulated else 16
        launch(self.rows.merge, (-(-self.b // each),), *args, R=each, WIDTH=width)

    def splits(self) -> int:
        """Parts of a chunk that are summed into d x side by side, for as many programs as the GPU has processors."""
        if self.emulated:
            return min(2, self.t)
        programs = -(-self.b // self.tiles.m) * -(-self.d // self.tiles.d)
        processors = torch.cuda.get_device_properties(self.x.device).multi_processor_count if self.x.is_cuda else PROCESSORS
        return max(1, min(processors // programs, self.t))

    def add_dx(self, start, exps, v, inverse, tops, top, rescale, out) -> None:
        """out [S, B, D]"""
        start, stop, t = self.span(start)
        tiles, splits, many = self.tiles, len(out), self.centers
        numbers = (self.b, (stop - start) // many, self.d, self.k // many, t, splits)
        args = (*exps, v, inverse[start:stop], tops, top, rescale, out, *numbers)
        grid = (-(-self.b // tiles.m), -(-self.d // tiles.d), splits)
        launch(self.make.add_dx, grid, *args, BM=tiles.m, BN=tiles.n, BK=tiles.k, BD=tiles.d, **self.product)

    def row_grads(self, start, exps, inverse, tops, level, weight, room) -> None:
        """Of the chunk's negatives, into room [K, D] fp32; `finish` has to follow."""
        start, stop, t = self.span(start)
        tiles, many = self.tiles, self.centers
        numbers = (self.b, (stop - start) // many, self.d, self.k // many)
        args = (*exps, self.x, inverse[start:stop], tops, level, weight, room, *numbers)
        more = dict(BM=tiles.k, BN=tiles.n, BD=tiles.d, **self.product)
        launch(self.make.row_grads, (t, -(-self.d // tiles.d), many), *args, **more)

    def finish(self, start, room, inverse, x, pull, order, first, out=None, update=None) -> None:
        """The gradient of the chunk's rows, from room: into out [K, D] (or added to it), or used up in the rows' update.
        x [B, D] fp32, pull, order [B], first [C + 1]: see `gradient` in protomem/head/kernels/rows.py."""
        start, stop, _ = self.span(start)
        columns, (grid, constants) = self.columns, self._by_row(stop - start)
        args = (room, columns.rows[start:stop], *self._mixing(start, stop), inverse[start:stop])
        args += (x, pull, order, first[start : stop + 1])
        if update is None:
            launch(self.rows.finish, grid, *args, out, stop - start, self.d, ADD=not columns.sink.fresh, **constants)
        else:
            name, its, more = update.kernel(start, stop, self.d)
            launch(getattr(self.updates, name), grid, *args, *its, stop - start, self.d, **more, **constants)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, own, live, columns: Columns, scale, negatives, operands, cut, store, wants, threshold):
        wants_dx, wants_dw = wants
        filter_above = None if negatives is None else negatives.filter_above
        chunks = _Chunks(x, columns, float(scale), filter_above, operands.half, *cut)
        b, c = chunks.b, chunks.c
        _, mine = own_prototypes(x, own, columns)
        own_cos = (x * mine).sum(1)
        inverse = x.new_ones(c)
        kept_count = min(len(chunks.starts), store // max(1, chunks.bytes_kept())) if wants_dw else 0
        kept, kept_top = chunks.exps(kept_count), chunks.per_tile(kept_count)
        softmax, nearest = threshold is None, columns.nearest
        # Of the tiles of one chunk, then of the rows so far.
        tile_top, tile_sum = chunks.per_tile() if softmax else None, chunks.per_tile()
        tile_share = None if softmax else chunks.per_tile()
        tile_best, tile_at = (chunks.per_tile(), chunks.per_tile(dtype=torch.int32)) if nearest is not None else (None, None)
        top, total, rescale = x.new_full((b,), HIDDEN), x.new_zeros(b), x.new_ones(b)
        share, best, best_at = x.new_zeros(b), x.new_full((b,), HIDDEN), torch.zeros_like(columns.target)
        dx = x.new_zeros(chunks.splits(), b, chunks.d) if wants_dx and c else None
        scratch = chunks.exps(1)[0] if dx is not None and kept_count < len(chunks.starts) else None
        for k, start in enumerate(chunks.starts):
            stays = k < kept_count
            exps, tops = (kept[k] if stays else scratch), (kept_top[k] if stays and softmax else tile_top)
            v = chunks.operands(start, inverse)
            chunks.logits(start, v, inverse, threshold, exps, tops, tile_sum, tile_share, tile_best, tile_at)
            args = (tops, tile_sum, tile_share, tile_best, tile_at, top, total, share, rescale, best, best_at)
            chunks.merge(start, *args)
            if dx is not None:
                chunks.add_dx(start, exps, v, inverse, tops, top, rescale, dx)
        if nearest is not None:
            nearest.cos = torch.where(best > HIDDEN / 2, best / scale, float("-inf"))
            nearest.row = best_at
        if softmax:
            none = top <= HIDDEN / 2
            cos_y, out = combine(own_cos, top.masked_fill(none, float("-inf")), total, scale)  # 0 there, or not a number
            level = out
        else:
            sums = distributed.all_reduce(torch.stack([own_cos, total, share]))
            cos_y, out, share = (t.clone() for t in sums.unbind())
            level, top = threshold, torch.zeros_like(top)
        chunks.operand = None  # the backward, if it needs one, makes its own: nothing of a chunk waits for it
        ctx.columns, ctx.chunks, ctx.negatives, ctx.operands = columns, chunks, negatives, operands
        ctx.kept, ctx.kept_top, ctx.unified, ctx.has_own = kept, kept_top, not softmax, own is not None
        ctx.has_live, ctx.wants_dw = live is not None, wants_dw
        ctx.save_for_backward(x, mine, cos_y, level, inverse, top, share, None if dx is None else dx.sum(0))
        return cos_y, out

    @staticmethod
    def backward(ctx, g_cos, g_out):
        x, mine, cos_y, level, inverse, top, share, dx_sum = ctx.saved_tensors
        columns, chunks, scale = ctx.columns, ctx.chunks, ctx.chunks.scale
        threshold = level if ctx.unified else None
        # Without a negative anywhere lse is -inf and every exponential 0.
        level = torch.zeros_like(top) if ctx.unified else torch.where(level.isinf(), torch.zeros_like(level), level)
        weight = g_out * scale
        dx = mine * g_cos[:, None]
        if dx_sum is not None:
            dx += dx_sum * (weight * (top - level).exp())[:, None]
        d_own, g_row = own_gradients(x, g_cos, columns, ctx.has_own)
        d_live = live_gradient(ctx, x, cos_y, level, threshold, weight, g_row) if ctx.has_live else None
        if ctx.wants_dw:

            def later():
                columns.sink.once()
                if chunks.c:
                    fill_sink(ctx, x, g_row, inverse, level, threshold, weight)
                columns.sink.fresh = False
                ctx.kept = ctx.kept_top = None

            distributed.put_off(later)
        d_threshold = -(g_out * share).sum()[None] if ctx.unified else None
        return dx, d_own, d_live, None, None, None, None, None, None, None, d_threshold


def triton_head(
    x: torch.Tensor,
    columns: Columns,
    scale: float,
    negatives: Negatives | None = None,
    threshold: torch.Tensor | None = None,
    *,
    precision: str = "fp32",
    block: int = 0,
    store_mb: float = 16.0,
    tiles: Tiles | None = None,
):
    """(cos_y [B], lse_neg or sum_neg [B]) of unit embeddings x [B, D] fp32; see protomem/head/contract.py.

    precision: `fp32` (exact, no TF32), or `bf16` for bf16 operands and exponentials with fp32 sums, target path and softmax
    statistics. block: rows per chunk, rounded up to whole tiles (0: `chunk_rows`). store_mb: MiB of exponentials kept for
    the backward (our default: 16, as for `blocked`; all of them are 2 B C bytes with bf16, 2 GB at B = 1024, C = 1 M, and at
    this B and D the default keeps none). tiles: of the kernels; None: `default_tiles`.

    Raises UserError without a GPU, without Triton, and for negatives without a kernel.
    """
    check(x.device)
    if negatives is not None and negatives.filter_above is None:
        raise UserError("head.backend=triton has no kernel for this margin's effect on negatives; use head.backend=blocked")
    if x.dtype != torch.float32:
        raise ValueError(f"the triton head takes float32 embeddings, not {x.dtype}")
    if not columns.rows.is_contiguous():
        raise ValueError("the triton head takes contiguous rows")
    columns = resolved(x, columns)
    live = columns.live.rows if columns.live is not None else None
    graphs = any(t is not None and t.requires_grad for t in (x, columns.own, live, threshold))
    keep = torch.is_grad_enabled() and (graphs or columns.sink is not None)
    wants = keep and x.requires_grad, keep and columns.sink is not None
    operands = Operands(precision, x.dtype, x.device)
    store = int(store_mb * 2**20)
    return _Head.apply(x, columns.own, live, columns, scale, negatives, operands, (block, tiles), store, wants, threshold)
