"""A batched z-buffer: all triangles of many pictures at once, with exact coverage.

Vertices arrive on a grid of 1/64 sample, so that "inside" is decided exactly; everything else is elementwise float
arithmetic (add, multiply, divide), which IEEE 754 fixes to the last bit. The result
does not depend on which pictures share the batch.
Triangles become rows, rows become spans of samples, and every sample bids for its cell of the depth buffer.
Arguments are vertex-major ([V, n]): gathering by vertex then copies contiguous rows. `M` triangles that face the
camera, `R` their rows, `S` samples in these, `N` visible samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SUBPIXEL = 64
_SHIFT = 6
_DEPTH_LEVELS = 2.0**14  # per dm
_EMPTY = torch.iinfo(torch.int64).min
# A sample that lies on an edge must count as inside although its position is the result of a division. Other samples
# are at least 2**-22 away from an edge.
_SLACK = 2.0**-24
_FAR = 1e9


class Fragments(NamedTuple):
    """The visible samples in ascending order. `sample` int64 [N] into n * size * size, `triangle` int64 [N],
    `weights` three float32 [N] barycentric weights, `depth` float32 [N]."""

    sample: torch.Tensor
    triangle: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    depth: torch.Tensor


def rasterise(
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    triangles: torch.Tensor,
    two_sided: torch.Tensor,
    size: int,
    nearer_than: torch.Tensor | None = None,
) -> Fragments:
    """x, y: int64 [V, n] in 1/64 samples, |x|, |y| <= 2**16, y downwards; z: float32 [V, n], larger is nearer;
    triangles int64 [T, 3]; two_sided bool [T] (the others are drawn only when they turn counter-clockwise on screen,
    as seen with y downwards); pictures of size x size samples; sample (i, j) lies at (j + 1/2, i + 1/2). An edge
    belongs to both of its triangles; of equally near samples the later triangle wins. `nearer_than`:
    float32 [n * size * size], depths behind which nothing is reported."""
    n = x.shape[1]
    front = _front_triangles(x, y, triangles, two_sided, size)
    x, y, z = (v.t().to(torch.float64).contiguous().view(-1) for v in (x, y, z))
    (ax, bx, cx), (ay, by, cy), (za, zb, zc) = ([v.index_select(0, c) for c in front.vertices] for v in (x, y, z))
    # edge k: f + dx * column + dy * row >= 0 inside, zero where the weight of vertex k is
    sign = front.sign
    dx = [sign * (by - cy), sign * (cy - ay), sign * (ay - by)]
    dy = [sign * (cx - bx), sign * (ax - cx), sign * (bx - ax)]
    half = SUBPIXEL // 2
    f = [p * (half - u) + q * (half - v) for p, q, u, v in zip(dx, dy, (bx, cx, ax), (by, cy, ay))]
    dx, dy = ([v * SUBPIXEL for v in d] for d in (dx, dy))
    top = front.top.to(torch.float64)
    f = [v + q * top for v, q in zip(f, dy)]  # rows count from the top of the triangle's box

    height = front.bottom - front.top
    of_row = torch.repeat_interleave(height)  # the triangle of each row, [R]
    row = _count(height, of_row)
    real_row = row.to(torch.float64)  # mixing integers into float arithmetic is slow
    low, high = _spans(f, dx, dy, of_row, real_row, size)
    length = (high - low).clamp_(min=0)
    of_sample = torch.repeat_interleave(length)  # the row of each sample, [S]
    step = _count(length, of_sample)
    line = (front.image * size + front.top).index_select(0, of_row) + row
    cell = (line * size + low).index_select(0, of_sample) + step
    # depth is a plane over the triangle, a line over the span
    plane = [((v0 * za + v1 * zb) + v2 * zc) / front.area for v0, v1, v2 in (f, dx, dy)]
    z0, z_dx, z_dy = (v.index_select(0, of_row) for v in plane)
    z0 = ((z0 + z_dy * real_row) + z_dx * low.to(torch.float64)).to(torch.float32)
    depth = z0.index_select(0, of_sample) + z_dx.to(torch.float32).index_select(0, of_sample) * step.to(torch.float32)
    bid = ((depth * _DEPTH_LEVELS).to(torch.int64) << 32) + torch.arange(len(cell), device=cell.device)
    buffer = torch.full((n * size * size,), _EMPTY, dtype=torch.int64, device=x.device)
    buffer.scatter_reduce_(0, cell, bid, "amax")

    covered = (buffer != _EMPTY).nonzero().squeeze(1)
    winner = buffer.index_select(0, covered) & 0xFFFFFFFF
    depth = depth.index_select(0, winner)
    if nearer_than is not None:
        seen = (depth > nearer_than.index_select(0, covered)).nonzero().squeeze(1)
        covered, winner, depth = (v.index_select(0, seen) for v in (covered, winner, depth))
    of_visible = of_sample.index_select(0, winner)
    row = real_row.index_select(0, of_visible)
    column = (low.index_select(0, of_visible) + step.index_select(0, winner)).to(torch.float64)
    which = of_row.index_select(0, of_visible)
    weights = []
    for k in range(2):
        v, p, q = ((d[k] / front.area).index_select(0, which) for d in (f, dx, dy))
        weights.append(((v + q * row) + p * column).to(torch.float32))
    weights.append((1 - weights[0]) - weights[1])
    return Fragments(covered, front.triangle.index_select(0, which), tuple(weights), depth)


def _spans(f, dx, dy, of_row, row, size) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last column [R] inside all three edges. A triangle has a left edge (dx > 0), a right edge, and
    a third that is either, or horizontal: then the box has dealt with it."""
    dx = torch.stack(dx)
    start, slope = -torch.stack(f) / dx, -torch.stack(dy) / dx
    left, right = (torch.where(d[0], 0, torch.where(d[1], 1, 2)) for d in (dx > 0, dx < 0))
    third = (3 - left - right)[None]
    kind, third_start, third_slope = (v.gather(0, third)[0] for v in (dx, start, slope))
    third_slope = torch.where(kind == 0, 0.0, third_slope).index_select(0, of_row) * row
    bounds = []
    for edge, mine, beyond in ((left, kind > 0, -_FAR), (right, kind < 0, _FAR)):
        one = (
            start.gather(0, edge[None])[0].index_select(0, of_row)
            + slope.gather(0, edge[None])[0].index_select(0, of_row) * row
        )
        bounds.append((one, torch.where(mine, third_start, beyond).index_select(0, of_row) + third_slope))
    low = torch.ceil(torch.maximum(*bounds[0]) - _SLACK).clamp_(0, size)
    high = torch.floor(torch.minimum(*bounds[1]) + _SLACK).clamp_(-1, size - 1) + 1
    return low.to(torch.int64), high.to(torch.int64)


