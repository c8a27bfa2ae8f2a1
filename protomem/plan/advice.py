"""The largest number of identities that fits, and what to change where a plan does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from protomem.plan.case import Case
from protomem.plan.estimate import step
from protomem.plan.memory import host_bytes, moments, rank_bytes

MOST = 10**13  # identities that are tried


def fits(case: Case) -> bool:
    return rank_bytes(case).total <= case.device.memory * 1e9


def largest_identities(case: Case) -> int:
    """The most identities that fit with everything else as it is; 0 if not even one does."""
    if not fits(case.with_identities(1)):
        return 0
    low, high = 1, 2
    while high < MOST and fits(case.with_identities(high)):
        low, high = high, high * 2
    while high - low > max(1, low // 1000):  # to a thousandth
        middle = (low + high) // 2
        low, high = (middle, high) if fits(case.with_identities(middle)) else (low, middle)
    return low


@dataclass(frozen=True)
class Change:
    """setting: what to write on the command line; total: bytes per rank then; note: what it costs."""

    setting: str
    total: float
    note: str


def changes(case: Case) -> list[Change]:
    """What makes a rank's bytes fewer, most effective first; only what the config allows."""
    c, p = case.config, case.config.prototypes
    half = c.train.batch_size // 2 // case.together * case.together
    tried = [
        (("encoder.checkpointing=true",), "a third more compute"),
        (("encoder.precision=bf16",), "autocast; faster, too"),
        ((f"train.accumulate={2 * c.train.accumulate}",), "as many smaller micro-batches, same result but for BatchNorm"),
        ((f"train.batch_size={half}",), "another optimum of the learning rate"),
        (("optimizer.momentum=0",), "no momentum: trains worse"),
        (("optimizer.name=sgd",), "one moment instead of two"),
        ((f"encoder.embedding_size={case.size // 2}",), "smaller embeddings"),
    ]
    # What goes with the source that is there would have the others refused.
    off = ["optimizer.fuse_prototypes=false"] if c.optimizer.fuse_prototypes else []
    off += ["optimizer.untouched=lazy"] if c.optimizer.untouched == "exact" else []
    if case.source == "classifier":
        tried.append((("optimizer.fuse_prototypes=true",), "the same updates inside the backward: no gradient of the rows"))
        sampled = (*off, "prototypes.source=sampled", "prototypes.rate=0.1")
        tried.append((sampled, "Partial FC: no gradient of the rows that are not drawn"))
    if case.source == "sampled":
        tried.append(((f"prototypes.rate={p.rate / 2:g}",), "fewer negatives in a step"))
    if case.source == "memory":
        tried.append(((f"prototypes.memory.size={max(1, p.memory.size // 2)}",), "fewer negatives, forgotten sooner"))
        tried.append((("prototypes.memory.storage=bf16",), "rows rounded to 0.4 %"))
        tried.append((("prototypes.memory.gradient=none",), "stored rows do not learn"))
    else:
        memory = (*off, "prototypes.source=memory", "prototypes.memory.size=100000", "data.sampler.name=mixed")
        tried.append((memory, "prototypes made from the batch: 4 bytes an identity"))
    if p.empirical.enabled:
        tried.append((("prototypes.empirical.enabled=false",), "without EPL's second term"))
    if case.key_encoder:
        tried.append((("prototypes.memory.key_encoder=0",), "prototypes by the encoder itself"))
    if c.head.store_mb > 0:
        tried.append((("head.store_mb=0",), "logits are computed again in backward"))
    now, out = rank_bytes(case).total, []
    for settings, note in tried:
        other = case.with_setting(*settings)
        if other is not None:
            out.append(Change(" ".join(settings), rank_bytes(other).total, note))
    for world in (2 * case.world, 4 * case.world):
        if case.config.train.batch_size // case.together >= world:
            out.append(Change(f"--world-size {world}", rank_bytes(case.with_world(world)).total, "more GPUs"))
    if case.source != "memory" and moments(case):
        saved = moments(case) * case.rows * case.size * 2
        out.append(Change("(bf16 moments of the rows: no such key yet)", now - saved, "would round the optimizer's state"))
    return sorted((c for c in out if c.total < 0.999 * now), key=lambda c: c.total)


@dataclass(frozen=True)
class Gain:
    """setting: what to write on the command line; images_per_s: the estimate then."""

    setting: str
    images_per_s: float


def faster(case: Case) -> list[Gain]:
    """Settings with which the estimate rises by a twentieth or more and that still fit as well as before, best first."""
    now, size = step(case).images_per_s, rank_bytes(case).total
    out = []
    head, encoder = case.config.head, case.config.encoder
    tried = {"head.block=16384": head.block < 16384, "head.precision=bf16": head.precision == "fp32"}
    tried["encoder.precision=bf16"] = encoder.precision == "fp32"
    for setting in (name for name, differs in tried.items() if differs):
        other = case.with_setting(setting)
        if other is None or rank_bytes(other).total > max(size, case.device.memory * 1e9):
            continue
        if (speed := step(other).images_per_s) > 1.05 * now:
            out.append(Gain(setting, speed))
    return sorted(out, key=lambda gain: -gain.images_per_s)


def host_total(case: Case) -> float:
    return sum(host_bytes(case).values())
