"""Reading and writing with DCP: what describes a checkpoint (`training.json`; `.metadata`, which is a pickle and read
without running it), and the error that a disk gives."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from protomem.errors import UserError


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


class Reader(dcp.FileSystemReader):
    """DCP's reader with that unpickler."""

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
