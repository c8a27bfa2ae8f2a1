"""What a person looks like, as a function of (seed, identity): morph weights, skin, hair, brows, irises and marks."""

from __future__ import annotations

import numpy as np

from protomem.data.faces.hashing import key, normal, snap, uniform
from protomem.data.faces.head import WEIGHT_GRID, Head

_RACES = ("african", "asian", "caucasian")
# sRGB along a scale of pigment, from very light to very dark
_SKIN = np.array([[246, 210, 188], [230, 188, 158], [208, 160, 124], [168, 116, 82], [120, 78, 54], [76, 48, 36]]) / 255
_SKIN_RANGE = np.array([[0.62, 1.0], [0.12, 0.52], [0.0, 0.40]])  # pigment, per race
_HAIR = np.array([[20, 17, 16], [45, 31, 24], [84, 56, 36], [126, 88, 54], [186, 148, 98], [142, 66, 34]]) / 255
_HAIR_ODDS = np.array(
    [[0.84, 0.13, 0.02, 0.0, 0.0, 0.01], [0.76, 0.2, 0.03, 0.0, 0.0, 0.01], [0.1, 0.25, 0.27, 0.17, 0.14, 0.07]]
)
_IRIS = np.array([[48, 30, 20], [92, 62, 34], [70, 108, 140], [86, 112, 72], [122, 130, 134]]) / 255
_IRIS_ODDS = np.array([[0.8, 0.18, 0.0, 0.01, 0.01], [0.78, 0.2, 0.0, 0.01, 0.01], [0.24, 0.27, 0.25, 0.13, 0.11]])
MOLES = 5
# styles of hair: (chance for a man, for a woman)
STYLES = {
    "none": (0.12, 0.0),
    "cropped": (0.2, 0.02),
    "short": (0.3, 0.08),
    "fringe": (0.14, 0.12),
    "swept": (0.14, 0.12),
    "curls": (0.06, 0.12),
    "bob": (0.01, 0.18),
    "long": (0.03, 0.26),
    "tied": (0.0, 0.1),
}


