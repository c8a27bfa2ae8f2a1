"""Colour of visible samples: skin, brows, lips, irises, beard, marks, hair, and their shading.

Only +, -, *, /, sqrt, comparisons and table look-ups are used, each its own elementwise operation, so that float32 should
give the same bits everywhere (see `render_faces` about where it does not yet). Colours are [3, N]; sRGB is approximated by its square root law (linear = sRGB squared).
Suffix legend: `N` samples, `n` pictures. Lengths in dm of the base head.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from protomem.data.faces.hashing import key, normal, snap, uniform
from protomem.data.faces.head import EYE, MASKS, SKIN, TEETH, TONGUE, Head

FRAME = 6  # material of glasses, after those of the head
_TABLE = 256


@lru_cache(maxsize=4)
def _noise_table(device: str) -> torch.Tensor:
    values = uniform(key(0, "noise table"), _TABLE * _TABLE)[0]
    return torch.from_numpy(values.astype(np.float32)).to(device)


def noise(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Smooth value noise in [0, 1), period 256 in both coordinates; u and v of one shape."""
    table = _noise_table(str(u.device))
    shape, u, v = u.shape, u.reshape(-1), v.reshape(-1)
    fu, fv = torch.floor(u), torch.floor(v)
    du, dv = u - fu, v - fv
    du, dv = du * du * (3 - 2 * du), dv * dv * (3 - 2 * dv)
    i0, j0 = fu.to(torch.int32) & 255, (fv.to(torch.int32) & 255) << 8
    i1, j1 = (i0 + 1) & 255, (j0 + 256) & 65535
    a, b = table.index_select(0, j0 + i0), table.index_select(0, j0 + i1)
    low = a + (b - a) * du
    a, b = table.index_select(0, j1 + i0), table.index_select(0, j1 + i1)
    high = a + (b - a) * du
    return (low + (high - low) * dv).view(shape)


def ramp(t: torch.Tensor) -> torch.Tensor:
    """0 below 0, 1 above 1, smooth between."""
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


def bump(t: torch.Tensor) -> torch.Tensor:
    """About exp(-t) for t >= 0, and exactly 0 from t = 4."""
    t = (1 - 0.25 * t).clamp(0, 1)
    t = t * t
    return t * t


