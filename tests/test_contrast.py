"""CoReFace: the loss between two views equals a slow formula at every world size; its schedule and state survive a kill."""

import functools
import itertools
import json
import math
import subprocess

import pytest
import torch
from torch import nn

from protomem import config, distributed, state, trainer
from protomem.encoder import build_encoder
from protomem.encoder.base import Encoder
from protomem.errors import UserError
from protomem.head import HEADS
from protomem.objective.contrast import Contrast
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.memory import PrototypeMemory
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_no_sync import no_waiting
from tests.test_training import assert_close, kill_at, run, settings, start_ranks

FEATURES, D, C, B, STEPS, RATE, SCALE, S, WEIGHT = 5, 4, 7, 11, 5, 0.3, 6.0, 8.0, 0.7
SIZES = {1: [11], 2: [5, 6], 3: [6, 1, 4], 4: [4, 0, 1, 6]}  # uneven; a rank with one image, and one with none
# Twice within a rank, over ranks, and one step in which all images are of one identity.
LABELS = [
    [0, 1, 0, 2, 3, 1, 1, 4, 0, 2, 5],
    [6, 6, 6, 6, 1, 2, 3, 4, 5, 5, 0],
    [3] * 11,
    [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3],
    [2, 2, 0, 0, 1, 1, 4, 4, 5, 2, 0],
]
COUPLINGS, MASKS, NEGATIVES = ("one_way", "two_way", "all_views"), ("zero", "exclude"), ("local", "global")
CASES = list(itertools.product(COUPLINGS, MASKS, NEGATIVES))
MAGNITUDE = dict(lower=1.5, upper=4.0, lower_margin=0.3, upper_margin=0.6, weight=2.0)


