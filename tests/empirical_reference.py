"""Training with a second term against empirical prototypes (EPL) and with UniFace's criterion, as slow and plain as possible:
one process, float64, loops over samples and identities; and the same through the real step. For tests only.

Written from the equations, not from protomem's code.
"""

from __future__ import annotations

import math

import torch

from protomem import distributed
from protomem.head import HEADS
from protomem.objective.criterion import Criterion, UnifiedCriterion
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.empirical import EmpiricalPrototypes
from protomem.prototypes.sampled import SampledShard
from protomem.step import MicroBatch, forward_backward
from tests.test_equivalence import SCALE, slow_phi

STEPS, BATCH, SIZE, FEATURES, RATE = 5, 7, 6, 5, 0.3

USUAL = dict(
    margin=dict(name="cosface"),
    classes=11,  # 4 ranks hold 3, 3, 3 and 2 rows
    empirical=None,  # or the options of EmpiricalPrototypes
    unified=None,  # or the options of UnifiedCriterion
    accumulate=1,
    backend="blocked",
    rate=None,  # of a sampled shard
)


def problem(classes: int):
    """Inputs and labels of all steps, with many images of the same identity, and the first weights."""
    g = torch.Generator().manual_seed(classes)
    inputs = torch.randn(STEPS, BATCH, FEATURES, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (STEPS, BATCH), generator=g)
    labels[:, 3] = labels[:, 0]  # on other ranks, and one rank's own
    labels[:, 4] = labels[:, 5] = labels[:, 0]
    labels[1] = labels[0]  # the second step meets rows that exist
    encoder = torch.randn(SIZE, FEATURES, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, SIZE, generator=g, dtype=torch.float64)
    return inputs, labels, encoder, weight


def slow_criterion(z_y, z_negatives: list, unified: dict | None, bias):
    """Loss of one sample from its logits."""
    if unified is None:
        return torch.stack([z_y, *z_negatives]).logsumexp(0) - z_y
    loss = torch.log(1 + torch.exp(bias - z_y))
    for z in z_negatives:
        loss = loss + unified.get("negatives", 1.0) * torch.log(1 + torch.exp(z - bias))
    return loss


def slow_negatives(cosines: list, margin: dict) -> list:
    above = margin.get("filter_above", 0)
    return [0 * cos if above and cos > above else SCALE * cos for cos in cosines]


def move(rows: dict, features: list, labels: list, coefficient: str) -> None:
    """Move the empirical rows (identity -> unit row) by a batch: all from the old rows, the last image stays."""
    old = dict(rows)
    for x, y in zip(features, labels):
        if y not in old:
            rows[y] = x / x.norm()
            continue
        s = (old[y] @ x).item()
        a = s / (1 + abs(s)) if coefficient == "softsign" else 1 / (1 + math.exp(-s))
        moved = a * old[y] + (1 - a) * x
        rows[y] = moved / moved.norm()


def run_slow(case: dict, active: list[list[int]] | None = None) -> list[dict]:
    """One record per step. active[step]: the identities that take part; None: all."""
    inputs, labels, encoder, weight = problem(case["classes"])
    given, unified = case["empirical"], case["unified"]
    bias = None
    if unified is not None:
        start = unified.get("bias")
        bias = torch.tensor(math.log(10 * case["classes"]) if start is None else start, dtype=torch.float32).double()
    rows: dict[int, torch.Tensor] = {}
    records = []
    for step in range(STEPS):
        leaves = [encoder.requires_grad_(), weight.requires_grad_()] + ([] if bias is None else [bias.requires_grad_()])
        y = labels[step].tolist()
        x = [encoder @ v for v in inputs[step]]
        x = [v / v.norm() for v in x]
        features = [v.detach() for v in x]
        taking_part = range(case["classes"]) if active is None else active[step]
        if given and given.get("update", "before") == "before":
            move(rows, features, y, given.get("coefficient", "softsign"))
        total = 0
        for i in range(BATCH):
            cos = {j: x[i] @ weight[j] / weight[j].norm() for j in taking_part}
            others = [cos[j] for j in taking_part if j != y[i]]
            z_y = SCALE * slow_phi(case["margin"], cos[y[i]])
            loss = slow_criterion(z_y, slow_negatives(others, case["margin"]), unified, bias)
            if given and step >= given.get("start", 0):
                e = x[i] @ rows.get(y[i], torch.zeros(SIZE, dtype=torch.float64))
                value = e - given.get("k", 0.7) * e.detach()
                phi = slow_phi(case["margin"], value) if given.get("stacked") else value
                others = [x[i] @ rows[j] for j in taking_part if j != y[i] and j in rows]
                second = slow_criterion(SCALE * phi, slow_negatives(others, case["margin"]), unified, bias)
                loss = (loss + second) / 2
            total = total + loss / BATCH
        grads = torch.autograd.grad(total, leaves)
        if given and given.get("update", "before") == "after":
            move(rows, features, y, given.get("coefficient", "softsign"))
        with torch.no_grad():
            encoder, weight = encoder - RATE * grads[0], weight - RATE * grads[1]
            bias = None if bias is None else bias - RATE * grads[2]
        zero = torch.zeros(SIZE, dtype=torch.float64)
        records.append(
            dict(
                loss=total.item(),
                encoder=grads[0],
                weight=grads[1],
                bias=None if bias is None else grads[2].view(1),
                rows=torch.stack([rows.get(j, zero) for j in range(case["classes"])]),
                seen=[int(j in rows) for j in range(case["classes"])],
            )
        )
    return records


