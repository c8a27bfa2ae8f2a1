"""Readers of training sets. RecordIO files are made here by a writer of the test's own, byte by byte from the
format."""

import io
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem.data import rec_index
from protomem.data.folders import FolderRecords
from protomem.data.rec_index import rebuild_idx
from protomem.data.recordio import RecordIO, RecordWriter
from protomem.data.records import open_records
from protomem.data.tars import TarRecords
from protomem.errors import UserError

MAGIC = bytes.fromhex("0a23d7ce")
IMAGES = [b"first", MAGIC, b"x" * 7 + MAGIC * 2, b"abcd" + MAGIC * 2 + b"tail", b"", bytes(range(256)) * 30]
LABELS = [0, 0, 1, 2, 2, 2]


def record(image: bytes, label, key: int, id2: int = 0) -> bytes:
    """One record; `label` is a number, or a list of numbers stored as an array."""
    if isinstance(label, list):
        payload = struct.pack(f"<IfQQ{len(label)}f", len(label), 0.0, key, id2, *label) + image
    else:
        payload = struct.pack("<IfQQ", 0, label, key, id2) + image
    cuts = [i for i in range(0, len(payload) - 3, 4) if payload[i : i + 4] == MAGIC]
    out, start = b"", 0
    for n, end in enumerate(cuts + [len(payload)]):
        part = payload[start:end]
        cflag = 0 if not cuts else 1 if n == 0 else 2 if n < len(cuts) else 3
        out += MAGIC + struct.pack("<I", cflag << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
        start = end + 4
    return out


def write_set(folder: Path, images, labels, form: str, classes: int | None = 3, id2=None, ids=None) -> Path:
    """form: `plain` (keys 0..N-1), `header` (the header record first) or `header-last` (as face2rec2 writes it)."""
    folder.mkdir(parents=True, exist_ok=True)
    rec, idx = b"", {}

    def put(key, data):
        nonlocal rec
        idx[key] = len(rec)
        rec += data

    count, first = len(images), int(form != "plain")
    scalar = [label[0] if isinstance(label, list) else label for label in labels]
    starts = [i for i in range(count) if i == 0 or scalar[i] != scalar[i - 1]] + [count]
    header = record(b"", [float(count + 1), float(count + len(starts))], 0)
    if form == "header":
        put(0, header)
    for i, (image, label) in enumerate(zip(images, labels)):
        put(i + first, record(image, label, ids[i] if ids else i + first, id2[i] if id2 else 0))
    if form == "header-last":
        put(0, header)
    if form != "plain":
        for n, (begin, end) in enumerate(zip(starts, starts[1:])):
            put(count + 1 + n, record(b"", [begin + 1.0, end + 1.0], count + 1 + n))
    (folder / "train.rec").write_bytes(rec)
    (folder / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in idx.items()))
    if classes is not None:
        (folder / "property").write_text(f"{classes},112,112\n")
    return folder


FORMS = ["plain", "header", "header-last"]


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_recordio_forms(tmp_path, form, array):
    labels = [[float(label), 1.0] if array else float(label) for label in LABELS]
    folder = write_set(tmp_path / "set", IMAGES, labels, form)
    for path in (folder, folder / "train.rec"):
        records = open_records(path)
        assert isinstance(records, RecordIO) and len(records) == 6 and records.num_classes == 3
        assert records.labels.dtype == np.int64 and records.labels.tolist() == LABELS
        assert [records.bytes(i) for i in range(6)] == IMAGES
        assert [records.label(i) for i in range(6)] == LABELS and len(records.damaged) == 0
    assert open_records(write_set(tmp_path / "b", IMAGES, labels, form, classes=None)).num_classes == 3


def test_array_labels_of_one_and_three(tmp_path):
    folder = write_set(tmp_path, [b"a", b"b"], [[1.0], [2.0, 7.0, 9.0]], "plain")
    records = open_records(folder)
    assert records.labels.tolist() == [1, 2] and [records.bytes(0), records.bytes(1)] == [b"a", b"b"]


def test_magic_inside_the_record_header(tmp_path):
    # the id field itself is the magic number: the record is cut before the label array
    folder = write_set(
        tmp_path, [b"image", b"other"], [[2.0, 1.0], 1.0], "plain", ids=[struct.unpack("<I", MAGIC)[0], 1]
    )
    records = open_records(folder)
    assert records.labels.tolist() == [2, 1] and records.bytes(0) == b"image"


