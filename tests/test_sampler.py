"""The order of training: permutations, shuffled and identity-balanced batches."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem.data.sampler import BalancedSampler, ShuffledSampler, permute
from protomem.seeds import hash64, uniform
from protomem.errors import UserError


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint64(key))), np.arange(n))


def test_permute_takes_a_size_and_a_key_per_element():
    n, key = np.array([1, 2, 7, 50, 10**12]), hash64(np.arange(5))
    index = np.array([0, 1, 3, 49, 10**12 - 1])
    together = permute(index, n, key)
    assert together.tolist() == [int(permute(i, m, k)[0]) for i, m, k in zip(index, n, key)]
    assert (together < n).all()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_small_permutation_is_about_equally_frequent(n):
    kinds = math.factorial(n)
    keys = hash64(5, np.arange(200 * kinds)).repeat(n)
    orders = permute(np.tile(np.arange(n), 200 * kinds), n, keys).reshape(-1, n)
    counts = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    chi2 = ((counts - 200.0) ** 2 / 200.0).sum() + 200.0 * (kinds - len(counts))
    assert chi2 < 55  # 23 degrees of freedom at most: p < 2e-4


@pytest.mark.parametrize("n", [5, 37, 1000])
def test_every_place_sees_every_record_about_equally_often(n):
    keys = hash64(11, np.arange(4000))
    for place in (0, n // 2, n - 1):
        got = permute(np.full(4000, place), n, keys) * 5 // n  # in five bins
        observed = np.bincount(got, minlength=5)
        expected = np.bincount(np.arange(n) * 5 // n, minlength=5) / n * 4000
        assert ((observed - expected) ** 2 / expected).sum() < 24  # 4 degrees of freedom: p < 1e-4


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(100_000), 100_000, hash64(3))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    assert (np.abs(np.diff(order)) < 10).mean() < 5e-4  # 2e-4 by chance


def test_uniform_is_uniform():
    x = uniform(1, 2, np.arange(50_000))
    assert 0 <= x.min() and x.max() < 1
    assert abs(x.mean() - 0.5) < 0.006 and abs(x.var() - 1 / 12) < 0.003
    assert np.bincount((x * 50).astype(int)).std() < 55  # 31.3 expected


def test_the_order_never_changes_between_versions():
    # A run resumed with a newer protomem must go on in the same order.
    assert ShuffledSampler(42_000_000, 8, seed=7).batch(3, 1000).tolist() == [
        38439563,
        363775,
        37586628,
        35496884,
        22081215,
        38456497,
        33921304,
        12728431,
    ]
    labels = np.arange(1000) // 5
    assert BalancedSampler(labels, 3, 2, seed=7).batch(2, 9).tolist() == [364, 360, 880, 884, 186, 185]


def test_shuffled_shows_each_record_once_per_epoch():
    sampler = ShuffledSampler(1003, 25, seed=1)
    epochs = [[sampler.batch(e, s) for s in range(sampler.steps_per_epoch)] for e in range(3)]
    assert sampler.steps_per_epoch == 40
    for epoch in epochs:
        seen = np.concatenate(epoch)
        assert len(set(seen)) == 1000 and seen.min() >= 0 and seen.max() < 1003
        assert seen.dtype == np.int64
    left_out = [set(range(1003)) - set(np.concatenate(epoch)) for epoch in epochs]
    assert left_out[0] != left_out[1] != left_out[2]
    assert (np.concatenate(epochs[0]) == np.concatenate(epochs[1])).mean() < 0.02
    other = np.concatenate([ShuffledSampler(1003, 25, seed=2).batch(0, s) for s in range(40)])
    assert (np.concatenate(epochs[0]) == other).mean() < 0.02


def test_order_neither_uses_nor_moves_numpys_random_stream():
    np.random.seed(0)
    before = ShuffledSampler(500, 50, seed=1).batch(0, 0), BalancedSampler(np.arange(60) // 3, 4, 2, 1).batch(0, 0)
    assert np.random.random() == np.random.RandomState(0).random_sample()
    after = ShuffledSampler(500, 50, seed=1).batch(0, 0), BalancedSampler(np.arange(60) // 3, 4, 2, 1).batch(0, 0)
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_any_step_of_a_huge_set_at_once():
    sampler = ShuffledSampler(10**12, 64, seed=0)
    batch = sampler.batch(10**6, sampler.steps_per_epoch - 1)
    assert len(set(batch)) == 64 and batch.max() < 10**12


def _long_tail(seed=0):
    """Labels with 1 to 12 images each, gaps in the numbering, not in order."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(40) * 3, rng.integers(1, 13, 40))
    return rng.permutation(labels)


