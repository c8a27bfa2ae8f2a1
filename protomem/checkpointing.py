"""When a run goes on from a checkpoint, and what it puts into one (protomem/state.py writes and reads it)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from omegaconf import OmegaConf

from protomem import distributed, flight, lock, optim, state
from protomem.background import Saver
from protomem.elastic import starting
from protomem.errors import UserError
from protomem.files import remove_temporaries, replace_file
from protomem.redact import without_secrets


def identity(run) -> dict:
    """What a checkpoint's step number means: it is only a position in this data with this batch size and seed."""
    c = run.config
    return {
        "images": len(run.records),
        "identities": run.records.num_classes,
        "batch_size": c.train.batch_size,
        "seed": c.train.seed,
        "optimizer": c.optimizer.name,
        "sub_centers": c.prototypes.sub_centers,
        "sampler": c.data.sampler.name,
        "images_per_identity": c.data.sampler.images_per_identity if c.data.sampler.name != "shuffled" else None,
        # Groups are a function of these; a look-alike table and an averaged encoder are there or not.
        "group": [run.sampler.groups, run.sampler.passes] if c.data.sampler.name == "group" else None,
        "look_alikes": c.data.sampler.pick == "look_alike",
        "key_encoder": run.key_encoder is not None,
        "data": run.records.fingerprint,
    }


def modules(run) -> dict[str, torch.nn.Module]:
    """The parts of a run that have state, by the names that they have in a checkpoint."""
    more = {"contrast": run.contrast, "key_encoder": run.key_encoder}
    all_of_them = {"encoder": run.encoder, "prototypes": run.prototypes, "criterion": run.criterion, **more}
    return {name: module for name, module in all_of_them.items() if module is not None}


def _job() -> str:
    """What a launcher calls this job, over restarts and requeues; empty without one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def _begun_by_this_job(mark: Path, restarted: bool) -> bool:
    """Whether the run in the folder of `mark` is that of this very job, started again: one that was refused and then restarted
    by torchrun is not. An elastic job that has grown counts no restart."""
    again = restarted or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 or "PROTOMEM_ELASTIC" in os.environ
    return again and bool(_job()) and mark.is_file() and mark.read_text(errors="replace") == _job()


def _check_identity(run, path, info: dict) -> None:
    """Raises UserError if a checkpoint is a position in other data, or of another model."""
    for key, value in identity(run).items():
        if key == "data" and info["run"].get(key, value) != value:
            raise UserError(
                f"{run.records.path} has changed since checkpoint {path} was written, which is a position in the old data; put "
                "them back, or start anew with another output folder"
            )
        if info["run"].get(key, value) != value:
            raise UserError(
                f"checkpoint {path} was made with {key}={info['run'].get(key)}, this run has {value}; restore it, or "
                "start anew with checkpoint.resume=none and another output folder"
            )


def resume(run) -> Path | None:
    """Load the checkpoint that this run goes on from into its parts, and return it; None for a start. Collective."""
    # A machine that came back counts from 0 again.
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=run.device)
    found, restarted = None, distributed.all_reduce(restarts, "max").item() > 0

    def find():
        nonlocal found
        try:
            remove_temporaries(run.folder)
            state.tidy(run.folder / "checkpoints")
            ours = _begun_by_this_job(run.folder / ".job", restarted)
            found = state.find(run.folder / "checkpoints", run.config.checkpoint.resume, ours)
            if job := _job():
                replace_file(run.folder / ".job", job.encode())
        except OSError as error:
            raise lock.unwritable(run.folder, error) from None

    with starting():
        distributed.main_first(find)
    path = distributed.broadcast_object(str(found or "") if run.context.is_main else None)
    if not path:
        return None
    info = state.read_info(path)
    info["run"].setdefault("sub_centers", 1)  # of a checkpoint from before there were any
    with starting():  # reading, which another start may bring off, stays outside
        _check_identity(run, path, info)
    more = tuple(f"sampler.{name}" for name in run.memory.sampler_tensors()) if run.memory else ()
    info, loaded = state.load(path, modules(run), run.optimizers, more)
    run.step, run.tiles = info["step"], info.get("tiles")
    try:
        if run.memory:
            tensors = {name.removeprefix("sampler."): value for name, value in loaded.items()}
            run.memory.restore_sampler(run.step, info["sampler"], tensors)
        if run.scaler and info.get("scaler"):
            run.scaler.load_state_dict(info["scaler"])
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"training.json lacks what this run needs ({error})"
        raise UserError(f"checkpoint {path}: {reason}; take another checkpoint") from error
    return Path(path)


def saver(run) -> Saver:
    """What writes this run's checkpoints, and logs each of them once it is complete."""

    def report(step: int, path: Path, waited: float, seconds: float) -> None:
        run.log.event("checkpoint", step=step, path=str(path), waited_s=round(waited, 3), seconds=round(seconds, 3))

    return Saver(
        run.folder / "checkpoints",
        keep=run.config.checkpoint.keep,
        asynchronous=run.config.checkpoint.asynchronous,
        timeout_s=run.config.distributed.timeout_s,
        written=run.step,
        report=report,
    )


def check_finite(run) -> None:
    """Raises UserError if the loss, or what was to be saved, was not finite since the run began. Waits for the device."""
    if not run.finite.item():
        with contextlib.suppress(UserError):
            run.saver.wait()  # what is being written was finite
        kept = f"the checkpoint of step {run.saver.written} is intact" if run.saver.written else "nothing was saved"
        raise UserError(
            f"the loss became NaN or infinite by step {run.step}; {kept}: lower optimizer.lr, set optimizer.clip, or "
            "lengthen the warm-up, and start again"
        )


def save(run) -> Path:
    """Write a checkpoint of the run's state, or begin to; never of one that is not finite. Collective."""
    check_finite(run)
    if isinstance(rows := run.optimizers.get("prototypes"), optim.RowSGD):
        rows.catch_up()
    tensors = state.named_state(modules(run), run.optimizers)
    floats = torch.stack([t.detach().isfinite().all().to(run.device) for t in tensors.values() if t.is_floating_point()])
    run.finite *= distributed.all_reduce(floats.all().float(), "min")
    check_finite(run)
    for encoder in (run.encoder, run.key_encoder):
        if encoder is not None:
            state.average_statistics(encoder)
    numbers, more = run.memory.sampler_state(run.step) if run.memory else ({}, {})
    info = {
        "run": identity(run),
        "sampler": numbers,
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "tiles": run.tiles,
        "config": without_secrets(OmegaConf.to_container(run.config)),
    }
    run.saved = run.step
    tensors |= {f"sampler.{name}": value for name, value in more.items()}
    with flight.collective("checkpoint"):
        return run.saver.start(run.step, tensors, run.prototypes.total_rows, info)