def test_order_of_idx_lines_does_not_matter(tmp_path):
    folder = write_set(tmp_path, IMAGES, [float(x) for x in LABELS], "header")
    lines = (folder / "train.idx").read_text().splitlines()
    (folder / "train.idx").write_text("\n".join(lines[::-1]))
    records = open_records(folder)
    assert [records.bytes(i) for i in range(6)] == IMAGES


def test_filtered_idx_without_header(tmp_path):
    folder = write_set(tmp_path, IMAGES, [float(x) for x in LABELS], "header")
    lines = (folder / "train.idx").read_text().splitlines()
    (folder / "train.idx").write_text("\n".join(lines[1:7]) + "\n")
    assert open_records(folder).labels.tolist() == LABELS


@pytest.mark.parametrize("form", FORMS)
def test_missing_idx_names_the_cure_and_index_rebuilds_it(tmp_path, form):
    folder = write_set(tmp_path, IMAGES, [float(x) for x in LABELS], form)
    idx = folder / "train.idx"
    before = dict(line.split("\t") for line in idx.read_text().splitlines())
    idx.unlink()
    with pytest.raises(UserError, match=r"train\.idx does not exist.*protomem data index .*train\.rec"):
        open_records(folder)
    lines, broken = rebuild_idx(folder / "train.rec", idx)
    assert (lines, broken) == (len(before), [])
    assert dict(line.split("\t") for line in idx.read_text().splitlines()) == before
    assert open_records(folder).labels.tolist() == LABELS


def test_rebuild_goes_on_behind_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(rec_index, "_SPAN", 64)  # several buffers
    images = [b"%d" % i * (40 + i) for i in range(8)]
    folder = write_set(tmp_path, images, [0.0] * 8, "plain")
    offsets = [int(line.split()[1]) for line in (folder / "train.idx").read_text().splitlines()]
    data = bytearray((folder / "train.rec").read_bytes())
    data[offsets[3] : offsets[3] + 2] = b"??"
    del data[-20:]
    (folder / "train.rec").write_bytes(data)
    lines, broken = rebuild_idx(folder / "train.rec", folder / "train.idx")
    assert lines == 6 and broken == [offsets[3], offsets[7]]
    records = open_records(folder)
    assert [records.bytes(i) for i in range(6)] == images[:3] + images[4:7]
    (folder / "train.rec").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(UserError, match="no RecordIO record"):
        rebuild_idx(folder / "train.rec", folder / "train.idx")


@pytest.mark.parametrize(
    "text", ["", "a\tb\n", "0\t0\n1\n", "0\t0\t1\n", "0\t-4\n", "0\t0\n0\t40\n", "0\t1.5\n", "\xff\n"], ids=range(8)
)
def test_malformed_idx(tmp_path, text):
    folder = write_set(tmp_path, [b"a", b"b"], [0.0, 1.0], "plain")
    (folder / "train.idx").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"train\.idx"):
        open_records(folder)


def damage(folder, what):
    offsets = [int(line.split()[1]) for line in (folder / "train.idx").read_text().splitlines()]
    data = bytearray((folder / "train.rec").read_bytes())
    if what == "truncated":
        del data[-9:]
    elif what == "only the head is left":
        del data[offsets[5] + 12 :]
    elif what == "length":
        data[offsets[5] + 4 : offsets[5] + 8] = struct.pack("<I", 1 << 28)
    elif what == "too short":
        data[offsets[5] + 4 : offsets[5] + 8] = struct.pack("<I", 20)
    elif what == "label array":
        data[offsets[5] + 8 : offsets[5] + 12] = struct.pack("<I", 1 << 30)
    elif what == "magic":
        data[offsets[5]] ^= 1
    elif what == "middle":
        data[offsets[5] + 7] |= 2 << 5
    elif what == "split":
        data[offsets[5] + 7] |= 1 << 5  # a first part without a second
    elif what == "nan":
        data[offsets[5] + 12 : offsets[5] + 16] = struct.pack("<f", float("nan"))
    elif what == "fraction":
        data[offsets[5] + 12 : offsets[5] + 16] = struct.pack("<f", 1.5)
    elif what in ("offset", "far offset"):
        offsets_new = [*offsets[:5], len(data) + 4 if what == "offset" else 1 << 62]
        (folder / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in enumerate(offsets_new)))
        offsets = offsets_new
    (folder / "train.rec").write_bytes(data)
    return offsets[5]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated", "truncated"),
        ("only the head is left", "truncated"),
        ("length", "truncated"),
        ("too short", "broken record"),
        ("label array", "broken record"),
        ("magic", "no RecordIO magic"),
        ("middle", "broken record"),
        ("split", "truncated|broken record"),
        ("nan", "the label is no integer"),
        ("fraction", "the label is no integer"),
        ("offset", "truncated"),
        ("far offset", "truncated"),
    ],
)
def test_damaged_record(tmp_path, what, reason):
    folder = write_set(tmp_path, IMAGES, [float(x) for x in LABELS], "plain")
    offset = damage(folder, what)
    with pytest.raises(
        UserError, match=rf"train\.rec: key 5 at byte {offset}: ({reason}).*1 of 6 .*protomem data verify"
    ):
        open_records(folder)
    records = open_records(folder, strict=False)
    assert records.damaged.tolist() == [5] and records.labels[:5].tolist() == LABELS[:5]
    assert [records.bytes(i) for i in range(5)] == IMAGES[:5]
    if "label" not in reason:
        assert records.bytes(5) == b""


