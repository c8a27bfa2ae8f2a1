"""Checkpoints: written by all ranks with torch.distributed.checkpoint, complete or absent, loadable at any world size.

A checkpoint is a folder `step-00001234` with DCP's files and `training.json` (step, world size, what the data were).
It is written under a temporary name and renamed when whole. `last` and `best` are links to one of them.

What is state: encoder, prototype shards, optimizer, loss scale, step. The sampler's position, the augmentation and the
random streams of a step are functions of (seed, step), so the step number restores them exactly, at any world size.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from protomem import distributed
from protomem.errors import UserError

FOLDER = re.compile(r"step-(\d{8,})$")
SHARDED = "prototypes."  # keys under which every rank holds other rows


# --- what goes into a checkpoint -----------------------------------------------------------------------------------


def named_state(encoder, prototypes, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every tensor of the training state by a name that does not depend on the world size.

    `encoder.*` and `optimizer.encoder.*` are equal on all ranks; `prototypes.*` and `optimizer.prototypes.*` are rows.
    """
    modules = {"encoder": encoder, "prototypes": prototypes}
    state = {f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()}
    for part, optimizer in optimizers.items():
        for name, parameter in modules[part].named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    state[f"optimizer.{part}.{name}.{key}"] = value
    return state


def _is_rows(name: str, value: torch.Tensor) -> bool:
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
        if _is_rows(name, value):
            shape = torch.Size([rows, *value.shape[1:]])
            stride = tuple(torch.empty(shape, device="meta").stride())
            value = DTensor.from_local(value, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        out[name] = value
    return out


@contextlib.contextmanager
def _quiet():
    """DCP warns that a single process is a single process, and of torch's own deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- saving --------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, state: dict[str, torch.Tensor], rows: int, info: dict, *, keep: int, best: bool) -> Path:
    """Write checkpoint `folder/step-...`, point `last` (and `best`) at it, remove all but the newest `keep`.

    Collective. Raises UserError on every rank if any could not write; what was there before stays as it was.
    """
    folder = Path(folder)
    final, temporary = folder / f"step-{step:08d}", folder / f".writing-step-{step:08d}"

    def prepare():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def finish():
        text = json.dumps({**info, "step": step, "world_size": distributed.world_size()}, indent=1)
        (temporary / "training.json").write_text(text)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _link(folder / "last", final)
        if best:
            _link(folder / "best", final)
        _retain(folder, keep)

    def write():
        with _quiet():
            alone = distributed.world_size() == 1
            dcp.save(_wrap(state, rows), storage_writer=dcp.FileSystemWriter(temporary), no_dist=alone)

    for act, everybody in ((prepare, False), (write, True), (finish, False)):
        problem = None
        if everybody or distributed.rank() == 0:
            try:
                act()
            except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
                problem = str(error).strip().splitlines()[-1]
        if problems := [p for p in distributed.gather_objects(problem) if p]:
            if distributed.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {problems[0]}; free the disk or set another output folder")
    return final


def _link(name: Path, target: Path) -> None:
    temporary = name.with_name(f".{name.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, name)


def _retain(folder: Path, keep: int) -> None:
    linked = {(folder / name).resolve() for name in ("last", "best") if (folder / name).exists()}
    for path in checkpoints(folder)[:-keep]:
        if path.resolve() not in linked:
            shutil.rmtree(path)


# --- finding and loading -------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if FOLDER.search(p.name) and (p / "training.json").is_file()]
    return sorted(found, key=lambda p: int(FOLDER.search(p.name)[1]))


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: `auto` the newest one if any, `none` never one, else that path (or its `last`)."""
    if resume == "none":
        return None
    if resume == "auto":
        found = checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    for candidate in (path, path / "last", path / "checkpoints" / "last"):
        if (candidate / "training.json").is_file():
            return candidate.resolve()
    raise UserError(f"checkpoint.resume={resume}: no complete checkpoint there (a folder step-... with training.json)")


def read_info(path: Path) -> dict:
    """`training.json` of a checkpoint. Raises UserError if it is not readable."""
    try:
        return json.loads((Path(path) / "training.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path}: training.json cannot be read ({error}); take another checkpoint") from None


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's `.metadata` is a pickle; only the data classes that it is made of are ever constructed."""

    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "strided"},
    }

    def find_class(self, module, name):
        allowed = name in self.CLASSES.get(module, ())
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            allowed = True
        if not allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise UserError(f"checkpoint {self.path} is incomplete: .metadata is missing; take another checkpoint") from None
        except Exception as error:  # whatever a damaged or hostile pickle raises
            raise UserError(f"checkpoint {self.path}: .metadata refused ({error})") from None
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load(path: Path, encoder, prototypes, optimizers: dict[str, torch.optim.Optimizer], rows: int) -> dict:
    """Load a checkpoint in place, whatever world size wrote it; returns its `training.json`. Collective.

    Optimizer state that does not exist before the first step (momentum) is created. Raises UserError if the checkpoint
    is incomplete or belongs to another model (other shapes, other identities, another optimizer).
    """
    info, saved = read_info(path), _Reader(path).read_metadata().state_dict_metadata
    modules = {"encoder": encoder, "prototypes": prototypes}
    for part, optimizer in optimizers.items():
        for name, parameter in modules[part].named_parameters():
            prefix = f"optimizer.{part}.{name}."
            for key in (k[len(prefix) :] for k in saved if k.startswith(prefix)):
                if key not in optimizer.state[parameter]:
                    scalar = len(saved[prefix + key].size) == 0
                    optimizer.state[parameter][key] = torch.zeros(()) if scalar else torch.zeros_like(parameter)
    state = named_state(encoder, prototypes, optimizers)
    for name in sorted(set(state) ^ set(saved)):
        raise UserError(
            f"checkpoint {path} is of another model or optimizer: {name} is only in "
            + ("the checkpoint" if name in saved else "this run")
        )
    for name, value in state.items():
        shape = [rows, *value.shape[1:]] if _is_rows(name, value) else list(value.shape)
        if list(saved[name].size) != shape:
            raise UserError(f"checkpoint {path}: {name} is {list(saved[name].size)} there, {shape} in this run")
    with _quiet():
        dcp.load(_wrap(state, rows), storage_reader=_Reader(path), no_dist=distributed.world_size() == 1)
    return info


def load_encoder(path: Path, encoder: torch.nn.Module) -> dict:
    """Load only the encoder, in this one process (evaluate, embed, export); returns `training.json`."""
    info, saved = read_info(path), _Reader(path).read_metadata().state_dict_metadata
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    for name, value in state.items():
        if name not in saved or list(saved[name].size) != list(value.shape):
            raise UserError(f"checkpoint {path} does not hold this encoder: {name} is missing there or of another shape")
    with _quiet():
        dcp.load(state, storage_reader=_Reader(path), no_dist=True)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items()})
    return info


def average_statistics(encoder: torch.nn.Module) -> None:
    """Make the BatchNorm statistics of all ranks equal to their mean, as a checkpoint and an evaluation need them."""
    floats = [b for b in encoder.buffers() if b.is_floating_point()]
    if distributed.world_size() == 1 or not floats:
        return
    flat = torch.cat([b.flatten() for b in floats])
    dist.all_reduce(flat)
    flat /= distributed.world_size()
    for buffer, values in zip(floats, flat.split([b.numel() for b in floats])):
        buffer.copy_(values.view_as(buffer))
