"""Nothing on a step's path waits for the device: no number is read back, no shape depends on values, no loop over labels.

Without a GPU: a dispatch mode refuses the operators that would synchronise on one, and the methods of a tensor that read
it back are refused while a step runs. The same step, with each of them put in, must fail.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protomem.head import HEADS, mixer
from protomem.objective.margins import build_margin
from protomem.optim import RowSGD, UnitRowSGD
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.sampled import SampledShard
from protomem.step import Extras, MicroBatch, forward_backward
from tests.memory_cases import COPIES, MARGINS, SCALE, USUAL, batches, build, covering_array

# The size of their result depends on values, or their result is a Python number.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select",
    "unique_consecutive", "unique_dim", "_unique", "_unique2", "argwhere", "bincount",
}  # fmt: skip
READ_BACK = ("tolist", "numpy", "__iter__", "__bool__", "__int__", "__float__", "__index__", "__array__", "item", "cpu")


class Waits(AssertionError):
    pass


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(mixer, "ASKS", set())


class NoWaiting(TorchDispatchMode):
    """Refuses operators that wait for a GPU. Python numbers in, tensors out: what is left may be queued."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            raise Waits(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise Waits(f"{name} with a bool index")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits("repeat_interleave without output_size")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waiting():
    """On a CPU `tolist` and `numpy` read memory without an operator, hence the methods."""

    def refuse(name):
        def method(self, *args, **kwargs):
            raise Waits(f"Tensor.{name}")

        return method

    own = {name: torch.Tensor.__dict__.get(name) for name in READ_BACK}
    for name in READ_BACK:
        setattr(torch.Tensor, name, refuse(name))
    try:
        with NoWaiting():
            yield
    finally:
        for name, method in own.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)


def steps(case: dict, count: int = 3, observe: bool = False, inside=None) -> None:
    """Steps of the memory, and of its optimizer, none of which may wait. inside(memory, labels): also done there."""
    memory = build(case)
    learner = UnitRowSGD(memory, lr=0.1) if case["gradient"] == "sgd" else None
    margin = build_margin(scale=SCALE, **MARGINS[case["margin"]])
    for step, batch in enumerate(batches(case, count)):
        x, labels = batch["x"].float().requires_grad_(), torch.tensor(batch["labels"])
        copies = batch["copies"].float()
        part = MicroBatch(x, labels, [len(x)], batch["external"] if case["estimator"] == "external" else None)
        extras = Extras(lambda images: copies, COPIES, torch.nn.Identity()) if case["estimator"] == "given" else Extras()
        head, encoder = HEADS[case["backend"]], torch.nn.Identity()
        with no_waiting():
            forward_backward([part], encoder, memory, head, margin, step, extras=extras, observe=observe)
            if learner is not None:
                learner.step()
            if inside is not None:
                inside(memory, labels)
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("observe", [False, True])
def test_no_option_waits(observe):
    """Every pair of values of two options, with the blocked head; also with the statistics of a logged step."""
    for case in covering_array():
        try:
            steps({**case, "backend": "blocked"}, observe=observe)
        except Waits as error:
            raise AssertionError(f"{error} in {case}") from error


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_injection_does_not_wait(rate):
    """Features mixed into a classifier's and a sampled shard's rows, taken, and counted, in two micro-batches."""
    options = dict(injection=dict(weight=0.15, steps=2, start=1))
    shard = ClassifierShard(40, 6, **options) if rate == 1 else SampledShard(40, 6, rate=rate, **options)
    learner = RowSGD([shard.weight], lr=0.1) if rate < 1 else torch.optim.SGD([shard.weight], lr=0.1)
    margin, injected = build_margin("cosface"), []
    for step, batch in enumerate(batches(USUAL, 4)):
        x, labels = batch["x"].float().requires_grad_(), torch.tensor(batch["labels"])
        parts = [MicroBatch(x[cut], labels[cut], [6]) for cut in (slice(0, 6), slice(6, 12))]
        with no_waiting():
            stats = forward_backward(parts, torch.nn.Identity(), shard, HEADS["blocked"], margin, step, observe=True)
            learner.step()
        injected.append(stats["injected"].item())
    assert injected[0] == 0 and min(injected[1:]) > 0


def test_a_cpu_is_asked_which_rows_are_injected(monkeypatch):
    monkeypatch.setattr(mixer, "ASKS", {"cpu"})
    with pytest.raises(Waits, match="nonzero"):
        steps({**USUAL, "injection": 0.3})


def test_look_alikes_do_not_wait():
    case = {**USUAL, "fill": "random"}
    steps(case, inside=None)
    steps(case, observe=True, inside=lambda memory, labels: memory.look_alike_labels())


CULPRITS = {
    "item": lambda memory, labels: memory.slots.cursor.item(),
    "tolist": lambda memory, labels: labels.tolist(),
    "numpy": lambda memory, labels: labels.numpy(),
    "loop": lambda memory, labels: [label for label in labels],
    "if": lambda memory, labels: 1 if memory.slots.overfull else 0,
    "int": lambda memory, labels: int(memory.slots.clock),
    "cpu": lambda memory, labels: labels.cpu(),
    "nonzero": lambda memory, labels: (labels > 3).nonzero(),
    "where": lambda memory, labels: torch.where(labels > 3),
    "mask": lambda memory, labels: labels[labels > 3],
    "mask_write": lambda memory, labels: memory.rows.__setitem__(memory.filled[:-1], 0.0),
    "masked_select": lambda memory, labels: labels.masked_select(labels > 3),
    "unique": lambda memory, labels: labels.unique(),
    "unique_consecutive": lambda memory, labels: labels.unique_consecutive(),
    "bincount": lambda memory, labels: labels.bincount(),
    "equal": lambda memory, labels: torch.equal(labels, labels),
    "repeat_interleave": lambda memory, labels: labels.repeat_interleave(labels),
    "slice": lambda memory, labels: labels[: memory.slots.cursor],
    "range": lambda memory, labels: range(memory.slots.clock),
}


@pytest.mark.parametrize("name", list(CULPRITS))
def test_what_waits_is_found(name):
    with pytest.raises(Waits):
        steps(USUAL, inside=CULPRITS[name])


@pytest.mark.parametrize("where", ["plan", "columns", "weights", "head"])
def test_what_waits_is_found_wherever_it_is(where, monkeypatch):
    """Read-backs inside the step's own functions, forward and backward."""
    from protomem.prototypes.memory import PrototypeMemory
    from protomem.prototypes.slots import Slots
    from protomem.quality import Quality

    def before(owner, name, act):
        original = getattr(owner, name)

        def method(self, *args, **kwargs):
            act(*args)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    if where == "plan":
        before(Slots, "plan", lambda labels: labels.max().item())
    elif where == "columns":
        before(PrototypeMemory, "columns", lambda labels, x: labels.tolist())
    elif where == "weights":
        before(Quality, "weights", lambda scores, *_: scores[scores > 0.5])
    else:
        blocked = HEADS["blocked"]

        def head(x, *args, **kwargs):
            x.register_hook(lambda grad: grad.nonzero() and None)
            return blocked(x, *args, **kwargs)

        monkeypatch.setitem(HEADS, "blocked", head)
    with pytest.raises(Waits):
        steps(USUAL)
