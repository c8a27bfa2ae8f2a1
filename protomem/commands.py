"""What `protomem evaluate` and `protomem embed` do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from protomem import build, config, distributed, state
from protomem.data.records import open_records
from protomem.errors import UserError
from protomem.files import replace_file
from protomem.evaluate.extract import evaluate_bins, extract
from protomem.metrics import event_line


def load_run(run: Path, device) -> tuple:
    """(config, encoder with the trained weights, training.json) of a run folder or a checkpoint folder."""
    checkpoint = state.locate(run)
    info = state.read_info(checkpoint)
    settings = OmegaConf.merge(OmegaConf.structured(config.Config), info["config"])
    # What the machine at hand may lack and the embeddings do not depend on.
    settings.encoder.weights, settings.encoder.sync_bn, settings.data.loader = None, False, "auto"
    encoder = build.encoder_from(settings, device)
    state.load_encoder(checkpoint, encoder)
    return settings, encoder.eval(), info


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


def embed(run: Path, data: str, output: Path, *, flip: bool, batch_size: int, device: str) -> None:
    import io

    if output.suffix != ".npz":
        raise UserError(f"{output}: the output is an .npz file; give it that ending")
    context = distributed.init(device)
    try:
        settings, encoder, _ = load_run(run, context.device)
        records = open_records(data)
        parts, chunk = [], 100 * batch_size * context.world_size  # bounded memory for sets of any size
        for start in range(0, len(records), chunk):
            encoded = [records.bytes(i) for i in range(start, min(start + chunk, len(records)))]
            options = dict(precision=settings.encoder.precision, flip=flip, size=settings.data.size)
            parts.append(
                extract(encoder, encoded, device=context.device, batch_size=batch_size, backend=settings.data.loader, **options)
            )
        if context.is_main:
            file = io.BytesIO()
            np.savez(file, embeddings=np.concatenate(parts), labels=np.asarray(records.labels))
            output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(output, file.getvalue())
            print(f"{output}: {len(records)} embeddings of size {parts[0].shape[1]}")
    finally:
        distributed.shutdown()
