"""Pair verification: is it the same identity? Accuracy by folds, ROC, TAR@FAR, AUC, EER, error versus reject.

Everything is computed in float64 from unit embeddings. Scores are cosines, higher = more alike, and a pair is
accepted when its score is at least the threshold; the accuracy protocol works on squared distances, d = 2 - 2 cos.
Legend: n pairs, D feature size, T thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protomem.errors import UserError

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
# The grid of the LFW protocol as facenet and insightface run it; squared distances of unit vectors lie in [0, 4].
DISTANCE_GRID = np.arange(0, 4, 0.01)


@dataclass
class Verification:
    """The result of one pair set. Rates are in [0, 1]; a rate that the data cannot define is NaN."""

    accuracy: float  # mean over the folds
    accuracy_std: float  # population standard deviation over the folds
    fold_accuracies: np.ndarray  # [folds]
    tar_at_far: dict[float, float]  # {1e-3: 0.91, ...}
    auc: float
    eer: float
    threshold: float  # squared distance, mean of the folds' choices; as a cosine: 1 - threshold / 2
    scores: np.ndarray  # [n] cosine of each pair
    same: np.ndarray  # [n] bool
    norms: np.ndarray  # [2n] embedding norms before normalisation: row 2i and 2i+1 belong to pair i
    quality: np.ndarray | None = None  # [2n] known quality of the images, where somebody knows it; higher is better
    rendered: bool = False  # the images are synthetic, and it is said wherever the numbers are shown

    def summary(self) -> dict[str, float]:
        """The numbers alone, flat, for a log line: accuracy, tar@1e-3, ..."""
        tars = {f"tar@{far_name(far)}": tar for far, tar in self.tar_at_far.items()}
        return {
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            **tars,
            "auc": self.auc,
            "eer": self.eer,
            "threshold": self.threshold,
            "pairs": len(self.same),
            "rendered": self.rendered,
        }


def far_name(far: float) -> str:
    """1e-3, the same on every platform; part of the keys of `Verification.summary`."""
    return f"{far:.0e}".replace("e-0", "e-")


def verify_pairs(embeddings, same, folds: int = 10) -> Verification:
    """Score the pairs (row 2i, row 2i+1) of embeddings [2n, D], where same [n] says which are one identity.

    Embeddings need not be unit vectors. The accuracy is the LFW protocol (Huang et al. 2007) as the field's code runs
    it: contiguous, unshuffled folds, the first n % folds of them one pair longer; for each fold the first best
    threshold of DISTANCE_GRID on the other folds; a pair is accepted when its squared distance is below it. The order
    of the pairs therefore matters: each fold should hold as many genuine as impostor pairs. Thresholds are not searched
    between the grid's points: the numbers would no longer compare with published ones.

    TAR@FAR, AUC and EER are taken over all pairs at once; their rules stand at `tar_at_far`, `auc`, `equal_error_rate`.
    Raises UserError if rows and flags do not match, if there are fewer pairs than folds, or if a value is not finite.
    """
    embeddings, same = np.asarray(embeddings, np.float64), np.asarray(same, bool)
    n = len(same)
    if embeddings.ndim != 2 or len(embeddings) != 2 * n:
        raise UserError(f"verification needs two embeddings per pair: got {embeddings.shape} for {n} pairs")
    if folds < 2 or n < folds:
        raise UserError(f"verification needs at least two folds and a pair in each: got {n} pairs for {folds} folds")
    broken = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(broken):
        raise UserError(
            f"{len(broken)} of {2 * n} embeddings are not finite, the first is that of image {broken[0]}: "
            "the encoder has diverged, or precision=fp16 overflows (try fp32 or bf16)"
        )
    norms = np.linalg.norm(embeddings, axis=1)
    unit = embeddings / np.where(norms > 0, norms, 1)[:, None]
    distances = np.square(unit[0::2] - unit[1::2]).sum(1)
    scores = 1 - distances / 2
    accuracies, thresholds = fold_accuracies(distances, same, folds)
    return Verification(
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        fold_accuracies=accuracies,
        tar_at_far={far: tar_at_far(scores, same, far) for far in FARS},
        auc=auc(scores, same),
        eer=equal_error_rate(scores, same),
        threshold=float(thresholds.mean()),
        scores=scores,
        same=same,
        norms=norms,
    )


def fold_accuracies(distances, same, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy [folds] on each fold and the threshold [folds] that the other folds chose; see `verify_pairs`."""
    right = np.empty((folds, len(DISTANCE_GRID)), np.int64)  # correct decisions of each fold at each threshold
    sizes = np.empty(folds, np.int64)
    for k, (d, s) in enumerate(zip(np.array_split(distances, folds), np.array_split(same, folds))):
        accepted_genuine = np.searchsorted(np.sort(d[s]), DISTANCE_GRID)
        accepted_impostor = np.searchsorted(np.sort(d[~s]), DISTANCE_GRID)
        right[k], sizes[k] = accepted_genuine + (~s).sum() - accepted_impostor, len(s)
    chosen = np.argmax(right.sum(0) - right, axis=1)
    return right[np.arange(folds), chosen] / sizes, DISTANCE_GRID[chosen]