def test_damage_after_opening_names_the_record(tmp_path):
    folder = write_set(tmp_path, IMAGES, [float(x) for x in LABELS], "plain")
    records = open_records(folder)
    offset = damage(folder, "truncated")
    with pytest.raises(UserError, match=rf"key 5 at byte {offset}: truncated"):
        records.bytes(5)


def test_label_out_of_range(tmp_path):
    folder = write_set(tmp_path, IMAGES, [0.0, 0.0, 1.0, 2.0, 5.0, -1.0], "plain")
    with pytest.raises(UserError, match=r"key 4 at byte \d+: label 5 is outside 0\.\.2 \(2 of 6 .*property"):
        open_records(folder)
    records = open_records(folder, strict=False)
    assert (
        records.damaged.tolist() == [4, 5]
        and records.reason(5) == "label -1 is outside 0..2"
        and records.reason(0) == ""
    )
    (folder / "property").write_text("many\n")
    with pytest.raises(UserError, match="property must begin with the number of identities"):
        open_records(folder)


BIG = [3, 2**24 + 1, 2**24 + 3, 40_000_001]


def test_labels_above_2_to_24(tmp_path):
    folder = write_set(tmp_path, [b"i"] * 4, [float(x) for x in BIG], "plain", classes=50_000_000)
    with pytest.raises(UserError, match=r"key 1 .*label above 2\*\*24.*inexact.*3 of 4.*train\.labels\.npy"):
        open_records(folder)
    assert open_records(folder, strict=False).damaged.tolist() == [1, 2, 3]
    np.save(folder / "train.labels.npy", np.array(BIG))
    assert open_records(folder).labels.tolist() == BIG
    np.save(folder / "train.labels.npy", np.array([4, *BIG[1:]]))  # of another set
    with pytest.raises(UserError, match="gives label 4 for record 0, the .rec file 3"):
        open_records(folder)
    np.save(folder / "train.labels.npy", np.array(BIG[1:]))
    with pytest.raises(UserError, match=r"must be int64 \[4\]"):
        open_records(folder)
    (folder / "train.labels.npy").write_bytes(b"")
    with pytest.raises(UserError, match="no readable .npy"):
        open_records(folder)


def test_labels_above_2_to_24_in_the_id_fields(tmp_path):
    labels, images = [float(x) for x in BIG], [b"i"] * 4
    id2 = write_set(tmp_path / "id2", images, labels, "plain", classes=None, id2=BIG)
    assert open_records(id2).labels.tolist() == BIG and open_records(id2).num_classes == 40_000_002
    ids = write_set(tmp_path / "id", images, labels, "plain", classes=None, ids=BIG)
    assert open_records(ids).labels.tolist() == BIG
    # a running number that happens to round to the labels is not the label
    running = write_set(
        tmp_path / "running", images, labels, "plain", classes=None, ids=[9, 2**24, 2**24 + 4, 40_000_000]
    )
    assert open_records(running, strict=False).damaged.tolist() == [1, 2, 3]


@pytest.mark.parametrize("images", [2**24 + 1, 2**24 + 2, 40_000_000, 42_474_557])
def test_rounded_header_of_a_large_set(images):
    # keys around the boundary, without 40 million records: the header's count is rounded to float32
    key = np.array([0, 1, 5, *range(images - 9, images + 9)])
    heads = np.zeros(len(key), rec_index._HEAD)
    identity = (key == 0) | (key > images)
    heads["lrec"], heads["flag"] = np.where(identity, 32, 4000), np.where(identity, 2, 0)
    heads["first"][0] = images + 1
    rows, promised = rec_index._image_rows(key, heads, np.zeros(len(key), np.uint8))
    assert key[rows].tolist() == [k for k in key.tolist() if 1 <= k <= images]
    assert abs(promised - images) <= 4