def identity_parameters(head: Head, seed: int, identities: np.ndarray, spread: float) -> dict[str, np.ndarray]:
    """One row per identity [n, ...]; colours are sRGB in 0..1, lengths in dm of the base mesh.

    `spread` is the deviation of the 80 or so independent local modifiers (nose width, eye distance, ...), whose full
    range is -1..1: 0.3 gives ordinary faces, 0.45 begins to look like caricature."""
    n = len(identities)

    def u(name: str, count: int) -> np.ndarray:
        return uniform(key(seed, "identity", identities, name), count)

    def g(name: str, count: int) -> np.ndarray:
        return normal(key(seed, "identity", identities, name), count)

    race = u("race", 3) ** 3 + 1e-3  # mostly one race, often a mixture
    race = snap(race / (race[:, :1] + race[:, 1:2] + race[:, 2:]))
    male = (u("sex", 1)[:, 0] < 0.5).astype(float)
    masculine = np.clip(0.12 + 0.76 * male + 0.06 * g("masculine", 1)[:, 0], 0, 1)
    age = u("age", 1)[:, 0] ** 2 * 0.9
    out = {"race": race, "male": male, "age": age}
    out["weights"] = _morph_weights(head, race, masculine, age, spread, u, g)

    pigment = _mix(race, _SKIN_RANGE[:, 0]) + u("pigment", 1)[:, 0] * _mix(race, _SKIN_RANGE[:, 1] - _SKIN_RANGE[:, 0])
    skin = np.stack([_ramp(pigment, _SKIN[:, c]) for c in range(3)], 1)
    shift = g("skin", 3) * [0.035, 0.03, 0.022]  # brightness, red against green, yellow against blue
    out["skin"] = np.clip(
        skin * (1 + shift[:, :1] + shift[:, 1:2] * [0.6, -0.6, 0] + shift[:, 2:] * [0.3, 0.3, -1]), 0.08, 0.97
    )
    grey = np.clip((age - 0.55) * 3 * u("grey", 1)[:, 0], 0, 0.9)[:, None]
    hair = _choose(u("hair", 1), race, _HAIR_ODDS, _HAIR) * (0.8 + 0.45 * u("hair shade", 1))
    out["hair"] = np.clip(hair * (1 - grey) + grey * 0.62, 0.04, 0.9)
    out["brow_colour"] = np.clip(out["hair"] * (0.45 + 0.4 * u("brow shade", 1)), 0.04, 0.7)
    out["iris"] = np.clip(_choose(u("iris", 1), race, _IRIS_ODDS, _IRIS) * (0.8 + 0.4 * u("iris shade", 1)), 0.05, 0.8)
    makeup = (1 - male) * np.clip(u("make-up", 1)[:, 0] * 1.6 - 0.6, 0, 1)
    out["lip_strength"] = 0.35 + 0.3 * u("lip", 1)[:, 0] + 0.3 * makeup
    lipstick = 0.25 + 0.5 * u("lipstick", 3) * [1.0, 0.35, 0.45] + [0.3, 0, 0]
    natural = out["skin"] * (np.array([0.86, 0.6, 0.6]) + 0.05 * g("lip hue", 3))
    out["lip"] = np.clip(natural * (1 - makeup[:, None]) + lipstick * makeup[:, None], 0.05, 0.9)
    out["lash"] = 0.5 + 0.3 * (1 - male) + 0.2 * makeup
    out["lid"] = 0.35 * makeup * u("lid", 1)[:, 0]

    b, heavy = u("brow", 5), 0.012 * male
    # half thickness, height, slope, curvature, density, outer end
    out["brow"] = np.stack(
        [
            0.022 + heavy + 0.03 * b[:, 0],
            0.03 * g("brow y", 1)[:, 0],
            0.3 * b[:, 1] - 0.08,
            0.8 + 1.6 * b[:, 2],
            0.5 + 0.5 * b[:, 3],
            0.44 + 0.12 * b[:, 4],
        ],
        1,
    )
    # field coefficients of the skin (see appearance.py): low-frequency tone and redness, then named regions
    out["tone"] = np.concatenate(
        [0.022 * g("tone", 12), -0.12 * u("eye shadow", 1), 0.03 * g("forehead", 1), np.zeros((n, 2))], 1
    )
    light = 1 - 0.6 * pigment[:, None]
    out["redness"] = np.concatenate(
        [
            0.012 * g("redness", 12),
            0.04 * u("eye red", 1),
            np.zeros((n, 1)),
            0.13 * u("blush", 1) * light,
            0.1 * u("nose red", 1) * light,
        ],
        1,
    )
    m = u("moles", 3 * MOLES).reshape(n, MOLES, 3)
    number = np.floor(u("mole count", 1) ** 2 * (MOLES + 1))
    size = (0.011 + 0.016 * m[:, :, 2] ** 2) * (np.arange(MOLES) < number)
    out["moles"] = np.stack([1.1 * m[:, :, 0] - 0.55, 6.4 + 1.5 * m[:, :, 1], size], 2)
    out["freckles"] = np.clip(u("freckles", 1)[:, 0] * 4 - 3.2, 0, 0.7) * (1 - pigment)
    out["lines"] = np.clip(age - 0.3, 0, 0.6) * (0.5 + u("lines", 1)[:, 0])
    out["texture"] = np.floor(u("texture", 2) * 4096)  # offset into the noise table: the person's own skin and strands

    bearded = male * (u("bearded", 1)[:, 0] < 0.45)
    kind = u("beard", 4)
    stubble = male * 0.28 * u("stubble", 1)[:, 0]
    # strengths of cheek-and-jaw beard, moustache, chin beard, and the height of the cheek line
    full, goatee = (kind[:, 0] < 0.5) * 1.0, (kind[:, 0] > 0.7) * 1.0
    dense = bearded * (0.5 + 0.5 * kind[:, 1])
    out["beard"] = np.stack(
        [
            np.maximum(stubble, dense * full),
            np.maximum(stubble, dense * np.where(full > 0, 0.9, 1.0)),
            np.maximum(stubble, dense * np.maximum(full, goatee)),
            kind[:, 2],
        ],
        1,
    )
    _hair_style(out, male, u)
    out["painted"] = np.where(out["style"] == 0, 0.12, 0.95)  # how dense the hair painted on the scalp is
    wears = u("glasses", 1)[:, 0]
    out["glasses"] = np.where(wears < 0.1, 1.0, np.where(wears < 0.2, 0.5, 0.0))  # chance that a picture shows them
    frame = u("frame", 5)
    out["frame"] = np.stack(
        [0.9 + 0.25 * frame[:, 0], 0.75 + 0.4 * frame[:, 1], frame[:, 2], 0.012 + 0.02 * frame[:, 3]], 1
    )
    out["frame_colour"] = np.where(
        frame[:, 4:] < 0.7, 0.07 + 0.1 * u("frame colour", 3), 0.2 + 0.5 * u("frame colour", 3)
    )
    return out


