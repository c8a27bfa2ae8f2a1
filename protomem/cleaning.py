"""Images whose label is probably wrong: far from the dominant prototype of their identity.

The second stage of Sub-center ArcFace (Deng et al., ECCV 2020; insightface's recognition/subcenter_arcface/drop.py): where an
identity has several prototypes, wrong images gather at others than the dominant one, which is nearest to most of its images.
What is more than 75 degrees away from that one is dropped, and a network with one prototype of each identity is trained on
the rest. Unlike there, an identity keeps its number when all of its images are dropped.

Legend: N images, C identities, K prototypes of each, D feature size, B batch over all ranks, R identities of this rank.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from protomem import distributed, state
from protomem.commands import load_run
from protomem.data.augment import AugmentOptions
from protomem.data.cleaned import SUMMARY, write_cleaned
from protomem.data.index_cache import progress_bar
from protomem.data.inspect import known_bad
from protomem.data.pipeline import make_loader, normalise
from protomem.data.records import open_records
from protomem.errors import UserError
from protomem.evaluate.extract import PRECISIONS


OURS = re.compile(r"train\.(rec|idx|index\.cache|verified\.json|.+\.npy)|property|clean\.json|dropped\.(csv|png)|angles\.png")


class _InOrder:
    """These records once, in order, as a sampler of one epoch; the last batch is filled up with the last record."""

    together = 1

    def __init__(self, positions: np.ndarray, batch_size: int):
        self.positions, self.batch_size = positions, batch_size
        self.steps_per_epoch = -(-len(positions) // batch_size)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        at = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self.positions[np.minimum(at, len(self.positions) - 1)]


def angles_to_rows(x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, first: int) -> torch.Tensor:
    """Angles [B, K] between x [B, D] and the prototypes of its identity, in degrees, computed in float64, float32; 0 where
    another rank has them. rows [R, K, D]: of the identities from `first` on."""
    out = torch.zeros(len(x), rows.shape[1], device=x.device)
    mine = (labels >= first) & (labels < first + len(rows))
    own = F.normalize(rows[labels[mine] - first].double(), dim=2)
    cos = torch.bmm(own, F.normalize(x[mine].double(), dim=1)[:, :, None]).squeeze(2)
    out[mine] = cos.clamp(-1, 1).arccos().rad2deg().float()
    return out


def measure(encoder, rows: torch.Tensor, identities: int, records, settings, context, batch_size: int, skip: bool):
    """(angles [N, K] in degrees, float32, of every image to the prototypes of its identity; usable [N], bool). Collective.

    rows [R, K, D]: this rank's. Each rank reads and encodes its part of a batch, gets the features of all, and adds the angles
    of the images whose identity it owns; rank 0 alone keeps them, the others return zeros. batch_size: images of a rank; an
    image has the same place in the same shape of batch at every world size, unless all of them fill no batch. An image that
    cannot be decoded is not usable; with skip=False it raises UserError on every rank.
    """
    world, count, device, bad = context.world_size, len(records), context.device, known_bad(records)
    if len(bad) and not skip:
        raise _corrupt(records, int(bad[0]))
    positions = np.setdiff1d(np.arange(count), bad)
    if not len(positions):
        raise UserError(f"{records.path}: not one of the {count:,} records can be decoded")
    batch_size = min(batch_size, -(-len(positions) // world))
    first, _ = distributed.shard_bounds(identities, context.rank, world)
    sampler, sizes = _InOrder(positions, batch_size * world), [batch_size] * world
    angles, usable = np.zeros((count, rows.shape[1]), np.float32), np.zeros(count, bool)
    loader = make_loader(
        records,
        sampler,
        backend=settings.data.loader,
        rank=context.rank,
        world_size=world,
        augment=AugmentOptions(flip=0.0),
        size=settings.data.size,
        device=device,
        threads=settings.data.threads,
        prefetch=settings.data.prefetch,
        on_corrupt="skip",  # so that all ranks hear of it
    )
    half = settings.encoder.precision
    autocast = torch.autocast(device.type, dtype=PRECISIONS[half], enabled=half != "fp32")
    with contextlib.closing(loader), torch.no_grad(), progress_bar("measuring", len(positions), context.is_main) as advance:
        for batch in loader.epoch(0):
            wanted = sampler.batch(0, batch.step)
            with autocast:
                x = encoder(normalise(batch.images.to(device))).float()
            own = torch.from_numpy(wanted[batch_size * context.rank :][:batch_size])
            sound = (own == batch.index).to(device)  # else the loader took another image
            x = distributed.gather_rows(torch.cat([x, sound[:, None]], dim=1), sizes)
            sound = x[:, -1].cpu().numpy() > 0
            if not skip and not sound.all():
                raise _corrupt(records, int(wanted[~sound][0]))
            labels = torch.from_numpy(np.where(sound, records.labels[wanted], -1)).to(device)
            found = distributed.all_reduce(angles_to_rows(x[:, :-1], labels, rows, first))
            if context.is_main:
                here = wanted[: len(positions) - batch.step * sampler.batch_size]  # without what fills up the last batch
                angles[here], usable[here] = found[: len(here)].cpu().numpy(), sound[: len(here)]
            advance(len(wanted))
    unknown = np.flatnonzero(usable & ~np.isfinite(angles).all(1))  # rank 0 alone has them, and all have to hear of it
    position = distributed.broadcast_object(int(unknown[0]) if len(unknown) else None)
    if position is not None:
        raise UserError(
            f"the embedding of record {position} ({records.where(position)}), or a prototype of its identity, is not finite; use "
            "an earlier checkpoint, or a run with encoder.precision=fp32"
        )
    return angles, usable


def _corrupt(records, position: int) -> UserError:
    return UserError(
        f"record {position} ({records.where(position)}) cannot be decoded; `protomem data verify {records.path}` lists all "
        "such, --skip-corrupt leaves them out"
    )


@dataclass
class Findings:
    """What is known of each image: angle float32 [N] to the dominant prototype, degrees; nearest int8 [N]: which prototype of
    its identity; usable, keep bool [N]. dominant int8 [C]: the prototype of each identity that is nearest to most images."""

    angle: np.ndarray
    nearest: np.ndarray
    dominant: np.ndarray
    usable: np.ndarray
    keep: np.ndarray


def judge(angles: np.ndarray, usable: np.ndarray, labels: np.ndarray, identities: int, limit: float) -> Findings:
    """angles [N, K], usable [N], labels [N] (of usable images in 0..identities-1) -> Findings; `keep`: usable, and not more
    than `limit` degrees away. Of equally near or frequent prototypes the first counts (published code)."""
    k = angles.shape[1]
    labels = np.where(usable, labels, 0)
    nearest = angles.argmin(axis=1).astype(np.int8)
    votes = np.bincount((labels * k + nearest)[usable], minlength=identities * k).reshape(identities, k)
    dominant = votes.argmax(axis=1).astype(np.int8)
    angle = np.where(usable, np.take_along_axis(angles, dominant[labels][:, None].astype(np.int64), axis=1)[:, 0], np.nan)
    return Findings(angle, nearest, dominant, usable, usable & (angle <= limit))


def clean(
    run: Path,
    output: Path,
    *,
    data: str | None,
    angle: float,
    list_only: bool,
    skip_corrupt: bool,
    force: bool,
    batch_size: int,
    device: str,
    json_output: bool,
) -> None:
    """What `protomem data clean` does. Collective."""
    context = distributed.init(device)
    temporary, made, located = output.parent / f".{output.name}.writing-{os.getpid()}", [], []
    try:
        # One rank looks: the run may be training, and write a newer one meanwhile.
        distributed.main_first(lambda: located.append(state.locate(run)))
        checkpoint = Path(distributed.broadcast_object(str(located[0]) if context.is_main else None))
        settings, encoder, info = load_run(checkpoint, context.device)
        if settings.prototypes.source == "memory":
            raise UserError(
                f"{run} was trained with prototypes.source=memory, which keeps no prototype of each identity; cleaning needs a "
                "run with classifier or sampled, best with prototypes.sub_centers=3"
            )
        lenient = skip_corrupt or settings.data.on_corrupt == "skip"
        path = data or settings.data.train

        def prepare():
            records = _records(path, lenient, data is not None, info.get("run", {}))
            _check_output(output, force, [*_files_of(records), checkpoint])
            _or_user_error(output, lambda: _make(temporary))
            made.append(temporary)

        distributed.main_first(prepare)
        records = open_records(path, strict=not lenient)
        rows, identities = state.load_rows(checkpoint, context.device)
        centers, size = settings.prototypes.sub_centers, settings.encoder.embedding_size
        if rows.shape[1:] != (centers * size,):
            raise UserError(f"checkpoint {checkpoint}: rows of {list(rows.shape[1:])} numbers, not {centers} x {size}")
        if identities != records.num_classes:
            raise UserError(
                f"{records.path} has {records.num_classes:,} identities, but {run} was trained on {identities:,}; name the "
                "very data of the run"
            )
        rows = rows.view(len(rows), centers, size)
        measured = measure(encoder, rows, identities, records, settings, context, batch_size, lenient)

        def write():
            found = judge(*measured, records.labels, identities, angle)
            facts = {"run": str(run), "checkpoint": str(checkpoint), "step": info["step"]}
            facts |= {"sub_centers": centers, "angle": angle}
            facts = _or_user_error(output, lambda: write_cleaned(temporary, records, found, facts, list_only))
            _or_user_error(output, lambda: _put_in_place(temporary, output))
            print(json.dumps(facts, indent=1) if json_output else _told(facts, output, list_only))

        distributed.main_first(write)
    finally:
        if made:
            shutil.rmtree(temporary, ignore_errors=True)
        distributed.shutdown()


def _records(path: str, lenient: bool, given: bool, trained: dict):
    try:
        records = open_records(path, strict=not lenient)
    except UserError as error:
        if given:
            raise
        raise UserError(f"{error} (these are the data of the run; --data names where they are now)") from None
    if not given and trained.get("data", records.fingerprint) != records.fingerprint:
        raise UserError(
            f"{path} has changed since the run was trained, so its labels may mean others; put the data back, or name a set "
            "of the same identities with --data"
        )
    return records


def _files_of(records) -> list[Path]:
    """The data's own folder or file, and where its parts really lie."""
    path = Path(records.path)
    inside = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(path.name))
    return [path, *inside, *(part for part in [getattr(records, "rec", None)] if part)]


