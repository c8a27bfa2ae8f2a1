"""Image degradations with a known severity, and the one quality number that follows from them.

Severities are in 0..1, columns as scene.DEGRADATIONS. In the order of the physical chain: occlusion, low light, blur,
down-sampling, sensor noise, compression. Pictures are linear light on entry and 8-bit sRGB on exit; integer weights
below 2**24 (or an explicit order of operations) are there to keep every pixel the same everywhere.
"""

from __future__ import annotations

import numpy as np
import torch

from protomem.data.faces.hashing import bits, key, snap, uniform

# What the worst case of each costs, as a share of the quality that the others leave (our default, by eye)
_COST = np.array([0.75, 0.8, 0.5, 0.6, 0.55, 0.6])
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA = np.full((8, 8), 99)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def quality(severities: np.ndarray) -> np.ndarray:
    """quality = prod over degradations of (1 - cost * severity), float64 [n] from severities [n, 6]: 1 if clean, and
    falling strictly with every severity, 0.0018 when all are at their worst. Costs: blur 0.75, downsample 0.8,
    noise 0.5, occlusion 0.6, compression 0.55, low_light 0.6 (our default)."""
    out = np.ones(len(severities))
    for k, cost in enumerate(_COST):
        out = out * (1 - cost * severities[:, k])
    return out


def degrade(linear: torch.Tensor, severities: np.ndarray, keys: np.ndarray) -> torch.Tensor:
    """linear: float32 [n, 3, S, S] in 0..1 -> uint8 [n, 3, S, S]; keys: uint64 [n], the random stream of each picture.

    At severity 1: blur of 4 pixels' deviation, down-sampling to 14 x 14, noise of 32 levels' deviation, 45 % of the
    face's box hidden, JPEG quality 5, and 7 % of the light."""
    out = _to_pixels(linear)
    for row in np.nonzero(severities.any(1))[0]:
        picture, size = linear[row], linear.shape[-1]
        blur, down, noise, hidden, compression, dark = severities[row].tolist()
        own = keys[row : row + 1]
        if hidden:
            picture = _occlude(picture, hidden, own)
        if dark:
            picture = picture * float(np.float32(snap((1 - dark) ** 2 * 0.93 + 0.07)))
        pixels = _to_pixels(picture)
        if blur:
            pixels = _resample(pixels, _blur_matrix(size, 0.4 + 3.6 * blur * size / 112))
        if down:
            target = max(4, round(size / (1 + 7 * down)))
            pixels = _resample(pixels, _down_up_matrix(size, target))
        if noise or dark:
            pixels = _sensor_noise(pixels, 32 * noise + 6 * dark, own)
        if compression:
            pixels = _compress(pixels, compression)
        out[row] = pixels
    return out


def _to_pixels(linear: torch.Tensor) -> torch.Tensor:
    return torch.floor(torch.sqrt(linear) * 255 + 0.5).to(torch.uint8)


def _occlude(picture: torch.Tensor, severity: float, own: np.ndarray) -> torch.Tensor:
    """A soft-edged flat or striped patch over part of the face: rectangle or ellipse, 5 % to 45 % of the picture."""
    size = picture.shape[-1]
    u = uniform(key(own.astype(np.int64), "occlusion"), 12)[0]
    area, aspect = 0.05 + 0.4 * severity, 0.6 + 1.2 * u[0]
    half_w, half_h = snap(0.5 * np.sqrt(area * aspect)), snap(0.5 * np.sqrt(area / aspect))
    cx, cy = 0.2 + 0.6 * u[1], 0.25 + 0.6 * u[2]
    t = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    dx, dy = ((t - cx) / half_w)[None, :], ((t - cy) / half_h)[:, None]
    reach = torch.sqrt(dx * dx + dy * dy) * 0.9 if u[3] < 0.5 else torch.maximum(dx.abs(), dy.abs())
    mask = ((1 - reach) * 12).clamp(0, 1)
    stripe = (
        torch.floor((dx * 3 + dy * 2 * u[4] + 8) * (1 + 2 * u[5])) % 2 if u[6] < 0.4 else torch.zeros(1, 1).double()
    )
    colours = [
        torch.from_numpy(c**2)[:, None, None]
        for c in ((0.08 + 0.7 * u[7]) * (0.75 + 0.25 * u[8:11]), 0.1 + 0.6 * u[[11, 8, 9]])
    ]
    patch = colours[0] + (colours[1] - colours[0]) * stripe
    mask, patch = mask.float().to(picture.device), patch.float().to(picture.device)
    return picture + (patch - picture) * mask


def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    d = np.arange(size)[:, None] - np.arange(size)[None, :]
    w = np.exp(-0.5 * (d / sigma) ** 2)
    return w / w.sum(1, keepdims=True)


