"""Hair and glasses: small meshes built around the head, bound to it so that they follow each person's shape.

Hair is one shell of columns that run from the crown downwards, along the scalp as far as the level of the brows; below
it they follow the head (`hang` 0) or fall straight (`hang` 1). A style is the level `ends` at which each column stops,
the thickness of the shell there, and `hang`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from protomem.data.faces.hashing import snap
from protomem.data.faces.head import SKIN, Head, load_head
from protomem.data.faces.identity import STYLES

COLUMNS, ROWS = 72, 15
_ARC, _DROP = 24, 16  # guide points along the scalp and below it
_CENTRE = np.array([0.0, 7.6, 0.5])
_FLOOR = 5.8  # where the longest hair ends
AZIMUTH = np.linspace(-np.pi, np.pi, COLUMNS)  # 0 = front, positive = the person's left; the first and last column meet
_DEGREES = np.abs(np.degrees(AZIMUTH))
_STYLE = {name: i for i, name in enumerate(STYLES)}


class Guides:
    """`points` (that follow the head), `straight`, `outward` [COLUMNS, _ARC + _DROP, 3]; `bound` int64, the same
    grid: the vertex that each point follows; `column` [V]: azimuth of each head vertex in columns; `triangles` of the
    shell."""

    def __init__(self, head: Head) -> None:
        v = head.vertices
        scalp = np.unique(head.triangles[head.material == SKIN])
        scalp = scalp[(v[scalp, 1] > 7.35) & (v[scalp, 2] > -0.6) & (head.masks[scalp, 2] < 0.1)]
        offset = v[scalp] - _CENTRE
        radius = np.sqrt((offset**2).sum(1))
        elevation = np.radians(np.linspace(90, 0, _ARC))
        flat = np.stack([np.sin(AZIMUTH), np.zeros(COLUMNS), np.cos(AZIMUTH)], 1)
        direction = np.cos(elevation)[None, :, None] * flat[:, None] + np.sin(elevation)[None, :, None] * [0, 1.0, 0]
        cosine = direction @ (offset / radius[:, None]).T
        weight = np.exp(260 * (cosine - cosine.max(-1, keepdims=True)))
        arc = _CENTRE + direction * ((weight * radius).sum(-1) / weight.sum(-1))[..., None]
        drop = np.repeat(arc[:, -1:], _DROP, 1)
        top = arc[:, -1:, 1]
        drop[:, :, 1] = top + (_FLOOR - top) * np.linspace(0, 1, _DROP + 1)[1:]
        self.straight = snap(np.concatenate([arc, drop], 1))
        close = drop.copy()
        close[:, :, [0, 2]] = _CENTRE[[0, 2]] + flat[:, None, [0, 2]] * _girth(head, drop[:, :, 1])[..., None]
        self.points = snap(np.concatenate([arc, close], 1))
        self.outward = snap(np.concatenate([direction, np.repeat(flat[:, None], _DROP, 1)], 1))
        bound = scalp[snap(cosine, 2.0**-30).argmax(-1)]  # snapped: mirrored vertices tie everywhere or nowhere
        self.bound = np.concatenate([bound, np.repeat(bound[:, -1:], _DROP, 1)], 1)
        around = np.arctan2(v[:, 0], v[:, 2] - _CENTRE[2])
        self.column = snap((around + np.pi) / (2 * np.pi) * (COLUMNS - 1))
        q = np.arange(COLUMNS * ROWS).reshape(COLUMNS, ROWS)
        a, b, c, d = (p.reshape(-1) for p in (q[:-1, :-1], q[1:, :-1], q[:-1, 1:], q[1:, 1:]))
        self.triangles = np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def _girth(head: Head, level: np.ndarray) -> np.ndarray:
    """Horizontal distance [COLUMNS, rows] from the axis to the skin without ears, at each column's azimuth."""
    v = head.vertices[head.skin_vertices]
    v = v[(head.masks[head.skin_vertices, 2] < 0.1) & (v[:, 1] < 7.9)]
    radius = np.hypot(v[:, 0], v[:, 2] - _CENTRE[2])
    outer = radius > 0.3  # not the inside of the mouth
    v, radius = v[outer], radius[outer]
    turn = AZIMUTH[:, None] - np.arctan2(v[:, 0], v[:, 2] - _CENTRE[2])
    near = np.sin(0.5 * turn)[:, None] ** 2 / 0.004 + ((level[..., None] - v[:, 1]) / 0.08) ** 2
    weight = np.exp(-near + near.min(-1, keepdims=True))
    return (weight * radius).sum(-1) / weight.sum(-1)


@lru_cache(maxsize=1)
def load_guides() -> Guides:
    return Guides(load_head())