class TwoMaps(nn.Module):
    """Two views that are functions of the image alone."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        base = torch.randn(D, FEATURES, generator=g, dtype=torch.float64)
        self.maps = nn.ParameterList(base + 0.5 * torch.randn(base.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def forward(self, images, views=1):
        return images @ self.maps[0].t() if views == 1 else tuple(images @ m.t() for m in self.maps)


def images(step: int) -> torch.Tensor:
    return torch.randn(B, FEATURES, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def prototypes() -> torch.Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


# --- the slow formulas -----------------------------------------------------------------------------------------------


def cosine(a, b):
    return ((a @ b) / (a.norm() * b.norm())).clamp(-1, 1)


def slow_contrast(views, labels, groups, coupling, mask, m, momentum):
    """(mean loss over all anchors, new m), anchor by anchor and key by key. groups: the images that are compared."""
    drawn = (0,) if coupling == "one_way" else (0, 1)
    anchors = []  # (C_pos, [C of other identities], number of images of the own identity as keys)
    for group in groups:
        for i in group:
            for v in drawn:
                others, twins = [], 0
                for j in group:
                    for u in (0, 1) if coupling == "all_views" else (1 - v,):
                        if j != i and labels[j] != labels[i]:
                            others.append(cosine(views[v][i], views[u][j]))
                        elif j != i:
                            twins += 1
                anchors.append((cosine(views[v][i], views[1 - v][i]), others, twins))
    gaps = [pos.item() - max([0.0] + [c.item() for c in others]) for pos, others, _ in anchors]
    m = (1 - momentum) * sum(gaps) / len(gaps) + momentum * m
    total = 0.0
    for pos, others, twins in anchors:
        z = [S * (pos - m)] + [S * c for c in others] + ([0 * pos] * twins if mask == "zero" else [])
        total = total + torch.stack(z).logsumexp(0) - z[0]
    return total / len(anchors), m


def slow_classification(x, labels, columns: dict[int, torch.Tensor], phi):
    """Mean over samples of -log(e^z_y / sum_j e^z_j)."""
    total = 0.0
    for i, y in enumerate(labels):
        z = [SCALE * cosine(x[i], row) for j, row in columns.items() if j != y]
        own = SCALE * phi(cosine(x[i], columns[y]), x[i].norm())
        total = total + torch.stack([own, *z]).logsumexp(0) - own
    return total / len(labels)


def slow_magface(kind, cos, norm):
    g = MAGNITUDE
    a = min(max(norm, norm.new_tensor(g["lower"])), norm.new_tensor(g["upper"]))
    m = g["lower_margin"] + (g["upper_margin"] - g["lower_margin"]) * (a - g["lower"]) / (g["upper"] - g["lower"])
    if kind == "cosface":
        return cos - m
    return torch.cos(torch.acos(cos) + m) if torch.acos(cos) + m < math.pi else cos - m * torch.sin(m)


def slow_penalty(norm):
    a = min(max(norm, norm.new_tensor(MAGNITUDE["lower"])), norm.new_tensor(MAGNITUDE["upper"]))
    return MAGNITUDE["weight"] * (a / MAGNITUDE["upper"] ** 2 + 1 / a)


def groups_of(negatives: str, world: int) -> list[list[int]]:
    if negatives == "global":
        return [list(range(B))]
    starts = [sum(SIZES[world][:r]) for r in range(world)]
    return [list(range(s, s + n)) for s, n in zip(starts, SIZES[world]) if n]


@functools.cache
def expected(case, world: int, momentum: float):
    """STEPS steps of one process on the whole batch: [(loss, contrast, m, gradients)]."""
    coupling, mask, negatives = case
    model, rows, m, out = TwoMaps(), prototypes().requires_grad_(), 0.0, []
    for step in range(STEPS):
        views, labels = model(images(step), 2), LABELS[step]
        columns = dict(enumerate(rows))
        ce = sum(slow_classification(v, labels, columns, lambda cos, norm: cos - 0.2) for v in views) / 2
        contrast, m = slow_contrast(views, labels, groups_of(negatives, world), coupling, mask, m, momentum)
        grads = torch.autograd.grad(ce + WEIGHT * contrast, [*model.maps, rows])
        out.append(((ce + WEIGHT * contrast).item(), WEIGHT * contrast.item(), m, grads))
        with torch.no_grad():
            for p, g in zip(model.maps, grads):
                p -= RATE * g
    return out


# --- the implementation ----------------------------------------------------------------------------------------------


def wrapped(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model) if distributed.world_size() > 1 else model


def my_part(step: int, sizes: list[int]) -> MicroBatch:
    mine = slice(sum(sizes[: distributed.rank()]), sum(sizes[: distributed.rank() + 1]))
    return MicroBatch(images(step)[mine], torch.tensor(LABELS[step])[mine], sizes)


def contrast_of(case, momentum: float = 0.01) -> Contrast:
    coupling, mask, negatives = case
    return Contrast(WEIGHT, coupling=coupling, mask=mask, negatives=negatives, scale=S, momentum=momentum).double()


def train(case, momentum: float):
    model = TwoMaps()
    ddp, shard, contrast = wrapped(model), ClassifierShard(C, D).double(), contrast_of(case, momentum)
    shard.weight.data.copy_(prototypes()[shard.first : shard.last])
    margin, records = build_margin("cosface", scale=SCALE, m=0.2), []
    for step in range(STEPS):
        model.zero_grad()
        part = my_part(step, SIZES[distributed.world_size()])
        stats = forward_backward([part], ddp, shard, HEADS["blocked"], margin, step, contrast=contrast, observe=True)
        assert torch.equal(stats["contrast_margin"], contrast.m)
        numbers = [stats[k].item() for k in ("loss", "contrast", "contrast_margin")]
        records.append((*numbers, [p.grad.numpy().copy() for p in model.maps], shard.weight.grad.numpy().copy()))
        with torch.no_grad():
            for p in model.maps:
                p -= RATE * p.grad
    return records


def close(a, b, what):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    error = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
    assert a.shape == b.shape and error <= 1e-9, f"{what}: relative error {error:.3g}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_slow_formula(world):
    """Loss, encoder and prototype gradients, and m, over five steps; once with a margin that remembers."""
    momenta = {case: 0.6 if k % 3 == 0 else 0.01 for k, case in enumerate(CASES)}
    results = run_ranks(world, lambda: [train(case, momenta[case]) for case in CASES])
    for k, case in enumerate(CASES):
        same = world if case[2] == "local" else 1  # with global negatives one formula serves all world sizes
        for step, (loss, contrast, m, grads) in enumerate(expected(case, same, momenta[case])):
            where = f"{case}, step {step}"
            for rank in range(world):
                got = results[rank][k][step]
                close(got[:3], [loss, contrast, m], where)
                for i in range(2):
                    close(got[3][i], grads[i], f"{where}, encoder")
            close(torch.cat([torch.as_tensor(r[k][step][4]) for r in results]), grads[2], f"{where}, prototypes")


@pytest.mark.parametrize("world", [2, 4])
def test_local_gradient_does_not_grow_with_the_ranks(world):
    """Every rank has the same images: loss, gradient and m are those of one."""

    def work(case):
        model, shard, contrast = TwoMaps(), ClassifierShard(C, D).double(), contrast_of(case)
        shard.weight.data.zero_()  # every cosine is 0: what reaches the encoder comes from the contrast
        ranks = distributed.world_size()
        part = MicroBatch(images(0), torch.tensor(LABELS[0]), [B] * ranks)
        margin = build_margin("softmax")
        stats = forward_backward([part], wrapped(model), shard, HEADS["dense"], margin, 0, contrast=contrast, observe=True)
        return [p.grad.numpy() for p in model.maps], stats["contrast"].item(), contrast.m.item()

    local = [case for case in CASES if case[2] == "local"]
    (one,), several = run_ranks(1, lambda: [work(c) for c in local]), run_ranks(world, lambda: [work(c) for c in local])
    for (grads, loss, m), (other_grads, other_loss, other_m) in zip(one, several[0]):
        close([other_loss, other_m], [loss, m], "loss and m")
        for a, b in zip(grads, other_grads):
            assert abs(a).max() > 1e-3
            close(b, a, "gradient")


def test_mask_zero_keeps_a_logit_of_zero_and_exclude_does_not():
    """Two images of one identity, of which nothing is known but that: log(1 + e^(-s (cos - m))) and 0."""
    a, b = (nn.functional.normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(k)), dim=1) for k in (1, 2))
    labels = torch.zeros(2, dtype=torch.int64)
    for mask in MASKS:
        contrast = Contrast(1.0, mask=mask, scale=S)
        value = contrast((a, b), labels, [2])
        cos = (a * b).sum(1)
        assert contrast.m.item() == pytest.approx(0.99 * cos.mean().item(), rel=1e-6)
        wanted = nn.functional.softplus(-S * (cos - contrast.m)).sum() if mask == "zero" else torch.zeros(())
        torch.testing.assert_close(value, wanted)


def test_a_single_image_has_no_loss_and_a_finite_gradient():
    for case in CASES:
        x = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
        value = contrast_of(case)(tuple(nn.functional.normalize(x, dim=1).split(1)), torch.tensor([3]), [1])
        value.backward()
        assert value.item() == 0 and x.grad.isfinite().all()


def test_a_step_that_overflowed_does_not_stay_in_the_margin():
    x, labels, contrast = nn.functional.normalize(torch.randn(4, D), dim=1), torch.arange(4), Contrast(1.0)
    contrast((x, x), labels, [4])
    before = contrast.m.clone()
    assert contrast((x * torch.tensor([[1], [torch.nan], [1], [1]]), x), labels, [4]).isnan()
    assert torch.equal(contrast.m, before) and before > 0
    assert contrast((x, x), labels, [4]).isfinite() and contrast.m != before


def test_nothing_waits_for_the_device():
    model, margin, labels = TwoMaps(), build_margin("cosface", scale=SCALE), torch.tensor(LABELS[0])
    for case in CASES:
        part, shard, contrast = MicroBatch(images(0), labels, [B]), ClassifierShard(C, D).double(), contrast_of(case)
        with no_waiting():
            forward_backward([part], model, shard, HEADS["blocked"], margin, 0, contrast=contrast)


# --- with other parts ------------------------------------------------------------------------------------------------

# An image alone in its identity is its own prototype, where an angle has no derivative: hence MagFace's margin on the cosine.
KIND = {"classifier": "arcface", "memory": "cosface"}
COMPOSED = [
    ("classifier", "none", ("one_way", "zero", "local")),
    ("memory", "none", ("one_way", "zero", "local")),
    ("memory", "none", ("all_views", "exclude", "global")),
    ("memory", "batch", ("two_way", "zero", "global")),
]


def compose(source, gradient, case):
    """MagFace's margin and three steps: [(loss, m, encoder gradients)]."""
    torch.set_default_dtype(torch.float64)
    model, contrast = TwoMaps(), contrast_of(case)
    if source == "memory":
        own = PrototypeMemory(C, D, size=C, gradient=gradient)
    else:
        own = ClassifierShard(C, D)
        own.weight.data.copy_(prototypes()[own.first : own.last])
    margin = build_margin("magface", scale=SCALE, magnitude={**MAGNITUDE, "kind": KIND[source]})
    ddp, records = wrapped(model), []
    for step in range(3):
        model.zero_grad()
        part = my_part(step, SIZES[distributed.world_size()])
        stats = forward_backward([part], ddp, own, HEADS["blocked"], margin, step, contrast=contrast, observe=True)
        records.append((stats["loss"].item(), contrast.m.item(), [p.grad.numpy().copy() for p in model.maps]))
    return records


