"""Fuzz every reader of foreign bytes for a while, and write what came out.

    python benchmarks/fuzz.py --seconds 120 --out benchmarks/results/fuzz.csv
    python benchmarks/fuzz.py --page docs/fuzzing.md benchmarks/results/fuzz.csv   # the page from such tables
    python benchmarks/fuzz.py --only pairs tar --seconds 20 --keep /tmp/findings     # inputs of findings are kept there

The readers and how inputs are made: tests/fuzz_targets.py and tests/fuzzing.py. Every finding can be made again from
--seed and its number. Exit code 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_csv
from tests.fuzz_targets import TARGETS
from tests.fuzzing import fuzz, random_inputs


HEAD = """# Fuzzing

Every reader of bytes that somebody else may have written is fuzzed: small valid files are changed (bits, lengths, digits,
pieces left out, doubled, exchanged, spliced; check sums made right again), and the reader must take them or refuse them with one
line that names the file. Each input is tried in a forked child with 1.5 GB of address space and 10 s of processor time, under
an audit hook that reports programs started, connections, and writes outside of the input's folder.

```bash
python benchmarks/fuzz.py --seconds 120 --out benchmarks/results/fuzz.csv        # all readers
python benchmarks/fuzz.py --only pairs tar --seconds 600 --keep /tmp/findings    # some, longer; keeps inputs of findings
python benchmarks/fuzz_coverage.py pairs --seconds 300 --work /tmp/coverage      # one, guided by coverage (atheris)
```

The suite (`tests/test_fuzz.py`) tries every input that was ever found (`tests/corpus/`) and a few new ones. A reader is added
in `tests/fuzz_targets.py`. This page is written by `benchmarks/fuzz.py --page`.
"""


def write_page(page: Path, tables: list[Path]) -> None:
    """docs/fuzzing.md from the results of runs and from what was found, benchmarks/results/fuzz_findings.csv."""
    rows = [row for table in tables for row in csv.DictReader(table.open())]
    found = list(csv.DictReader((Path(__file__).parent / "results" / "fuzz_findings.csv").open()))
    counts = Counter(row["reader"] for row in found)
    lines = [
        HEAD,
        "## The last run\n",
        "{date}, {machine}, Python {python}, torch {torch}. Seconds are of the clock; other work shared the 2 cores.\n".format(**rows[0]),
    ]
    lines += ["| reader | what | inputs | seconds | taken | refused | slowest, CPU s | findings | found and fixed before |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        numbers = [
            f"{int(r['inputs']):,}",
            r["seconds"],
            f"{int(r['accepted']):,}",
            f"{int(r['refused']):,}",
            r["slowest_cpu_s"],
            r["findings"],
        ]
        lines.append(" | ".join([f"| {r['reader']}", r["what"], *numbers, str(counts[r["reader"]]), ""]).rstrip())
    lines += [
        "\n## What was found\n",
        "Reading: seen in the code, and made a case of; fuzzing: met by the fuzzer.\n",
        "| reader | by | what was wrong | now |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['reader']} | {r['found by']} | {r['what was wrong']} | {r['now']} |" for r in found]
    page.write_text("\n".join(lines) + "\n" + TAIL)
    print(f"wrote {page}")


TAIL = """
## What is not covered

- torch.load(weights_only=True) of a `.pth` is torch's: a dictionary key of nested tuples can keep it busy for ever. Take
  safetensors where you do not know who wrote the file.
- DALI ends the process on some corrupt payloads, so nothing reaches it that `examine` (structure, and libjpeg's reading of the
  header) has not passed; no input that passed has ended it on a CPU here. Decoding on a GPU was not fuzzed.
- An honest picture may have 64 million pixels, 192 MB decoded: DALI decodes a whole batch of them at once.
- A link inside a folder of class folders is followed: sets made of links are common. What it points at is decoded as an image or
  refused.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of the clock, for each reader")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, nargs="+", metavar="FILE", help="the page to write, and the tables it is made of")
    arguments = parser.parse_args()
    if arguments.page:
        write_page(arguments.page[0], arguments.page[1:])
        return 0
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
        write_csv(arguments.out, rows)
    return 1 if any(row["findings"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