def run_fast(case: dict) -> list[dict]:
    """This rank's part of the same steps through the implementation, in float64."""
    inputs, labels, encoder_weight, weight = problem(case["classes"])
    rank, world = distributed.rank(), distributed.world_size()
    encoder = torch.nn.Linear(FEATURES, SIZE, bias=False).double()
    encoder.weight.data.copy_(encoder_weight)
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    if case["rate"] is None:
        shard = ClassifierShard(case["classes"], SIZE)
    else:
        shard = SampledShard(case["classes"], SIZE, rate=case["rate"], seed=3)
    if case["empirical"]:
        shard.empirical = EmpiricalPrototypes(case["classes"], SIZE, **case["empirical"])
    shard.double().weight.data.copy_(weight[shard.first : shard.last])
    unified = case["unified"]
    criterion = Criterion() if unified is None else UnifiedCriterion(case["classes"], **unified).double()
    margin, records = build_margin(scale=SCALE, **case["margin"]), []
    for step in range(STEPS):
        # Each rank has neighbouring rows of the global batch, which are cut into micro-batches, also empty ones.
        bounds = [distributed.batch_bounds(BATCH, r, world) for r in range(world)]
        mine, parts = slice(*bounds[rank]), []
        for a in range(case["accumulate"]):
            cut = [distributed.batch_bounds(stop - start, a, case["accumulate"]) for start, stop in bounds]
            own = slice(*cut[rank])
            parts.append(MicroBatch(inputs[step][mine][own], labels[step][mine][own], [e - s for s, e in cut]))

        def head(*arguments, **options):  # kept logits: none, one block, all of them, in turn
            return HEADS[case["backend"]](*arguments, block=4, store_mb=(0, 0.0003, 16)[step % 3], **options)

        encoder.zero_grad()
        criterion.zero_grad()
        stats = forward_backward(parts, model, shard, head, margin, step, criterion=criterion)
        grad, index = shard.gradient().clone(), torch.arange(len(shard.weight))
        if case["rate"] is not None:
            index = shard.index
            grad = torch.zeros_like(shard.weight).index_copy_(0, index, grad)
        empirical = shard.empirical
        records.append(
            dict(
                loss=stats["loss"].item(),
                encoder=encoder.weight.grad.numpy().copy(),
                weight=grad.numpy().copy(),
                bias=None if unified is None else criterion.bias.grad.numpy().copy(),
                rows=None if empirical is None else empirical.rows.numpy().copy(),
                seen=None if empirical is None else empirical.seen.tolist(),
                active=(index + shard.first).tolist(),
            )
        )
        with torch.no_grad():
            encoder.weight -= RATE * encoder.weight.grad
            shard.weight -= RATE * grad
            if unified is not None:
                criterion.bias -= RATE * criterion.bias.grad
    return records


def difference(case: dict, ranks: list[list[dict]], expected: list[dict], tolerance: float = 1e-9) -> str | None:
    """What differs first between the ranks' records and the slow ones, or None."""

    def close(a, b):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)

    for step, want in enumerate(expected):
        got = [records[step] for records in ranks]
        for r, one in enumerate(got):
            if not close(one["loss"], want["loss"]):
                return f"step {step}, rank {r}: loss {one['loss']}, expected {want['loss']}"
            for name in ("encoder", "bias"):
                if want[name] is not None and not close(one[name], want[name]):
                    return f"step {step}, rank {r}: gradient of {name} {one[name]}, expected {want[name]}"
        for name in ("weight", *(("rows", "seen") if case["empirical"] else ())):
            whole = torch.cat([torch.as_tensor(one[name]) for one in got])
            if not close(whole, want[name]):
                return f"step {step}: {name} {whole}, expected {want[name]}"
    return None


def compare(cases: dict[str, dict], ranks: list[list[list[dict]]]) -> dict[str, str]:
    """{name: what differs} of the cases that differ from their slow runs. ranks: of each rank the records of each case."""
    found = {}
    for k, (name, case) in enumerate(cases.items()):
        mine = [records[k] for records in ranks]
        active = None
        if case["rate"] is not None:
            active = [sum((records[step]["active"] for records in mine), []) for step in range(STEPS)]
        problem = difference(case, mine, run_slow(case, active))
        if problem:
            found[name] = problem
    return found
