"""What `protomem evaluate`, `templates` and `embed` do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Callable

import numpy as np

from protomem import build, config, distributed, state
from protomem.console import event_line
from protomem.data.records import open_records
from protomem.errors import UserError
from protomem.files import replace_file
from protomem.evaluate.extract import evaluate_bins, extract
from protomem.evaluate.templates import random_protocol, read_protocol, verify_templates


def load_run(run: Path, device) -> tuple:
    """(config, encoder with the trained weights, training.json) of a run folder or a checkpoint folder."""
    checkpoint = state.locate(run)
    info = state.read_info(checkpoint)
    settings = config.of_checkpoint(info.get("config"), checkpoint)
    # What the machine at hand may lack and the embeddings do not depend on.
    settings.encoder.weights, settings.encoder.sync_bn, settings.data.loader = None, False, "auto"
    encoder = build.encoder_from(settings, device)
    state.load_encoder(checkpoint, encoder)
    return settings, encoder.eval(), info


def _embeddings(encoder, read: Callable[[int], bytes], count: int, context, settings, *, flip: bool, batch_size: int):
    """Embeddings [count, D] of the encoded images read(0), read(1), ...; bounded memory for sets of any size. Collective."""
    options = dict(precision=settings.encoder.precision, size=settings.data.size, backend=settings.data.loader)
    options |= dict(device=context.device, flip=flip, batch_size=batch_size)
    chunk = 100 * batch_size * context.world_size
    starts = range(0, count, chunk)
    return np.concatenate([extract(encoder, [read(i) for i in range(s, min(s + chunk, count))], **options) for s in starts])


def evaluate(run: Path, pairs: list[Path], *, flip: bool, batch_size: int, device: str, json_output: bool) -> None:
    for path in pairs:
        if not path.is_file():
            raise UserError(f"{path} does not exist; make verification pairs with `protomem data pairs`")
    context = distributed.init(device)
    try:
        settings, encoder, info = load_run(run, context.device)
        results = evaluate_bins(
            encoder,
            pairs,
            device=context.device,
            batch_size=batch_size,
            precision=settings.encoder.precision,
            flip=flip,
            backend=settings.data.loader,
            size=settings.data.size,
        )
        if context.is_main and json_output:
            print(json.dumps({name: result.summary() for name, result in results.items()}, indent=1))
        elif context.is_main:
            for name, result in results.items():
                print(event_line("evaluation", {"step": info["step"], "name": name, **result.summary()}))
    finally:
        distributed.shutdown()


def templates(
    run: Path,
    data: str,
    *,
    lists: tuple[Path, Path] | None,
    images: int,
    pairs: int,
    poolings: list[str],
    flip: bool,
    batch_size: int,
    device: str,
    json_output: bool,
) -> None:
    column = None
    if "quality" in poolings and lists:
        raise UserError("--pooling quality needs a set with train.quality.npy, not lists; use mean and norm")
    if lists:
        names, protocol = read_protocol(*lists)
        missing = [name for name in names if not os.path.isfile(Path(data) / name)]
        if missing:
            raise UserError(f"{Path(data) / missing[0]} does not exist, but {lists[0]} lists it (and {len(missing) - 1} more)")
        count, read = len(names), lambda i: (Path(data) / names[i]).read_bytes()
    else:
        records = open_records(data)
        protocol = random_protocol(records.labels, images, pairs)
        count, read = len(records), records.bytes
        column = records.column("quality") if "quality" in poolings else None
    context = distributed.init(device)
    try:
        settings, encoder, info = load_run(run, context.device)
        found = _embeddings(encoder, read, count, context, settings, flip=flip, batch_size=batch_size)
        results = {pooling: verify_templates(found, protocol, pooling, column) for pooling in poolings}
        if context.is_main and json_output:
            print(json.dumps(results, indent=1))
        elif context.is_main:
            for name, result in results.items():
                values = {"step": info["step"], "pooling": name, **result, "pairs": len(protocol.same)}
                print(event_line("templates", values))
    finally:
        distributed.shutdown()


def embed(run: Path, data: str, output: Path, *, flip: bool, batch_size: int, device: str) -> None:
    import io

    if output.suffix != ".npz":
        raise UserError(f"{output}: the output is an .npz file; give it that ending")
    context = distributed.init(device)
    try:
        settings, encoder, _ = load_run(run, context.device)
        records = open_records(data)
        found = _embeddings(encoder, records.bytes, len(records), context, settings, flip=flip, batch_size=batch_size)
        if context.is_main:
            file = io.BytesIO()
            np.savez(file, embeddings=found, labels=np.asarray(records.labels))
            output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(output, file.getvalue())
            print(f"{output}: {len(records)} embeddings of size {found.shape[1]}")
    finally:
        distributed.shutdown()
