"""Pictures of rendered people: geometry, rasterisation, shading, anti-aliasing, degradation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from protomem.data.faces import appearance as look
from protomem.data.faces import geometry, hair
from protomem.data.faces.degrade import degrade, quality
from protomem.data.faces.hashing import snap
from protomem.data.faces.head import EYE, MASKS, load_head
from protomem.data.faces.identity import identity_parameters
from protomem.data.faces.raster import Fragments, rasterise
from protomem.data.faces.scene import DEGRADATIONS, ImageOptions, scene_parameters

RENDERER = 1  # counts up whenever a pixel changes: cached sets of another number are rendered again
_CHUNK_CPU, _CHUNK_GPU = 16, 64  # pictures at a time; on the CPU the intermediate tensors should stay in the cache
_SAMPLED = [0, 1, 2, 3 + MASKS.index("lips"), 3 + MASKS.index("lash")]  # rows of the static table, per sample
_LOOK = (
    "texture",
    "skin",
    "lip",
    "lip_strength",
    "lash",
    "hair",
    "brow_colour",
    "brow",
    "iris",
    "mole_x",
    "mole_y",
    "mole_size",
    "any_mole",
    "freckles",
    "lines",
    "beard",
    "bearded",
    "frame_colour",
    "fade",
    "ragged",
)


def render_faces(
    identities: np.ndarray,
    images: np.ndarray,
    *,
    seed: int = 0,
    size: int = 112,
    spread: float = 0.35,
    device: torch.device | str = "cpu",
    options: ImageOptions = ImageOptions(),
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Draw picture `images[i]` of person `identities[i]`: uint8 [n, size, size, 3] RGB on the CPU, aligned to the
    ArcFace template, and the truth about each picture.

    A pure function of (seed, identity, image, size, spread, options): not of the batch, the order or the threads. The
    arithmetic is arranged so that every machine should give the same pixels. It is not so yet: an AMD EPYC and an Intel
    Xeon differ in a few (a test holds both hashes), the cause is not found, and no GPU was measured. identities and images are integers [n]; `size` is a multiple of 16.
    The truth is a dict of float32 [n]: `quality` in 0..1 (1 = clean; degrade.quality), `yaw` and `pitch` in degrees,
    and the severity in 0..1 of each degradation: blur, downsample, noise, occlusion, compression, low_light."""
    identities, images = np.atleast_1d(identities).astype(np.int64), np.atleast_1d(images).astype(np.int64)
    if identities.shape != images.shape or identities.ndim != 1:
        raise ValueError(f"identities {identities.shape} and images {images.shape} must be one list each, equally long")
    if size % 16 or size < 32:
        raise ValueError(f"size {size} must be a multiple of 16, at least 32")
    if not len(images):
        names = ("quality", "yaw", "pitch", *DEGRADATIONS)
        return torch.zeros(0, size, size, 3, dtype=torch.uint8), {name: np.zeros(0, np.float32) for name in names}
    device = torch.device(device)
    people, which = np.unique(identities, return_inverse=True)
    person = _people(seed, people, spread)
    scenes = scene_parameters(load_head(), seed, identities, images, options)
    chunk = _CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            of_picture = {name: value[which[rows]] for name, value in person.items()}
            parts.append(_draw(of_picture, {name: value[rows] for name, value in scenes.items()}, size, device))
    severities = scenes["severities"]
    truth = {"quality": quality(severities), "yaw": scenes["yaw"], "pitch": scenes["pitch"]}
    truth |= {name: severities[:, k] for k, name in enumerate(DEGRADATIONS)}
    return torch.cat(parts), {name: value.astype(np.float32) for name, value in truth.items()}


def _people(seed: int, people: np.ndarray, spread: float) -> dict[str, np.ndarray]:
    head = load_head()
    person = identity_parameters(head, seed, people, spread)
    person |= geometry.hair_shells(seed, people, person)
    person["mole_x"], person["mole_y"], person["mole_size"] = person["moles"].transpose(2, 0, 1)
    person["any_mole"] = person["mole_size"].max(1)
    person["bearded"] = person["beard"][:, :3].max(1)
    person["exact"] = head.exact(person["weights"]).t().contiguous().numpy()
    return person


