"""What varies between pictures, as a function of (seed, identity, image): expression, pose, light, background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protomem.data.faces.hashing import key, normal, snap, uniform
from protomem.data.faces.head import WEIGHT_GRID, Head

DEGRADATIONS = ("blur", "downsample", "noise", "occlusion", "compression", "low_light")

_EXPRESSIONS = [
    {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.8, "cheekSquintLeft": 0.4, "cheekSquintRight": 0.4},
    {
        "mouthSmileLeft": 0.8,
        "mouthSmileRight": 0.8,
        "cheekSquintLeft": 0.5,
        "cheekSquintRight": 0.5,
        "jawOpen": 0.18,
        "mouthUpperUpLeft": 0.35,
        "mouthUpperUpRight": 0.35,
        "eyeSquintLeft": 0.25,
        "eyeSquintRight": 0.25,
    },
    {
        "browInnerUp": 0.8,
        "browOuterUpLeft": 0.6,
        "browOuterUpRight": 0.6,
        "eyeWideLeft": 0.5,
        "eyeWideRight": 0.5,
        "jawOpen": 0.35,
    },
    {
        "browDownLeft": 0.8,
        "browDownRight": 0.8,
        "mouthFrownLeft": 0.5,
        "mouthFrownRight": 0.5,
        "eyeSquintLeft": 0.3,
        "eyeSquintRight": 0.3,
    },
    {"jawOpen": 0.4, "mouthFunnel": 0.25},
    {"mouthPucker": 0.6, "cheekPuff": 0.15},
    {"browInnerUp": 0.7, "mouthFrownLeft": 0.5, "mouthFrownRight": 0.5},
    {"mouthPressLeft": 0.6, "mouthPressRight": 0.6, "mouthDimpleLeft": 0.3, "mouthDimpleRight": 0.3},
    {"mouthSmileLeft": 0.6, "mouthDimpleLeft": 0.4, "browOuterUpLeft": 0.5},
]


@dataclass(frozen=True)
class ImageOptions:
    """How much the pictures of one person differ (the defaults are ours).

    yaw_std, pitch_std: deviation in degrees of the head's turn and tilt (bounded at 3.46 deviations);
    yaw_range: (low, high) in degrees: |yaw| is uniform in it and yaw_std is not used;
    expression: strength of expressions, 0 = neutral, 1 = natural;
    light: strength of the variation of light direction, contrast and colour, 0 = one frontal light;
    degrade: probability in [0, 1] that a picture is degraded, by one to three of the six degradations;
    severity: (low, high) bounds within [0, 1] of each degradation's severity."""

    yaw_std: float = 16.0
    pitch_std: float = 7.0
    yaw_range: tuple[float, float] | None = None
    expression: float = 1.0
    light: float = 1.0
    degrade: float = 0.3
    severity: tuple[float, float] = (0.15, 1.0)


def scene_parameters(
    head: Head, seed: int, identities: np.ndarray, images: np.ndarray, options: ImageOptions
) -> dict[str, np.ndarray]:
    """One row per picture [n, ...]: expression weights, angles in degrees, camera distance in dm, light, background."""
    n = len(images)

    def u(name: str, count: int = 1) -> np.ndarray:
        return uniform(key(seed, "image", identities, images, name), count)

    def g(name: str, count: int = 1) -> np.ndarray:
        return normal(key(seed, "image", identities, images, name), count)

    yaw = g("yaw")[:, 0] * options.yaw_std
    if options.yaw_range is not None:
        low, high = options.yaw_range
        side, size = np.hsplit(u("yaw range", 2), 2)
        yaw = (np.where(side < 0.5, -1.0, 1.0) * (low + (high - low) * size))[:, 0]
    out = {"yaw": yaw, "pitch": g("pitch")[:, 0] * options.pitch_std}
    out["expression"] = _expression_weights(head, n, u, g, options.expression)
    out["distance"] = 7 + 9 * u("distance")[:, 0]
    out["jitter"] = 0.7 * g("jitter", 10).reshape(n, 5, 2)  # pixels of 112: what a good landmark detector errs
    light = options.light
    out["azimuth"] = 32 * light * g("azimuth")[:, 0]
    out["elevation"] = 25 + 14 * light * g("elevation")[:, 0]
    out["ambient"] = 0.5 + 0.2 * light * (u("ambient")[:, 0] - 0.5) * 2
    out["exposure"] = 0.86 * (1 + 0.1 * light * g("exposure")[:, 0])
    out["warmth"] = light * g("warmth")[:, 0]
    out["glasses"] = u("glasses")[:, 0]
    out["backdrop"] = u("backdrop", 12)
    out["severities"] = _severities(n, u, options)
    out["degrade_key"] = key(seed, "image", identities, images, "degrade")
    return out


def _expression_weights(head: Head, n: int, u, g, strength: float) -> np.ndarray:
    w = np.zeros((n, len(head.expressions)))

    def add(name: str, value: np.ndarray) -> None:
        w[:, head.expressions.index(name)] += value

    pick, size = np.hsplit(u("expression", 2), 2)
    which = (pick[:, 0] * 1.5 * len(_EXPRESSIONS)).astype(int)  # one picture in three has none
    for k, units in enumerate(_EXPRESSIONS):
        for name, value in units.items():
            add(name, strength * np.where(which == k, value * (0.25 + 0.75 * size[:, 0]), 0))
    small = [name for name in head.expressions if "Look" not in name and "tongue" not in name]
    for k, value in enumerate(np.clip(g("twitch", len(small)), 0, 3).T):
        add(small[k], strength * 0.035 * value)
    blink = np.where(u("blink")[:, 0] < 0.03, 0.95, 0.1 * u("lids")[:, 0]) * strength
    across, up = (0.25 * strength * g("gaze", 2)).T
    for side, sign in (("Left", 1), ("Right", -1)):
        add("eyeBlink" + side, blink)
        add("eyeWide" + side, np.full(n, 0.3))  # the base mesh looks tired
        add("eyeLookOut" + side, np.clip(sign * across, 0, 1))
        add("eyeLookIn" + side, np.clip(-sign * across, 0, 1))
        add("eyeLookUp" + side, np.clip(0.6 * up, 0, 1))
        add("eyeLookDown" + side, np.clip(-0.6 * up, 0, 1))
    return snap(np.clip(w, 0, 1), WEIGHT_GRID)


def _severities(n: int, u, options: ImageOptions) -> np.ndarray:
    """float64 [n, 6] in 0..1, columns as DEGRADATIONS; one kind half of the time, else two or three."""
    low, high = options.severity
    degraded = u("degraded")[:, 0] < options.degrade
    how_many = 1 + (u("how many")[:, 0] > 0.5) + (u("how many")[:, 0] > 0.85)
    rank = u("which", len(DEGRADATIONS)).argsort(1, kind="stable").argsort(1, kind="stable")
    severity = low + (high - low) * u("severity", len(DEGRADATIONS))
    return np.where(degraded[:, None] & (rank < how_many[:, None]), severity, 0.0)
