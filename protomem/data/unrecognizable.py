"""Copies of batch images that nobody can recognise: what the prototype of unrecognisable images is made of.

Quality-Aware Prototype Memory (arXiv 2311.07734) scores an image by its distance to a dedicated "unrecognizable
identity" prototype. How its images are obtained is not published; destroying a few images of each batch is our reading,
and every strength below is our default.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F

from protomem.seeds import mix

LOW_RESOLUTIONS = (6, 7, 8, 9, 10)  # pixels across; 112 pixels show a face, 10 no longer tell whose
BLUR = 3  # side of the averaged square, in pixels of the low resolution: 34 to 56 of 112
NOISE = (10.0, 40.0)  # standard deviation in grey levels, drawn per copy
OCCLUDED = (0.4, 0.7)  # share of the area, drawn per copy
ASPECT = (0.75, 4 / 3)  # of the occluding rectangle; 0.7 of the area still fits into the image at both ends


def rows_here(total: int, batch_size: int, start: int, stop: int) -> tuple[list[int], list[int]]:
    """Which of the `total` copies are made by the holder of rows start..stop-1 of a batch of `batch_size` images.

    Copy i is one of the batch's image floor(i * batch_size / total), so they spread evenly over the batch. Returns the
    numbers of the copies (consecutive) and, for each, the row of its image counted from `start`. Plain integers, the same
    at every step: `torch.stack([images[row] for row in rows])` picks the images without sending an index to a GPU.
    """
    first, end = -(-start * total // batch_size), -(-stop * total // batch_size)
    numbers = list(range(first, end))
    return numbers, [i * batch_size // total - start for i in numbers]


def destroy(images: torch.Tensor, numbers: Sequence[int], total: int, seed: int, step: int) -> torch.Tensor:
    """Copies of uint8 [m, H, W, 3] that are beyond recognition, of the same shape and on the same device.

    numbers: the m consecutive numbers, in 0..total-1, that `images` have among all copies of the step. In this order:
    shrunk to 6..10 pixels across (which of them follows from the number), blurred, enlarged again, noised, and 40 to 70 %
    of the area hidden by a rectangle of one grey.

    A copy is a function of (image, number, total, seed, step, kind of device): ranks that share the numbers make together
    what one process makes. Nothing waits for the device. Raises ValueError for numbers that do not fit.
    """
    m, height, width, _ = images.shape
    if len(numbers) != m or (m and list(numbers) != list(range(numbers[0], numbers[0] + m))):
        raise ValueError(f"{m} images need {m} consecutive numbers, not {list(numbers)}")
    if m and not 0 <= numbers[0] <= total - m:
        raise ValueError(f"numbers {list(numbers)} are not all in 0..{total - 1}")
    if not m:
        return images.clone()
    # Everything is drawn for all copies and then cut, so that the numbers do not depend on who makes which copy.
    generator = torch.Generator(images.device).manual_seed(mix(seed, step))
    here = slice(numbers[0], numbers[0] + m)
    u = torch.rand(6, total, 1, 1, 1, generator=generator, device=images.device)[:, here]
    noise = torch.randn(total, 3, height, width, generator=generator, device=images.device)[here]

    x = images.permute(0, 3, 1, 2).float()
    sizes = len(LOW_RESOLUTIONS)
    for k in range(min(sizes, m)):  # every fifth copy has the same size
        side = LOW_RESOLUTIONS[numbers[k] % sizes]
        low = F.interpolate(x[k::sizes], (side, side), mode="bilinear", antialias=True)
        low = F.avg_pool2d(low, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)  # here it costs next to nothing
        x[k::sizes] = F.interpolate(low, (height, width), mode="bilinear")
    x = x + noise * _between(NOISE, u[0])
    x = torch.where(_rectangles(u[1:5], height, width), 255 * u[5], x)
    return x.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _rectangles(u: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """u [4, m, 1, 1, 1], uniform in [0, 1): area, aspect and place -> bool [m, 1, H, W], true inside."""
    area, aspect = _between(OCCLUDED, u[0]), _between(ASPECT, u[1])
    inside = []
    for count, extent, place in ((height, (area / aspect).sqrt(), u[2]), (width, (area * aspect).sqrt(), u[3])):
        centres = (torch.arange(count, device=u.device) + 0.5) / count
        corner = place * (1 - extent)
        inside.append((centres >= corner) & (centres < corner + extent))  # [m, 1, 1, count]
    return inside[0].transpose(2, 3) & inside[1]


def _between(bounds: tuple[float, float], u: torch.Tensor) -> torch.Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * u
