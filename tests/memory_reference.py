"""A prototype memory as slow and plain as possible: dictionaries, lists and loops, one process, float64; for tests only.

Written from the equations and from the rules that protomem/prototypes states, not from its code.
"""

from __future__ import annotations

import math

import torch


class SlotReference:
    """Which identity sits in which slot: a dictionary, a list of slots and a search for every new identity.

    order[s] is the moment slot s was filled (ring) or written (lru), None while it is empty; written[s] is the number of
    the step that last wrote it.
    """

    def __init__(self, num_slots: int, policy: str):
        self.num_slots, self.policy = num_slots, policy
        self.slots: list[int | None] = [None] * num_slots
        self.slot_of: dict[int, int] = {}
        self.order: list[int | None] = [None] * num_slots
        self.written: list[int] = [-1] * num_slots
        self.cursor, self.moment, self.time = 0, 0, 0

    def plan(self, labels: list[int]) -> tuple[list[int], list[int]]:
        """Give each identity of the batch a slot; returns (refreshed identities, new identities)."""
        identities = sorted(set(labels))
        refreshed = [c for c in identities if c in self.slot_of]
        new = [c for c in identities if c not in self.slot_of]
        busy = {self.slot_of[c] for c in refreshed}
        for c in refreshed:
            slot = self.slot_of[c]
            self.written[slot] = self.time
            if self.policy == "lru":
                self.order[slot] = self._tick()
        for c in new:
            slot = self._victim(busy)
            busy.add(slot)
            if self.slots[slot] is not None:
                del self.slot_of[self.slots[slot]]
            self.slots[slot], self.slot_of[c] = c, slot
            self.order[slot], self.written[slot] = self._tick(), self.time
        self.time += 1
        return refreshed, new

    def _tick(self) -> int:
        self.moment += 1
        return self.moment

    def _victim(self, busy: set[int]) -> int:
        if self.policy == "ring":
            while self.cursor in busy:
                self.cursor = (self.cursor + 1) % self.num_slots
            slot = self.cursor
            self.cursor = (slot + 1) % self.num_slots
            return slot
        candidates = [s for s in range(self.num_slots) if s not in busy]
        empty = [s for s in candidates if self.slots[s] is None]
        return empty[0] if empty else min(candidates, key=lambda s: self.order[s])

    def oldest_first(self) -> list[int]:
        """The filled slots in the order of their age."""
        return sorted((s for s in range(self.num_slots) if self.slots[s] is not None), key=lambda s: self.order[s])


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm()


