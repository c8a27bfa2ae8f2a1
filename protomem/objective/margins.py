"""Margins on the target logit and filters on the negatives. Each is a function of [B] cosines: z_y = s * phi(cos_y).

Sources: NormFace (Wang et al. 2017), CosFace (Wang et al. 2018, eq. 4), ArcFace (Deng et al. 2019, eq. 3-4, with the
combined margin cos(m1 t + m2) - m3), Partial FC (An et al. 2022) for the inter-class filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Mapping

import torch

from protomem.errors import UserError
from protomem.head import Negatives
from protomem.objective.magface import magnitude_margin

BEYOND_PI = ("threshold", "easy", "plain", "raw", "monotone")


@dataclass(frozen=True)
class Margin:
    """scale s; target phi: (cos_y [B], embedding norms [B], both with a graph) -> [B], so that z_y = s phi; negatives: their
    rule, None for z_j = s cos_j; penalty: norms [b] -> [b], a regulariser on each rank's own rows, None: none."""

    scale: float
    target: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    negatives: Negatives | None = None
    penalty: Callable[[torch.Tensor], torch.Tensor] | None = None


def _cos(m: float | torch.Tensor):
    return m.cos() if isinstance(m, torch.Tensor) else math.cos(m)


def _sin(m: float | torch.Tensor):
    return m.sin() if isinstance(m, torch.Tensor) else math.sin(m)


def add_angle(cos: torch.Tensor, m: float | torch.Tensor) -> torch.Tensor:
    """cos(t + m) from cos t, without acos: its derivative sin(t + m) / sin t stays finite in the closed range."""
    # 1e-12 keeps the square root's derivative finite where |cos| = 1; it moves values by at most 1e-6 sin(m) there.
    sine = (1 - cos * cos).clamp_min(1e-12).sqrt()
    return cos * _cos(m) - sine * _sin(m)


def angular(cos: torch.Tensor, m: float | torch.Tensor, beyond_pi: str) -> torch.Tensor:
    """cos(t + m) [B] with a rule for t + m > pi, where the cosine would rise again. m: a number, or one per sample [B].

    threshold: cos t - m sin m there (ArcFace's first code). easy: no margin where cos t <= 0. plain: no margin beyond
    pi. raw: cos(t + m) everywhere. monotone: -cos(t + m) - 2 there (continuous and falling, as SphereFace continues).
    """
    shifted = add_angle(cos, m)
    if beyond_pi == "raw":
        return shifted
    if beyond_pi == "easy":
        return torch.where(cos > 0, shifted, cos)
    inside = cos > -_cos(m)
    beyond = {"threshold": cos - m * _sin(m), "plain": cos, "monotone": -shifted - 2}[beyond_pi]
    return torch.where(inside, shifted, beyond)


def multiplied(cos: torch.Tensor, m1: float, m2: float) -> torch.Tensor:
    """(-1)^k cos(a) - 2k with a = m1 t + m2, k = floor(a / pi): SphereFace's falling continuation (Liu et al. 2017)."""
    angle = m1 * cos.clamp(-1 + 1e-7, 1 - 1e-7).acos() + m2
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * angle.cos() - 2 * k


def interclass_filter(threshold: float) -> Negatives:
    """Negatives with cos_j > threshold get the logit 0: they are likely the same person under another label."""
    return Negatives(
        value=lambda cos, cos_y: torch.where(cos > threshold, torch.zeros_like(cos), cos),
        slope=lambda cos, cos_y: (cos <= threshold).to(cos.dtype),
        filter_above=threshold,
    )


def build_margin(
    name: str,
    *,
    scale: float = 64.0,
    m: float | None = None,
    m1: float | None = None,
    m2: float | None = None,
    m3: float | None = None,
    gradient: str = "true",
    beyond_pi: str = "threshold",
    filter_above: float = 0.0,
    magnitude: Mapping = {},
) -> Margin:
    """A margin by name: softmax (none), cosface (m, default 0.4), arcface (m, default 0.5), combined
    (m1, m2, m3: 1, 0.5, 0 where not given; m2 in radians), magface (`magnitude`: the arguments of protomem/objective/magface.py).

    gradient: `true`, or `straight_through` (value of phi, derivative 1), which is what insightface's ArcFace trains with.
    beyond_pi: see `angular`; `monotone` is the only rule that is defined for m1 != 1. filter_above: inter-class filter
    threshold, 0 = off. Raises UserError for an unknown name or an option without effect on the chosen margin.
    """
    if gradient not in ("true", "straight_through"):
        raise UserError(f"margin.gradient={gradient} is not one of true, straight_through")
    if beyond_pi not in BEYOND_PI:
        raise UserError(f"margin.beyond_pi={beyond_pi} is not one of {', '.join(BEYOND_PI)}")
    takes = {"softmax": (), "cosface": ("m",), "arcface": ("m",), "combined": ("m1", "m2", "m3"), "magface": ()}
    if name not in takes:
        raise UserError(f"margin.name={name} is not one of {', '.join(takes)}")
    takes = takes[name]
    for key, value in {"m": m, "m1": m1, "m2": m2, "m3": m3}.items():
        if value is not None and key not in takes:
            cure = f"it takes {', '.join(takes)}" if takes else "remove it"
            raise UserError(f"margin.{key} has no effect on margin.name={name}; {cure}")
    negatives = interclass_filter(filter_above) if filter_above > 0 else None
    if name == "magface":
        target, penalty = magnitude_margin(angular, beyond_pi=beyond_pi, **magnitude)
        return Margin(scale, target, negatives, penalty)
    if name == "combined":
        m1, m2, m3 = 1.0 if m1 is None else m1, 0.5 if m2 is None else m2, 0.0 if m3 is None else m3
    else:
        m1 = 1.0
        m2 = (0.5 if m is None else m) if name == "arcface" else 0.0
        m3 = (0.4 if m is None else m) if name == "cosface" else 0.0
    if not (0 <= m2 < math.pi and m1 > 0):
        raise UserError(f"margin: needs m1 > 0 and 0 <= angle < pi, got m1={m1}, angle={m2}")
    if m1 != 1 and beyond_pi != "monotone":
        raise UserError(f"margin.m1={m1}: beyond_pi={beyond_pi} is undefined for m1 != 1; set margin.beyond_pi=monotone")

    def target(cos: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        phi = cos
        if m1 != 1:
            phi = multiplied(cos, m1, m2)
        elif m2 != 0:
            phi = angular(cos, m2, beyond_pi)
        phi = phi - m3
        return phi if gradient == "true" else cos + (phi - cos).detach()

    return Margin(scale, target, negatives)