@pytest.mark.parametrize("world", [1, 2])
def test_with_a_memory_and_magface(world):
    """Prototypes are made from the first view; margin and norm penalty are means over both."""
    results = run_ranks(world, lambda: [compose(*c) for c in COMPOSED])
    for k, (source, gradient, (coupling, mask, negatives)) in enumerate(COMPOSED):
        model, stored, m = TwoMaps(), {} if source == "memory" else dict(enumerate(prototypes())), 0.0
        for step in range(3):
            views, labels, columns = model(images(step), 2), LABELS[step], dict(stored)
            for y in set(labels) if source == "memory" else ():
                members = [views[0][i] / views[0][i].norm() for i in range(B) if labels[i] == y]
                made = sum(members) / len(members)
                stored[y] = (made / made.norm()).detach()
                columns[y] = made / made.norm() if gradient == "batch" else stored[y]
            ce = sum(slow_classification(v, labels, columns, functools.partial(slow_magface, KIND[source])) for v in views) / 2
            penalty = sum(slow_penalty(x.norm()) for v in views for x in v) / (2 * B)
            contrast, m = slow_contrast(views, labels, groups_of(negatives, world), coupling, mask, m, 0.01)
            loss = ce + penalty + WEIGHT * contrast
            grads = torch.autograd.grad(loss, list(model.maps))
            for rank in range(world):
                got = results[rank][k][step]
                close(got[:2], [loss.item(), m], f"{COMPOSED[k]}, step {step}")
                for a, b in zip(got[2], grads):
                    close(a, b, f"{COMPOSED[k]}, step {step}, encoder")