class QualityReference:
    """Scores of single images and weights of one identity's images, number by number."""

    def __init__(
        self,
        estimator="equal",
        usage="soft",
        power=1.0,
        minimum=1e-3,
        threshold=None,
        quantile=0.1,
        on_empty="equal",
        keep=2,
        warmup=0,
        loss_weight=0.0,
        unrecognizable="given",
        decay=0.9,
    ):
        self.estimator, self.usage, self.power, self.minimum, self.threshold = estimator, usage, power, minimum, threshold
        self.quantile, self.on_empty, self.keep, self.warmup = quantile, on_empty, keep, warmup
        self.loss_weight, self.unrecognizable, self.decay = loss_weight, unrecognizable, decay
        self.u = None  # running mean of unit embeddings of the unrecognizable
        self.mean = self.deviation = None

    def see(self, embeddings: list[torch.Tensor]) -> None:
        mean = sum(unit(e) for e in embeddings) / len(embeddings)
        self.u = mean if self.u is None else self.decay * self.u + (1 - self.decay) * mean

    def scores(self, x: list[torch.Tensor], external: list[float] | None) -> list[float]:
        norms = [v.norm().item() for v in x]
        if self.estimator == "norm":
            return [n / max(norms) for n in norms]
        if self.estimator == "magface":
            return [(min(max(n, 10), 110) - 10) / 100 for n in norms]
        if self.estimator == "external":
            return [max(e, 0.0) for e in external]
        if self.estimator == "zscore":  # as AdaFace: unbiased deviation, 1 % of the batch enters, 1e-3 in the denominator
            mean = sum(norms) / len(norms)
            deviation = (sum((n - mean) ** 2 for n in norms) / (len(norms) - 1)) ** 0.5
            first = self.mean is None
            self.mean = mean if first else 0.99 * self.mean + 0.01 * mean
            self.deviation = deviation if first else 0.99 * self.deviation + 0.01 * deviation
            return [1 / (1 + math.exp(-0.333 * (n - self.mean) / (self.deviation + 1e-3))) for n in norms]
        if self.estimator == "recognizability":
            if self.unrecognizable == "low_norm":
                lowest = sorted(range(len(x)), key=lambda j: norms[j])[: max(1, round(0.02 * len(x)))]
                self.see([x[j] for j in lowest])
            if self.u is None:
                return [1.0] * len(x)
            return [min(max(1 - (unit(v) @ unit(self.u)).item(), 0.0), 1.0) for v in x]
        return [1.0] * len(x)

    def weights(self, scores: list[float], members: list[int], step: int) -> list[float] | None:
        """Weights of an identity's images; members: their places in the batch. None: it is to get no prototype."""
        own = [scores[j] for j in members]
        best = sorted(range(len(own)), key=lambda k: -own[k])  # sorted is stable: the first of equals is the better one
        equal = [1.0] * len(own)
        if self.estimator == "equal" or step < self.warmup:
            return equal
        if self.usage == "soft":
            q = [max(v**self.power, self.minimum) for v in own]
            return q if sum(q) > 1e-6 else equal
        if self.usage == "topk":
            return [float(k in best[: self.keep]) for k in range(len(own))]
        limit = self.threshold
        if limit is None:
            limit = sorted(scores)[min(int(self.quantile * len(scores)), len(scores) - 1)]
        q = [float(v >= limit) for v in own]
        if sum(q) > 0:
            return q
        return {"equal": equal, "best": [float(k == best[0]) for k in range(len(own))], "skip": None}[self.on_empty]

    def loss_weights(self, scores: list[float], step: int) -> list[float]:
        if self.loss_weight == 0 or step < self.warmup:
            return [1.0] * len(scores)
        return [(v / max(scores)) ** self.loss_weight for v in scores]


def prototype(e: list[torch.Tensor], q: list[float]) -> torch.Tensor:
    """norm(sum q e / sum q); the image with the largest weight where that sum has no direction."""
    mean = sum(w / sum(q) * v for w, v in zip(q, e))
    if mean.norm() < 1e-6:
        mean = e[max(range(len(q)), key=lambda j: q[j])]  # max takes the first of equals
    return unit(mean)