def _draw(person: dict[str, np.ndarray], scene: dict[str, np.ndarray], size: int, device: torch.device) -> torch.Tensor:
    tables = _tables(str(device))
    samples = size * 3 // 2
    neutral = torch.from_numpy(person["exact"]).to(device).t().contiguous()
    solid, shell = geometry.build(load_head(), neutral, person, scene, samples, tables)
    values = {name: person[name] for name in _LOOK} | _light(scene)
    values = {name: torch.from_numpy(value.astype(np.float32)).to(device) for name, value in values.items()}
    canvas = (
        _backdrop(scene, size, device)[..., _nearest(size, device), :][..., _nearest(size, device)]
        .contiguous()
        .view(3, -1)
    )
    depth = torch.full(canvas.shape[1:], -1e9, device=device)
    _paint_head(canvas, depth, solid, tables, values, _vertex_look(tables, person, device), samples)
    _paint_hair(canvas, depth, shell, tables, values, samples)
    p = _reduce(canvas.view(3, -1, samples, samples))
    exposure = torch.from_numpy((scene["exposure"] * (1 / 9)).astype(np.float32)).to(device)
    linear = (p * exposure[:, None, None]).clamp(0, 1).permute(1, 0, 2, 3)
    pixels = degrade(linear, scene["severities"], scene["degrade_key"])
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def _nearest(size: int, device: torch.device) -> torch.Tensor:
    return torch.arange(size * 3 // 2, device=device) * 2 // 3


def _reduce(p: torch.Tensor) -> torch.Tensor:
    """9 times the mean of 3/2 x 3/2 samples, along rows and columns: [..., 3 k, 3 k] -> [..., 2 k, 2 k]."""
    for _ in range(2):  # filter the rows, turn the picture, filter what were its columns, turn it back
        a, b, c = p[..., 0::3, :], p[..., 1::3, :], p[..., 2::3, :]
        p = torch.stack((a + a + b, b + (c + c)), -2).flatten(-3, -2).transpose(-1, -2)
    return p


@lru_cache(maxsize=4)
def _tables(device: str) -> dict[str, torch.Tensor]:
    """What no person changes. The solid mesh is the head followed by the glasses."""
    head, guides = load_head(), hair.load_guides()
    v = len(head.vertices)
    frame = hair.frame_triangles() + v
    material = np.concatenate([head.material, np.full(len(frame), look.FRAME)])
    static = np.zeros((int(frame.max()) + 1, 3 + len(MASKS)), np.float32)
    static[:v] = np.concatenate([head.vertices, head.masks], 1)
    static[v:, 3 + MASKS.index("occlusion")] = 1
    column, row = np.divmod(np.arange(hair.COLUMNS * hair.ROWS), hair.ROWS)
    out = {
        "triangles": np.concatenate([head.triangles, frame]),
        "material": material,
        "two_sided": material == look.FRAME,
        "static": np.ascontiguousarray(static.T),
        "vertices": head.vertices,
        "fields": look.vertex_fields(head),
        "column": guides.column,
        "scalp": look.scalp_mask(head),
        "shell": guides.triangles,
        # further up, the head hides the inside of the shell
        "shell_inside": guides.triangles[row[guides.triangles].min(1) >= hair.ROWS // 3][:, ::-1].copy(),
        "strand": np.stack([column, row / (hair.ROWS - 1)]).astype(np.float32),
    }
    return {name: torch.from_numpy(value).to(device) for name, value in out.items()}


def _vertex_look(tables, person, device) -> torch.Tensor:
    """float32 [5, n, V of the solid mesh]: skin colour (3), painted scalp hair, openness to the sky."""
    fields, static = tables["fields"], tables["static"]
    glasses = static.shape[1] - len(fields)

    def to(name: str) -> torch.Tensor:
        return torch.from_numpy(person[name]).to(device)

    tone, redness = (torch.matmul(fields, to(k).t()) for k in ("tone", "redness"))
    # products summed in another order agree after this
    tone, redness = (torch.round(v * 65536) * 2.0**-16 for v in (tone, redness))
    lids, mouth, sky = (
        static[3 + MASKS.index(k), : len(fields), None].double() for k in ("eyelids", "inside-mouth", "occlusion")
    )
    tone = (1 + tone) * (1 - to("lid") * lids) * (1 - 0.8 * mouth)
    skin = to("skin")
    shift = (1 + 0.35 * redness, 1 - redness, 1 - 0.9 * redness)
    column = tables["column"].clamp(0, hair.COLUMNS - 1.001)
    low = column.to(torch.int64)
    share = (column - low)[:, None]
    line, ends = (v[low] + (v[low + 1] - v[low]) * share for v in (to("line").t(), to("ends").t()))
    y, scalp = tables["vertices"][:, 1:2], tables["scalp"][:, None]
    painted = look.ramp((y - line) * 9 + 0.3) * scalp * to("painted")
    under = look.ramp((y - ends) * 5 + 1.0) * look.ramp((8.4 - ends) * 9) * scalp  # shadow below the ends of the hair
    out = torch.stack([skin[:, c] * tone * shift[c] for c in range(3)] + [painted, sky * (1 - 0.45 * under)])
    out = torch.nn.functional.pad(out, (0, 0, 0, glasses))
    out[4, len(fields) :] = 1
    return out.to(torch.float32).transpose(1, 2).contiguous()


def _interpolate(weights, corners: list[torch.Tensor], rows) -> torch.Tensor:
    """rows: tensors [R] -> their values at the samples, [len(rows), N]; corners: three index tensors [N] into R."""
    out = torch.empty(len(rows), len(corners[0]), device=corners[0].device)
    for k, row in enumerate(rows):
        a, b, c = (row.index_select(0, i) * w for i, w in zip(corners, weights))
        torch.add(a + b, c, out=out[k])
    return out


def _corners(seen: Fragments, triangles: torch.Tensor) -> list[torch.Tensor]:
    return [c.contiguous().index_select(0, seen.triangle) for c in triangles.unbind(1)]


def _paint_head(canvas, depth, mesh, tables, values, vertex_look, samples) -> None:
    seen = rasterise(mesh.x, mesh.y, mesh.z, tables["triangles"], tables["two_sided"], samples)
    s = look.Samples(values, torch.div(seen.sample, samples * samples, rounding_mode="floor"))
    corners = _corners(seen, tables["triangles"])
    static = _interpolate(seen.weights, corners, [tables["static"][k] for k in _SAMPLED])
    corners = [c + s.image * len(mesh.z) for c in corners]
    normal = _interpolate(seen.weights, corners, mesh.normal.flatten(1))
    moving = _interpolate(seen.weights, corners, vertex_look.flatten(1))
    material = tables["material"].index_select(0, seen.triangle)
    colour = look.face_albedo(s, static[:3], moving[:3], static[3], static[4], moving[3], material)
    sharp = ((material == EYE) | (material == look.FRAME)).to(torch.float32)
    open_ = moving[4] + (1 - moving[4]) * 0.75 * sharp
    shine = (0.07 + 0.63 * sharp) * open_ * (1 - moving[3])
    canvas.index_copy_(1, seen.sample, look.shade(s, colour, normal, open_, shine, sharp))
    depth.index_copy_(0, seen.sample, seen.depth)


def _paint_hair(canvas, depth, mesh, tables, values, samples) -> None:
    """The far side of the shell (seen from inside, below the head), then the near side."""
    one_sided = torch.zeros(1, dtype=torch.bool, device=depth.device)
    for triangles in (tables["shell_inside"], tables["shell"]):
        seen = rasterise(mesh.x, mesh.y, mesh.z, triangles, one_sided, samples, depth)
        s = look.Samples(values, torch.div(seen.sample, samples * samples, rounding_mode="floor"))
        corners = _corners(seen, triangles)
        column, along = _interpolate(seen.weights, corners, tables["strand"])
        normal = _interpolate(seen.weights, [c + s.image * len(mesh.z) for c in corners], mesh.normal.flatten(1))
        colour, cover, open_, shine = look.hair_look(s, column, along)
        lit = look.shade(s, colour, normal, open_, shine)
        canvas.index_copy_(1, seen.sample, look.blend(canvas.index_select(1, seen.sample), lit, cover))


def _light(scene) -> dict[str, np.ndarray]:
    a, e = np.radians(scene["azimuth"]), np.radians(scene["elevation"])
    direction = np.stack([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], 1)
    direction = snap(direction * np.where(direction[:, 2:] < 0.1, [1, 1, -1], 1))  # never from behind
    half = direction + [0, 0, 1]
    half = snap(half / np.sqrt(half[:, :1] ** 2 + half[:, 1:2] ** 2 + half[:, 2:] ** 2))
    warm = 0.045 * scene["warmth"][:, None]
    return {
        "direction": direction,
        "half": half,
        "ambient": scene["ambient"],
        "key": 1.12 - scene["ambient"],
        "tint": 1 + warm * [1, 0, -1],
    }


def _backdrop(scene, size, device) -> torch.Tensor:
    """Linear light [3, n, size, size]: an out-of-focus surrounding, smooth noise around a muted colour."""
    b = torch.from_numpy(scene["backdrop"].astype(np.float32)).to(device)[:, :, None, None]
    level, contrast, coarse, fine = 0.12 + 0.7 * b[:, 0], 0.1 + 0.5 * b[:, 1], 1.5 + 2 * b[:, 2], 4 + 6 * b[:, 3]
    du, dv = torch.floor(b[:, 4] * 4096), torch.floor(b[:, 5] * 4096)
    t = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) * (1 / size)
    u, v = (w.expand(len(b), size, size) for w in (t, t[:, None]))
    waves, tint = (look.noise(coarse * u + (du + k), coarse * v + dv) - 0.5 for k in (0, 17))
    value = waves + 0.3 * (look.noise(fine * u + dv, fine * v + du) - 0.5)
    out = []
    for c, share in enumerate((0.2, -0.05, -0.2)):
        hue = 1 + 0.22 * (b[:, 6 + c] - 0.5)
        channel = (level * hue + contrast * (value + share * tint)).clamp(0.08, 0.97)
        out.append(channel * channel)
    return torch.stack(out)