@pytest.mark.parametrize("name", ["small", "mobilefacenet", "iresnet18", "vit_t"])
def test_every_encoder_gives_two_views(name):
    """One pass through the trunk; the views differ by the dropout before the fully connected layer, the only one there is."""
    torch.manual_seed(0)
    encoder, x = build_encoder(name, 8, input_size=32), torch.randn(4, 3, 32, 32)
    assert [m for m in encoder.modules() if isinstance(m, nn.modules.dropout._DropoutNd)] == [encoder.dropout]
    calls, trunk = [], encoder.pre_fc
    encoder.pre_fc = lambda images: calls.append(1) or trunk(images)
    same = encoder(x, views=2)
    assert torch.equal(*same)
    encoder.dropout.p = 0.6
    one, two = encoder(x, views=2)
    assert len(calls) == 2 and not torch.isclose(one, two).all(1).any()
    (one.sum() + two.sum()).backward()
    encoder.eval()
    one, two = encoder(x, views=2)
    assert torch.equal(one, two) and torch.equal(one, encoder(x))
    encoder.dropout.p = 0.1
    assert torch.equal(one, encoder(x))


# --- the trainer -----------------------------------------------------------------------------------------------------

SHORT = (
    "contrast.weight=0.5",
    "contrast.scale=16",
    "contrast.start_epoch=0.6",  # 10 steps an epoch: steps 0 to 5 have a single view
    "contrast.momentum=0.9",  # a margin that was lost would be missed
    "encoder.dropout=0.2",
    "schedule.steps=14",
    "schedule.warmup_steps=3",
    "checkpoint.every=4",
    "checkpoint.keep=9",
)
MEMORY = (
    "prototypes.source=memory",
    "prototypes.memory.size=20",
    "prototypes.memory.key_encoder=0.9",
    "data.sampler.name=mixed",
)


ALONE = ("train.batch_size=1", "contrast.start_epoch=0", "encoder.dropout=0")