class MemoryReference:
    """The memory in one process. rows: slot -> unit row, for the slots that take part in the softmax.

    quality: a QualityReference. fillers: rows of a memory that starts at random. pinned: the prototype of the
    unrecognizable is one more negative. phi: margin of the target cosine; filter_above: negatives with a larger cosine
    get the logit 0. injection: weight, steps and start of the features that are mixed into stored rows (VPL).
    """

    def __init__(
        self,
        size,
        quality: QualityReference,
        policy="ring",
        momentum=0.0,
        gradient="none",
        self_exclusion="none",
        average="unit",
        storage="fp32",
        fillers=None,
        pinned=False,
        injection=None,
    ):
        self.book, self.quality = SlotReference(size, policy), quality
        self.momentum, self.gradient, self.self_exclusion = momentum, gradient, self_exclusion
        self.average, self.storage, self.pinned = average, storage, pinned
        self.rows: dict[int, torch.Tensor] = dict(enumerate(fillers or []))
        self.fillers = set(self.rows)
        self.leaves: dict[int, torch.Tensor] = {}
        self.injection, self.features = injection, {}  # identity -> (unit embedding of its last image, its step)

    def _keep(self, row: torch.Tensor) -> torch.Tensor:
        return row.detach().bfloat16().double() if self.storage == "bf16" else row.detach()

    def loss(self, x: torch.Tensor, labels: list[int], step: int, scale, phi, filter_above=0.0, external=None):
        """Loss of one step with the embeddings x [B, D] (a leaf, if a gradient is wanted); writes the memory first."""
        quality, slot_of = self.quality, self.book.slot_of
        scores = quality.scores(list(x.detach()), external)
        weight = quality.loss_weights(scores, step)
        self.left_over = 1.0  # the smallest sum without an image, as a share of that image's part in it
        refreshed, new = self.book.plan(labels)
        source = x if self.gradient == "batch" else x.detach()
        live: dict[int, torch.Tensor] = {}  # slot -> the row with its graph
        positive: dict[int, torch.Tensor] = {}  # sample -> what it is compared with, where that is not its slot's row
        for c in sorted(set(labels)):
            slot = slot_of[c]
            images = [j for j, y in enumerate(labels) if y == c]
            builders = images[: (len(images) + 1) // 2] if self.self_exclusion == "split" else images
            if self.self_exclusion == "split":
                for j in builders:
                    weight[j] = 0.0
            q = quality.weights(scores, builders, step)
            if c in new:
                self.rows.pop(slot, None)
                self.fillers.discard(slot)
            if q is None:
                continue
            e = [unit(source[j]) if self.average == "unit" else source[j] for j in builders]
            p = made = prototype(e, q)
            if self.momentum and c in refreshed and slot in self.rows:
                mixed = self.momentum * self.rows[slot] + (1 - self.momentum) * p
                p = unit(mixed) if mixed.norm() >= 1e-6 else p
            self.rows[slot] = self._keep(p)
            live[slot] = p
            if self.self_exclusion == "loo":
                for k, j in enumerate(builders):
                    rest = sum(w / sum(q) * v for i, (w, v) in enumerate(zip(q, e)) if i != k)
                    nothing = len(builders) == 1 or rest.norm() < 1e-6
                    if not nothing:
                        self.left_over = min(self.left_over, (rest.norm() / (q[k] / sum(q) * e[k]).norm()).item())
                    positive[j] = made if nothing else unit(rest)
        columns = self._inject(self._columns(live), step)
        for y, v in zip(labels, x.detach()):  # for later steps
            self.features[y] = (unit(v), step)
        total = 0.0
        for i, y in enumerate(labels):
            t = slot_of[y]
            if t not in self.rows:
                weight[i] = 0.0
                continue
            xh = unit(x[i])
            z = [scale * phi(xh @ positive.get(i, columns[t]))]
            for slot, row in columns.items():
                if slot != t:
                    cos = xh @ row
                    z.append(0 * cos if filter_above and cos > filter_above else scale * cos)
            total = total + weight[i] * (torch.stack(z).logsumexp(0) - z[0])
        if sum(weight) == 0:
            return (x * 0).sum()
        return total / sum(weight)

    def _inject(self, columns: dict[int, torch.Tensor], step: int) -> dict[int, torch.Tensor]:
        """slot -> row with the last feature of its identity, if that is young."""
        i, self.features = self.injection, {c: f for c, f in self.features.items() if c in self.book.slot_of}
        if i is None or step < i["start"]:
            return columns
        out = dict(columns)
        for c, (feature, seen) in self.features.items():
            slot = self.book.slot_of[c]
            if slot in out and step - seen <= i["steps"]:
                out[slot] = unit((1 - i["weight"]) * out[slot] + i["weight"] * feature)
        return out

    def _columns(self, live: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """slot -> row as the softmax sees it."""
        columns = dict(self.rows)
        if self.storage == "bf16":
            columns = {s: unit(row) for s, row in columns.items()}
        if self.gradient == "batch":
            columns.update(live)
        if self.pinned and self.quality.u is not None:
            columns[self.book.num_slots] = unit(self._keep(unit(self.quality.u)))
        if self.gradient == "sgd":
            columns = {s: row.clone().requires_grad_() for s, row in columns.items()}
            self.leaves = columns
        return columns

    def learn(self, rate: float) -> None:
        """Plain SGD on the stored rows after the backward, then back to unit length."""
        for slot in self.rows:
            grad = self.leaves[slot].grad
            if grad is not None:
                self.rows[slot] = unit(self.rows[slot] - rate * grad)
