"""Fuzz every reader of foreign bytes for a while, and write what came out.

    python benchmarks/fuzz.py --seconds 120 --out benchmarks/results --page docs/fuzzing.md
    python benchmarks/fuzz.py --only pairs tar --seconds 20 --keep /tmp/findings     # inputs of findings are kept there

The readers and how inputs are made: tests/fuzz_targets.py and tests/fuzzing.py. Every finding can be made again from
--seed and its number. Exit code 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_csv
from tests.fuzz_targets import TARGETS
from tests.fuzzing import fuzz, random_inputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of the clock, for each reader")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        target, begin = TARGETS[name], time.monotonic()
        inputs = random_inputs(target, arguments.seed)
        tally = fuzz(target, inputs, arguments.seconds)
        row = {"reader": name, "what": target.what, "inputs": tally.inputs, "seconds": round(time.monotonic() - begin)}
        row |= {"accepted": tally.accepted, "refused": tally.refused, "findings": len(tally.findings)}
        row |= {"slowest_cpu_s": round(tally.slowest, 2), "seed": arguments.seed}
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items() if k != "what"), flush=True)
        for number, (what, where) in enumerate(sorted(tally.findings.items(), key=lambda f: -len(f[1]))):
            print(f"    {len(where)} x {what}   (first: {where[0]}: {tally.examples.get(what, '')[:160]})", flush=True)
            if arguments.keep:
                for file, data in next(inputs(where[0]))[1].items():
                    path = arguments.keep / name / str(number) / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
    if arguments.out:
        write_csv(arguments.out / "fuzz.csv", rows)
    return 1 if any(row["findings"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
