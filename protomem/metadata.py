"""Reading and writing with DCP: what describes a checkpoint (`training.json`; `.metadata`, which is a pickle and read
without running it), and the error that a disk gives."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as kinds

from protomem.errors import UserError
from protomem.files import read_json

INFO = {
    "step": int,
    "world_size": int,
    "run": dict,
    "config": dict,
    "sampler": dict,
    "scaler": (dict, type(None)),
    "checksums": dict,
}


def read_info(path: Path) -> dict:
    """`training.json` of a checkpoint. Raises UserError if it is not readable."""
    try:
        info = read_json(Path(path) / "training.json")
        if not isinstance(info, dict) or not {"step", "world_size"} <= info.keys():
            raise ValueError("it does not describe a checkpoint")
        for key, kind in INFO.items():
            if key in info and (not isinstance(info[key], kind) or isinstance(info[key], bool)):
                raise ValueError(f"{key} is a {type(info[key]).__name__}")
        if not (0 <= info["step"] < 2**53 and 1 <= info["world_size"] < 2**31):
            raise ValueError("step or world_size is out of range")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path}: training.json cannot be read ({error}); take another checkpoint") from None
    return info


# Pickle's machine in Python, since the one in C reserves what a file asks for before it looks whether the file is so long;
# without the operations that such a file does not need.
_OPERATIONS = set(b"\x80\x95N\x88\x89JKM\x8aBC\x8eX\x8c\x8d()t\x85\x86\x87]}ldaesu0chjqr\x94\x93\x81Rb.G")


class _MetadataUnpickler(pickle._Unpickler):
    """DCP's `.metadata` is a pickle; only the data classes that it is made of are ever constructed."""

    dispatch = {code: act for code, act in pickle._Unpickler.dispatch.items() if code in _OPERATIONS}
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

    def load_build(self):
        target, state = self.stack[-2], self.stack[-1]
        if not dataclasses.is_dataclass(target) or isinstance(target, type):
            raise pickle.UnpicklingError(f"it changes a {type(target).__name__}")
        if not isinstance(target, kinds.TensorProperties) and not (
            isinstance(state, dict) and state.keys() <= {field.name for field in dataclasses.fields(target)}
        ):
            raise pickle.UnpicklingError(f"a {type(target).__name__} has no such state")
        super().load_build()

    def _check_keys(self, keys):
        for key in keys:  # the hash of a tuple that holds itself many times would take for ever
            if not isinstance(key, str) and not (isinstance(key, kinds.MetadataIndex) and _is_index(key)):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")

    def load_setitem(self):
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        self._check_keys(self.stack[::2])  # what lies above the mark
        super().load_setitems()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _is_index(key) -> bool:
    return isinstance(getattr(key, "fqn", None), str) and isinstance(getattr(key, "offset", None), (torch.Size, type(None)))


def _check(metadata, folder: Path) -> None:
    """Raises ValueError for metadata that no checkpoint here has: DCP and we rely on their form."""
    if not isinstance(metadata, kinds.Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise ValueError("it holds no metadata")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, kinds.BytesStorageMetadata):
            continue
        if not isinstance(entry, kinds.TensorStorageMetadata) or not isinstance(entry.size, torch.Size):
            raise ValueError(f"{name} is no tensor")
        dtype = getattr(getattr(entry, "properties", None), "dtype", None)
        if not isinstance(dtype, torch.dtype) or min(entry.size, default=0) < 0:
            raise ValueError(f"{name} has no dtype or no size")
        if math.prod(entry.size) * dtype.itemsize > sum(sizes.values()):
            raise ValueError(f"{name} is larger than all files together: damaged, or a file is missing")
        if not isinstance(entry.chunks, list):
            raise ValueError(f"{name} has no chunks")
        for chunk in entry.chunks:
            if not isinstance(chunk, kinds.ChunkStorageMetadata) or not (
                len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            ):
                raise ValueError(f"{name} has broken chunks")
            if any(not 0 <= o <= o + n <= size for o, n, size in zip(chunk.offsets, chunk.sizes, entry.size)):
                raise ValueError(f"{name} has chunks outside of it")
    if not isinstance(metadata.storage_data, dict) or not isinstance(metadata.planner_data, (dict, type(None))):
        raise ValueError("it does not tell where the tensors are stored")
    if not isinstance(metadata.storage_meta, (kinds.StorageMeta, type(None))):
        raise ValueError("it holds no metadata of its storage")
    for key, entry in metadata.storage_data.items():
        if not isinstance(key, kinds.MetadataIndex) or not isinstance(entry, filesystem._StorageInfo):
            raise ValueError("a place that is none")
        place, name = (entry.offset, entry.length), entry.relative_path
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{key.fqn} is stored in {str(name)[:100]}, which is no file of this folder")
        if any(type(number) is not int for number in place) or not 0 <= min(place) <= sum(place) <= sizes.get(name, sum(place)):
            raise ValueError(f"{key.fqn} is stored outside of {name}")
        if getattr(entry, "transform_descriptors", None):
            raise ValueError(f"{key.fqn} is stored in a form that is not read here")


class Reader(dcp.FileSystemReader):
    """DCP's reader with that unpickler."""

    def read_metadata(self, *args, **kwargs):
        folder = Path(self.path)
        try:
            metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            _check(metadata, folder)
        except FileNotFoundError:
            raise UserError(f"checkpoint {self.path} is incomplete: .metadata is missing; take another checkpoint") from None
        except Exception as error:  # whatever a damaged or hostile pickle raises
            raise UserError(
                f"checkpoint {self.path}: .metadata refused ({type(error).__name__}: {error}); take another checkpoint"
            ) from None
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Writer(dcp.FileSystemWriter):
    """DCP's writer, whose error is the one that the disk gave, not what the zip writer makes of it."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None