def test_writer_forms(tmp_path):
    with RecordWriter(tmp_path / "grouped") as writer:
        for image, label in zip(IMAGES, LABELS):
            writer.add(image, label)
    assert sorted(os.listdir(tmp_path / "grouped")) == ["property", "train.idx", "train.rec"]
    rec = (tmp_path / "grouped" / "train.rec").read_bytes()
    expected = b"".join(record(image, float(label), i + 1) for i, (image, label) in enumerate(zip(IMAGES, LABELS)))
    expected += record(b"", [7.0, 10.0], 0)
    expected += record(b"", [1.0, 3.0], 7) + record(b"", [3.0, 4.0], 8) + record(b"", [4.0, 7.0], 9)
    assert rec == expected
    records = open_records(tmp_path / "grouped")
    assert records.promised == 6 and [records.bytes(i) for i in range(6)] == IMAGES

    with RecordWriter(tmp_path / "mixed", stem="other") as writer:
        for image, label in zip(IMAGES, [0, 1, 0, 2, 2, 4]):
            writer.add(image, label)
    records = open_records(tmp_path / "mixed" / "other.rec")
    assert records.promised == -1 and records.labels.tolist() == [0, 1, 0, 2, 2, 4] and records.num_classes == 5
    assert [line.split("\t")[0] for line in (tmp_path / "mixed" / "other.idx").read_text().splitlines()] == list(
        "012345"
    )
    with pytest.raises(UserError, match="other.rec: name that file"):
        open_records(tmp_path / "mixed")


def test_writer_keeps_large_labels_exact(tmp_path):
    with RecordWriter(tmp_path) as writer:
        for label in BIG:
            writer.add(b"x", label)
    assert np.load(tmp_path / "train.labels.npy").tolist() == BIG
    assert open_records(tmp_path).labels.tolist() == BIG
    (tmp_path / "train.labels.npy").unlink()
    assert open_records(tmp_path).labels.tolist() == BIG  # id2 has them too
    with RecordWriter(tmp_path) as writer:  # a new set in the same place does not inherit the side file
        writer.add(b"y", 1)
    assert not (tmp_path / "train.labels.npy").exists() and open_records(tmp_path).labels.tolist() == [1]