class _Front(NamedTuple):
    """Triangles that may cover a sample: [M] each. `vertices`: three indices into flattened [n, V]; rows top <= row <
    bottom; twice the area in sub-samples (float64), and its sign on screen."""

    triangle: torch.Tensor
    image: torch.Tensor
    vertices: list[torch.Tensor]
    top: torch.Tensor
    bottom: torch.Tensor
    area: torch.Tensor
    sign: torch.Tensor


def _front_triangles(x, y, triangles, two_sided, size) -> _Front:
    x, y = x.to(torch.int32), y.to(torch.int32)
    (ax, bx, cx), (ay, by, cy) = ([v.index_select(0, c) for c in triangles.unbind(1)] for v in (x, y))
    half = SUBPIXEL // 2
    # first and one-past-last sample whose centre can lie inside
    left = ((torch.minimum(torch.minimum(ax, bx), cx) + (half - 1)) >> _SHIFT).clamp_(0, size)
    right = (((torch.maximum(torch.maximum(ax, bx), cx) - half) >> _SHIFT) + 1).clamp_(0, size)
    top = ((torch.minimum(torch.minimum(ay, by), cy) + (half - 1)) >> _SHIFT).clamp_(0, size)
    bottom = (((torch.maximum(torch.maximum(ay, by), cy) - half) >> _SHIFT) + 1).clamp_(0, size)
    # only the sign: float64 holds these products exactly, 32-bit integers would not
    ax, bx, ay, by = (v.to(torch.float64) for v in (ax, bx, ay, by))
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    drawn = (right > left) & (bottom > top) & ((area < 0) | (two_sided[:, None] & (area > 0)))
    # picture by picture from here on: what a picture's samples look up then lies close together in memory
    flat = drawn.t().reshape(-1).nonzero().squeeze(1)
    top, bottom, area = (v.t().reshape(-1).index_select(0, flat) for v in (top, bottom, area))
    image = torch.div(flat, len(triangles), rounding_mode="floor")
    triangle = flat - image * len(triangles)
    vertices = [c.index_select(0, triangle) + image * len(x) for c in triangles.unbind(1)]
    return _Front(triangle, image, vertices, top.to(torch.int64), bottom.to(torch.int64), area.abs(), torch.sign(area))


def _count(lengths: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """0, 1, ..., lengths[0] - 1, 0, 1, ..., lengths[1] - 1, ..."""
    start = torch.cumsum(lengths, 0) - lengths
    return torch.arange(len(owner), device=owner.device) - start.index_select(0, owner)
