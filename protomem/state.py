"""Checkpoints: written by all ranks with torch.distributed.checkpoint, complete or absent, loadable at any world size.

A checkpoint is a folder `step-00001234` with DCP's files and `training.json` (step, world size, what the data were, and
checksums of the files).
It is written under a temporary name and renamed when whole. `last` and `best` are links to one of them.

What is state: encoder, prototype shards or memory, optimizer, loss scale, step, and where a sampler that follows the
memory stands. Other samplers' positions, the augmentation and the random streams of a step are functions of (seed, step),
so the step number restores them exactly, at any world size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from protomem import checksums, distributed, flight
from protomem.errors import UserError
from protomem.files import read_json, remove_temporaries, replace_file, sync_folder
from protomem.metadata import Reader, Writer, read_info
from protomem.row_blocks import RowBlocks

FOLDER = re.compile(r"step-(\d{8,})$")
SHARDED = "prototypes."  # keys under which every rank holds other rows
# DCP warns that a single process is a single process, and of torch's own deprecated calls.
warnings.filterwarnings("ignore", module=r"torch\.distributed")


# --- what goes into a checkpoint -----------------------------------------------------------------------------------


def named_state(modules: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every tensor of the training state by a name that does not depend on the world size.

    modules: `encoder`, `prototypes`, and what else there is. `prototypes.*` and `optimizer.prototypes.*` are rows, of which
    every rank has others; all else is equal on all ranks. A module that knows better than its state_dict has `saved()`.
    """
    state = {}
    for part, module in modules.items():
        own = module.saved() if hasattr(module, "saved") else {f"{part}.{k}": v for k, v in module.state_dict().items()}
        state |= own
    for part, optimizer in optimizers.items():
        for name, parameter in modules[part].named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    state[f"optimizer.{part}.{name}.{key}"] = value
    return state


