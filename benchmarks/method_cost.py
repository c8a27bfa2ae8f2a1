"""CPU time that a method adds to the head step of one process: forward, backward, what it keeps, and the SGD update.

    python benchmarks/method_cost.py --out benchmarks/results          # the figures of the log
    python benchmarks/method_cost.py --identities 20000 --batches 64 --repeats 3

Variants run in turn, repeat by repeat, on the same rows and in the same process (user + system time, one thread); each
ratio is to the plain head of the same repeat.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import spread, write_csv
from protomem.head import blocked_head
from protomem.objective.margins import build_margin
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.empirical import EmpiricalPrototypes
from protomem.prototypes.variational import FeatureBank
from protomem.step import losses

SHARES = (0.04, 0.128, 0.5, 1.0)  # of the rows that are injected; 200 steps of 64 images reach 12.8 % of 100,000


class Problem:
    """One shard with its optimizer, and a batch; `step` is what is timed."""

    def __init__(self, identities: int, size: int):
        self.shard = ClassifierShard(identities, size)
        self.optimizer = torch.optim.SGD([self.shard.weight], lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        self.bank = FeatureBank(identities, size, weight=0.15, steps=200, start=0)
        self.bank.features.copy_(torch.nn.functional.normalize(torch.randn(identities, size)))
        self.order = torch.randperm(identities)
        self.empirical = EmpiricalPrototypes(identities, size)
        self.empirical.rows.copy_(self.bank.features)
        self.empirical.seen.fill_(1)

    def draw(self, batch: int) -> None:
        self.x = torch.randn(batch, self.shard.weight.shape[1]).requires_grad_()
        self.labels = torch.randint(0, self.shard.num_identities, (batch,))

    def step(self) -> None:
        shard, labels = self.shard, self.labels
        shard.begin_step(labels, 1000)
        found = losses((self.x,) * self.views, labels, [len(labels)], shard, blocked_head, self.margin)
        found.per_sample.mean().backward()
        shard.after_step(labels, found.unit)
        self.optimizer.step()


def plain(problem: Problem) -> None:
    problem.shard.bank = problem.shard.empirical = None
    problem.margin, problem.views = build_margin("cosface", scale=64.0, m=0.4), 1


def epl(problem: Problem) -> None:
    problem.shard.empirical = problem.empirical


def magface(problem: Problem) -> None:
    problem.margin = build_margin("magface", scale=64.0)


def two_views(problem: Problem) -> None:
    """CoReFace's classification; its contrast is B x B numbers."""
    problem.views = 2


def vpl(share: float):
    """A bank in which this share of the rows, here and there, has a feature that counts."""

    def prepare(problem: Problem) -> None:
        bank = problem.shard.bank = problem.bank
        bank.seen.fill_(-1)
        bank.seen[problem.order[: round(share * len(bank.seen))]] = 999

    return prepare


VARIANTS = {
    "plain": plain,
    **{f"vpl {100 * share:g} %": vpl(share) for share in SHARES},
    "epl": epl,
    "magface": magface,
    "coreface": two_views,
}


def measure(problem: Problem, batch: int, repeats: int) -> list[dict]:
    times = {name: [] for name in VARIANTS}
    problem.draw(batch)
    for repeat in range(repeats + 1):
        for name, prepare in VARIANTS.items():
            plain(problem)
            prepare(problem)
            start = time.process_time()
            problem.step()
            if repeat:  # the first is the warm-up
                times[name].append(time.process_time() - start)
    rows = []
    for name, seconds in times.items():
        row = {"variant": name, "identities": problem.shard.num_identities, "size": problem.x.shape[1], "batch": batch}
        row |= {f"cpu_s_{k}" if k != "repeats" else k: v for k, v in spread(seconds).items()}
        ratios = spread([a / b for a, b in zip(seconds, times["plain"])])
        row |= {f"ratio_to_plain_{k}": ratios[k] for k in ("median", "min", "max")}
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for method_cost.csv")
    parser.add_argument("--identities", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = Problem(options.identities, options.size)
    rows = [row for batch in options.batches for row in measure(problem, batch, options.repeats)]
    if options.out:
        write_csv(options.out / "method_cost.csv", rows)


if __name__ == "__main__":
    main()