def _front(low: float, high: float) -> np.ndarray:
    """1 for columns nearer the front than `low` degrees, falling to 0 at `high`."""
    t = np.clip((high - _DEGREES) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def hairline(person: dict[str, np.ndarray]) -> np.ndarray:
    """Level [n, COLUMNS] below which the scalp is bare: forehead, receding temples, sideburns, above the ears, nape."""
    top, recede, peak, sideburn = (person["hairline"][:, k : k + 1] for k in range(4))
    side = np.sin(np.clip((_DEGREES - 12) / 40, 0, 1) * np.pi / 2)
    level = top - peak * _front(4, 14) + recede * side * _front(44, 62) + 0.05 * _front(20, 45)
    front = _front(50, 68)
    ear = np.clip(1 - np.abs(_DEGREES - 84) / 22, 0, 1)
    back = 6.75 + (7.42 - 6.75) * np.minimum(1, ear * 2.5)
    before_ear = np.clip(1 - np.abs(_DEGREES - 60) / 9, 0, 1)
    back = back * (1 - before_ear) + np.minimum(sideburn, back) * before_ear
    return snap(level * front + back * (1 - front))


def style_shell(
    person: dict[str, np.ndarray], line: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Ends [n, COLUMNS] and thickness [n, COLUMNS, 2] (at the crown, at the end) of the shell in dm, `hang`
    [n, COLUMNS], and [n] each: `fade` (share of the length over which the ends thin out), `ragged`, `lumps` (dm)."""
    n = len(line)
    style, s = person["style"][:, None], person["style_shape"]
    ends, fade = line.copy(), np.full((n, 1), 0.12)
    ragged, lumps = np.full((n, 1), 0.25), np.full((n, 1), 0.008)
    crown, end = np.full((n, 1), 0.03), np.full((n, COLUMNS), 0.012)
    s = [s[:, k : k + 1] for k in range(s.shape[1])]
    signed = np.degrees(AZIMUTH) * np.where(s[0] < 0.5, 1, -1)

    def use(name: str, **values) -> None:
        nonlocal ends, fade, ragged, lumps, crown, end
        here = style == _STYLE[name]
        ends = np.where(here, values.get("ends", ends), ends)
        fade = np.where(here, values.get("fade", fade), fade)
        ragged = np.where(here, values.get("ragged", ragged), ragged)
        lumps = np.where(here, values.get("lumps", lumps), lumps)
        crown = np.where(here, values["crown"], crown)
        end = np.where(here, values["end"], end)

    front, face = _front(40, 58), _front(56, 70)
    bare = np.full((1, COLUMNS), 8.6)
    use("none", ends=bare, crown=0.0, end=-0.05)
    use("cropped", crown=0.025, end=0.012, ragged=0.5)
    use("short", crown=0.1 + 0.14 * s[1], end=0.03 + 0.05 * s[2] + 0.06 * s[3] * _front(30, 60), ragged=0.5)
    bangs = np.minimum(line, 7.58 + 0.2 * s[1] + 0.06 * s[2] * np.abs(signed) / 40)
    use(
        "fringe",
        ends=bangs * front + (line - 0.12 * s[3]) * (1 - front),
        crown=0.1 + 0.1 * s[4],
        end=0.05,
        fade=0.18,
        ragged=0.6,
    )
    sweep = np.minimum(line, 7.62 + 0.3 * s[1] + 0.006 * (signed + 40))
    use(
        "swept",
        ends=sweep * front + (line - 0.08 * s[3]) * (1 - front),
        crown=0.12 + 0.1 * s[4],
        end=0.07,
        fade=0.15,
        ragged=0.4,
    )
    volume = 0.1 + 0.28 * s[1]
    use(
        "curls",
        ends=line - 0.05 - 0.5 * s[2] * (1 - face),
        crown=volume,
        end=0.5 * volume * (1 - 0.6 * front),
        fade=0.1,
        ragged=0.9,
        lumps=0.07,
    )
    # long styles part the hair from the forehead outwards, with or without a fringe
    fringe = np.where(s[5] < 0.3, np.minimum(line, 7.6 + 0.12 * s[1]), line - 0.02)
    curtain = np.where(s[5] > 0.65, line - 0.5 * s[6] * np.clip(_DEGREES / 50, 0, 1) ** 2, fringe)
    body = 0.12 + 0.1 * s[4] + 0.04 * s[7] * np.ones((1, COLUMNS))
    use(
        "bob",
        ends=curtain * face + (6.25 + 0.45 * s[2]) * (1 - face),
        crown=0.1 + 0.1 * s[3],
        end=body * (1 - 0.7 * face),
        fade=0.1,
        ragged=0.3,
        lumps=0.012 + 0.03 * (s[8] > 0.7),
    )
    use(
        "long",
        ends=curtain * face + 5.9 * (1 - face),
        crown=0.08 + 0.1 * s[3],
        end=body * (1 - 0.7 * face),
        fade=0.08,
        ragged=0.3,
        lumps=0.012 + 0.04 * (s[8] > 0.6),
    )
    use("tied", crown=0.05 + 0.06 * s[1], end=0.02, fade=0.1, ragged=0.2)
    thickness = np.stack([np.broadcast_to(crown, ends.shape), np.broadcast_to(end, ends.shape)], 2)
    hang = ((style == _STYLE["bob"]) | (style == _STYLE["long"])) * (1 - face)
    return (
        snap(ends),
        snap(thickness),
        {"hang": snap(hang), "fade": fade[:, 0], "ragged": ragged[:, 0], "lumps": lumps[:, 0]},
    )


def shell_template(
    guides: Guides,
    ends: np.ndarray,
    thickness: np.ndarray,
    hang: np.ndarray,
    lumps: np.ndarray,
    bumps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shell points on the base head [n, COLUMNS, ROWS, 3] and the two bound vertices of each with the second's share.
    `bumps` [n, COLUMNS, ROWS] in -1..1 displaces the surface by `lumps` dm."""
    y = guides.points[:, :, 1]
    # where on its column does the level `ends` lie? y falls monotonically along a column
    steps = np.clip((y[None, :, :-1] - ends[:, :, None]) / (y[None, :, :-1] - y[None, :, 1:]), 0, 1)
    last = np.zeros(ends.shape)
    for k in range(steps.shape[2]):
        last = last + steps[:, :, k]
    t = np.arange(ROWS) / (ROWS - 1)
    at = snap(last[:, :, None] * t)
    low = np.minimum(at.astype(np.int64), y.shape[1] - 2)
    share = at - low
    column = np.arange(COLUMNS)[None, :, None]

    def along(grid: np.ndarray) -> np.ndarray:
        return grid[column, low] * (1 - share[..., None]) + grid[column, low + 1] * share[..., None]

    hang = hang[:, :, None, None]
    point = along(guides.points) * (1 - hang) + along(guides.straight) * hang
    thick = thickness[:, :, :1] + (thickness[:, :, 1:] - thickness[:, :, :1]) * (t * t * t)
    taper = 1 - t**4 * (1 - 0.7 * hang[..., 0])  # ends lie on the skin unless they hang freely
    thick = thick * taper + lumps[:, None, None] * bumps
    return (
        point + along(guides.outward) * thick[..., None],
        guides.bound[column, low],
        guides.bound[column, low + 1],
        share,
    )


LENS = 20  # points around a lens
_FRAME_POINTS = 2 * LENS * 2 + 4 + 8


def frame_triangles() -> np.ndarray:
    """Two rims of 2 x LENS points (inner, outer), a bridge of 4 and two temples of 4."""
    tri = []
    for lens in range(2):
        k = np.arange(LENS)
        inner, outer = lens * 2 * LENS + k, lens * 2 * LENS + LENS + k
        nxt = (k + 1) % LENS
        tri += [np.stack([inner, outer, inner[nxt]], 1), np.stack([inner[nxt], outer, outer[nxt]], 1)]
    for start in range(4 * LENS, _FRAME_POINTS, 4):
        tri.append(np.array([[start, start + 1, start + 2], [start + 2, start + 1, start + 3]]))
    return np.concatenate(tri)


def frame_points(frame: np.ndarray, left: np.ndarray, right: np.ndarray, nose: np.ndarray) -> np.ndarray:
    """Glasses [n, points, 3] in front of the eye centres [n, 3]; `frame` [n, 4]: width, height, squareness, rim."""
    n = len(frame)
    width, height, square, rim = frame.T
    angle = np.arange(LENS) / LENS * 2 * np.pi
    ca, sa = np.cos(angle), np.sin(angle)
    power = (0.55 + 0.45 * (1 - square))[:, None]
    ex = snap(np.sign(ca) * np.abs(ca) ** power)
    ey = snap(np.sign(sa) * np.abs(sa) ** power)
    rx, ry = 0.5 * 0.46 * width, 0.5 * 0.36 * height
    level = 0.5 * (left[:, 1] + right[:, 1]) - 0.02
    depth = np.maximum(nose[:, 2] - 0.1, np.maximum(left[:, 2], right[:, 2]) + 0.3)
    points = np.zeros((n, _FRAME_POINTS, 3))
    for lens, (eye, sign) in enumerate(((left, 1.0), (right, -1.0))):
        centre = sign * np.maximum(np.abs(eye[:, 0]), rx + 0.05)
        for ring in range(2):
            a, b = (rx + ring * rim)[:, None] * ex, (ry + ring * rim)[:, None] * ey
            p = points[:, (lens * 2 + ring) * LENS : (lens * 2 + ring + 1) * LENS]
            p[:, :, 0], p[:, :, 1] = centre[:, None] + a, level[:, None] + b
            p[:, :, 2] = depth[:, None] - 0.12 * p[:, :, 0] ** 2
        k = 4 * LENS + 4 + 4 * lens
        for j, (out, up) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1))):
            points[:, k + j, 0] = centre + sign * (rx + rim) if out == 0 else sign * 0.84
            points[:, k + j, 1] = level + 0.1 + 0.6 * rim * up
            points[:, k + j, 2] = depth - 0.12 * (np.abs(centre) + rx) ** 2 if out == 0 else 0.5
        inner = centre - sign * rx
        for j, up in enumerate((1, -1)):
            points[:, 4 * LENS + 2 * lens + j, 0] = inner
            points[:, 4 * LENS + 2 * lens + j, 1] = level + 0.06 + 0.7 * rim * up
            points[:, 4 * LENS + 2 * lens + j, 2] = depth
    return snap(points)