def test_writer_leaves_nothing_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with RecordWriter(tmp_path / "a" / "b") as writer:
            writer.add(b"x", 0)
            raise ZeroDivisionError
    with pytest.raises(UserError, match="no image was added"):
        with RecordWriter(tmp_path / "a" / "b"):
            pass
    with pytest.raises(UserError, match="negative"):
        with RecordWriter(tmp_path / "a" / "b") as writer:
            writer.add(b"x", -1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be written"):
        with RecordWriter("/dev/null/set"):
            pass
    with RecordWriter(tmp_path) as writer:
        writer.add(b"old", 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        with RecordWriter(tmp_path) as writer:
            writer.add(b"new", 0)
            raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


pieces = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=6).map(b"".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(pieces, st.integers(0, 2**31)), min_size=1, max_size=8))
def test_round_trip(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("set")
    with RecordWriter(folder) as writer:
        for image, label in items:
            writer.add(image, label)
    records = open_records(folder)
    assert [(records.bytes(i), records.label(i)) for i in range(len(records))] == items
    if max(label for _, label in items) < 2**24:  # ours = the test's own writer
        grouped = len({label for _, label in items}) == sum(
            i == 0 or items[i][1] != items[i - 1][1] for i in range(len(items))
        )
        other = write_set(
            folder / "other",
            [d for d, _ in items],
            [float(x) for _, x in items],
            "header-last",
            None,
            ids=range(1, len(items) + 1),
        )
        own = (folder / "train.rec").read_bytes()
        assert grouped == (own == (other / "train.rec").read_bytes())
        assert [open_records(other).bytes(i) for i in range(len(items))] == [d for d, _ in items]


def test_index_is_built_once_and_renewed_when_the_data_change(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", IMAGES, [float(x) for x in LABELS], "header")
    first = open_records(folder).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(rec_index, "build_index", None)
        records = open_records(folder)
        assert isinstance(records.labels, np.memmap) and records.fingerprint == first and records.bytes(3) == IMAGES[3]
        assert b"_offset" not in pickle.dumps(records)  # workers map the file, they are not sent it
    cache = folder / "train.index.cache"
    cache.write_bytes(cache.read_bytes()[:-200])  # an incomplete index is no index
    assert open_records(folder).labels.tolist() == LABELS
    shutil.copytree(folder, tmp_path / "copy")
    assert open_records(tmp_path / "copy").fingerprint == first
    write_set(folder, [*IMAGES[:5], IMAGES[5][:-1] + b"?"], [float(x) for x in LABELS], "header")
    os.utime(folder / "train.rec", (1, 1))
    assert open_records(folder).fingerprint != first
    write_set(folder, IMAGES, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0], "header")
    os.utime(folder / "train.rec", (2, 2))
    assert open_records(folder).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_index_goes_to_the_cache_folder_where_the_data_cannot_be_written(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", IMAGES, [float(x) for x in LABELS], "header")
    (folder / "train.index.cache").mkdir()  # takes the place, also for root
    records = open_records(folder)
    assert [path.suffix for path in (tmp_path / "cache" / "protomem").iterdir()] == [".cache"]
    monkeypatch.setattr(rec_index, "build_index", None)
    assert open_records(folder).bytes(2) == IMAGES[2]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # neither place: everything stays in memory, pickles whole
    records = open_records(folder)
    copy = pickle.loads(pickle.dumps(records))
    assert copy.labels.tolist() == LABELS and copy.bytes(3) == IMAGES[3]


def _hash_all(records, queue):
    queue.put([(records.bytes(i), records.label(i)) for _ in range(20) for i in range(len(records))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("form", ["rec", "folder", "tar"])
def test_workers_read_the_same(tmp_path, form, method):
    expected = list(zip(IMAGES, LABELS))
    path = {"rec": make_rec, "folder": make_folder, "tar": make_tar}[form](tmp_path / "set")
    records = open_records(path)
    assert records.bytes(0) == IMAGES[0]  # opened before the fork: the file descriptor is shared
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_hash_all, args=(records, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [expected * 20] * 2


def make_rec(folder):
    return write_set(folder, IMAGES, [float(x) for x in LABELS], "header")


def make_folder(folder):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS)):
        path = folder / f"person {label}" / f"{i:04d}.{['jpg', 'PNG', 'jpeg'][i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_tar(folder, form=tarfile.USTAR_FORMAT, prefix=""):
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"set-{shard:03d}.tar", "w", format=form) as tar:
            for i in range(shard * 3, shard * 3 + 3):
                add(tar, f"{prefix}{i:06d}.cls", b"%d" % LABELS[i])
                add(tar, f"{prefix}{i:06d}.json", b"{}")
                add(tar, f"{prefix}{i:06d}.{['jpg', 'png', 'jpeg'][i % 3]}", IMAGES[i])
    return folder


def test_folder(tmp_path):
    root = make_folder(tmp_path / "set")
    (root / "empty class").mkdir()
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.jpg").write_bytes(b"no")
    (root / "person 1" / "notes.txt").write_bytes(b"no")
    (root / "loose.jpg").write_bytes(b"no")
    records = open_records(root)
    assert isinstance(records, FolderRecords) and records.num_classes == 3 and records.labels.tolist() == LABELS
    assert [records.bytes(i) for i in range(6)] == IMAGES and records.where(2).endswith("person 1/0002.jpeg")
    assert records.bytes(-1) == IMAGES[-1] and len(records.damaged) == 0
    assert isinstance(open_records(root).labels, np.memmap)
    first = records.fingerprint
    (root / "person 2" / "0005.jpeg").write_bytes(IMAGES[5][:-1] + b"?")
    assert open_records(root).fingerprint != first
    (root / "äöü\udce4").mkdir()  # a name that is no UTF-8
    (root / "äöü\udce4" / "new.jpg").write_bytes(b"new")
    os.utime(root / "äöü\udce4", (5, 5))
    records = open_records(root)
    assert len(records) == 7 and records.bytes(6) == b"new" and records.label(6) == 3
    (root / "äöü\udce4" / "new.jpg").unlink()
    with pytest.raises(UserError, match="new.jpg cannot be read"):
        records.bytes(6)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "some/folder.x/", "long/" * 25, "ä" * 120 + "/"])
