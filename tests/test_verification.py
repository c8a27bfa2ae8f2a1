"""Every metric against a slow loop written from its definition, with ties and with few impostors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem.errors import UserError
from protomem.evaluate import verification as v


def make_embeddings(n, noise=0.9, dim=8, seed=0):
    """Alternating genuine and impostor pairs [2n, dim] with random norms, and their flags [n]."""
    rng = np.random.default_rng(seed)
    same = np.arange(n) % 2 == 0
    first = rng.standard_normal((n, dim))
    second = np.where(same[:, None], first + noise * rng.standard_normal((n, dim)), rng.standard_normal((n, dim)))
    rows = np.stack([first, second], 1).reshape(2 * n, dim) * rng.uniform(0.5, 20, (2 * n, 1))
    return rows.astype(np.float32), same


def slow_squared_distances(embeddings):
    out = []
    for i in range(0, len(embeddings), 2):
        a, b = (np.asarray(e, np.float64) for e in embeddings[i : i + 2])
        a, b = a / math.sqrt(sum(a * a)), b / math.sqrt(sum(b * b))
        out.append(sum((x - y) ** 2 for x, y in zip(a, b)))
    return np.array(out)


def slow_fold_accuracies(distances, same, folds):
    """Huang et al.'s protocol in plain loops: [accuracy per fold], [threshold per fold]."""
    n, out = len(same), []
    grid = [0.01 * k for k in range(400)]
    first = 0
    for fold in range(folds):
        size = n // folds + (1 if fold < n % folds else 0)
        test = set(range(first, first + size))
        first += size
        best, best_right = None, -1
        for t in grid:
            right = sum((distances[i] < t) == same[i] for i in range(n) if i not in test)
            if right > best_right:
                best, best_right = t, right
        out.append((sum((distances[i] < best) == same[i] for i in test) / size, best))
    return [a for a, _ in out], [t for _, t in out]


def slow_tar_at_far(scores, same, far):
    """Try every score as a threshold; of those whose false accepts stay within far, take the most true accepts."""
    genuine = [s for s, g in zip(scores, same) if g]
    impostors = [s for s, g in zip(scores, same) if not g]
    if not genuine or far * len(impostors) < 1 - 1e-9:
        return math.nan
    best = 0.0
    for threshold in scores:
        if sum(s >= threshold for s in impostors) / len(impostors) <= far + 1e-12:
            best = max(best, sum(s >= threshold for s in genuine) / len(genuine))
    return best


def slow_auc(scores, same):
    total = count = 0
    for a, genuine in zip(scores, same):
        for b, other in zip(scores, same):
            if genuine and not other:
                total += 1.0 if a > b else 0.5 if a == b else 0.0
                count += 1
    return total / count if count else math.nan


def slow_eer(scores, same):
    """Walk the thresholds downwards until false accepts reach false rejects; cross the last step on a straight line."""
    genuine = [s for s, g in zip(scores, same) if g]
    impostors = [s for s, g in zip(scores, same) if not g]
    if not genuine or not impostors:
        return math.nan
    far, frr = 0.0, 1.0
    for threshold in sorted(set(scores), reverse=True):
        next_far = sum(s >= threshold for s in impostors) / len(impostors)
        next_frr = sum(s < threshold for s in genuine) / len(genuine)
        if next_far >= next_frr:
            t = (frr - far) / ((next_far - far) + (frr - next_frr))
            return far + t * (next_far - far)
        far, frr = next_far, next_frr
    raise AssertionError("far ends at 1 and frr at 0")


@pytest.mark.parametrize("n, folds", [(100, 10), (103, 10), (10, 10), (47, 5)])
def test_accuracy_equals_the_protocol_in_plain_loops(n, folds):
    embeddings, same = make_embeddings(n)
    result = v.verify_pairs(embeddings, same, folds)
    distances = slow_squared_distances(embeddings)
    accuracies, thresholds = slow_fold_accuracies(distances, same, folds)
    assert result.fold_accuracies == pytest.approx(accuracies, abs=1e-12)
    assert result.accuracy == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert result.accuracy_std == pytest.approx(np.std(accuracies), abs=1e-12)
    assert result.threshold == pytest.approx(np.mean(thresholds), abs=1e-12)
    assert result.scores == pytest.approx(1 - distances / 2, abs=1e-12)
    assert result.norms == pytest.approx(np.linalg.norm(embeddings, axis=1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40))
def test_rates_equal_slow_loops_with_ties(pairs):
    scores = np.array([s / 8 for s, _ in pairs])
    same = np.array([g for _, g in pairs])
    for far in (0.5, 0.25, 0.1, 0.05):
        assert v.tar_at_far(scores, same, far) == pytest.approx(slow_tar_at_far(scores, same, far), nan_ok=True)
    assert v.auc(scores, same) == pytest.approx(slow_auc(scores, same), nan_ok=True)
    assert v.equal_error_rate(scores, same) == pytest.approx(slow_eer(scores, same), nan_ok=True)


