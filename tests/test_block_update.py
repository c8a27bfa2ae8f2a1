"""Updates of the classifier inside the head's backward: the same run, bit for bit, as with a gradient and an optimizer step."""

import functools
import shutil

import numpy as np
import pytest
import torch

from protomem import build, config, distributed, state
from protomem.errors import UserError
from protomem.head import HEADS, Negatives
from protomem.objective.margins import Margin, build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_head import Largest
from tests.test_no_sync import no_waiting
from tests.test_training import run as trained

HARDER = Negatives(  # as CurricularFace: negatives above the positive count more
    value=lambda cos, cos_y: torch.where(cos > cos_y - 0.3, cos * (0.4 + cos), cos),
    slope=lambda cos, cos_y: torch.where(cos > cos_y - 0.3, 0.4 + 2 * cos, torch.ones_like(cos)),
)
MARGINS = {
    "cosface": build_margin("cosface", scale=16.0),
    "arcface": build_margin("arcface", scale=16.0),
    "harder negatives": Margin(16.0, lambda cos, norm: cos - 0.2, HARDER),
}
OPTIMIZERS = {
    "sgd": ("optimizer.weight_decay=0.1",),
    "nesterov": ("optimizer.weight_decay=0.1", "optimizer.nesterov=true"),
    "no momentum": ("optimizer.momentum=0", "optimizer.fused=false"),
    "adamw": ("optimizer.name=adamw", "optimizer.weight_decay=0.1"),
    "adamw, unfused": ("optimizer.name=adamw", "optimizer.fused=false", "optimizer.head.lr=0.3"),
}
VPL = {"weight": 0.3, "steps": 2, "start": 1}


@functools.cache
def configured(*settings: str):
    return config.load([], ["data.train=x", "output=y", *settings])


def plain_and_fused(*settings: str):
    return [configured(*settings, f"optimizer.fuse_prototypes={value}") for value in ("false", "true")]


def run(c, margin, classes, injection=None, dtype=torch.float64, steps=4, head={}, batch=9, size=6, backend="blocked"):
    """(losses, this rank's rows after each step, the encoder's weights, the optimizer's state by its names)."""
    rank, world = distributed.rank(), distributed.world_size()
    g = torch.Generator().manual_seed(classes)
    shard = ClassifierShard(classes, size, std=0.5, injection=injection).to(dtype)
    encoder = torch.nn.Linear(5, size, bias=False).to(dtype)
    encoder.weight.data.copy_(torch.randn(size, 5, generator=g))
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    optimizers = build.optimizers_from(c, torch.nn.Sequential(encoder), shard, torch.nn.Module())
    bounds = [distributed.batch_bounds(batch, r, world) for r in range(world)]
    lo, hi = bounds[rank]
    seen, rows = [], []
    for step in range(steps):
        images = torch.randn(batch, 5, generator=g).to(dtype)
        labels = torch.randint(0, classes, (batch,), generator=g)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:  # as a schedule does
                group["lr"] = group["lr"] * 0.7
        part = MicroBatch(images[lo:hi], labels[lo:hi], [b - a for a, b in bounds])
        given = {"block": 4, "store_mb": 0.0003, **head}
        stats = forward_backward([part], model, shard, lambda *a: HEADS[backend](*a, **given), margin, step)
        for optimizer in optimizers.values():
            optimizer.step()
        seen.append(stats["loss"].item())
        rows.append(shard.weight.detach().clone().numpy())
    assert (shard.sink.buffer is None) == c.optimizer.fuse_prototypes == (shard.weight.grad is None)
    named = state.named_state({"prototypes": shard}, {"prototypes": optimizers["prototypes"]})
    return seen, rows, encoder.weight.detach().numpy(), {k: v.detach().numpy().copy() for k, v in named.items()}


def assert_same(one, other):
    for a, b in zip(one[:3], other[:3]):
        assert np.array_equal(np.stack(a), np.stack(b))
    assert one[3].keys() == other[3].keys() and all((one[3][k] == other[3][k]).all() for k in one[3])


