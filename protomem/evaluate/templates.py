"""Templates: several images of one person pooled into one embedding, and their verification.

An image counts by its weight in norm(sum w x / |x|): `mean` (all alike), `norm` (w = |x|: MagFace's magnitude-weighted
pooling, Meng et al. 2021, section 4.3; also the plain sum of raw embeddings) or `quality` (numbers that somebody knows).
Images of one medium (the frames of a video) are pooled among themselves first and count as one, as the IJB protocols ask.

Legend: n images, D feature size, T templates, p pairs of templates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protomem.errors import UserError
from protomem.evaluate.verification import FARS, auc, equal_error_rate, far_name, tar_at_far

POOLINGS = ("mean", "norm", "quality")


@dataclass
class Protocol:
    """template [n] and medium [n] of each image, numbered from 0; pairs [p, 2] of templates; same [p]: one person?"""

    template: np.ndarray
    medium: np.ndarray
    pairs: np.ndarray
    same: np.ndarray


def pool(embeddings, template, weight=None, medium=None) -> np.ndarray:
    """Unit templates [T, D] from embeddings [n, D] of images, template [n] in 0..T-1, all of which occur.

    weight [n] >= 0, not all zero in any template (None: equal); medium [n]: images of a template with the same number are
    averaged first (None: each by itself). Where a template's sum has no direction the row is zero.
    """
    x = np.asarray(embeddings, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, np.float64)
    owner = np.asarray(template)
    if medium is not None:
        (keys, group) = np.unique(np.stack([owner, np.asarray(medium)]), axis=1, return_inverse=True)
        group, owner = group.ravel(), keys[0]
        total = np.zeros(len(owner))
        np.add.at(total, group, weight)
        count = np.bincount(group)
        sums = np.zeros((len(owner), x.shape[1]))
        np.add.at(sums, group, weight[:, None] * x)
        # A medium's embedding is the weighted mean of its images, and it counts their mean weight.
        x, weight = sums / np.maximum(total, 1e-12)[:, None], total / count
    out = np.zeros((int(owner.max()) + 1, x.shape[1]))
    np.add.at(out, owner, weight[:, None] * x)
    length = np.linalg.norm(out, axis=1, keepdims=True)
    return np.where(length > 1e-12, out / np.maximum(length, 1e-12), 0)


def random_protocol(labels, images: int, most_pairs: int, seed: int = 0) -> Protocol:
    """Templates of `images` images each from a labelled set: an identity's images in random order, cut into full templates
    (the rest is left out: template -1). All genuine pairs and as many impostor pairs at random, at most `most_pairs` of each.

    Raises UserError if no identity has two templates, or there are fewer than two identities.
    """
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # an identity's images are neighbours now, in random order
    _, start, group, count = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    full = count // images
    first, part = np.cumsum(full) - full, (np.arange(len(order)) - start[group]) // images
    template = np.empty(len(labels), np.int64)
    template[order] = np.where(part < full[group], first[group] + part, -1)
    person = np.repeat(np.arange(len(full)), full)
    ends = np.cumsum(full * (full - 1) // 2)
    if not ends[-1] or (full > 0).sum() < 2:
        raise UserError(f"no two identities with two templates of {images} images; lower --images-per-template")
    # Number r of an identity's pairs 01, 02, 12, 03, ...: the second has r >= j (j - 1) / 2. None is listed that is not drawn.
    drawn = rng.choice(ends[-1], min(ends[-1], most_pairs), replace=False)
    owner = np.searchsorted(ends, drawn, side="right")
    r = drawn - (ends - full * (full - 1) // 2)[owner]
    j = ((1 + np.sqrt(1 + 8 * r)) // 2).astype(np.int64)
    genuine = first[owner, None] + np.stack([r - j * (j - 1) // 2, j], 1)
    # More draws than are wanted, since some are of one person or come twice.
    drawn = np.unique(np.sort(rng.integers(0, len(person), (3 * len(genuine), 2))), axis=0)
    impostor = rng.permutation(drawn[person[drawn[:, 0]] != person[drawn[:, 1]]])[: len(genuine)]
    same = np.repeat([True, False], [len(genuine), len(impostor)])
    return Protocol(template, np.arange(len(labels)), np.concatenate([genuine, impostor]), same)


def _table(path: Path, what: str, names: bool) -> list[list[str]]:
    """Lines of three words, whole numbers but for the first one if it is a name."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it should be a text file of lines `{what}`") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 3 or not all(cell.removeprefix("-").isdecimal() and len(cell) <= 18 for cell in row[names:]):
            raise UserError(f"{path}: line {number} is not `{what}`")
        if names and (os.path.isabs(row[0]) or ".." in Path(row[0]).parts or "\0" in row[0]):
            raise UserError(f"{path}: line {number} names {row[0]}, which is not below the folder of the images")
    if not rows:
        raise UserError(f"{path} is empty; it should have lines `{what}`")
    return rows


def read_protocol(images: Path, pairs: Path) -> tuple[list[str], Protocol]:
    """(image names, protocol) from the two lists of the IJB protocols as insightface ships them: `name template medium` and
    `template template same` (0 or 1). Raises UserError for a line of another form or a template that has no image."""
    listed, compared = _table(images, "image template medium", True), _table(pairs, "template template same", False)
    numbers, template = np.unique([int(row[1]) for row in listed], return_inverse=True)
    place = {int(n): k for k, n in enumerate(numbers)}
    for number, (a, b, _) in enumerate(compared, 1):
        for one in (a, b):
            if int(one) not in place:
                raise UserError(f"{pairs}: line {number} names template {one}, of which {images} lists no image")
    pair = np.array([[place[int(a)], place[int(b)]] for a, b, _ in compared])
    same = np.array([int(s) == 1 for _, _, s in compared])
    return [row[0] for row in listed], Protocol(template, np.array([int(row[2]) for row in listed]), pair, same)


def verify_templates(embeddings, protocol: Protocol, pooling: str, quality=None) -> dict[str, float]:
    """TAR@FAR, AUC and EER of the protocol's pairs, with the images of a template pooled by `pooling`.

    embeddings [n, D] raw; images with template -1 are left out. quality [n] >= 0: for that pooling. Raises UserError if it
    is missing or negative, or the embeddings are not finite."""
    embeddings = np.asarray(embeddings, np.float64)
    if not np.isfinite(embeddings).all():
        raise UserError("an embedding is not finite: the encoder has diverged")
    if pooling == "quality" and quality is None:
        raise UserError("pooling=quality needs a quality for each image: train.quality.npy beside the data")
    if pooling == "quality" and not (np.asarray(quality) >= 0).all():  # nan is refused as well
        raise UserError("pooling=quality: a quality is negative or not a number; shift or scale the numbers")
    used = protocol.template >= 0
    weight = {"mean": None, "norm": np.linalg.norm(embeddings, axis=1)}.get(pooling, quality)
    weight = None if weight is None else np.asarray(weight)[used]
    templates = pool(embeddings[used], protocol.template[used], weight, protocol.medium[used])
    scores = (templates[protocol.pairs[:, 0]] * templates[protocol.pairs[:, 1]]).sum(1)
    rates = {f"tar@{far_name(far)}": tar_at_far(scores, protocol.same, far) for far in (*FARS, 1e-5)}
    return {**rates, "auc": auc(scores, protocol.same), "eer": equal_error_rate(scores, protocol.same)}