def test_rates_equal_scikit_learn_and_the_loops_on_many_pairs():
    metrics = pytest.importorskip("sklearn.metrics")
    embeddings, same = make_embeddings(400, seed=3)
    result = v.verify_pairs(embeddings, same)
    far, tar, thresholds = v.roc(result.scores, same)
    expected = metrics.roc_curve(same, result.scores, drop_intermediate=False)
    for ours, theirs in zip((far, tar, thresholds), expected):
        assert ours == pytest.approx(theirs)
    assert result.auc == pytest.approx(metrics.roc_auc_score(same, result.scores))
    assert result.auc == pytest.approx(slow_auc(result.scores, same))
    assert result.eer == pytest.approx(slow_eer(result.scores, same))
    assert result.tar_at_far[1e-1] == slow_tar_at_far(result.scores, same, 1e-1)
    assert result.tar_at_far[1e-2] == slow_tar_at_far(result.scores, same, 1e-2)


def test_a_rate_below_one_impostor_is_not_made_up():
    embeddings, same = make_embeddings(400)  # 200 impostors: 1e-2 allows two false accepts, 1e-3 not even one
    tars = v.verify_pairs(embeddings, same).tar_at_far
    assert 0 < tars[1e-2] <= tars[1e-1] <= 1
    assert math.isnan(tars[1e-3]) and math.isnan(tars[1e-4])
    scores, flags = np.linspace(0, 1, 1001), np.arange(1001) >= 1000  # 1000 impostors allow exactly one
    assert v.tar_at_far(scores, flags, 1e-3) == 1.0
    assert v.threshold_at_far(scores, flags, 1e-3) == scores[999]


def test_tied_impostors_are_not_accepted_beyond_the_rate():
    scores = np.array([0.9] * 10 + [0.8, 0.9, 0.95])
    same = np.array([False] * 10 + [True] * 3)
    assert v.tar_at_far(scores, same, 0.1) == pytest.approx(1 / 3)  # one may pass, but ten stand together at 0.9
    assert v.tar_at_far(scores[:-1], same[:-1], 0.1) == 0.0


def test_perfect_and_reversed_scores():
    scores, same = np.array([0.1, 0.2, 0.8, 0.9] * 5), np.array([False, False, True, True] * 5)
    assert (v.auc(scores, same), v.equal_error_rate(scores, same), v.tar_at_far(scores, same, 0.1)) == (1, 0, 1)
    assert (v.auc(scores, ~same), v.equal_error_rate(scores, ~same), v.tar_at_far(scores, ~same, 0.1)) == (0, 1, 0)


def test_one_kind_of_pair_only_has_an_accuracy_but_no_rates():
    embeddings, _ = make_embeddings(20)
    result = v.verify_pairs(embeddings, np.ones(20, bool))
    assert result.accuracy >= 0.9
    assert math.isnan(result.auc) and math.isnan(result.eer) and math.isnan(result.tar_at_far[1e-1])


def test_summary_is_flat_and_named_by_the_rate():
    embeddings, same = make_embeddings(40)
    summary = v.verify_pairs(embeddings, same).summary()
    rates = ["tar@1e-1", "tar@1e-2", "tar@1e-3", "tar@1e-4"]
    assert list(summary) == ["accuracy", "accuracy_std", *rates, "auc", "eer", "threshold", "pairs", "rendered"]
    assert summary["pairs"] == 40


def test_error_versus_reject_equals_a_slow_loop():
    embeddings, same = make_embeddings(300, noise=1.5)
    result = v.verify_pairs(embeddings, same)
    quality = np.round(np.random.default_rng(1).uniform(size=300), 2)
    shares, rates = v.error_versus_reject(result.scores, same, quality, 1e-1)
    threshold = v.threshold_at_far(result.scores, same, 1e-1)
    genuine = sorted(
        ((quality[i], i, result.scores[i]) for i in range(300) if same[i]), key=lambda entry: (entry[0], entry[1])
    )
    for share, rate in zip(shares, rates):
        kept = genuine[int(share * len(genuine) + 1e-9) :]
        assert rate == pytest.approx(sum(score < threshold for _, _, score in kept) / len(kept))
    assert rates[0] == pytest.approx(1 - v.tar_at_far(result.scores, same, 1e-1))
    assert rates[0] > 0.05  # the comparison saw errors
    _, by_score = v.error_versus_reject(result.scores, same, result.scores, 1e-1)
    assert (
        by_score[-1] == 0 and (np.diff(by_score) <= 1e-12).all()
    )  # a quality that knows the truth rejects every error
    assert np.isnan(v.error_versus_reject(result.scores, same, quality, 1e-4)[1]).all()


@pytest.mark.parametrize(
    "embeddings, same, message",
    [
        (np.zeros((3, 2)), [True] * 2, "two embeddings per pair"),
        (np.ones((4, 2)), [True] * 2, "got 2 pairs for 10 folds"),
        (np.where(np.arange(40)[:, None] == 7, np.nan, np.ones((40, 2))), [True] * 20, "the first is that of image 7"),
    ],
)
def test_wrong_input_is_named(embeddings, same, message):
    with pytest.raises(UserError, match=message):
        v.verify_pairs(embeddings, same)


def test_a_zero_embedding_is_no_error():
    embeddings, same = make_embeddings(20)
    embeddings[3] = 0
    assert v.verify_pairs(embeddings, same).scores[1] == pytest.approx(0.5)  # |u - 0|^2 = 1, as the field's code has it