def blend(colour: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return colour + (other - colour) * share


def vertex_fields(head: Head) -> np.ndarray:
    """[V, 16]: twelve smooth random fields over the head, then eye shadow, forehead, cheeks, nose (all in 0..1)."""
    x, y, z = head.vertices.T
    direction = normal(key(0, "field direction", np.arange(12)), 3) * np.linspace(2.5, 8, 12)[:, None]
    phase = uniform(key(0, "field phase", np.arange(12)), 1)[:, 0] * 2 * np.pi
    waves = np.sin(head.vertices @ direction.T + phase)
    ax, front = np.abs(x), z > 0.9
    regions = [
        np.exp(-((ax - 0.31) ** 2) / 0.03 - (y - 7.14) ** 2 / 0.006) * front,
        np.clip((y - 7.55) / 0.2, 0, 1) * front,
        np.exp(-((ax - 0.45) ** 2 + (y - 6.95) ** 2) / 0.035) * front,
        np.exp(-(ax**2 + (y - 6.9) ** 2) / 0.02) * (z > 1.3),
    ]
    return snap(np.concatenate([waves, np.stack(regions, 1)], 1))


def scalp_mask(head: Head) -> np.ndarray:
    """[V] 1 on the skin where hair can be painted: the head without the ears and the throat."""
    y, z = head.vertices[:, 1], head.vertices[:, 2]
    ears = head.masks[:, MASKS.index("ears")].astype(np.float64)
    return snap((1 - ears) * np.clip((y - 6.3) / 0.3, 0, 1) * ((z < 0.75) | (y > 7.3)))


class Samples:
    """Visible samples with their person's parameters at hand: `s("skin")` is [N] or [3, N], `s.only(where)` a subset.

    people: tensors [n] or [n, k]; image int64 [N]."""

    def __init__(self, people: dict[str, torch.Tensor], image: torch.Tensor) -> None:
        self.people, self.image = people, image

    def __call__(self, name: str) -> torch.Tensor:
        value = self.people[name]
        return (
            value.index_select(0, self.image)
            if value.ndim == 1
            else torch.stack([c.contiguous().index_select(0, self.image) for c in value.unbind(1)])
        )

    def having(self, name: str, region: torch.Tensor) -> torch.Tensor:
        """Indices of the samples in `region` (bool [N]) whose person has a positive value of `name`."""
        where = region.nonzero().squeeze(1)
        return where.index_select(0, (self.only(where)(name) > 0).nonzero().squeeze(1))

    def only(self, where: torch.Tensor) -> Samples:
        return Samples(self.people, self.image.index_select(0, where))


def _select(where: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    return [v.index_select(-1, where) for v in values]


def face_albedo(
    s: Samples,
    place: torch.Tensor,
    skin: torch.Tensor,
    lips: torch.Tensor,
    lash: torch.Tensor,
    scalp: torch.Tensor,
    material: torch.Tensor,
) -> torch.Tensor:
    """sRGB [3, N] of the samples of head and glasses.

    place [3, N]: position on the base head; skin [3, N]: colour of the bare skin; lips, lash, scalp [N]: shares of lip,
    lash line and painted hair; material int64 [N]."""
    x, y, z = place
    ax = x.abs()
    tu, tv = s("texture")
    colour = skin * (1 + 0.07 * (noise((x + 0.5 * z) * 16 + tu, (y + 0.3 * z) * 16 + tv) - 0.5))
    front = z > 0.8
    _freckles_and_lines(s, x, ax, y, z, colour)
    _moles(s, s.having("any_mole", front & (y > 6.35) & (y < 7.95)), x, y, colour)
    _beard(s, (y < 7.3) & (y > 5.95) & (z > 0.5), x, ax, y, z, lips, colour)
    where = (lips > 0).nonzero().squeeze(1)
    t, share = s.only(where), ramp(lips.index_select(0, where) * 1.3)
    colour.index_copy_(1, where, blend(colour.index_select(1, where), t("lip"), share * t("lip_strength")))
    _brows(s, (front & (y > 7.3) & (y < 7.8) & (ax > 0.06) & (ax < 0.66)).nonzero().squeeze(1), ax, y, colour)
    where = (scalp > 0).nonzero().squeeze(1)
    t, (hx, hz, share) = s.only(where), _select(where, x, z, scalp)
    tu, tv = t("texture")
    hair = t("hair") * (0.75 + 0.4 * noise(hx * 40 + tu, hz * 12 + tv))
    colour.index_copy_(1, where, blend(colour.index_select(1, where), hair, share))
    where = (lash > 0).nonzero().squeeze(1)
    dark = 1 - 0.6 * s.only(where)("lash") * lash.index_select(0, where)
    colour.index_copy_(1, where, colour.index_select(1, where) * dark)
    _other_materials(s, ax, y, material, colour)
    return colour


def _freckles_and_lines(s, x, ax, y, z, colour) -> None:
    where = s.having("freckles", (z > 0.9) & (y < 7.3) & (y > 6.6))
    t, (fx, fy) = s.only(where), _select(where, x, y)
    tu, tv = t("texture")
    spots = ramp((noise(fx * 42 + tv, fy * 42 + tu) - 0.66) * 5)
    region = ramp(2.2 - 4.5 * (fy - 7.0).abs() - 1.4 * fx.abs())
    colour.index_copy_(1, where, colour.index_select(1, where) * (1 - 0.42 * spots * region * t("freckles")))
    where = s.having("lines", (y > 7.56) & (z > 1.0) & (ax < 0.5))
    t, (fx, fy) = s.only(where), _select(where, ax, y)
    wave = (fy + 0.05 * fx * fx) * 9
    wave = (wave - torch.floor(wave) - 0.5).abs()
    fold = t("lines") * ramp(1 - wave * 6) * ramp(2 - fx * 4)
    colour.index_copy_(1, where, colour.index_select(1, where) * (1 - 0.3 * fold))


def _moles(s, where, x, y, colour) -> None:
    t, (px, py) = s.only(where), _select(where, x, y)
    dark = torch.zeros_like(px)
    for mx, my, size in zip(t("mole_x"), t("mole_y"), t("mole_size")):
        dx, dy = px - mx, py - my
        dark = torch.maximum(dark, ramp(1.6 - (dx * dx + dy * dy) / (size * size + 1e-9)))
    colour.index_copy_(1, where, colour.index_select(1, where) * (1 - 0.62 * dark))


def _beard(s, inside, x, ax, y, z, lips, colour) -> None:
    where = s.having("bearded", inside)
    t, (bx, sx, by, bz, lip) = s.only(where), _select(where, ax, x, y, z, lips)
    cheek, moustache, chin, line = t("beard")
    tu, tv = t("texture")
    strands = noise(sx * 64 + tu, by * 26 + bz * 18 + tv)
    border = 6.58 + 0.16 * line + 0.95 * (bx - 0.27).clamp(min=0) + 0.06 * (strands - 0.5)
    full = ramp((border - by) * 11) * ramp((by - 6.02) * 7) * ramp((bx - 0.2) * 7)
    lower = ramp((6.53 - by) * 10 + 0.3) * ramp((by - 6.05) * 8) * ramp((0.3 - bx) * 9)
    upper = ramp(1.35 - (by - 6.745 + 0.5 * bx * bx).abs() * 15) * ramp((0.31 - bx) * 9)
    side = ramp(1.3 - (bx - 0.28).abs() * 13) * ramp((6.74 - by) * 12) * ramp((by - 6.42) * 12)  # beside the mouth
    amount = torch.maximum(full * cheek, torch.maximum(lower * chin, upper * moustache))
    amount = torch.maximum(amount, side * torch.minimum(moustache, chin))
    amount = (amount * (0.8 + 0.4 * strands)).clamp(max=0.95) * (1 - ramp(lip * 1.5))
    hair = t("hair") * (0.7 + 0.5 * strands)
    colour.index_copy_(1, where, blend(colour.index_select(1, where), hair, amount))


def _brows(s, where, ax, y, colour) -> None:
    t, (bx, by) = s.only(where), _select(where, ax, y)
    thick, height, slope, curve, density, outer = t("brow")
    drop = (bx - 0.33).clamp(min=0)
    centre = 7.455 + height + slope * (bx.clamp(max=0.42) - 0.2) - curve * drop * drop
    d = (by - centre) / (thick * (1.15 - 0.75 * ramp((bx - 0.2) * 3)))
    tu, tv = t("texture")
    strands = noise(bx * 60 - by * 30 + tu, by * 34 + tv)
    amount = bump(d * d * 0.9) * ramp((bx - 0.085) * 14) * ramp((outer - bx) * 12)
    amount = (amount * density * (0.7 + 0.6 * strands)).clamp(max=0.97)
    colour.index_copy_(1, where, blend(colour.index_select(1, where), t("brow_colour"), amount))


def _other_materials(s, ax, y, material, colour) -> None:
    other = (material != SKIN).nonzero().squeeze(1)
    kind = material.index_select(0, other)
    eye = other.index_select(0, (kind == EYE).nonzero().squeeze(1))
    t, (dx, dy) = s.only(eye), _select(eye, ax, y)
    dx, dy = dx - 0.3078, dy - 7.284
    d = torch.sqrt(dx * dx + dy * dy)
    white = torch.tensor([[0.9], [0.87], [0.85]], device=colour.device)
    iris = blend(white, t("iris") * (0.75 + 5 * d), ramp((0.077 - d) * 160))
    iris = iris * (1 - 0.5 * ramp((d - 0.057) * 90) * ramp((0.08 - d) * 120))
    colour.index_copy_(1, eye, iris * (1 - 0.94 * ramp((0.033 - d) * 160)))
    for which, rgb in ((TEETH, (0.86, 0.83, 0.77)), (TONGUE, (0.6, 0.3, 0.3))):
        where = other.index_select(0, (kind == which).nonzero().squeeze(1))
        colour[:, where] = torch.tensor(rgb, device=colour.device)[:, None]
    where = other.index_select(0, (kind == FRAME).nonzero().squeeze(1))
    colour.index_copy_(1, where, s.only(where)("frame_colour"))


def hair_look(
    s: Samples, column: torch.Tensor, along: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sRGB [3, N], cover, openness and shine [N] of hair samples; column: 0..COLUMNS around the head, along: 0 at the
    crown, 1 at the ends."""
    tu, tv = s("texture")
    u, v = column * 2.2 + tu, along * 5 + tv
    locks, strands = noise(u, v), noise(u * 4, v * 1.5)
    cover = ramp((1 - along) / s("fade") - s("ragged") * 1.2 * (0.6 * locks + 0.4 * strands))
    colour = s("hair") * (0.62 + 0.35 * locks + 0.4 * strands)
    return colour, cover, 0.75 + 0.25 * locks, 0.02 + 0.12 * strands * locks


def shade(
    s: Samples,
    colour: torch.Tensor,
    normal_: torch.Tensor,
    open_: torch.Tensor,
    shine: torch.Tensor,
    sharp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear light [3, N] from sRGB albedo [3, N]: sky, a wrapped key light (warmer where it grazes), one highlight.

    normal_ [3, N] in camera space, turned towards the camera where needed; open_ [N] share of the sky not hidden;
    shine [N] strength of the highlight; sharp [N] 1 for a small highlight (eyes, glasses), 0 for a broad one."""
    nx, ny, nz = normal_
    scale = torch.copysign(1 / (torch.sqrt(nx * nx + ny * ny + nz * nz) + 1e-6), nz)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
    lx, ly, lz = s("direction")
    ndl = nx * lx + ny * ly + nz * lz
    hx, hy, hz = s("half")
    ndh = (nx * hx + ny * hy + nz * hz).clamp(min=0)
    p2 = ndh * ndh
    p8 = p2 * p2 * (p2 * p2)
    highlight = p8 * p8
    if sharp is not None:
        p32 = highlight * highlight
        highlight = highlight + (p32 * p32 - highlight) * sharp
    power = s("key") * (0.35 + 0.65 * open_)
    sky = s("ambient") * (0.8 + 0.2 * ny) * open_
    highlight = shine * highlight * power
    out = torch.empty_like(colour)
    for c, (wrap, tint) in enumerate(zip((0.36, 0.24, 0.2), s("tint"))):
        direct = (ndl * (1 / (1 + wrap)) + wrap / (1 + wrap)).clamp(min=0)
        out[c] = (colour[c] * colour[c] * (sky + power * direct) + highlight) * tint
    return out
