"""What is looked at before a run starts, since it would only show after hours or as somebody else's error."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from protomem import distributed
from protomem.errors import UserError


def cut_rows(batch_size: int, together: int, world: int, accumulate: int) -> list[list[tuple[int, int]]]:
    """[micro-batch][rank] -> (first, last) of the rank's own rows. `together`: rows of an identity that stay on one rank.

    Raises UserError when there are too few rows, or identities, for the ranks and micro-batches.
    """
    if batch_size // together < world:
        what = f"only {batch_size // together} identities of {together} images" if together > 1 else f"{batch_size} rows"
        raise UserError(f"train.batch_size={batch_size} has {what} for {world} ranks; raise it, or start fewer ranks")
    rows = [b - a for a, b in (distributed.batch_bounds(batch_size, r, world, together) for r in range(world))]
    if min(rows) < accumulate:
        raise UserError(
            f"train.batch_size={batch_size} leaves a rank {min(rows)} rows, too few for {accumulate} micro-batches; raise it, or "
            "lower train.accumulate"
        )
    return [[distributed.batch_bounds(n, a, accumulate) for n in rows] for a in range(accumulate)]


def pair_sets(config: DictConfig) -> dict[str, str]:
    """{name: path} of the verification sets. Raises UserError for a missing one, two of one name, an unknown best."""
    sets = {}
    for path in config.data.eval:
        if not Path(path).is_file():
            raise UserError(f"data.eval: {path} does not exist; make pairs with `protomem data pairs`, or remove it")
        if Path(path).stem in sets:
            raise UserError(f"data.eval: two sets are called {Path(path).stem}; results are told apart by that name")
        sets[Path(path).stem] = path
    if config.checkpoint.best is not None and config.checkpoint.best not in sets:
        raise UserError(f"checkpoint.best={config.checkpoint.best} is not one of data.eval: {', '.join(sets) or 'none'}")
    return sets


def graphs(config: DictConfig, device: torch.device) -> None:
    """Raises UserError where CUDA graphs are asked for and the run is not on a GPU."""
    if config.encoder.compile == "graphs" and device.type != "cuda":
        raise UserError("encoder.compile=graphs needs a GPU, and torch sees none here; use compile=default")


def batchnorm(config: DictConfig, encoder: torch.nn.Module, parts: list[list[tuple[int, int]]]) -> None:
    """Raises UserError where a BatchNorm would have to take the statistics of a single image."""
    fewest = min(b - a for bounds in parts for a, b in bounds)
    norms = (m for m in encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    if fewest < 2 and any(norm.training for norm in norms) and not config.encoder.sync_bn:
        raise UserError(
            f"train.batch_size={config.train.batch_size} leaves a rank or micro-batch a single image, and BatchNorm needs two; "
            "raise it, or set encoder.freeze_statistics=true"
        )


def contrast(config: DictConfig, parts: list[list[tuple[int, int]]], together: int) -> None:
    """Raises UserError where CoReFace's loss (protomem/objective/contrast.py) would have nobody to compare with. together:
    images of an identity that stay on one rank."""
    c = config.contrast
    if c.weight == 0:
        return
    rows = [b - a for a, b in parts[0]]
    if (min(rows) if c.negatives == "local" else sum(rows)) < 2 * together:
        raise UserError(
            f"train.batch_size={config.train.batch_size} with contrast.negatives={c.negatives} leaves a single identity, "
            "which has no negatives; raise it" + (", or set contrast.negatives=global" if c.negatives == "local" else "")
        )
