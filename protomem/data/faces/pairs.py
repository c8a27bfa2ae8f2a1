"""Verification pairs of rendered people that no training set contains: clean, across pose, low quality, look-alikes."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from protomem.data.faces.hashing import bits, key, uniform
from protomem.data.faces.head import load_head
from protomem.data.faces.identity import STYLES, identity_parameters
from protomem.data.faces.scene import ImageOptions
from protomem.data.faces.synth import read_manifest, render_blocks, write_manifest
from protomem.errors import UserError
from protomem.files import write_atomically

FIRST_IDENTITY = 10_000_000
_FOLDS = 10
_POOL = 10  # look-alikes are sought among this many times as many people

_CLEAN = ImageOptions(yaw_std=6, pitch_std=4, expression=0.8, degrade=0)
# the first and the second picture of a pair
PAIR_OPTIONS = {
    "clean": (_CLEAN, _CLEAN),
    "cross_pose": (_CLEAN, ImageOptions(yaw_range=(35, 60), degrade=0)),
    "low_quality": (ImageOptions(degrade=0.5, severity=(0.3, 0.9)), ImageOptions(degrade=1, severity=(0.3, 0.9))),
    "look_alike": (_CLEAN, _CLEAN),
}


def write_face_pairs(
    folder: str | os.PathLike,
    *,
    kinds: tuple[str, ...] = ("clean", "cross_pose", "low_quality", "look_alike"),
    pairs: int = 2000,
    identities: int = 200,
    first_identity: int = FIRST_IDENTITY,
    seed: int = 0,
    spread: float = 0.35,
    quality: int = 92,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Render `<kind>.bin` (insightface's verification form) and `<kind>.quality.npy` (float32 [2 * pairs]).

    Every kind has `pairs` pairs in ten folds as LFW has them: a fold is pairs / 20 genuine pairs, then as many impostor
    pairs, and no person is in two folds. clean: |yaw| below 21 degrees, not degraded; cross_pose: the second picture
    has 35 to 60 degrees of yaw; low_quality: the second picture, and half of the first ones, are degraded; look_alike:
    clean, impostors are near neighbours in shape, skin, hair and brows. Persons are first_identity and up (our default
    keeps them apart from any training set). A kind that is there, by its `<kind>.json`, is not rendered again."""
    from protomem.data.images import encode_jpeg
    from protomem.data.pairs import write_bin

    unknown = [kind for kind in kinds if kind not in PAIR_OPTIONS]
    if unknown:
        raise UserError(f"unknown kind of pairs '{unknown[0]}'; known: {', '.join(PAIR_OPTIONS)}")
    if pairs < 2 * _FOLDS or pairs % (2 * _FOLDS) or identities < 2 * _FOLDS:
        raise UserError(
            f"pairs must be a multiple of {2 * _FOLDS} and identities at least {2 * _FOLDS}, not {pairs} and "
            f"{identities}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for kind in kinds:
        path = out[kind] = folder / f"{kind}.bin"
        options = PAIR_OPTIONS[kind]
        wanted = {
            "kind": kind,
            "pairs": pairs,
            "identities": identities,
            "first_identity": first_identity,
            "seed": seed,
            "spread": spread,
            "quality": quality,
            "options": [asdict(o) for o in options],
        }
        manifest = folder / f"{kind}.json"
        if read_manifest(manifest, wanted, [path]) is not None:
            continue
        people, same = plan_pairs(kind, pairs, identities, first_identity, seed, spread)
        pictures, place = np.unique(picture_numbers(people, same), axis=0, return_inverse=True)
        place = place.reshape(-1)
        blocks = render_blocks(
            pictures[:, 0],
            pictures[:, 1],
            list(options),
            seed=seed,
            spread=spread,
            device=device,
            workers=workers,
            title=f"rendering {kind} pairs" if progress else None,
            encode=lambda picture: encode_jpeg(picture, quality),
        )
        encoded, truth = [], []
        for _, block, block_quality in blocks:
            encoded += block
            truth.append(block_quality)
        manifest.unlink(missing_ok=True)
        encoded, truth = [encoded[k] for k in place], np.concatenate(truth)[place]
        write_bin(path, encoded, same.tolist())
        write_atomically(folder / f"{kind}.quality.npy", lambda file, truth=truth: np.save(file, truth))
        write_manifest(manifest, wanted, [path], {"pairs": pairs, "quality_mean": float(truth.mean())})
    return out


def plan_pairs(
    kind: str, pairs: int, identities: int, first_identity: int, seed: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Who is in each pair: int64 [pairs, 2], and bool [pairs] whether they are the same person."""
    half = pairs // (2 * _FOLDS)
    people, same = [], []
    for fold in range(_FOLDS):
        size = identities // _FOLDS
        if kind == "look_alike":
            pool = first_identity + np.arange(fold * size * _POOL, (fold + 1) * size * _POOL)
            impostor = nearest_pairs(pool, half, seed, spread)
            genuine = np.unique(impostor)
        else:
            genuine = first_identity + np.arange(fold * size, (fold + 1) * size)
            impostor = _random_pairs(genuine, half, seed)
        genuine = np.resize(genuine[bits(key(seed, "genuine", fold), len(genuine))[0].argsort(kind="stable")], half)
        people += [np.stack([genuine, genuine], 1), impostor]
        same += [np.ones(half, bool), np.zeros(half, bool)]
    return np.concatenate(people), np.concatenate(same)


def picture_numbers(people: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Which picture of whom stands where: int64 [2 * pairs, 2] of (person, number) for people [pairs, 2], same [pairs].

    Everybody has three pictures for the first place of a pair (even numbers) and three for the second (odd ones), used
    again and again, as LFW does: nine different genuine pairs of a person, far fewer pictures to render than places.
    """
    numbers = np.empty_like(people)
    for side in (0, 1):
        group = people[:, side] * 2 + same
        order = group.argsort(kind="stable")
        new = np.r_[True, np.diff(group[order]) != 0]
        turn = np.empty(len(group), np.int64)
        turn[order] = np.arange(len(group)) - np.maximum.accumulate(np.where(new, np.arange(len(group)), 0))
        numbers[:, side] = 2 * ((turn + side * (turn // 3)) % 3) + side
    return np.stack([people, numbers], 2).reshape(-1, 2)


def _random_pairs(people: np.ndarray, count: int, seed: int) -> np.ndarray:
    u = uniform(key(seed, "impostor", people[0], np.arange(count)), 2)
    first = (u[:, 0] * len(people)).astype(np.int64)
    step = 1 + (u[:, 1] * (len(people) - 1)).astype(np.int64)
    return np.stack([people[first], people[(first + step) % len(people)]], 1)


def nearest_pairs(people: np.ndarray, count: int, seed: int, spread: float) -> np.ndarray:
    """The `count` most alike pairs [count, 2] among `people`, nobody in more than ceil(4 * count / n) + 1 of them."""
    features = identity_features(people, seed, spread)
    squared = (features**2).sum(1)
    distance = np.round(squared[:, None] + squared[None, :] - 2 * features @ features.T, 6)
    first, second = np.triu_indices(len(people), 1)
    order = np.argsort(distance[first, second], kind="stable")
    limit = -(-4 * count // len(people)) + 1
    used = np.zeros(len(people), int)
    chosen = []
    for k in order:
        i, j = first[k], second[k]
        if used[i] < limit and used[j] < limit:
            used[[i, j]] += 1
            chosen.append((people[i], people[j]))
            if len(chosen) == count:
                break
    return np.array(chosen, np.int64)


def identity_features(people: np.ndarray, seed: int, spread: float) -> np.ndarray:
    """float64 [n, F]: what makes two people look alike, scaled so that each part has a comparable say."""
    head = load_head()
    parts = []
    for block in np.array_split(people, -(-len(people) // 256)):
        p = identity_parameters(head, seed, block, spread)
        face = head.skin_vertices[(head.vertices[head.skin_vertices, 2] > 0.9)][::8]
        shape = head.express(head.exact(p["weights"]), np.zeros((len(block), len(head.expressions))))
        shape = shape[face].numpy().reshape(-1, len(block)).T
        style = np.eye(len(STYLES))[p["style"]]
        parts.append(
            np.concatenate(
                [
                    shape * (1.6 / np.sqrt(shape.shape[1] / 3) / 0.1),
                    p["skin"] * 8,
                    p["hair"] * 4,
                    p["lip"] * 2,
                    p["iris"] * 1.5,
                    p["brow"] * [12, 12, 2, 0.5, 1, 4],
                    p["beard"][:, :3] * 1.5,
                    style * 1.2,
                    p["glasses"][:, None] * 2,
                    p["age"][:, None] * 1.5,
                    p["freckles"][:, None] * 2,
                ],
                1,
            )
        )
    return np.concatenate(parts)
