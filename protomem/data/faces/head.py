"""The head: base mesh, morph targets and triangle tables, read once from `mhhead.npz` (see NOTICE for its source).

Lengths are in the mesh's unit, the decimetre: x to the person's left, y up, z forwards; the eyes are at y = 7.28.
Geometry is exact: targets are integers (1e-4 dm), weights are multiples of 2**-16, so every product and sum of the
float64 matrix product is an integer below 2**53 and the result does not depend on the order of summation.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch

WEIGHT_GRID = 2.0**-16
POSITION_GRID = 2.0**-14  # dm
SKIN, EYE, LASH, HAIR_HELPER, TEETH, TONGUE = range(6)
MASKS = ("lips", "eyelids", "ears", "inside-mouth", "occlusion", "lash")

_OPPOSITES = (
    ("decr", "incr"),
    ("-in", "-out"),
    ("-down", "-up"),
    ("backward", "forward"),
    ("-uncompress", "-compress"),
    ("concave", "convex"),
)


class Head:
    """Read-only tables. `vertices` float64 [V, 3]; `triangles` int64 [T, 3]; `material` int64 [T]; `masks` [V, 6]
    in 0..1 (columns as MASKS); `index` name -> row of `targets`."""

    def __init__(self) -> None:
        with np.load(str(files(__package__).joinpath("mhhead.npz")), allow_pickle=False) as z:
            data = {name: z[name] for name in z.files}
        self.names = data["names"].tolist()
        self.index = {name: i for i, name in enumerate(self.names)}
        self.expressions = [name[5:] for name in self.names if name.startswith("expr/")]  # the last targets
        base = np.round(data["V"].astype(np.float64) * 1e4)
        # the mesh is cut off at y = 5.75; a longer neck keeps the cut out of the picture
        base[:, 1] -= 5 * np.clip(60000 - base[:, 1], 0, None)
        self.vertices = base * 1e-4
        targets = np.zeros((len(self.names), base.size))
        for i, (a, b) in enumerate(zip(data["ptr"][:-1], data["ptr"][1:])):
            cells = data["idx"][a:b].astype(np.int64)[:, None] * 3 + np.arange(3)
            targets[i, cells] = data["val"][a:b].astype(np.float64) * 10
        self.base = torch.from_numpy(base.reshape(-1) * (1 / WEIGHT_GRID))
        self.targets = torch.from_numpy(targets)
        keep = (data["mat"] != HAIR_HELPER) & (data["mat"] != LASH)  # too crude: hair.py has hair, mask lash the lashes
        self.triangles = data["T"][keep].astype(np.int64)
        self.material = data["mat"][keep].astype(np.int64)
        self.masks = np.stack([data["mask_" + name].astype(np.float32) * np.float32(1 / 255) for name in MASKS], 1)
        self.pairs, self.single = _modifiers(self.names)
        self._landmarks(data["mask_lips"] > 127)

    def _landmarks(self, lips: np.ndarray) -> None:
        v = self.vertices
        eyes = np.unique(self.triangles[self.material == EYE])
        self.left_eye, self.right_eye = eyes[v[eyes, 0] > 0], eyes[v[eyes, 0] < 0]
        skin = np.unique(self.triangles[self.material == SKIN])
        nose = skin[(np.abs(v[skin, 0]) < 0.05) & (v[skin, 1] > 6.7) & (v[skin, 1] < 7.2)]
        self.nose_tip = nose[np.argmax(v[nose, 2])]
        bridge = skin[np.abs(v[skin, 0]) < 0.05]
        bridge = bridge[np.abs(v[bridge, 1] - 7.25) < 0.12]
        self.nose_bridge = bridge[np.argmax(v[bridge, 2])]
        lip = skin[lips[skin]]
        self.left_mouth, self.right_mouth = lip[np.argmax(v[lip, 0])], lip[np.argmin(v[lip, 0])]
        self.skin_vertices = skin

    def exact(self, weights: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Weights [n, targets] -> displaced vertices [V * 3, n] in units of 1e-4 * 2**-16 dm: float64 integers."""
        base, shapes, _ = self._on(str(device))
        w = torch.from_numpy(np.round(weights[:, : len(shapes)] * (1 / WEIGHT_GRID))).to(device)
        return torch.addmm(base[:, None], shapes.t(), w.t())

    def express(self, exact: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        """Add expressions [n, expression targets] to `exact`: float64 [V, 3, n] dm, multiples of POSITION_GRID."""
        expressions = self._on(str(exact.device))[2]
        w = torch.from_numpy(np.round(weights * (1 / WEIGHT_GRID))).to(exact.device)
        exact = torch.addmm(exact, expressions.t(), w.t())
        grid = torch.round(exact.mul_(1e-4 * WEIGHT_GRID / POSITION_GRID)).mul_(POSITION_GRID)
        return grid.view(-1, 3, w.shape[0])

    @lru_cache(maxsize=4)  # noqa: B019  (one Head exists per process)
    def _on(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = len(self.names) - len(self.expressions)
        return tuple(t.to(device) for t in (self.base, self.targets[:shapes], self.targets[shapes:]))


def _modifiers(names: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Shape targets as (negative, positive) pairs, and those that stand alone."""
    names = [n for n in names if n.split("/")[0] not in ("macrodetails", "expr")]
    pairs, paired = [], set()
    for low, high in _OPPOSITES:
        for n in names:
            other = n[: -len(low)] + high
            if n.endswith(low) and other in names and n not in paired:
                pairs.append((n, other))
                paired |= {n, other}
    return sorted(pairs), [n for n in names if n not in paired]


@lru_cache(maxsize=1)
def load_head() -> Head:
    return Head()