def test_balanced_batches_are_p_identities_times_k_neighbours():
    labels = _long_tail()
    sampler = BalancedSampler(labels, 7, 4, seed=3)
    assert sampler.batch_size == 28 and sampler.steps_per_epoch == len(labels) // 28
    for step in range(3 * sampler.steps_per_epoch):
        batch = sampler.batch(0, step)
        identities = labels[batch].reshape(7, 4)
        assert batch.dtype == np.int64
        assert (identities == identities[:, :1]).all()
        assert len(set(identities[:, 0])) == 7
        for row, identity in zip(batch.reshape(7, 4), identities[:, 0]):
            have = int((labels == identity).sum())
            assert len(set(row)) == min(have, 4)  # without replacement as far as its images go
            assert max(Counter(row).values()) <= -(-4 // have)  # and repeated as evenly as can be


def test_balanced_rounds_show_every_identity_once_and_cycle_through_its_images():
    labels = np.repeat(np.arange(12), 10)
    sampler = BalancedSampler(labels, 4, 4, seed=5)
    assert sampler.steps_per_epoch == 7  # rounds of 3 batches run on across epochs
    steps = [sampler.batch(e, s) for e in range(30) for s in range(7)]
    for start in range(0, 210, 3):
        seen = np.concatenate(steps[start : start + 3])
        assert sorted(labels[seen][::4]) == list(range(12))
    visits = {i: [] for i in range(12)}
    for batch in steps:
        for row in batch.reshape(4, 4):
            visits[labels[row[0]]].append(row)
    for rows in visits.values():  # 5 visits x 4 images = two passes over 10 images
        drawn = np.concatenate(rows)[: 20 * (len(rows) // 5)].reshape(-1, 10)
        assert all(len(set(one_pass)) == 10 for one_pass in drawn)
        assert not np.array_equal(drawn[0], drawn[2]) and np.array_equal(drawn[0], drawn[1])


def test_balanced_left_out_identities_change_from_round_to_round():
    sampler = BalancedSampler(np.repeat(np.arange(5), 8), 2, 2, seed=0)  # one of five sits out each round of two
    missing = []
    for visit in range(200):
        seen = np.concatenate([sampler.batch(0, 2 * visit), sampler.batch(0, 2 * visit + 1)]) // 8
        missing.append((set(range(5)) - set(seen)).pop())
    assert min(Counter(missing).values()) > 20 and len(set(missing)) == 5


def test_balanced_gives_the_same_identities_for_ordered_and_shuffled_labels():
    labels = np.sort(_long_tail())
    shuffle = np.random.default_rng(1).permutation(len(labels))
    ordered, mixed = BalancedSampler(labels, 5, 3, 1), BalancedSampler(labels[shuffle], 5, 3, 1)
    for step in range(20):
        assert np.array_equal(labels[ordered.batch(1, step)], labels[shuffle][mixed.batch(1, step)])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ShuffledSampler(10, 11, 0), "batch of 11 cannot be drawn from 10 images"),
        (lambda: BalancedSampler(np.arange(6) // 2, 4, 1, 0), "only 3"),
        (lambda: BalancedSampler(np.arange(6) // 2, 3, 4, 0), "3 identities x 4 images cannot be drawn from 6"),
    ],
)
def test_impossible_batches_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
