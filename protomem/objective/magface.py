"""MagFace: the margin grows with the embedding's norm, and a regulariser rewards large norms (Meng et al. 2021).

The norm a becomes a measure of quality: samples that are easy to classify can afford a large one (a large margin), hard
ones are pulled down. With a clamped to [lower, upper], m(a) a line through both ends (eq. 4 and section 3.3):

    z_y = s cos(t + m(a))   or, with kind=cosface,   z_y = s (cos t - m(a))
    L = mean CE + weight mean g(a),   g(a) = a / upper^2 + 1 / a

Both parts have a gradient to the norm, none where it is clamped. weight must not be below the bound of
`protomem.composition.least_weight`. The defaults are those of the authors' training script (10, 110, 0.45, 0.8, 35); its
rule beyond pi is `easy`.
"""

from __future__ import annotations

from typing import Callable

import torch


def magnitude_margin(
    angular: Callable,
    *,
    kind: str = "arcface",
    lower: float = 10.0,
    upper: float = 110.0,
    lower_margin: float = 0.45,
    upper_margin: float = 0.8,
    weight: float = 35.0,
    beyond_pi: str = "threshold",
) -> tuple[Callable, Callable | None]:
    """(target: (cos_y [B], norms [B]) -> phi [B], penalty: norms [b] -> weight g(a) [b], None if the weight is 0).

    angular(cos, m, beyond_pi): cos(t + m) with a margin per sample; margins in radians (kind=arcface) or of a cosine.
    """

    def margin(norm: torch.Tensor) -> torch.Tensor:
        return lower_margin + (upper_margin - lower_margin) * (norm.clamp(lower, upper) - lower) / (upper - lower)

    def target(cos: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        if kind == "cosface":
            return cos - margin(norm)
        return angular(cos, margin(norm), beyond_pi)

    def penalty(norm: torch.Tensor) -> torch.Tensor:
        a = norm.clamp(lower, upper)
        return weight * (a / upper**2 + 1 / a)

    return target, penalty if weight > 0 else None