@pytest.mark.parametrize("world, classes", [(1, 13), (2, 13), (3, 13), (4, 5)])  # 4 ranks hold 2, 2, 1 and 0 of five rows
def test_updates_inside_the_backward_change_no_bit(world, classes):
    configs = {name: plain_and_fused(*settings) for name, settings in OPTIMIZERS.items()}  # loaded once, not in every rank
    cases = [("sgd", m, i) for m in MARGINS.values() for i in (None, VPL)]
    cases += [(o, MARGINS["cosface"], None) for o in list(OPTIMIZERS)[1:]]

    def work():
        return [[run(c, m, classes, i) for c in configs[o]] for o, m, i in cases]

    for results in run_ranks(world, work):
        for plain, fused in results:
            assert_same(plain, fused)
            assert len(set(plain[0])) == 4 and (not len(plain[1][0]) or (plain[1][0] != plain[1][3]).any())


def test_bf16_operands_too():
    options = dict(dtype=torch.float32, head={"precision": "bf16"}, size=32)
    assert_same(*(run(c, MARGINS["cosface"], 30, **options) for c in plain_and_fused()))


def shard_of(c, classes: int, size: int) -> ClassifierShard:
    shard = ClassifierShard(classes, size)
    build.optimizers_from(c, torch.nn.Linear(1, 1), shard, torch.nn.Module())
    return shard


def test_nothing_of_the_size_of_the_shard_is_made():
    largest = []
    for c in plain_and_fused("optimizer.momentum=0"):
        shard, labels = shard_of(c, 5000, 64), torch.tensor([1, 2])
        x = torch.nn.functional.normalize(torch.ones(2, 64)).requires_grad_()
        with Largest() as seen:
            shard.begin_step(labels, 0)
            HEADS["blocked"](x, shard.columns(labels), 8.0, block=256)[1].sum().backward()
        largest.append(seen.numel)
    assert largest == [5000 * 64, 256 * 64]


@pytest.mark.parametrize(
    "setting",
    [
        *("head.backend=dense", "train.accumulate=2", "optimizer.clip=5", "encoder.precision=fp16"),
        *("optimizer.name=lamb", "prototypes.source=sampled"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(setting):
    with pytest.raises(UserError, match="optimizer.fuse_prototypes") as error:
        configured("optimizer.fuse_prototypes=true", setting)
    assert setting.split("=")[0] in str(error.value) and "\n" not in str(error.value)
    configured("optimizer.fuse_prototypes=true", "head.backend=triton")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_it_waits_for_no_device(name):
    shard, labels = shard_of(plain_and_fused("optimizer.name=" + name)[1], 40, 4), torch.tensor([1, 2, 2])
    images = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with no_waiting():
        for step in range(2):
            part = MicroBatch(images, labels, [3])
            forward_backward([part], torch.nn.Identity(), shard, HEADS["blocked"], MARGINS["cosface"], step)


def test_a_second_loss_term_is_an_error_not_a_wrong_step():
    shard, labels = shard_of(plain_and_fused()[1], 9, 4), torch.tensor([1, 2])
    x = torch.nn.functional.normalize(torch.ones(2, 4)).requires_grad_()
    shard.begin_step(labels, 0)
    terms = [HEADS["blocked"](x, shard.columns(labels), 8.0)[1].sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="a single loss term"):
        sum(terms).backward()


def test_a_run_may_switch_it_on_when_it_goes_on_with_other_ranks(small_set, tmp_path):
    """Same names and shapes of the saved state; from there on the same losses, to the last digit."""
    more = ("optimizer.clip=0", "schedule.decay=constant", "schedule.warmup_steps=0", "optimizer.name=adamw")
    trained(1, small_set, tmp_path / "plain", *more, "schedule.steps=2")
    shutil.copytree(tmp_path / "plain", tmp_path / "fused", symlinks=True)
    plain = trained(2, small_set, tmp_path / "plain", *more, "schedule.steps=4")
    fused = trained(2, small_set, tmp_path / "fused", *more, "schedule.steps=4", "optimizer.fuse_prototypes=true")
    assert plain == fused and len(plain) == 4


def test_with_empirical_prototypes(small_set, tmp_path):
    """EPL's second term has constant rows, so the shard's gradient is still written once: the same training, bit for bit."""
    epl = ("prototypes.empirical.enabled=true", "prototypes.empirical.start_epoch=0.1")
    more = ("schedule.steps=5", "schedule.warmup_steps=0", "optimizer.clip=0", *epl)
    plain = trained(2, small_set, tmp_path / "plain", *more)
    assert trained(2, small_set, tmp_path / "fused", *more, "optimizer.fuse_prototypes=true") == plain
