"""Embeddings of a list of encoded images, over all ranks, and the evaluation of verification sets.

Legend: n images, D feature size.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from protomem import distributed
from protomem.data import pipeline
from protomem.data.decode import decode_tolerant, examine
from protomem.data.pairs import read_bin
from protomem.errors import UserError
from protomem.files import read_array, read_json
from protomem.evaluate.verification import Verification, verify_pairs

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def extract(
    encoder: torch.nn.Module,
    encoded: list[bytes],
    *,
    device: torch.device | str,
    batch_size: int = 128,
    precision: str = "fp32",
    flip: bool = False,
    backend: str = "auto",
    size: int = 112,
) -> np.ndarray:
    """Embed JPEG or PNG images; return float32 [n, D], not normalised, in order, on every rank.

    A collective: all ranks call it with the same list; an image that occurs twice is encoded once. Whole batches are
    dealt to the ranks and the last one is filled up, so a row is computed in the same place of the same batch shape at
    every world size: the result does not depend on the world size (bitwise on equal machines), and on the batch size
    only by the rounding of other kernels.
    The encoder, on `device`, runs in eval mode with rank 0's buffers (ranks' BatchNorm statistics differ; rank 0's are
    the ones a checkpoint holds); modes and buffers are put back afterwards.

    batch_size: images per forward pass (our default 128). precision: fp32, bf16 or fp16 (autocast). flip: add the
    embedding of the mirrored image (the flip-sum of the field; twice the work). backend: auto, dali or torch decoding.
    size: pixels of the encoder's input; other sizes are resized. Raises UserError on every rank for an image that
    cannot be decoded, naming its position, and for an unknown precision or an empty list.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    if not encoded:
        raise UserError("there are no images to embed: the list is empty")
    unique = list(dict.fromkeys(encoded))  # pair sets use many images several times
    device, n = torch.device(device), len(unique)
    if isinstance(encoder, torch.nn.parallel.DistributedDataParallel):
        encoder = encoder.module  # DDP's own forward synchronises buffers, and ranks run different numbers of batches
    batch_size = min(batch_size, n)
    rank, world = distributed.rank(), distributed.world_size()
    batches = -(-n // batch_size)
    bounds = [distributed.batch_bounds(batches, r, world) for r in range(world)]
    rows = [(min(a * batch_size, n), min(b * batch_size, n)) for a, b in bounds]
    start, stop = rows[rank]

    parts, problem = [], None
    with _evaluation_mode(encoder), torch.no_grad(), _autocast(device, precision):
        try:
            # A rank without rows encodes one image all the same: it has to know D for the gather.
            mine = unique[start:stop] or unique[:1]
            for images in pipeline.eval_batches(mine, batch_size, backend, device, size):
                parts.append(_encode(encoder, images.to(device), batch_size, flip))
        except UserError as error:
            problem = _first_broken(mine, encoded) or str(error)
    # Nobody enters the gather alone: a rank that failed tells the others first.
    if problems := [p for p in distributed.gather_objects(problem) if p]:
        raise UserError(problems[0])
    out = torch.cat(parts)[: stop - start]
    out = distributed.gather_rows(out, [b - a for a, b in rows]).cpu().numpy()
    row = {data: i for i, data in enumerate(unique)}
    return out[[row[data] for data in encoded]]


def _encode(encoder, images, batch_size, flip) -> torch.Tensor:
    """uint8 [k, H, W, 3] with k <= batch_size -> float32 [k, D], computed in a batch of exactly batch_size."""
    k = len(images)
    if k < batch_size:
        images = torch.cat([images, images[-1:].expand(batch_size - k, -1, -1, -1)])
    x = pipeline.normalise(images, torch.float32, channels_last=False)
    out = encoder(x).float()
    if flip:
        out = out + encoder(x.flip(3)).float()
    return out[:k]


def _first_broken(part: list[bytes], encoded: list[bytes]) -> str | None:
    """The message about the first image of `part` that cannot be decoded."""
    for data in part:
        try:
            examine(data)
            decode_tolerant(data)
        except ValueError as error:
            return f"image {encoded.index(data)} of {len(encoded)} cannot be decoded: {error}"
    return None


def _autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


@contextlib.contextmanager
def _evaluation_mode(encoder):
    modes = {module: module.training for module in encoder.modules()}
    buffers = list(encoder.buffers())
    own = [b.clone() for b in buffers] if distributed.world_size() > 1 else []
    try:
        encoder.eval()
        for buffer in buffers if own else ():
            dist.broadcast(buffer, src=0)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in zip(buffers, own):
                buffer.copy_(value)


def evaluate_bins(encoder: torch.nn.Module, paths, **options) -> dict[str, Verification]:
    """Verify every `.bin` file of `paths`; {file stem: Verification}, on every rank. `options` go to `extract`.

    Beside `x.bin` may lie `x.quality.npy`, one known quality per image (float [2n]), which is passed on, and the
    `x.json` by which a rendered set is told from photographs. Raises UserError naming the file that is wrong.
    """
    paths = [Path(path) for path in paths]
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two verification files are called {sorted(twice)[0]}.bin: results are told apart by the name")
    results = {}
    for name, path in zip(names, paths):
        encoded, same = read_bin(path)
        try:
            result = results[name] = verify_pairs(extract(encoder, encoded, **options), same)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        result.quality, result.rendered = _known_quality(path, len(encoded)), _is_rendered(path)
    return results


def _known_quality(path: Path, images: int) -> np.ndarray | None:
    file = path.with_suffix(".quality.npy")
    if not file.exists():
        return None
    try:
        quality = np.array(read_array(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); make it again, or delete it") from None
    if quality.shape != (images,) or quality.dtype.kind not in "fiub":
        raise UserError(
            f"{file} must hold one value for each of the {images} images of {path.name}, not {quality.dtype} {quality.shape}"
        )
    return quality


def _is_rendered(path: Path) -> bool:
    """Whether protomem's face renderer wrote this very file: its manifest lies beside it and knows the size."""
    try:
        manifest = read_json(path.with_suffix(".json"))
        return "renderer" in manifest and manifest["files"][path.name] == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False
