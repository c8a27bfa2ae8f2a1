"""Every reader of foreign bytes, with valid small inputs made by our own writers (see tests/fuzzing.py)."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from protomem import config, metrics, report, report_page, report_plots, state
from protomem.data import decode as decoding
from protomem.data import images, inspect, rec_index
from protomem.data.index_cache import load_column
from protomem.data.pairs import pairs_from_folder, read_bin
from protomem.data.recordio import RecordIO, RecordWriter
from protomem.data.records import open_records
from protomem.encoder.weights import read_tensors
from protomem.errors import UserError
from protomem.evaluate.extract import _is_rendered, _known_quality
from protomem.evaluate.templates import read_protocol
from protomem.evaluate.verification import verify_pairs
from tests.fuzzing import Files, Target


@functools.cache
def jpegs() -> list[bytes]:
    """Baseline colour, baseline grey, progressive, with EXIF, CMYK, of other sizes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for mode, size, options in (
        ("RGB", 24, {}),
        ("L", 24, {}),
        ("RGB", 40, {"progressive": True}),
        ("RGB", 24, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("RGB", 33, {"subsampling": 0, "restart_marker_blocks": 2}),
        ("CMYK", 24, {}),
    ):
        array = rng.integers(0, 256, (size, size, {"L": 1, "CMYK": 4}.get(mode, 3)), np.uint8)
        image = Image.frombytes(mode, (size, size), array.tobytes())
        file = io.BytesIO()
        image.save(file, "JPEG", quality=70, **options)
        found.append(file.getvalue())
    return found


@functools.cache
def pngs() -> list[bytes]:
    from PIL import Image

    rng = np.random.default_rng(1)
    found = []
    for mode in ("RGB", "L", "RGBA", "P", "I;16", "1"):
        array = rng.integers(0, 256, (12, 12, {"RGB": 3, "RGBA": 4}.get(mode, 1)), np.uint8)
        if mode == "I;16":
            image = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
        else:
            image = Image.frombytes("L" if mode in "P1" else mode, (12, 12), array.tobytes())
            image = image.convert(mode) if mode in "P1" else image
        file = io.BytesIO()
        image.save(file, "PNG")
        found.append(file.getvalue())
    return found


def _made(write) -> Files:
    """The files that write(folder) leaves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- training sets -------------------------------------------------------------------------------------------------


def _rec(labels=(0, 0, 1, 2, 2), split=False) -> Files:
    def write(folder):
        with RecordWriter(folder) as writer:
            for number, label in enumerate(labels):
                image = jpegs()[number % 2]
                writer.add(image + (b"\0" * (-len(image) % 4) + rec_index.MAGIC_BYTES * 3 if split else b""), label)

    return _made(write)


@functools.cache
def recordio_seeds() -> list[Files]:
    return [_rec(), _rec((2, 0, 1)), _rec(split=True), _rec((0, 1, 2**24 + 1))]


def use(records) -> None:
    """What a run, `data inspect` and `data verify` do with a set."""
    for position in range(min(len(records), 50)):
        data = records.bytes(position)
        records.where(position), records.reason(position), records.label(position)
        images.check_image(data)
    inspect.statistics(records, 20)
    inspect.verify(records, 1, progress=False)
    inspect.known_bad(records)


def run_recordio(folder: Path) -> None:
    use(RecordIO(folder, strict=False))
    RecordIO(folder)


def run_rebuild(folder: Path) -> None:
    rec_index.rebuild_idx(folder / "train.rec", folder / "train.idx")
    use(RecordIO(folder, strict=False))


@functools.cache
def columns_seeds() -> list[Files]:
    found = []
    for array in (np.arange(3, dtype=np.float32), np.arange(3), np.ones(3, bool), np.ones((3, 1)), np.array(list("abc"))):
        file = io.BytesIO()
        np.save(file, array)
        found.append({"train.quality.npy": file.getvalue()})
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return found + [{"train.quality.npy": file.getvalue()}]


def run_columns(folder: Path) -> None:
    load_column(folder / "train", "quality", 3)
    (folder / "train.bin").write_bytes(b"")
    _known_quality(folder / "train.bin", 3)


def labels_seeds() -> list[Files]:
    base = _rec((0, 1, 2**24 + 1))
    return [base | {"train.labels.npy": s["train.quality.npy"]} for s in columns_seeds()] + [base]


# Caches are tied to sizes and times of the data; the harness gives every file the same time, so they are found again.
def _cached(files: Files, name: str, suffix: str) -> Files:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
            os.utime(folder / file, ns=(10**18, 10**18))
        for inner in folder.iterdir():
            if inner.is_dir():
                os.utime(inner, ns=(10**18, 10**18))
        records = open_records(folder / name, strict=False)
        inspect.save_report(records, inspect.verify(records, 1, progress=False))
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@functools.cache
def cache_seeds() -> list[Files]:
    rec = {k: v for k, v in _rec().items()}
    tar = {"a.tar": tar_seeds()[0]["a.tar"]}
    classes = {f"{c}/{i}.jpg": jpegs()[0] for c in "ab" for i in range(2)}
    return [_cached(files, ".", "") for files in (rec, tar, classes)]


def cache_repair(name: str, data: bytes) -> bytes:
    """The header's text padded to its place again, with the file's size."""
    if not name.endswith(".cache"):
        return data
    end = data.rindex(b"}", 0, 4200) + 1
    return data[:end].ljust(4096) + data[max(end, 4096) :]


def run_cache(folder: Path) -> None:
    for inner in folder.iterdir():
        if inner.is_dir():
            os.utime(inner, ns=(10**18, 10**18))
    use(open_records(folder, strict=False))


@functools.cache
def tar_seeds() -> list[Files]:
    found = []
    for form, name in (
        (tarfile.USTAR_FORMAT, "{:04d}"),
        (tarfile.GNU_FORMAT, "d/" * 60 + "{:04d}"),
        (tarfile.PAX_FORMAT, "d/" * 60 + "é{:04d}"),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for number in range(3):
                for suffix, data in ((".jpg", jpegs()[0][:400]), (".cls", b"%d" % number)):
                    member = tarfile.TarInfo(name.format(number) + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        found.append({"a.tar": file.getvalue()[: 10240 * (len(file.getvalue()) // 10240)], "property": b"3,112,112\n"})
    return found + [{"a.tar": found[0]["a.tar"]}]


def tar_repair(name: str, data: bytes) -> bytes:
    """Right check sums in whatever stands where headers may stand."""
    if name != "a.tar":
        return data
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def run_tar(folder: Path) -> None:
    use(open_records(folder / "a.tar", strict=False))
    open_records(folder / "a.tar")


def names_seeds() -> list[Files]:
    return [{"names": b"alice/1.jpg\nalice/2.png\nbob/1.JPG\n.hidden/1.jpg\nnone/readme.txt\n"}]


def run_names(folder: Path) -> None:
    """A folder of class folders with these names, as far as a file system takes them; what `data verify` prints of it."""
    root = folder / "set"
    root.mkdir()
    for name in (folder / "names").read_bytes().split(b"\n")[:20]:
        parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")][:2]
        if len(parts) == 2 and b"\0" not in name and all(len(part) < 256 for part in parts):
            place = os.path.join(os.fsencode(root), *parts)
            if not os.path.exists(place) and not os.path.isfile(os.path.dirname(place)):
                os.makedirs(os.path.dirname(place), exist_ok=True)
                with open(place, "wb") as file:
                    file.write(jpegs()[0])
    from typer.testing import CliRunner

    from protomem.data.commands import app

    records = open_records(root)
    use(records)
    result = CliRunner().invoke(app, ["verify", str(root)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    result.stdout.encode()


# --- pairs, lists, images ------------------------------------------------------------------------------------------


@functools.cache
def pairs_seeds() -> list[Files]:
    encoded, same = [jpegs()[0][:60], b"x", jpegs()[1][:60], b"y"], [True, False]
    arrays = [np.frombuffer(e, np.uint8) for e in encoded], np.array(same)
    forms = [pickle.dumps((encoded, same), p) for p in (0, 2, 3, 4, 5)] + [pickle.dumps(arrays, p) for p in (0, 2, 4)]
    forms += [
        b"(]q\x01(U\x04abcdq\x02h\x02h\x02h\x02e](I01\nI00\net.",
        pickle.dumps([encoded, [np.bool_(True), np.bool_(0)]], 2),
    ]
    return [{"a.bin": form} for form in forms]


PICKLE_WORDS = (b"cos\nsystem\n", b"\x8c\x05posix\x8c\x06system\x93", b"R", b"b", b"0", b"2", b"(", b"t", b"e", b"a", b"h\x00")
PICKLE_WORDS += (b"\x94", b"h\x01h\x01\x86\x94" * 40, b"r\xff\xff\xff\xff", b"\x96" + b"\xff" * 8, b"\x8e\0\0\0\0\x10\0\0\0")
PICKLE_WORDS += (
    b"(" * 5000,
    b"]" * 3000,
    b"\x85" * 3000,
    b"cnumpy.core.multiarray\nscalar\n",
    b"c_codecs\nencode\n",
    b"Q",
    b"}",
    b"u",
    b"s",
)


def run_pairs(folder: Path) -> None:
    encoded, same = read_bin(folder / "a.bin")
    assert len(encoded) == 2 * len(same) and all(type(e) is bytes for e in encoded)
    _is_rendered(folder / "a.bin")


def lists_seeds() -> list[Files]:
    return [
        {
            "media.txt": b"1.jpg 1 1\n2.jpg 1 2\n3.jpg 2 3\n",
            "pairs.txt": b"1 2 1\n1 1 0\n",
            "1.jpg": b"x",
            "2.jpg": b"x",
            "3.jpg": b"x",
        }
    ]


def run_lists(folder: Path) -> None:
    names, protocol = read_protocol(folder / "media.txt", folder / "pairs.txt")
    commands_missing(folder, names)
    embeddings = np.random.default_rng(0).normal(size=(len(names), 4))
    from protomem.evaluate.templates import verify_templates

    verify_templates(embeddings, protocol, "mean")


def commands_missing(folder: Path, names: list[str]) -> None:
    """What `protomem templates --lists` does with the names; nothing outside of the folder may be read."""
    for name in names:
        path = Path(os.path.abspath(folder / name))
        assert path.is_relative_to(folder), f"{name} leaves the folder"


def pair_lists_seeds() -> list[Files]:
    files = {"p/p_0001.jpg": jpegs()[0], "p/p_0002.jpg": jpegs()[1], "q/q_0001.jpg": jpegs()[0]}
    return [
        {"list.txt": b"10\t300\np\t1\t2\np\t1\tq\t1\n"} | files,
        {"list.txt": "\ufeff# comment\np/p_0001.jpg p/p_0002.jpg 1\np/p_0001.jpg q/q_0001.jpg 0\n".encode()} | files,
    ]


def run_pair_lists(folder: Path) -> None:
    pairs_from_folder(folder, folder / "list.txt", folder / "out.bin")


@functools.cache
def image_seeds() -> list[Files]:
    return [{"image": data} for data in (*jpegs(), *pngs())]


def image_repair(name: str, data: bytes) -> bytes:
    """Right check sums of a PNG's chunks; an end for a JPEG."""
    if data[:2] == b"\xff\xd8":
        return data if data.endswith(b"\xff\xd9") else data + b"\xff\xd9"
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        stop = at + 12 + length
        if stop > len(out):
            break
        struct.pack_into(">I", out, stop - 4, zlib.crc32(out[at + 4 : stop - 4]))
        at = stop
    return bytes(out)


IMAGE_WORDS = (
    b"\xff\xda",
    b"\xff\xc4\0\x05",
    b"\xff\xc0",
    b"\xff\xc2",
    b"\xff\xdd\0\4\0\1",
    b"\xff\xd9",
    b"\xff\xdb",
    b"\xff\xd0",
)
IMAGE_WORDS += (b"IDAT", b"PLTE", b"IEND", b"iTXt", b"zTXt", b"iCCP", b"acTL\0\0\0\x10\0\0\0\0", b"\xff\xe1\xff\xff", b"tRNS")


def run_images(folder: Path) -> None:
    data = (folder / "image").read_bytes()
    reason = images.check_image(data)
    for act in (images.image_size, images.decode, decoding.examine, decoding.decode_tolerant):
        try:
            result = act(data)
        except ValueError:
            continue
        if act is images.decode:
            assert reason is None and result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3
    if reason is not None:
        raise UserError(f"image: {reason}")


@functools.cache
def _dali():
    from protomem.data.dali import DaliDecoder

    return DaliDecoder(1, 32, ("crop",), torch.device("cpu"), 1, 1)


def run_dali(folder: Path) -> None:
    """What `examine` lets through must not end the process in DALI's decoder."""
    from protomem.data.augment import AugmentOptions, draw
    from protomem.data.decode import CorruptImage, Rows

    data = (folder / "image").read_bytes()
    try:
        size = decoding.examine(data)
    except ValueError as error:
        raise UserError(f"image: {error}") from None
    params = draw(AugmentOptions(flip=0.0), 0, 0, np.zeros(1, np.int64), 32)
    try:
        for _ in _dali().run([Rows([data], [size], {k: v for k, v in params.items() if k == "crop"})]):
            pass
    except CorruptImage as error:
        raise UserError(f"image: {error.reasons}") from None


# --- checkpoints, weights, runs ------------------------------------------------------------------------------------


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        self.register_buffer("mean", torch.ones(4))


@functools.cache
def checkpoint_seeds() -> list[Files]:
    def write(folder):
        net = _Net()
        values = {f"encoder.{k}": v for k, v in net.state_dict().items()} | {"prototypes.weight": torch.ones(5, 4)}
        loaded = config.load([], ["output=o", "data.train=d", "encoder.name=small", "encoder.embedding_size=8", "data.size=32"])
        from omegaconf import OmegaConf

        path = state.save(folder, 3, values, 5, {"run": {"images": 1}, "config": OmegaConf.to_container(loaded)}, keep=2)
        state.mark_best(folder, path, {"step": 3, "set": "a", "accuracy": 0.5})
        (folder / "last").unlink(), (folder / "best").unlink()

    files = _made(write)
    info = json.loads(files["step-00000003/training.json"])
    del info["checksums"]  # as checkpoints of the first version were: nothing stands before the readers
    return [files | {"step-00000003/training.json": json.dumps(info).encode()}, files]


def run_metadata(folder: Path) -> None:
    state.load_encoder(state.locate(folder), _Net())


def run_checkpoint(folder: Path) -> None:
    state.best_so_far(folder)
    path = state.locate(folder)
    config.of_checkpoint(state.read_info(path).get("config"), path)
    state.load_encoder(path, _Net())


@functools.cache
def weights_seeds() -> list[Files]:
    from safetensors.torch import save

    tensors = {"conv.weight": torch.arange(16.0).view(4, 4), "module.bn.bias": torch.ones(4, dtype=torch.bfloat16)}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(tensors, new)
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    found = [{"a.pth": new.getvalue()}, {"a.pth": old.getvalue()}, {"a.safetensors": save(tensors)}]
    return found


def zip_repair(name: str, data: bytes) -> bytes:
    """Right CRCs in the local headers and the directory of a zip file whose members are stored."""
    if data[:2] != b"PK":
        return data
    out = bytearray(data)
    at = out.find(b"PK\1\2")
    while at >= 0:
        size, name_length = struct.unpack_from("<I", out, at + 20)[0], struct.unpack_from("<H", out, at + 28)[0]
        (offset,) = struct.unpack_from("<I", out, at + 42)
        begin = offset + 30 + sum(struct.unpack_from("<HH", out, offset + 26))
        crc = zlib.crc32(out[begin : begin + size])
        struct.pack_into("<I", out, at + 16, crc), struct.pack_into("<I", out, offset + 14, crc)
        at = out.find(b"PK\1\2", at + 46 + name_length)
    return bytes(out)


def run_weights(folder: Path) -> None:
    (path,) = folder.iterdir()
    for tensor in read_tensors(path).values():
        tensor.double().sum() if not tensor.is_sparse and tensor.numel() < 10**7 else None


@functools.cache
def run_folder_seeds() -> list[Files]:
    rng = np.random.default_rng(0)
    result = verify_pairs(rng.normal(size=(40, 4)), rng.integers(0, 2, 20).astype(bool))

    def write(folder):
        encoded = [jpegs()[0]] * 40
        report.save_evaluation(folder, "final", {"lfw": result}, {"lfw": encoded})
        report.save_evaluation(folder, "step-2", {"lfw": result}, {"lfw": encoded})
        for path in (folder / "evaluations").iterdir():  # stored, so that changes reach the arrays
            with np.load(path) as arrays:
                stored = {k: arrays[k] for k in arrays.files}
            np.savez(path, **stored)
        lines = [{"step": s, "time": 1.7e9, "loss": 2.0, "images_per_s": 9.0, "lr": 0.1, "memory_gb": 0.1} for s in (1, 2)]
        summary = metrics._finite(result.summary())
        lines += [
            {"event": "evaluation", "time": 1.7e9, "step": 2, "name": "lfw", "tag": t, **summary} for t in ("step-2", "final")
        ]
        lines += [{"event": "checkpoint", "time": 1.7e9, "step": 2, "path": "runs/x"}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text("output: x\n")
        (folder / "environment.json").write_text(
            json.dumps({"protomem": "1", "gpus": [], "world_size": 2, "packages": {"a": "1"}})
        )

    return [_made(write)]


def run_report(folder: Path) -> None:
    """The page without its figures, which take a second."""
    real, report_plots.draw = report_plots.draw, lambda *_: {}
    try:
        page = report.write_report(folder).read_text()
    finally:
        report_plots.draw = real
    assert "<script" not in page and "\x1b" not in page
    metrics._truncate(folder / "metrics.jsonl", 1)


def run_figures(folder: Path) -> None:
    page = report.write_report(folder).read_text()
    assert "<script" not in page
    assert report_page.KINDS


# --- configs -------------------------------------------------------------------------------------------------------


def config_seeds() -> list[Files]:
    root = Path(__file__).parent.parent / "configs"
    found = [
        {"a.yaml": path.read_bytes()} for path in (root / "quickstart.yaml", *sorted((root / "methods").glob("q*.yaml"))[:2])
    ]
    found.append(
        {"a.yaml": b"output: &x runs/a\ndata: {train: *x, eval: [a.bin, '${output}.bin'], size: 32}\nmargin: {m: .3}\n"}
    )
    return found


CONFIG_WORDS = (
    b"${oc.env:HOME}",
    b"${output}",
    b"${data.train}${data.train}",
    b"&a [*a]",
    b"*x",
    b"!!python/object/apply:os.system [id]",
    b"? ",
)
CONFIG_WORDS += (
    b"!!binary aGk=",
    b"2001-01-01",
    b"!!set {a}",
    b"<<: *x\n",
    b"- - - - ",
    b"0x1F",
    b"1_000",
    b"output: a\n",
    b"data:\n",
    b"???",
    b"{a: 1}",
)
CONFIG_WORDS += (b"${oc.decode:x}", b"${" * 500, b": " * 300, b".inf", b"- ")


def run_config(folder: Path) -> None:
    try:
        config.load([str(folder / "a.yaml")], ["output=o", "data.train=d"])
    except UserError as error:  # of merged values it is the key that is named
        raise UserError(f"a.yaml: {error}") from None


def override_seeds() -> list[Files]:
    return [
        {
            "lines": b"output=a\ndata.train=d\ndata.eval=[a.bin,b.bin]\noptimizer.betas=[0.9,0.99]\noptimizer.name=adamw\nmargin.m=0.3"
        },
        {"lines": b"output=a\ndata.train=patterns:identities=10,images=2,size=32,tail=1\ntrain.seed=7\nlog.wandb.name=null"},
    ]


def run_overrides(folder: Path) -> None:
    lines = (folder / "lines").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    try:
        loaded = config.load([], [line for line in lines if "\0" not in line])
        if loaded.data.train.startswith("patterns:"):
            records = open_records(loaded.data.train)
            records.bytes(0), records.labels[:2]
    except UserError as error:  # it has no file: the key or the text must be named
        raise UserError(f"lines: {error}") from None


TARGETS = {
    target.name: target
    for target in (
        Target("recordio", "RecordIO: .rec, .idx, property", recordio_seeds, run_recordio),
        Target("idx", "RecordIO: the .idx alone", recordio_seeds, run_recordio, ("train.idx",)),
        Target("rebuild", "`data index`: .rec without .idx", recordio_seeds, run_rebuild, ("train.rec",)),
        Target("columns", "side files: quality.npy", columns_seeds, run_columns, repair=zip_repair),
        Target("labels", "side files: labels.npy", labels_seeds, run_recordio, ("train.labels.npy",)),
        Target(
            "cache",
            "index caches and verified.json",
            cache_seeds,
            run_cache,
            ("train.index.cache", "train.verified.json"),
            cache_repair,
            (b'"O"', b'"|O"', b'"<f8"', b"..", b"/"),
        ),
        Target(
            "tar",
            "tar shards",
            tar_seeds,
            run_tar,
            repair=tar_repair,
            words=(b"12 path=/x\n", b"20 size=-1\n", b"22 GNU.sparse.map=1\n"),
        ),
        Target(
            "names", "class folders: names", names_seeds, run_names, words=(b"/", b"\n", b"[bold]", b".jpg\n", b"\xed\xb2\x80")
        ),
        Target("pairs", "verification .bin", pairs_seeds, run_pairs, words=PICKLE_WORDS),
        Target("templates", "IJB lists", lists_seeds, run_lists, ("media.txt", "pairs.txt"), words=(b" ", b"\xd9\xa3", b"../")),
        Target(
            "pair_lists",
            "lists of pairs",
            pair_lists_seeds,
            run_pair_lists,
            ("list.txt",),
            words=(b" ", b"\t", b"\xd9\xa3", b"../"),
        ),
        Target("images", "JPEG and PNG payloads", image_seeds, run_images, repair=image_repair, words=IMAGE_WORDS),
        Target("dali", "payloads that reach DALI", image_seeds, run_dali, repair=image_repair, words=IMAGE_WORDS),
        Target(
            "metadata",
            "checkpoints: .metadata",
            checkpoint_seeds,
            run_metadata,
            ("step-00000003/.metadata",),
            words=PICKLE_WORDS,
        ),
        Target(
            "checkpoint",
            "checkpoints: other files",
            checkpoint_seeds,
            run_checkpoint,
            repair=zip_repair,
            words=(b"${oc.env:HOME}",),
        ),
        Target(
            "weights", "encoder weights: .pth, .safetensors", weights_seeds, run_weights, repair=zip_repair, words=PICKLE_WORDS
        ),
        Target("report", "a run's folder: log, evaluations", run_folder_seeds, run_report, repair=zip_repair),
        Target("figures", "a run's folder, with figures", run_folder_seeds, run_figures, repair=zip_repair),
        Target("config", "config files", config_seeds, run_config, words=CONFIG_WORDS),
        Target("overrides", "key=value", override_seeds, run_overrides, words=CONFIG_WORDS),
    )
}