def _down_up_matrix(size: int, target: int) -> np.ndarray:
    """Area averaging down to `target` cells, then linear interpolation back."""
    edges = np.arange(target + 1) * (size / target)
    cells = np.clip(
        np.minimum(edges[1:, None], np.arange(size) + 1.0) - np.maximum(edges[:-1, None], np.arange(size)), 0, 1
    )
    down = cells * (target / size)
    at = np.clip((np.arange(size) + 0.5) * (target / size) - 0.5, 0, target - 1)
    low = np.minimum(at.astype(int), target - 2)
    up = np.zeros((size, target))
    up[np.arange(size), low], up[np.arange(size), low + 1] = 1 - (at - low), at - low
    return up @ down


def _resample(pixels: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """Rows and columns through the same matrix; weights are multiples of 2**-12 that sum to one, so sums are exact."""
    whole = np.round(matrix * 4096)
    centre = np.arange(len(whole))
    whole[centre, centre] += 4096 - whole.sum(1)
    m = torch.from_numpy(whole).to(pixels.device)
    exact = torch.matmul(torch.matmul(m, pixels.double()), m.t())
    return torch.floor(exact * 2.0**-24 + 0.5).to(torch.uint8)


def _sensor_noise(pixels: torch.Tensor, deviation: float, own: np.ndarray) -> torch.Tensor:
    """Gaussian-like noise, two thirds of its power in brightness: sums of four random bytes."""
    size = pixels.shape[-1]
    count = 4 * size * size
    words = bits(key(own.astype(np.int64), "noise"), count // 2)[0]
    halves = words.view(np.uint32).reshape(4, size, size)
    total = sum(((halves >> np.uint32(s)) & np.uint32(255)).astype(np.int64) for s in (0, 8, 16, 24)) - 510
    weights = np.round(np.array([0.8, 0.6]) * deviation * 1024 / 147.8)  # 147.8: deviation of the sum of four bytes
    levels = (weights[0] * total[:1] + weights[1] * total[1:]).astype(np.int64)
    noisy = pixels.to(torch.int64) + ((torch.from_numpy(levels).to(pixels.device) + 512) >> 10)
    return noisy.clamp(0, 255).to(torch.uint8)


def _compress(pixels: torch.Tensor, severity: float) -> torch.Tensor:
    """What JPEG loses (8 x 8 DCT, the standard's example tables, 4:2:0 chroma) at quality 60 down to 5, computed here
    because codecs differ in their last bits."""
    q = 60.0 * (5 / 60) ** severity
    scale = 5000 / q if q < 50 else 200 - 2 * q
    r, g, b = pixels.double()
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb, cr = (b - y) * 0.5643, (r - y) * 0.7133
    y = _quantise(y - 128, _LUMA, scale) + 128
    cb, cr = (_quantise(_halve(c), _CHROMA, scale).repeat_interleave(2, 0).repeat_interleave(2, 1) for c in (cb, cr))
    out = torch.stack((y + 1.402 * cr, y - 0.3441 * cb - 0.7141 * cr, y + 1.772 * cb))
    return torch.floor(out.clamp(0, 255) * 1024 + 0.5).mul(2.0**-10).add(0.5).floor().to(torch.uint8)


def _halve(c: torch.Tensor) -> torch.Tensor:
    return (c[::2, ::2] + c[::2, 1::2] + c[1::2, ::2] + c[1::2, 1::2]) * 0.25


def _quantise(plane: torch.Tensor, table: np.ndarray, scale: float) -> torch.Tensor:
    k = np.arange(8)
    dct = np.cos((2 * k[None, :] + 1) * k[:, None] * np.pi / 16) * 0.5
    dct[0] *= np.sqrt(0.5)
    dct = torch.from_numpy(snap(dct, 2.0**-20)).to(plane.device)
    step = torch.from_numpy(np.clip(np.floor((table * scale + 50) / 100), 1, 255)).to(plane.device)
    height, width = plane.shape
    pad = (0, -width % 8, 0, -height % 8)
    plane = torch.nn.functional.pad(plane[None, None], pad, mode="replicate")[0, 0]
    blocks = plane.reshape(plane.shape[0] // 8, 8, -1, 8).transpose(1, 2)
    coefficients = torch.matmul(torch.matmul(dct, blocks), dct.t())
    # a product summed in another order differs by 1e-13; the coarse grid swallows that before it can decide a tie
    coefficients = torch.round(coefficients * 1024) * 2.0**-10
    blocks = torch.floor(coefficients / step + 0.5) * step
    plane = torch.matmul(torch.matmul(dct.t(), blocks), dct).transpose(1, 2).reshape(plane.shape)
    return torch.round(plane[:height, :width] * 1024) * 2.0**-10