def _hair_style(out: dict[str, np.ndarray], male: np.ndarray, u) -> None:
    odds = np.array(list(STYLES.values()))
    odds = male[:, None] * odds[:, 0] + (1 - male[:, None]) * odds[:, 1]
    out["style"] = (u("style", 1) > np.cumsum(odds, 1)).sum(1).clip(0, len(STYLES) - 1)
    out["style_shape"] = u("style shape", 10)
    # hairline: height above the middle of the forehead, recession at the temples, widow's peak, sideburn level
    s = u("hairline", 4)
    recede = np.where(male > 0, s[:, 1] * (0.35 + 0.9 * out["age"]), 0.25 * s[:, 1])
    out["hairline"] = np.stack([7.84 + 0.2 * s[:, 0], 0.3 * recede, 0.05 * (s[:, 2] - 0.3), 7.0 + 0.35 * s[:, 3]], 1)


def _mix(race: np.ndarray, values: np.ndarray) -> np.ndarray:
    return race[:, 0] * values[0] + race[:, 1] * values[1] + race[:, 2] * values[2]


def _ramp(t: np.ndarray, table: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1) * (len(table) - 1)
    i = np.minimum(t.astype(int), len(table) - 2)
    return table[i] + (t - i) * (table[i + 1] - table[i])


def _choose(u: np.ndarray, race: np.ndarray, odds: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Pick a row of `table` with the odds of the race mixture."""
    p = np.stack([_mix(race, odds[:, k]) for k in range(odds.shape[1])], 1)
    return table[(u > np.cumsum(p, 1)).sum(1).clip(0, len(table) - 1)]


def _morph_weights(head: Head, race, masculine, age, spread: float, u, g) -> np.ndarray:
    n = len(race)
    w = np.zeros((n, len(head.names)))
    sexes = (("male", masculine), ("female", 1 - masculine))
    ages = (("young", 1 - age), ("old", age))
    muscle, weight = u("muscle", 1)[:, 0], (u("weight", 1) + u("weight b", 1))[:, 0] * 0.5
    muscles = (
        ("minmuscle", np.clip(1 - 2 * muscle, 0, 1)),
        ("averagemuscle", 1 - abs(2 * muscle - 1)),
        ("maxmuscle", np.clip(2 * muscle - 1, 0, 1)),
    )
    weights = (
        ("minweight", np.clip(1 - 2 * weight, 0, 1)),
        ("averageweight", 1 - abs(2 * weight - 1)),
        ("maxweight", np.clip(2 * weight - 1, 0, 1)),
    )
    for sex, ws in sexes:
        for old, wa in ages:
            for r, name in enumerate(_RACES):
                w[:, head.index[f"macrodetails/{name}-{sex}-{old}"]] = race[:, r] * ws * wa
            for m, wm in muscles:
                for f, wf in weights:
                    i = head.index.get(f"macrodetails/universal-{sex}-{old}-{m}-{f}")
                    if i is not None:  # the average of both is the base mesh
                        w[:, i] = ws * wa * wm * wf
    modifier = np.clip(spread * g("modifiers", len(head.pairs)), -1, 1)
    asymmetry = 0.04 * g("asymmetry", len(head.pairs))
    groups: dict[str, int] = {}
    for k, (low, high) in enumerate(head.pairs):
        part, name = low.split("/")
        sided = name[:2] in ("l-", "r-")
        value = modifier[:, groups.setdefault(f"{part}/{name[2:]}" if sided else low, k)]
        if sided:
            value = value + asymmetry[:, k]  # faces are a little asymmetric
        if "trans-in" in low and not sided:
            value = value * 0.15  # the head, nose, mouth or neck moved sideways
        elif "trans" in low:
            value = value * 0.5
        if part == "neck" or "head-scale" in low or "head-back" in low or "head-trans" in low:
            value = value * 0.4
        w[:, head.index[low]] = np.clip(-value, 0, 1)
        w[:, head.index[high]] = np.clip(value, 0, 1)
    shape = u("shape", len(head.single)) ** 8  # a few of: head shapes, ear shapes, triangular chin
    share = np.zeros(n)
    for k in range(shape.shape[1]):
        share = share + shape[:, k]
    for k, name in enumerate(head.single):
        w[:, head.index[name]] = 0.75 * shape[:, k] / (share + 0.6)
    return snap(w, WEIGHT_GRID)