def _check_output(output: Path, force: bool, sources: list[Path]) -> None:
    here = output.resolve()
    for source in sources:  # class folders would have an identity more
        if source.resolve() in here.parents:
            raise UserError(f"{output} lies within {source}, which is read; choose another folder")
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UserError(f"{output} exists; --force replaces it")
    if not (output / SUMMARY).is_file() or output.is_symlink():
        why = "was not written by this command, so --force does not replace it"
        raise UserError(f"{output} {why}; choose another folder")
    for source in sources:
        if here in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{output} holds {source}, which is read; choose another folder")
    for path in sorted(output.iterdir()):
        if path.is_dir() or not OURS.fullmatch(path.name):
            raise UserError(f"{output} also holds {path.name}, which this command did not write; choose another folder")


def _make(temporary: Path) -> None:
    """An empty folder; removes those of killed commands that were to become the same one."""
    for old in temporary.parent.glob(glob.escape(temporary.stem) + ".writing-*"):
        process = old.name.rpartition("-")[2]
        if not process.isdigit() or not Path("/proc", process).exists():
            shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)


def _or_user_error(output: Path, act):
    try:
        return act()
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error})") from None


def _put_in_place(temporary: Path, output: Path) -> None:
    if output.exists():
        old = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old)
    else:
        temporary.rename(output)


def _told(facts: dict, output: Path, list_only: bool) -> str:
    share = 100 * facts["dropped"] / max(1, facts["images"])
    lines = [
        f"{output}: {facts['kept']:,} of {facts['images']:,} images kept, {facts['dropped']:,} ({share:.1f} %) more than "
        f"{facts['angle']:g} degrees from their identity's dominant prototype" + (" (list only)" if list_only else "")
    ]
    if facts["unusable"]:
        lines.append(f"left out because they cannot be decoded: {facts['unusable']:,} images")
    if facts["emptied"]:
        some = ", ".join(map(str, facts["first_emptied"][:8])) + (", ..." if facts["emptied"] > 8 else "")
        lines.append(f"{facts['emptied']:,} identities have no image left and keep their number: {some}")
    lines.append(f"look at {output / 'angles.png'}" + (f" and {output / 'dropped.png'}" if facts["dropped"] else ""))
    return "\n".join(lines)
