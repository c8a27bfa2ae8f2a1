"""Speed of the built-in image sources: rendered faces and generated patterns.

    python benchmarks/render_speed.py --out benchmarks/results
    python benchmarks/render_speed.py --images 96 --repeats 3 --device cuda

Per source: images per second of wall time and CPU time (user + system) per image, repeated in turn. `faces: set` is
everything that `protomem data synth` does: rendering in threads, degradation, JPEG, RecordIO.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.common import cpu_seconds, spread, write_csv
from protomem.data.faces import render_faces, write_face_set
from protomem.data.patterns import PatternRecords


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=320, help="faces per repeat; patterns are drawn ten times as often"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads of `faces: set`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for render_speed.csv")
    arguments = parser.parse_args()
    count = arguments.images // 20 * 20
    people, images = np.repeat(np.arange(count // 20), 20), np.tile(np.arange(20), count // 20)
    patterns = PatternRecords(1_000_000, 4)
    place = (np.arange(10 * count) * 104_729) % len(patterns)

    def write_set(repeat: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_face_set(
                folder,
                identities=count // 20,
                images_per_identity=20,
                seed=repeat,
                device=arguments.device,
                workers=arguments.workers,
                progress=False,
            )

    def render(repeat: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        render_faces(people, images, seed=repeat, device=arguments.device)
        torch.set_num_threads(threads)

    sources = {
        "faces: pixels, one thread": (count, render),
        f"faces: set, {arguments.workers} threads": (count, write_set),
        "patterns: array, one thread": (len(place), lambda _: [patterns.array(i) for i in place]),
        "patterns: JPEG, one thread": (len(place), lambda _: [patterns.bytes(i) for i in place]),
    }
    render_faces(people[:16], images[:16], device=arguments.device)  # tables
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for repeat in range(arguments.repeats):
        for name, (number, draw) in sources.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            draw(repeat)
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            figures[name].append((number / wall, cpu / number * 1e3))
    rows = []
    for name, values in figures.items():
        for quantity, column in (("images/s", 0), ("CPU ms per image", 1)):
            row = {
                "source": name,
                "device": arguments.device,
                "quantity": quantity,
                **spread([v[column] for v in values]),
            }
            rows.append(row)
            print(f"{name:30} {quantity:17} median {row['median']:9.2f}  min {row['min']:9.2f}  max {row['max']:9.2f}")
    if arguments.out:
        write_csv(arguments.out / "render_speed.csv", rows)


if __name__ == "__main__":
    main()