def test_tar(tmp_path, form, prefix):
    if form == tarfile.USTAR_FORMAT and not prefix.isascii():
        pytest.skip("ustar cannot hold this name")
    root = make_tar(tmp_path / "set", form, prefix)
    records = open_records(root)
    assert isinstance(records, TarRecords) and records.num_classes == 3 and records.labels.tolist() == LABELS
    assert [records.bytes(i) for i in range(6)] == IMAGES
    assert isinstance(open_records(root).labels, np.memmap)
    for path in (root / "set-001.tar", root / "*1.tar"):
        records = open_records(path)
        assert len(records) == 3 and records.bytes(2) == IMAGES[5]


def test_tar_size_in_a_pax_header(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 700, {"size": "700"}
        tar.addfile(info, io.BytesIO(b"i" * 700))
        add(tar, "a.cls", b"1")
    data = bytearray(path.read_bytes())
    head = memoryview(data)[1024:1536]  # behind the extended header
    head[124:136], head[148:156] = b"0" * 11 + b"\0", b" " * 8  # a size too large for its field is written as 0
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getmember("a.jpg").size == 700
    assert open_records(tmp_path).bytes(0) == b"i" * 700


def test_tar_files_are_closed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("protomem.data.tars._OPEN_FILES", 1)
    records = open_records(make_tar(tmp_path / "set"))
    for i in (0, 5, 1, 4, 2, 3):
        assert records.bytes(i) == IMAGES[i] and len(records._files) == 1


def test_tar_errors(tmp_path):
    def fails(match, change):
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as tar:
            add(tar, "a.jpg", b"image" * 100)
            add(tar, "a.cls", b"7")
            change(tar)
        with pytest.raises(UserError, match=match):
            open_records(path)

    fails(r"x\.tar: b has no \.cls member \(1 of 2 images\)", lambda tar: add(tar, "b.png", b"x"))
    fails(r"b\.cls holds no whole number", lambda tar: (add(tar, "b.png", b"x"), add(tar, "b.cls", b"one")))
    fails(r"two images for the key a", lambda tar: add(tar, "a.png", b"x"))

    path = tmp_path / "y.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"image" * 100)
        add(tar, "a.cls", b"7")
    data = path.read_bytes()
    assert open_records(path).num_classes == 8
    (tmp_path / "property").write_text("5,112,112")
    with pytest.raises(UserError, match=r"label 7 is outside 0\.\.4"):
        open_records(path)
    assert open_records(path, strict=False).damaged.tolist() == [0]

    def changed(match, content):
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            open_records(path)

    changed("claims 500 bytes, more than the file holds", data[:700])
    changed("is truncated: it ends at byte 2,048 without", data[:2048])
    changed("claims 8,589,934,591 bytes", data[:124] + b"77777777777\0" + data[136:])
    changed("claims -?[0-9,]+ bytes", data[:124] + b"\xff" * 12 + data[136:])
    changed("no tar header at byte 0", b"garbage" * 1000)
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "a.jpg", b"image")
    with pytest.raises(UserError, match="compressed.*gunzip"):
        open_records(path)


def test_column(tmp_path):
    for path in (make_rec(tmp_path / "r"), make_folder(tmp_path / "f"), make_tar(tmp_path / "t")):
        records = open_records(path)
        with pytest.raises(UserError, match=r"train\.quality\.npy does not exist"):
            records.column("quality")
        np.save(path / "train.quality.npy", np.linspace(0, 1, 6))
        quality = records.column("quality")
        assert quality.dtype == np.float32 and quality.tolist() == np.linspace(0, 1, 6, dtype=np.float32).tolist()
        np.save(path / "train.quality.npy", np.zeros(5))
        with pytest.raises(UserError, match=r"shape \(5,\), but the data have 6"):
            records.column("quality")
        np.save(path / "train.quality.npy", np.array([object()] * 6), allow_pickle=True)
        with pytest.raises(UserError, match="no readable .npy"):
            records.column("quality")


def test_open_records_errors(tmp_path):
    for name in ("nothing", "nothing.rec", "nothing.tar", "no*.tar"):
        with pytest.raises(UserError, match=r"does not exist; `protomem data synth "):
            open_records(tmp_path / name)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="neither a folder nor"):
        open_records(tmp_path / "file")
    with pytest.raises(UserError, match="holds neither train.rec, .tar shards nor class folders"):
        open_records(tmp_path)


def test_patterns():
    records = open_records("patterns:identities=50,images=4,seed=3")
    assert len(records) == 200 and records.num_classes == 50
    for text in ("patterns:identities=50", "patterns:identities=50,images=x", "patterns:people=3,images=1"):
        with pytest.raises(UserError, match="patterns:identities=100000,images=4,seed=1"):
            open_records(text)
