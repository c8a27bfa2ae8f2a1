"""Fuzz one reader guided by coverage: atheris (`pip install atheris`) keeps the inputs that reach new lines of protomem.

    python benchmarks/fuzz_coverage.py pairs --seconds 300 --work /tmp/coverage

Worth it for the readers written in Python: pairs, tar, images, templates, pair_lists, columns. Stops at the first finding,
whose input libFuzzer writes into the working folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris

with atheris.instrument_imports(include=["protomem"]):
    from tests import fuzzing
    from tests.fuzz_targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    target, seeds = TARGETS[arguments.reader], TARGETS[arguments.reader].seeds()
    name = (target.mutable or tuple(seeds[0]))[0]
    place = arguments.work / arguments.reader
    (place / "inputs").mkdir(parents=True, exist_ok=True)
    for number, files in enumerate(seeds):
        (place / "inputs" / f"seed-{number}").write_bytes(files[name])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))

    def one(data: bytes) -> None:
        fuzzing._lay(folder, seeds[0] | {name: data})
        kind, text = fuzzing.judge(target, folder)
        if kind not in ("accepted", "refused"):
            raise AssertionError(f"{kind}: {text}")

    options = [
        f"-max_total_time={arguments.seconds}",
        "-rss_limit_mb=3000",
        "-timeout=60",
        "-max_len=20000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={place}/", str(place / "inputs")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