def numbers(output) -> dict[int, tuple]:
    """{step: (loss, contrast, margin)} of a run's log; the last two None where there is one view."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {n["step"]: (n["loss"], n.get("contrast"), n.get("contrast_margin")) for n in lines if "loss" in n}


def cut(output, step: int) -> None:
    """As if the run had been killed soon after this step."""
    for path in state.checkpoints(output / "checkpoints"):
        if state.read_info(path)["step"] > step:
            subprocess.run(["rm", "-r", path], check=True)


def test_the_phases_change_at_their_step(small_set, tmp_path, monkeypatch):
    seen, inner = [], trainer.forward_backward

    def watched(parts, encoder, *args, **kwargs):
        seen.append((kwargs["extras"].encoder.dropout.p, kwargs["extras"].key_encoder.encoder.dropout.p))
        return inner(parts, encoder, *args, **kwargs)

    monkeypatch.setattr(trainer, "forward_backward", watched)
    trainer.train(config.load([], settings(small_set, tmp_path, *SHORT, *MEMORY, "schedule.steps=8")))
    assert seen == [(0.2, 0.2)] * 6 + [(0.6, 0.6)] * 2
    log = numbers(tmp_path)
    assert [step for step, values in log.items() if values[1] is not None] == [7, 8]
    assert log[7][2] != 0 and log[8][2] != log[7][2]


def test_kill_9_and_resume_across_the_switch_bit_for_bit(small_set, tmp_path):
    more = (*SHORT, "contrast.start_epoch=1.8", "schedule.steps=32", "checkpoint.every=6")
    run(2, small_set, tmp_path / "whole", *more)
    kill_at(start_ranks(2, small_set, tmp_path / "killed", *more), tmp_path / "killed", 9)
    run(2, small_set, tmp_path / "killed", *more)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("world", [1, 3])
def test_resumed_before_and_after_the_switch_bit_for_bit(world, small_set, tmp_path):
    more = (*SHORT, *(MEMORY if world == 1 else ()))
    run(world, small_set, tmp_path, *more)
    whole = numbers(tmp_path)
    for step in (8, 4):
        cut(tmp_path, step)
        run(world, small_set, tmp_path, *more)
        assert numbers(tmp_path) == whole


def test_4_ranks_then_2_then_3_keep_the_margin(small_set, tmp_path, monkeypatch):
    """With views that are functions of the image and global negatives: the curve of one process, margin included."""

    def forward(self, images, views=1):
        flat = self.pre_fc(images)
        half = torch.arange(flat.shape[1], device=flat.device) % 2
        return self.embed(flat) if views == 1 else (self.embed(2 * flat * half), self.embed(2 * flat * (1 - half)))

    monkeypatch.setattr(Encoder, "forward", forward)
    more = (*SHORT, "encoder.dropout=0", "contrast.dropout=1e-9", "contrast.negatives=global", "contrast.coupling=all_views")
    run(1, small_set, tmp_path / "whole", *more)
    for world, step in ((4, 8), (2, 12), (3, 14)):
        run(world, small_set, tmp_path / "cut", *more)
        cut(tmp_path / "cut", step)
    whole, resumed = numbers(tmp_path / "whole"), numbers(tmp_path / "cut")
    for k in range(3):
        values = [{step: v[k] for step, v in log.items() if v[k] is not None} for log in (resumed, whole)]
        assert_close(*values, 1e-4)
        assert len(values[0]) == (14 if k == 0 else 8)


def test_fp16_follows_fp32(small_set, tmp_path):
    more = (*SHORT, "contrast.start_epoch=0", "encoder.dropout=0", "schedule.steps=6")
    half, whole = (run(2, small_set, tmp_path / p, *more, f"encoder.precision={p}") for p in ("fp16", "fp32"))
    assert_close(half, whole, 0.1)


@pytest.mark.parametrize(
    "given, message",
    [
        (("contrast.dropout=0",), "contrast.dropout=0.0: the two views of an image would be the same"),
        (("contrast.dropout=1",), "contrast.dropout=1.0: nothing of an image would be left"),
        (("train.accumulate=2",), "contrast with train.accumulate=2"),
        (("contrast.start_epoch=1.4",), "contrast.start_epoch=1.4 is step 14 of only 14, so it would never begin"),
        ((*ALONE,), "train.batch_size=1 with contrast.negatives=local leaves a single"),
        ((*ALONE, "contrast.negatives=global"), "with contrast.negatives=global leaves"),
        (("contrast.weight=0",), "has no effect with contrast.weight=0"),
    ],
)
def test_what_would_do_nothing_is_refused(given, message, small_set, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer.train(config.load([], settings(small_set, tmp_path, *SHORT, *given)))
