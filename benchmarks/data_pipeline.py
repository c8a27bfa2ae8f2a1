"""Speed of the input pipeline: threads with simplejpeg (`torch`) against DALI, reading a RecordIO set of 112x112 JPEGs.

    python benchmarks/data_pipeline.py --out benchmarks/results
    python benchmarks/data_pipeline.py --images 20000 --repeats 7 --threads 8 --batch 256 --device cuda

Per loader and set of augmentations: images per second of wall time and CPU time (user + system) per image, repeated in
turn. `all`: crop, low resolution, photometric and occlusion, each for one image in five, and flip for one in two.
`decode only` is libjpeg-turbo in one thread, the floor of both. On a GPU, DALI decodes there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import cpu_seconds, spread, write_csv
from protomem.data import dali
from protomem.data.augment import AugmentOptions
from protomem.data.decode import decode_tolerant
from protomem.data.patterns import PatternRecords
from protomem.data.pipeline import make_loader
from protomem.data.recordio import RecordWriter
from protomem.data.records import open_records
from protomem.data.sampler import ShuffledSampler

CHANGES = {
    "none": AugmentOptions(flip=0),
    "flip": AugmentOptions(),
    "all": AugmentOptions(crop=0.2, low_resolution=0.2, photometric=0.2, occlusion=0.2),
}


def versions() -> dict[str, str]:
    found = {}
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "simplejpeg", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"packages": " ".join(f"{name}={version}" for name, version in found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="images per repeat")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads (one more reads)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for data_pipeline.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = PatternRecords(arguments.images // 4, 4)
        with RecordWriter(folder) as writer:
            for i in range(len(source)):
                writer.add(source.bytes(i), source.label(i))
        rows = measure(open_records(folder), arguments)
    if arguments.out:
        write_csv(arguments.out / "data_pipeline.csv", rows)


def measure(records, arguments) -> list[dict]:
    device = torch.device(arguments.device)
    sampler = ShuffledSampler(len(records), arguments.batch, seed=0)
    options = {"seed": 0, "device": device, "threads": arguments.threads}
    loaders = {
        (backend, name): make_loader(records, sampler, backend=backend, augment=augment, **options)
        for name, augment in CHANGES.items()
        for backend in (["torch", "dali"] if dali.available() else ["torch"])
    }

    def decode_only(epoch: int) -> int:
        count = min(len(records), 1024)
        for i in range(count):
            decode_tolerant(records.bytes(i))
        return count

    def run(loader):
        return lambda epoch: sum(len(batch.images) for batch in loader.epoch(epoch))

    runs = {("decode only", ""): decode_only, **{name: run(loader) for name, loader in loaders.items()}}
    figures: dict[tuple, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(-1, arguments.repeats):  # the first round warms up
        for name, once in runs.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            count = once(repeat + 1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 0:
                figures[name].append((count / (time.perf_counter() - wall), (cpu_seconds() - cpu) / count * 1e6))
    for loader in loaders.values():
        loader.close()
    rows = []
    for (loader, changes), values in figures.items():
        for quantity, column in (("images/s", 0), ("CPU us per image", 1)):
            row = {"loader": loader, "augmentation": changes, "device": arguments.device, "batch": arguments.batch}
            row |= {"threads": 1 if loader == "decode only" else arguments.threads, "quantity": quantity}
            row |= {**spread([value[column] for value in values]), **versions()}
            rows.append(row)
            figure = "  ".join(f"{name} {row[name]:7.0f}" for name in ("median", "min", "max"))
            print(f"{loader:12}{changes:6}{quantity:17} {figure}")
    return rows


if __name__ == "__main__":
    main()
