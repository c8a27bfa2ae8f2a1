"""One way to open training images, whatever form they are stored in."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from protomem.errors import UserError


def open_records(path: str | os.PathLike, strict: bool = True):
    """Random access to encoded training images. What is there decides the form:

    - a folder with train.rec, or a .rec file: insightface RecordIO (protomem.data.recordio.RecordIO)
    - a folder, a .tar file or a glob pattern of .tar files: webdataset shards (protomem.data.tars.TarRecords)
    - a folder of class folders: protomem.data.folders.FolderRecords
    - "patterns:identities=1000,images=4,seed=1,size=112": generated (protomem.data.patterns.PatternRecords, which tells
      what else can be asked for)

    Every reader has len(), label(i) -> int, bytes(i) -> encoded image as stored (perhaps corrupt or empty), labels
    (int64 [N]), num_classes, path, fingerprint (changes when the data change, not when they are copied), where(i) ->
    text for messages, changed() -> the first data file that is no longer what was opened, or "", column(name) -> float32 [N], damaged (int64 positions known to be unusable without looking at the
    images), and may be pickled and used in forked and spawned workers.
    strict=False opens a set with damaged records or unusable labels too (`.damaged` tells which).
    Raises UserError if there is nothing to open.
    """
    text = str(path)
    if text.startswith("patterns:"):
        return _open_patterns(text)
    path = Path(text).expanduser()
    if path.suffix == ".rec" or (path / "train.rec").exists():
        if not path.exists():
            raise _missing(text)
        from protomem.data.recordio import RecordIO

        return RecordIO(path, strict)
    if path.suffix == ".tar" or glob.has_magic(text) or (path.is_dir() and any(path.glob("*.tar"))):
        if not path.exists() and not glob.glob(str(path)):
            raise _missing(text)
        from protomem.data.tars import TarRecords

        return TarRecords(path, strict)
    if path.is_dir():
        others = sorted(path.glob("*.rec"))
        if others:
            raise UserError(f"{text} holds no train.rec, but {others[0].name}: name that file itself")
        from protomem.data.folders import FolderRecords

        return FolderRecords(path)
    if path.exists():
        raise UserError(f"{text} is neither a folder nor a .rec or .tar file")
    raise _missing(text)


def _missing(path: str) -> UserError:
    return UserError(f"{path} does not exist; `protomem data synth {path}` renders a set of faces there")


def _open_patterns(text: str):
    from protomem.data.patterns import PatternRecords

    names = {"identities": "num_identities", "images": "images_per_identity", "seed": "seed", "size": "size"}
    names |= {"tail": "tail", "first": "first", "hard": "hard"}
    example = "patterns:identities=100000,images=4,seed=1"
    values = {}
    for part in text.removeprefix("patterns:").split(","):
        name, _, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if name not in names or not value.isdecimal() or len(value) > 18:
            raise UserError(
                f"'{text}': write {example} (whole numbers of {', '.join(names)}; '{part}' is not one)"
            )
        if name in ("tail", "hard") and value not in ("0", "1"):
            raise UserError(f"'{text}': {name} is 0 (off) or 1 (on)")
        values[names[name]] = value == "1" if name in ("tail", "hard") else int(value)
    if not {"num_identities", "images_per_identity"} <= values.keys():
        raise UserError(f"'{text}' must give identities and images, like {example}")
    return PatternRecords(**values)
