"""From people and scenes to meshes on the screen: morphing, hair and glasses, camera, alignment, vertex normals.

float64 throughout, every result rounded to a grid; trigonometric values are snapped first, so all that remains are
exactly rounded elementwise operations and sums of integers, which no machine can order differently.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from protomem.data.faces import hair
from protomem.data.faces.hashing import key, normal, snap
from protomem.data.faces.head import POSITION_GRID, Head
from protomem.data.faces.raster import SUBPIXEL

# the five points (eyes, nose tip, mouth corners; the picture's left first) to which face recognisers align, 112 x 112
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


class Mesh(NamedTuple):
    """x, y: int64 [V, n] in sub-samples; z: float32 [V, n] dm; normal: float32 [3, n, V], camera space, any length."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    normal: torch.Tensor


def hair_shells(seed: int, people: np.ndarray, person: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per person: shell points on the base head and their bound vertices, hairline and ends per column, strand look."""
    line = hair.hairline(person)
    ends, thickness, strands = hair.style_shell(person, line)
    shape = (len(people), hair.COLUMNS, hair.ROWS)
    bumps = normal(key(seed, "identity", people, "bumps"), shape[1] * shape[2]).reshape(shape) * 0.5
    bumps[:, -1] = bumps[:, 0]
    points, low, high, share = hair.shell_template(
        hair.load_guides(), ends, thickness, strands["hang"], strands["lumps"], bumps
    )
    return strands | {
        "line": line,
        "ends": ends,
        "shell": points.reshape(len(people), -1, 3),
        "low": low.reshape(len(people), -1),
        "high": high.reshape(len(people), -1),
        "share": share.reshape(len(people), -1),
    }


def build(
    head: Head,
    neutral: torch.Tensor,
    person: dict[str, np.ndarray],
    scene: dict[str, np.ndarray],
    size: int,
    tables: dict,
) -> tuple[Mesh, Mesh]:
    """The solid mesh (head, then glasses) and the hair shell, for pictures of size x size samples. `neutral`: each
    picture's person, from Head.exact."""
    device = neutral.device
    skin = head.express(neutral, scene["expression"])
    eyes = [skin[i].sum(0) * (1 / len(i)) for i in (head.right_eye, head.left_eye)]  # [3, n]; exact sums
    moved = skin - tables["vertices"][:, :, None]
    shell = _shell(moved, person, device)
    frame = hair.frame_points(
        person["frame"], *(e.t().cpu().numpy() for e in eyes[::-1]), skin[head.nose_bridge].t().cpu().numpy()
    )
    worn = scene["glasses"] < person["glasses"]
    frame = np.where(worn[:, None, None], frame, frame[:, :1])  # not worn: one point, which covers nothing
    solid = torch.cat([skin, torch.from_numpy(frame).to(device).permute(1, 2, 0)])
    camera = _Camera(scene, eyes, device)
    points = [*eyes, *(skin[i] for i in (head.nose_tip, head.right_mouth, head.left_mouth))]
    camera.align(torch.stack(points), scene["jitter"], size)
    return camera.project(solid, tables["triangles"]), camera.project(shell, tables["shell"])


def _shell(moved: torch.Tensor, person: dict[str, np.ndarray], device: torch.device) -> torch.Tensor:
    points, low, high, share = (torch.from_numpy(person[k]).to(device) for k in ("shell", "low", "high", "share"))
    image = torch.arange(len(points), device=device)[:, None]
    moved = moved.permute(2, 0, 1)
    a, b = moved[image, low], moved[image, high]
    points = points + (a + (b - a) * share[:, :, None])
    return (torch.round(points * (1 / POSITION_GRID)) * POSITION_GRID).permute(1, 2, 0)


class _Camera:
    def __init__(self, scene: dict[str, np.ndarray], eyes: list[torch.Tensor], device: torch.device) -> None:
        yaw, pitch = np.radians(scene["yaw"]), np.radians(scene["pitch"])
        cy, sy, cp, sp = (snap(v, 2.0**-30) for v in (np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)))
        zero = np.zeros_like(cy)
        rows = ((cy, zero, sy), (sp * sy, cp, -sp * cy), (-cp * sy, sp, cp * cy))
        self.rotation = [[torch.from_numpy(v).to(device) for v in row] for row in rows]
        self.distance = torch.from_numpy(scene["distance"]).to(device)
        shift = torch.tensor([0.0, -0.25, -0.5], dtype=torch.float64, device=device)[:, None]
        self.centre = (eyes[0] + eyes[1]) * 0.5 + shift  # the head turns about a point between the ears
        self.to_screen = None

    def _turn(self, v: torch.Tensor) -> list[torch.Tensor]:
        x, y, z = v.unbind(1)
        return [(r[0] * x + r[1] * y) + r[2] * z for r in self.rotation]

    def _perspective(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, z = self._turn(points - self.centre)
        scale = self.distance / (self.distance - z)
        return x * scale, -y * scale, z

    def align(self, points: torch.Tensor, jitter: np.ndarray, size: int) -> None:
        """Least-squares similarity from the five landmarks [5, 3, n] to the template, each target moved by `jitter`
        [n, 5, 2] (pixels of 112)."""
        x, y, _ = (v.cpu().numpy() for v in self._perspective(points))
        target = (ARCFACE_TEMPLATE + jitter).transpose(1, 2, 0) * (size / 112)  # [5, 2, n]
        mean = [_sum(v) * 0.2 for v in (x, y, target[:, 0], target[:, 1])]
        x, y, u, v = x - mean[0], y - mean[1], target[:, 0] - mean[2], target[:, 1] - mean[3]
        power = _sum(x * x + y * y)
        cosine, sine = _sum(x * u + y * v) / power, _sum(x * v - y * u) / power
        shift = mean[2] - (cosine * mean[0] - sine * mean[1]), mean[3] - (sine * mean[0] + cosine * mean[1])
        device = points.device
        self.to_screen = [torch.from_numpy(v).to(device) for v in (cosine, sine, *shift)]

    def project(self, points: torch.Tensor, triangles: torch.Tensor) -> Mesh:
        """points: float64 [V, 3, n], multiples of POSITION_GRID."""
        x, y, z = self._perspective(points)
        cosine, sine, u, v = self.to_screen
        column, row = (cosine * x - sine * y) + u, (sine * x + cosine * y) + v
        # far outside the picture nothing needs to be exact, only to fit 32-bit edge functions
        column, row = (torch.round(c * SUBPIXEL).clamp(-(2**16), 2**16).to(torch.int64) for c in (column, row))
        normal_ = torch.stack(self._turn(_normals(points, triangles))).to(torch.float32)
        return Mesh(column, row, z.to(torch.float32), normal_.transpose(1, 2).contiguous())


def _sum(v: np.ndarray) -> np.ndarray:
    return (((v[0] + v[1]) + v[2]) + v[3]) + v[4]


def _normals(points: torch.Tensor, triangles: torch.Tensor) -> torch.Tensor:
    """Area-weighted vertex normals [V, 3, n]: sums of integers, exact in any order, even in parallel."""
    points = points * (1 / POSITION_GRID)
    a = points[triangles[:, 0]]
    e, f = points[triangles[:, 1]] - a, points[triangles[:, 2]] - a
    cross = torch.stack(
        (
            e[:, 1] * f[:, 2] - e[:, 2] * f[:, 1],
            e[:, 2] * f[:, 0] - e[:, 0] * f[:, 2],
            e[:, 0] * f[:, 1] - e[:, 1] * f[:, 0],
        ),
        1,
    )
    out = torch.zeros_like(points)
    for k in range(3):
        out.index_add_(0, triangles[:, k], cross)
    return out * POSITION_GRID
