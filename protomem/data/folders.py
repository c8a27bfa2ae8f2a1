"""Class folders: `<root>/<identity>/<image>.jpg`, read in place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from protomem.data.index_cache import (
    content_fingerprint,
    file_stamp,
    load_column,
    load_index,
    progress_bar,
    save_index,
)
from protomem.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
_STORED = {}, {"label": "i8", "end": "i8", "names": "u1"}
_SAMPLED = 256  # files whose content enters the fingerprint


class FolderRecords:
    """Random access to a folder of class folders. Classes are the folders that hold an image (.jpg, .jpeg, .png, any
    case), in the order of their names, labels 0..C-1; images in the order of their names; names that begin with a dot
    are left out.

    The listing is kept in `<root>/train.index.cache` and renewed when the modification time of any of the folders
    changes. May be pickled and used in forked and spawned workers and in threads.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.root = Path(path).expanduser().absolute()
        self.stem = self.root / "train"
        self._open()
        names = [self._name(int(i)) for i in np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(int)]
        listing = (np.ascontiguousarray(array).data for array in (self._names, self.labels))
        try:
            self.fingerprint = content_fingerprint(listing, [self.root / name for name in dict.fromkeys(names)])
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None

    def _open(self) -> None:
        try:
            folders = sorted(entry.name for entry in os.scandir(self.root) if entry.name[0] != "." and entry.is_dir())
        except OSError as error:
            raise UserError(f"{self.root} cannot be read ({error.strerror})") from None
        self._stamp = stamp = file_stamp(self.root / name for name in folders)
        stored = load_index(self.stem, "folder", stamp, *_STORED)
        self._cached = stored is not None
        if stored is None:
            meta, arrays = _list(self.root, folders)
            self._cached = save_index(self.stem, "folder", stamp, meta, arrays) is not None
            stored = (load_index(self.stem, "folder", stamp, *_STORED) if self._cached else None) or (meta, arrays)
        self._use(*stored)

    def _use(self, meta: dict, arrays: dict[str, np.ndarray]) -> None:
        self.num_classes: int = meta["classes"]
        self.labels: np.ndarray = arrays["label"]
        self._names, self._ends = arrays["names"], arrays["end"]

    def __len__(self) -> int:
        return len(self.labels)

    def _name(self, i: int) -> str:
        i = range(len(self))[i]
        start = int(self._ends[i - 1]) if i else 0
        name = os.fsdecode(self._names[start : int(self._ends[i])].tobytes())
        folder, _, file = name.partition("/")
        if folder in ("", ".", "..") or file in ("", ".", "..") or "/" in file or "\0" in name:
            raise UserError(f"{self.stem}.index.cache lists {name!r}, which is no file of this set; delete that file")
        return name

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def where(self, i: int) -> str:
        return str(self.root / self._name(i))

    def reason(self, i: int) -> str:
        """Why position i is in `damaged`: it is not."""
        return ""

    def changed(self) -> str:
        """A data file that was changed since the set was opened: not known of single images, so ""."""
        return ""

    @property
    def damaged(self) -> np.ndarray:
        """int64 positions known to be unusable without looking at the images: none."""
        return np.zeros(0, np.int64)

    def bytes(self, i: int) -> bytes:
        """The file's content; it may be empty or corrupt. Raises UserError if it cannot be read."""
        path = os.path.join(self.root, self._name(i))
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None

    def column(self, name: str) -> np.ndarray:
        """float32 [N] from the side file `<root>/train.<name>.npy`."""
        return load_column(self.stem, name, len(self))

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if self._cached:
            for name in ("labels", "_names", "_ends"):
                del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._cached:  # without looking at a million folders again
            stored = load_index(self.stem, "folder", self._stamp, *_STORED)
            if stored is None:
                raise UserError(f"{self.root} was changed while it was in use")
            self._use(*stored)


def _list(root: Path, folders: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    names, ends, labels = bytearray(), [], []
    classes = 0
    with progress_bar(f"listing {root.name}", len(folders)) as advance:
        for folder in folders:
            images = sorted(
                entry.name
                for entry in os.scandir(root / folder)
                if entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()
            )
            for image in images:
                names += os.fsencode(f"{folder}/{image}")
                ends.append(len(names))
            labels.extend([classes] * len(images))
            classes += bool(images)
            advance(1)
    if not labels:
        raise UserError(
            f"{root} holds neither train.rec, .tar shards nor class folders with {', '.join(SUFFIXES)} files"
        )
    arrays = {
        "label": np.array(labels, np.int64),
        "end": np.array(ends, np.int64),
        "names": np.frombuffer(bytes(names), np.uint8),
    }
    return {"classes": classes}, arrays