def roc(scores, same) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every operating point: FAR [T], TAR [T] and threshold [T], from (0, 0) at +inf to (1, 1) at the lowest score.

    Equal scores are accepted together. NaN rates where there is no impostor or no genuine pair.
    """
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # the last pair of each run of equal scores
    accepted = [np.append(0, np.cumsum(kind)[last]) for kind in (~same, same)]
    with np.errstate(invalid="ignore"):
        far, tar = (a / a[-1] if a[-1] else np.full(len(a), np.nan) for a in accepted)
    return far, tar, np.append(np.inf, scores[last])


def threshold_at_far(scores, same, far: float) -> float:
    """The lowest observed score at which at most floor(far * impostors) impostors are accepted, else +inf.

    NaN where far * impostors < 1: so low a rate cannot be measured with so few impostors.
    """
    impostors = np.sort(scores[~same])[::-1]
    allowed = int(np.floor(far * len(impostors) + 1e-9))
    if allowed < 1:
        return float("nan")
    if allowed >= len(impostors):
        return float(scores.min())
    above = scores[scores > impostors[allowed]]
    return float(above.min()) if len(above) else float("inf")


def tar_at_far(scores, same, far: float) -> float:
    """The share of genuine pairs accepted at `threshold_at_far`: a step function of the counts, without interpolation,
    so that the false accept rate of the data never exceeds `far`. NaN with fewer than 1 / far impostors, or no genuine.
    """
    threshold, genuine = threshold_at_far(scores, same, far), scores[same]
    if np.isnan(threshold) or not len(genuine):
        return float("nan")
    return float((genuine >= threshold).mean())


def auc(scores, same) -> float:
    """The probability that a genuine pair scores above an impostor pair, ties counted half (Mann-Whitney)."""
    genuine, impostors = scores[same], np.sort(scores[~same])
    if not len(genuine) or not len(impostors):
        return float("nan")
    below, upto = np.searchsorted(impostors, genuine), np.searchsorted(impostors, genuine, side="right")
    return float((below + upto).mean() / (2 * len(impostors)))


def equal_error_rate(scores, same) -> float:
    """Where false accept and false reject rate meet, on the line between the two operating points around it."""
    far, tar, _ = roc(scores, same)
    gap = far - (1 - tar)  # rises from -1 to 1
    if np.isnan(gap[-1]):
        return float("nan")
    k = int(np.argmax(gap >= 0))
    share = -gap[k - 1] / (gap[k] - gap[k - 1])
    return float(far[k - 1] + share * (far[k] - far[k - 1]))


def error_versus_reject(scores, same, quality, far: float) -> tuple[np.ndarray, np.ndarray]:
    """False non-match rate of what is left when the pairs of lowest quality are rejected (Grother and Tabassi 2007).

    quality [n] belongs to pairs (the lower of its two images, usually). The threshold is fixed once, at `far` on all
    pairs. Returns the rejected share of the genuine pairs [0 .. 0.95 in 96 steps] and the rate [96]; equal qualities
    keep the order of the pairs. A curve that falls says that quality predicts errors. NaN where `far` is undefined.
    """
    genuine, threshold = scores[same], threshold_at_far(scores, same, far)
    shares = np.arange(96) / 100
    if np.isnan(threshold) or not len(genuine):
        return shares, np.full(len(shares), np.nan)
    errors = (genuine < threshold)[np.argsort(quality[same], kind="stable")]
    rejected = np.floor(shares * len(errors) + 1e-9).astype(int)
    left = np.append(np.cumsum(errors[::-1])[::-1], 0)[rejected]  # errors among the pairs that are kept
    return shares, left / (len(errors) - rejected)