def is_rows(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor of `named_state` is rows, of which every rank has others."""
    return name.removeprefix("optimizer.").startswith(SHARDED) and value.ndim > 0


def _wrap(state: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Give DCP this rank's rows as DTensors (rows = number of all ranks' rows), the rest as it is."""
    if distributed.world_size() == 1:
        return {k: v.detach() for k, v in state.items()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    kind = next(iter(state.values())).device.type
    mesh = init_device_mesh(kind, (distributed.world_size(),))
    out = {}
    for name, value in state.items():
        value = value.detach()
        if is_rows(name, value):
            shape = torch.Size([rows, *value.shape[1:]])
            stride = tuple(torch.empty(shape, device="meta").stride())
            value = DTensor.from_local(value, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        out[name] = value
    return out


# --- saving --------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, state: dict[str, torch.Tensor], rows: int, info: dict, *, keep: int, group=None) -> Path:
    """Write checkpoint `folder/step-...`, point `last` at it, remove all but the newest `keep` (and `best`).

    Collective over `group` (a CPU process group of all ranks; None: the default one).
    Raises UserError on every rank if any could not write; what was there before stays as it was.
    """
    folder = Path(folder)
    final, temporary = folder / f"step-{step:08d}", folder / f".writing-step-{step:08d}"

    def prepare():
        folder.mkdir(parents=True, exist_ok=True)
        remove_remains(folder)
        temporary.mkdir()

    def write():
        planner = RowBlocks({name for name, value in state.items() if is_rows(name, value)}, rows)
        plain = {name: value.detach() for name, value in state.items()}
        alone = distributed.world_size() == 1
        writer = Writer(temporary)
        dcp.save(plain, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)

    sums: dict[str, str] = {}

    def add_up():
        own = checksums.of_rank(temporary)
        for part in distributed.gather_objects(own, group):
            sums.update(part)
        if distributed.rank() == 0:
            sums[".metadata"] = checksums.sha256(temporary / ".metadata")

    def finish():
        shown = {**info, "step": step, "world_size": distributed.world_size(), "checksums": sums}
        text = json.dumps(shown, indent=1)
        with open(temporary / "training.json", "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            _remove(final)
        sync_folder(temporary)
        os.replace(temporary, final)
        _link(folder / "last", final)
        sync_folder(folder)  # it survives a power cut before an older one goes
        _retain(folder, keep)

    for act, everybody in ((prepare, False), (write, True), (add_up, True), (finish, False)):
        problem = None
        if everybody or distributed.rank() == 0:
            try:
                act()
            except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
                problem = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if problems := [p for p in distributed.gather_objects(problem, group) if p]:
            if distributed.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {problems[0]}; free the disk or set another output folder")
    return final


def _link(name: Path, target: Path) -> None:
    temporary = name.with_name(f".{name.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, name)


def _remove(path: Path) -> None:
    """A checkpoint disappears at once, not file by file: a kill in between leaves no half of one under its name."""
    hidden = path.with_name(f".removed-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def remove_remains(folder: Path) -> None:
    """Delete what an interrupted save or removal has left behind. Main rank only."""
    for stale in (*Path(folder).glob(".writing-*"), *Path(folder).glob(".removed-*")):
        shutil.rmtree(stale)


def tidy(folder: Path) -> None:
    """Finish what a kill has interrupted: delete the remains, and point `best` at what `best.json` names. Main rank only."""
    remove_remains(folder)
    remove_temporaries(Path(folder))
    record = best_so_far(folder)
    path = Path(folder) / f"step-{record['step']:08d}" if record else None
    if path is not None and _complete(path):
        _link(Path(folder) / "best", path)


def mark_best(folder: Path, path: Path, record: dict) -> None:
    """Point `best` at a checkpoint and remember why (step, pair set, accuracy). Main rank only."""
    replace_file(Path(folder) / "best.json", json.dumps(record).encode())
    _link(Path(folder) / "best", path)


def best_so_far(folder: Path) -> dict | None:
    """What `mark_best` remembered last, if anything."""
    file = Path(folder) / "best.json"
    if not file.is_file():
        return None
    try:
        best = read_json(file)
        if isinstance(best["set"], str) and isinstance(best["accuracy"], float):
            return best
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} cannot be read; delete it (the next evaluation then counts as the best so far)")


def _retain(folder: Path, keep: int) -> None:
    linked = {(folder / name).resolve() for name in ("last", "best") if (folder / name).exists()}
    for path in checkpoints(folder)[:-keep]:
        if path.resolve() not in linked:
            _remove(path)


# --- finding and loading -------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if FOLDER.search(p.name) and _complete(p)]
    return sorted(found, key=lambda p: int(FOLDER.search(p.name)[1]))


def _complete(path: Path) -> bool:
    return (path / "training.json").is_file() and (path / ".metadata").is_file()


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of a run with the highest step, None if none. Not what `last` points at: that link is for
    people, and a kill may leave it one checkpoint behind."""
    found = checkpoints(folder)
    return found[-1].resolve() if found else None


def locate(path: str | Path) -> Path:
    """The checkpoint that a user means: that folder, or the newest of a run folder. Raises UserError if there is none."""
    path = Path(path)
    found = path.resolve() if _complete(path) else newest(path) or newest(path / "checkpoints")
    if found is None:
        raise UserError(f"{path}: no complete checkpoint there (a folder step-... with training.json and .metadata)")
    return found


def find(folder: Path, resume: str, restarted: bool) -> Path | None:
    """The checkpoint to go on from. A run's own checkpoints always win; without any, `auto` and `none` start anew and a
    path is where to start from. `none` refuses a folder that holds a run, unless the launcher restarted this very job."""
    own = newest(folder)
    if own is not None and resume == "none" and not restarted:
        raise UserError(f"checkpoint.resume=none, but {folder} holds a run; choose another output, or remove that folder")
    if own is not None or resume in ("auto", "none"):
        return own
    return locate(resume)


def _read(path: Path, alone: bool) -> tuple[dict, dcp.metadata.Metadata]:
    """(training.json, DCP's metadata) of a checkpoint."""
    info = read_info(path)
    checksums.verify(path, info.get("checksums", {}), [".metadata"], alone)
    return info, Reader(path).read_metadata()


def _size(entry) -> list[int] | None:
    return list(entry.size) if hasattr(entry, "size") else None  # None: not a tensor, so nothing of ours


def _load(state: dict, path: Path, info: dict, metadata, alone: bool) -> None:
    """Fill `state` from a checkpoint, whose files that hold any of it are compared with their checksums first."""
    needed = {entry.relative_path for key, entry in metadata.storage_data.items() if key.fqn in state}
    checksums.verify(path, info.get("checksums", {}), needed, alone)
    try:
        with flight.collective("loading of the checkpoint"):
            dcp.load(state, storage_reader=Reader(path), no_dist=alone)
    except (dcp.api.CheckpointException, Exception) as error:  # damaged bytes make torch's readers fail in any way
        if re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise  # a rank is gone, not a file damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"checkpoint {path} is damaged ({reason}); take another checkpoint") from None


def load(
    path: Path, modules: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer], more: tuple[str, ...] = ()
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Load a checkpoint in place, whatever world size wrote it; returns its `training.json` and the tensors named `more`,
    of whatever shape they have there, equal on all ranks. Collective.

    Optimizer state that does not exist before the first step (momentum) is created. A prototype memory of another size
    takes over what it can. Raises UserError if the checkpoint is incomplete or belongs to another model (other shapes,
    other identities, another optimizer).
    """
    info, metadata = _read(path, distributed.world_size() == 1)
    saved = metadata.state_dict_metadata
    for part, optimizer in optimizers.items():
        for name, parameter in modules[part].named_parameters():
            prefix = f"optimizer.{part}.{name}."
            for key in (k[len(prefix) :] for k in saved if k.startswith(prefix)):
                if key not in optimizer.state[parameter]:
                    scalar = _size(saved[prefix + key]) == []
                    # Fused kernels count their steps on the parameter's device, the others on the CPU.
                    where = parameter.device if optimizer.param_groups[0].get("fused") else None
                    new = torch.zeros((), device=where) if scalar else torch.zeros_like(parameter)
                    optimizer.state[parameter][key] = new
    state, rows, prototypes = named_state(modules, optimizers), modules["prototypes"].total_rows, modules["prototypes"]
    for name in sorted((set(state) | set(more)) ^ set(saved)):
        raise UserError(
            f"checkpoint {path} is of another model or optimizer: {name} is only in "
            + ("the checkpoint" if name in saved else "this run")
        )
    if hasattr(prototypes, "blank"):
        blank, rows = prototypes.blank({name: _size(saved[name]) for name in saved})
        state |= blank
    for name in more:
        state[name] = torch.zeros(_size(saved[name]), dtype=saved[name].properties.dtype)
    for name, value in state.items():
        shape = [rows, *value.shape[1:]] if is_rows(name, value) else list(value.shape)
        if _size(saved[name]) != shape:
            raise UserError(f"checkpoint {path}: {name} is {_size(saved[name])} there, {shape} in this run")
    _load(_wrap(state, rows), path, info, metadata, distributed.world_size() == 1)
    if hasattr(prototypes, "blank"):
        prototypes.restore(state, info["world_size"])
    return info, {name: state[name] for name in more}


def load_encoder(path: Path, encoder: torch.nn.Module) -> dict:
    """Load only the encoder, in this one process (evaluate, embed, export); returns `training.json`."""
    info, metadata = _read(path, True)
    saved = metadata.state_dict_metadata
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    for name, value in state.items():
        if name not in saved or _size(saved[name]) != list(value.shape):
            raise UserError(f"checkpoint {path} does not hold this encoder: {name} is missing there or of another shape")
    _load(state, path, info, metadata, True)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
    return info


def load_rows(path: Path, device: torch.device) -> tuple[torch.Tensor, int]:
    """(this rank's rows [R, ...] of the learned prototypes, rows of all ranks), whatever world size wrote them. Collective.

    Raises UserError where there are none, as in a run with a prototype memory.
    """
    name, alone = "prototypes.weight", distributed.world_size() == 1
    info, metadata = _read(path, alone)
    entry = metadata.state_dict_metadata.get(name)
    if not _size(entry):
        raise UserError(f"checkpoint {path} holds no prototypes with a row for each identity")
    total, *shape = entry.size
    first, last = distributed.shard_bounds(total, distributed.rank(), distributed.world_size())
    rows = torch.zeros(last - first, *shape, dtype=entry.properties.dtype, device=device)
    _load(_wrap({name: rows}, total), path, info, metadata, alone)
    return rows, total


def average_statistics(encoder: torch.nn.Module) -> None:
    """Make the BatchNorm statistics of all ranks equal to their mean, as a checkpoint and an evaluation need them."""
    floats = [b for b in encoder.buffers() if b.is_floating_point()]
    if distributed.world_size() == 1 or not floats:
        return
    flat = torch.cat([b.flatten() for b in floats])
    distributed.all_reduce(flat)
    flat /= distributed.world_size()
    for buffer, values in zip(floats, flat.split([b.numel() for b in floats])):
        buffer.copy_(values.view_as(buffer))
