"""The integer plan of a prototype memory: its invariants, equality with a dictionary, hashes, other sizes, ages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem.prototypes.slots import EMPTY, FILLER, POLICIES, Slots
from tests.memory_reference import SlotReference

IDENTITIES = 23
STATE = ("label", "seq", "written", "cursor", "clock", "time")


@st.composite
def batches(draw, steps=40):
    """(number of slots, label lists): batches of different lengths, never with more identities than slots."""
    slots = draw(st.integers(1, 12))
    # Sometimes few identities, so that most are refreshed; sometimes all of them, so that most evict.
    pool = draw(st.integers(1, IDENTITIES))
    labels = st.lists(st.integers(0, pool - 1), min_size=1, max_size=14)
    lists = draw(st.lists(labels, min_size=1, max_size=steps))
    kept = []
    for one in lists:
        allowed = list(dict.fromkeys(one))[:slots]
        kept.append([c for c in one if c in allowed])
    return slots, kept


def tensor(labels) -> torch.Tensor:
    return torch.tensor(labels, dtype=torch.int64)


def check_invariants(slots: Slots) -> None:
    """What must hold after every step, whatever the policy; from the public buffers alone."""
    label, seq = slots.label[:-1].tolist(), slots.seq[:-1].tolist()
    stored = [c for c in label if c >= 0]
    assert len(stored) == len(set(stored)), "an identity has two slots"
    assert len(seq) == len(set(seq)), "seq is not unique"
    inverse = {c: s for s, c in enumerate(label) if c >= 0}
    assert slots.slot_of[:-1].tolist() == [inverse.get(c, -1) for c in range(slots.num_identities)]
    assert slots.occupied().tolist() == [c >= 0 for c in label]
    filled = [q for c, q in zip(label, seq) if c >= 0]
    vacant = [q for c, q in zip(label, seq) if c < 0]
    assert not filled or not vacant or max(vacant) < min(filled), "an empty slot would be given away after a full one"
    assert not filled or max(filled) < slots.clock


def check_equal(slots: Slots, reference: SlotReference) -> None:
    assert [None if c < 0 else c for c in slots.label[:-1].tolist()] == reference.slots
    assert slots.written[:-1].tolist() == reference.written
    ages = [reference.time - 1 - w for w in reference.written]
    assert slots.age().tolist() == ages
    seq = slots.seq[:-1].tolist()
    filled = [s for s, c in enumerate(reference.slots) if c is not None]
    assert sorted(filled, key=lambda s: seq[s]) == reference.oldest_first()
    if slots.policy == "ring":
        assert slots.cursor == reference.cursor
    assert slots.time == reference.time


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=150, deadline=None)
@given(case=batches())
def test_equals_dictionary(policy, case):
    """Thousands of steps: the plan, the whole state and the invariants, against dictionaries and loops."""
    size, lists = case
    slots, reference = Slots(size, IDENTITIES, policy), SlotReference(size, policy)
    seen = set()
    for labels in lists:
        before = slots.label[:-1].tolist()
        plan = slots.plan(tensor(labels))
        refreshed, new = reference.plan(labels)
        identities = sorted(set(labels))
        n, pad = len(identities), len(labels) - len(identities)
        assert plan.identity.tolist() == identities + [-1] * pad
        assert plan.slot.tolist() == [reference.slot_of[c] for c in identities] + [size] * pad
        assert plan.found.tolist() == [c in refreshed for c in identities] + [False] * pad
        assert plan.new.tolist() == [c in new for c in identities] + [False] * pad
        assert plan.identity[plan.group].tolist() == labels
        after = slots.label[:-1].tolist()
        evicted = {c for c in before if c >= 0} - set(after)
        assert set(identities) <= set(after), "an identity of the batch has no slot"
        assert not evicted & set(identities), "an identity of the batch was evicted"
        assert len(evicted) == max(0, sum(c >= 0 for c in before) + len(new) - size)
        for c in refreshed:
            assert before[reference.slot_of[c]] == c, "a refreshed identity moved"
        seen |= set(identities)
        assert slots.occupied().sum() == min(size, len(seen))
        assert not slots.overfull
        check_invariants(slots)
        check_equal(slots, reference)
        assert len(plan.slot) == len(labels) and n == (plan.identity >= 0).sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_long_run(policy):
    """2,000 steps of a size at which slots are reused hundreds of times; equality at every step."""
    generator = torch.Generator().manual_seed(1)
    size, identities = 17, 60
    slots, reference = Slots(size, identities, policy), SlotReference(size, policy)
    for step in range(2000):
        pool = 60 if step % 3 else 20
        labels = torch.randint(pool, (12,), generator=generator)
        slots.plan(labels)
        reference.plan(labels.tolist())
        check_equal(slots, reference)
    check_invariants(slots)


def test_ring_passes_over_what_it_just_refreshed():
    """By hand: identity 0 stands under the cursor, is refreshed in the same step, and lives a further revolution."""
    slots = Slots(3, 9, "ring")
    slots.plan(tensor([0, 1, 2]))
    plan = slots.plan(tensor([0, 5]))
    assert plan.slot.tolist() == [0, 1] and slots.label[:-1].tolist() == [0, 5, 2] and slots.cursor == 2
    assert slots.seq[0] < slots.seq[2] < slots.seq[1], "a refresh does not change the age in the ring"
    slots.plan(tensor([6, 7]))
    assert slots.label[:-1].tolist() == [7, 5, 6]


def test_lru_evicts_what_was_written_least_recently():
    slots = Slots(3, 9, "lru")
    slots.plan(tensor([0, 1, 2]))
    slots.plan(tensor([0, 5]))
    assert slots.label[:-1].tolist() == [0, 5, 2]
    assert slots.seq[2] < slots.seq[0] < slots.seq[1], "refreshed first, then new"
    slots.plan(tensor([6]))
    assert slots.label[:-1].tolist() == [0, 5, 6]


@pytest.mark.parametrize("policy", POLICIES)
def test_more_identities_than_slots_is_reported(policy):
    """No error on the step path, where nothing is read back: a flag, and a state that is still consistent."""
    slots = Slots(3, 9, policy)
    slots.plan(tensor([0, 1, 2]))
    assert not slots.overfull
    plan = slots.plan(tensor([1, 3, 4, 5, 6]))
    assert slots.overfull
    assert plan.slot[0] == 1 and (plan.slot < 3).sum() == 3
    check_invariants(slots)


def same_state(a: Slots, b: Slots) -> bool:
    """All but the spare places at the end of the arrays, which swallow the writes of padding."""
    values = [[getattr(s, name) for name in (*STATE, "slot_of")] for s in (a, b)]
    return all(torch.equal(*(v[:-1] if v.ndim else v for v in pair)) for pair in zip(*values))


def copy_of(slots: Slots) -> Slots:
    other = Slots(slots.num_slots, slots.num_identities, slots.policy)
    other.load_state_dict(slots.state_dict())
    other.index()
    return other


def run(size: int, lists, policy: str) -> Slots:
    slots = Slots(size, IDENTITIES, policy)
    for labels in lists:
        slots.plan(tensor(labels))
    return slots


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(case=batches(steps=12), data=st.data())
def test_fingerprint(policy, case, data):
    """Equal for equal replicas, different as soon as one number differs."""
    size, lists = case
    slots = run(size, lists, policy)
    other = copy_of(slots)
    assert same_state(slots, other) and slots.fingerprint() == run(size, lists, policy).fingerprint() == other.fingerprint()
    name = data.draw(st.sampled_from(STATE))
    value = getattr(other, name)
    change = data.draw(st.sampled_from([-7, -1, 1, 2, 1 << 20]))
    if value.ndim:
        place = data.draw(st.integers(0, size - 1))
        value[place] += change
    else:
        value += change
    assert slots.fingerprint() != other.fingerprint(), name


@pytest.mark.parametrize("policy", POLICIES)
def test_fingerprint_sees_order(policy):
    """The same labels in other places, and the same history in another order, are different states."""
    one = run(4, [[0, 1], [2, 3]], policy)
    assert one.fingerprint() != run(4, [[2, 3], [0, 1]], policy).fingerprint()
    swapped = copy_of(one)
    swapped.label[[0, 1]] = swapped.label[[1, 0]]
    assert one.fingerprint() != swapped.fingerprint()
    assert one.fingerprint() != run(4, [[0, 1], [2, 3], [2, 3]], policy).fingerprint()


def adopted(slots: Slots, size: int) -> tuple[Slots, list[int]]:
    other = Slots(size, slots.num_identities, slots.policy)
    other.plan(tensor([3])[:1])  # whatever it held before must not matter
    to = other.adopt(slots.label[:-1], slots.seq[:-1], slots.written[:-1], slots.cursor, slots.clock, slots.time)
    return other, to.tolist()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120, deadline=None)
@given(case=batches(steps=20), new_size=st.integers(1, 20), later=st.data())
def test_adopt(policy, case, new_size, later):
    check_adopt(policy, *case, new_size, False, later)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(case=batches(steps=6), new_size=st.integers(1, 20), later=st.data())
def test_adopt_with_fillers(policy, case, new_size, later):
    check_adopt(policy, *case, new_size, True, later)


def check_adopt(policy, size, lists, new_size, filled, later) -> None:
    """Another size keeps the newest min(M1, M2) rows, oldest in slot 0; the same size keeps everything in its place."""
    slots = Slots(size, IDENTITIES, policy)
    if filled:
        slots.label[:-1] = FILLER
    for labels in lists:
        slots.plan(tensor(labels))
    other, to = adopted(slots, new_size)
    label, seq = slots.label[:-1].tolist(), slots.seq[:-1].tolist()
    if new_size == size:
        assert to == list(range(size))
        assert same_state(slots, other) and slots.fingerprint() == other.fingerprint()
    by_age = sorted((s for s in range(size) if label[s] != EMPTY), key=lambda s: seq[s])
    newest = by_age[max(0, len(by_age) - new_size) :]
    if new_size != size:
        assert [s for s in range(size) if to[s] >= 0] == sorted(newest)
        assert [to[s] for s in newest] == list(range(len(newest)))
    for s in newest:
        assert other.label[to[s]] == label[s] and other.seq[to[s]] == seq[s] and other.written[to[s]] == slots.written[s]
    assert sorted(c for c in other.label[:-1].tolist() if c != EMPTY) == sorted(label[s] for s in newest)
    assert other.time == slots.time and other.clock == slots.clock
    check_invariants(other)
    # A new identity takes an empty slot if there is one, else the slot of the oldest row.
    room = new_size > len(newest)
    stored = {c for c in label if c >= 0}
    fresh = next(c for c in range(IDENTITIES) if c not in stored)
    if new_size != size:
        held = other.label[other.plan(tensor([fresh])).slot[0]]
        assert held == fresh
        survivors = set(other.label[:-1].tolist()) - {fresh, EMPTY, FILLER}
        if room or (newest and label[newest[0]] == FILLER):
            assert survivors == {label[s] for s in newest} - {FILLER}
        else:
            assert survivors == {label[s] for s in newest[1:]} - {FILLER}
        check_invariants(other)
    for _ in range(6):
        labels = later.draw(st.lists(st.integers(0, IDENTITIES - 1), min_size=1, max_size=new_size))
        plan = other.plan(tensor(labels))
        assert set(labels) <= set(other.label[:-1].tolist())
        assert other.label[plan.slot[plan.identity >= 0]].tolist() == sorted(set(labels))
        check_invariants(other)


def test_adopt_by_hand():
    """A ring of 4 with identities 4 5 2 3 (oldest: 2): a ring of 3 keeps 3 4 5 and gives 3's slot away next."""
    slots = run(4, [[0, 1, 2, 3], [4, 5]], "ring")
    assert slots.label[:-1].tolist() == [4, 5, 2, 3]
    smaller, to = adopted(slots, 3)
    assert smaller.label[:-1].tolist() == [3, 4, 5] and to == [1, 2, -1, 0] and smaller.cursor == 0
    larger, to = adopted(slots, 6)
    assert larger.label[:-1].tolist() == [2, 3, 4, 5, EMPTY, EMPTY] and larger.cursor == 4
    larger.plan(tensor([6, 7, 8]))
    assert larger.label[:-1].tolist() == [8, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("policy", POLICIES)
def test_mean_age(policy):
    """Without refreshes M / n steps fill the memory, so ages are 0 .. M/n - 1, uniformly: mean (M/n - 1) / 2, about M/2n."""
    size, n, identities = 64, 4, 4096
    slots = Slots(size, identities, policy)
    for step in range(100):
        slots.plan(torch.arange(step * n, (step + 1) * n) % identities)
    ages = slots.age().double()
    assert ages.max() == size / n - 1
    assert ages.mean() == pytest.approx((size / n - 1) / 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_mean_age_with_refreshes(policy):
    """A fifth of the batch drawn at random from memory: mean age near M/2n, and ages beyond M/n - 1 do occur.

    Statistics of 600 steps; simulated for much larger memories: mean 1.07 (lru) and 1.15 (ring) times M / 2n.
    """
    size, n, identities = 160, 10, 20000
    generator = torch.Generator().manual_seed(0)
    slots = Slots(size, identities, policy)
    mean, oldest, fresh = [], [], 0
    for step in range(600):
        stored = slots.label[:-1][slots.occupied()]
        again = stored[torch.randperm(len(stored), generator=generator)[:2]]
        new = torch.arange(fresh, fresh + n - len(again))
        fresh += len(new)
        slots.plan(torch.cat([again, new]))
        if step > 100:
            mean.append(slots.age().double().mean().item())
            oldest.append(slots.age().max().item())
    assert sum(mean) / len(mean) == pytest.approx({"ring": 8.6, "lru": 8.0}[policy], abs=0.5)
    assert max(oldest) >= size // n


def test_unknown_policy():
    with pytest.raises(ValueError, match="fifo"):
        Slots(3, 3, "fifo")
