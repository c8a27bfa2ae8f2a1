"""The loaders: one order at every world size, torch and DALI alike, corrupt images never reach a native decoder."""

import io
import logging
import subprocess
import sys
import textwrap
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from protomem.data import dali
from protomem.data.augment import AugmentOptions
from protomem.data.images import decode, encode_jpeg
from protomem.data.pipeline import eval_batches, make_loader, normalise
from protomem.data.recordio import RecordWriter
from protomem.data.records import open_records
from protomem.data.sampler import BalancedSampler, ShuffledSampler
from protomem.errors import UserError

needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")
BACKENDS = ["torch", pytest.param("dali", marks=needs_dali)]
ALL = AugmentOptions(flip=0.5, crop=0.4, low_resolution=0.4, photometric=0.4, occlusion=0.4)


class MemoryRecords:
    """Encoded images in a list, with the interface of protomem.data.records."""

    path = "memory"

    def __init__(self, encoded, labels=None, num_classes=None):
        self.encoded = list(encoded)
        self.labels = np.arange(len(self.encoded)) // 4 if labels is None else np.asarray(labels)
        self.num_classes = num_classes or int(self.labels.max()) + 1

    def __len__(self):
        return len(self.encoded)

    def label(self, i):
        return int(self.labels[i])

    def bytes(self, i):
        return self.encoded[i]

    def changed(self):
        return ""

    def where(self, i):
        return f"memory[{i}]"


@cache
def picture(i: int, height: int = 112, width: int = 112) -> np.ndarray:
    rng = np.random.default_rng([i, height, width])
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-25, 26, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


@cache
def jpeg(i: int, height: int = 112, width: int = 112) -> bytes:
    return encode_jpeg(picture(i, height, width))


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def good(n: int = 60) -> MemoryRecords:
    return MemoryRecords([jpeg(i) for i in range(n)])


def batches(records, sampler, epoch=0, start_step=0, **options):
    loader = make_loader(records, sampler, **options)
    try:
        return list(loader.epoch(epoch, start_step))
    finally:
        loader.close()


def joined(parts):
    return (
        torch.cat([p.index for p in parts]),
        torch.cat([p.labels for p in parts]),
        torch.cat([p.images for p in parts]),
    )


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(joined(a), joined(b)))


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_hold_what_the_sampler_says(backend):
    records, sampler = good(), ShuffledSampler(60, 16, seed=1)
    parts = batches(records, sampler, epoch=2, backend=backend, augment=AugmentOptions(flip=0))
    assert [(p.epoch, p.step, p.skipped) for p in parts] == [(2, 0, 0), (2, 1, 0), (2, 2, 0)]
    for p in parts:
        assert p.images.dtype == torch.uint8 and p.images.shape == (16, 112, 112, 3)
        assert p.index.dtype == p.labels.dtype == torch.int64
        assert p.index.tolist() == sampler.batch(2, p.step).tolist()
        assert p.labels.tolist() == [records.label(i) for i in p.index]
        assert all(np.array_equal(image, decode(records.bytes(i))) for image, i in zip(p.images.numpy(), p.index))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sampler", [ShuffledSampler(60, 10, seed=3), BalancedSampler(np.arange(60) // 4, 5, 2, seed=3)]
)
def test_ranks_together_see_the_global_batch_at_every_world_size(backend, sampler):
    records, options = good(), {"backend": backend, "augment": ALL, "seed": 9}
    whole = batches(records, sampler, epoch=1, **options)
    for world in (3, 12):  # 10 rows over 3 ranks are uneven; over 12 some ranks get none
        ranks = [batches(records, sampler, epoch=1, rank=r, world_size=world, **options) for r in range(world)]
        assert {len(parts) for parts in ranks} == {len(whole)}
        for step, expected in enumerate(whole):
            assert same([parts[step] for parts in ranks], [expected])
    sizes = [len(parts[0].images) for parts in ranks]
    k = sampler.together  # the images of an identity stay on one rank
    assert sizes == [k] * (10 // k) + [0] * (12 - 10 // k) and ranks[11][0].images.shape == (0, 112, 112, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_inside_an_epoch_also_at_another_world_size(backend):
    records, sampler = good(), ShuffledSampler(60, 8, seed=0)
    options = {"backend": backend, "augment": ALL, "seed": 4}
    whole = batches(records, sampler, epoch=5, **options)
    assert same(whole[4:], batches(records, sampler, epoch=5, start_step=4, **options))
    ranks = [batches(records, sampler, epoch=5, start_step=6, rank=r, world_size=2, **options) for r in range(2)]
    assert same([ranks[0][0], ranks[1][0]], [whole[6]])
    assert batches(records, sampler, epoch=5, start_step=7, **options) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_prefetch_change_nothing(backend):
    records, sampler = good(), ShuffledSampler(60, 6, seed=2)
    first = batches(records, sampler, backend=backend, augment=ALL, threads=1, prefetch=1)
    assert same(first, batches(records, sampler, backend=backend, augment=ALL, threads=3, prefetch=5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_left_early_does_not_show_in_the_next(backend):
    records, sampler = good(), ShuffledSampler(60, 6, seed=2)
    expected = batches(records, sampler, epoch=1, backend=backend)
    loader = make_loader(records, sampler, backend=backend, prefetch=3)
    for taken in (1, 4):
        iterator = loader.epoch(0)
        for _ in range(taken):
            next(iterator)
        del iterator  # abandoned
    assert same(list(loader.epoch(1)), expected)
    assert same(list(loader.epoch(1)), expected)
    loader.close()


# --- torch and DALI ------------------------------------------------------------------------------------------------


@needs_dali
def test_dali_equals_torch_bit_for_bit_when_nothing_is_resampled():
    mixed = [jpeg(i) if i % 3 else png(picture(i)) for i in range(40)]
    mixed[1] = encode_jpeg(picture(1), quality=60)
    out = io.BytesIO()
    Image.fromarray(picture(2)).save(out, "JPEG", progressive=True, subsampling=0)
    mixed[2] = out.getvalue()
    out = io.BytesIO()
    Image.fromarray(picture(3)).convert("L").save(out, "JPEG")
    mixed[3] = out.getvalue()
    records, sampler = MemoryRecords(mixed), ShuffledSampler(40, 8, seed=5)
    options = {"augment": AugmentOptions(flip=0.5, occlusion=0.5), "seed": 1}
    assert same(*(batches(records, sampler, backend=b, **options) for b in ("torch", "dali")))


@needs_dali
@pytest.mark.parametrize("change", ["crop", "low_resolution", "photometric", "all", "sizes"])
def test_dali_is_pixel_close_to_torch_when_something_is_resampled(change):
    records, augment = good(32), ALL
    if change == "sizes":
        sizes = [(112, 112), (250, 250), (64, 48), (96, 112), (300, 40), (1, 1)]
        records, augment = MemoryRecords([jpeg(i, *sizes[i % 6]) for i in range(32)]), AugmentOptions()
    elif change != "all":
        augment = AugmentOptions(flip=0.5, **{change: 1.0})
    sampler = ShuffledSampler(32, 16, seed=5)
    a, b = (joined(batches(records, sampler, backend=x, augment=augment, seed=2)) for x in ("torch", "dali"))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    difference = (a[2].int() - b[2].int()).abs().float()
    assert difference.mean((1, 2, 3)).max() < 1.0  # grey levels, worst image
    assert difference.max() <= 12
    plain = joined(batches(records, sampler, backend="torch", augment=AugmentOptions(), seed=2))
    assert change == "sizes" or (plain[2] != a[2]).flatten(1).any(1).sum() >= 16  # the changes did happen


# --- corrupt images ------------------------------------------------------------------------------------------------


def _bad_table() -> bytes:
    """A Huffman table with an impossible symbol: whole structure, readable header, and every decoder gives up."""
    data = bytearray(jpeg(7))
    table = data.index(b"\xff\xc4") + 4
    assert data[table] == 0  # the first DC table; its symbols come 17 bytes later
    data[table + 17] = 200
    return bytes(data)


def _bad_idat() -> bytes:
    """A PNG with right checksums and zlib data that ends too early."""
    data = png(picture(3))
    start = data.index(b"IDAT") - 4
    body = zlib.compress(zlib.decompress(data[start + 8 : data.index(b"IEND") - 8])[:1000])
    chunk = b"IDAT" + body
    return data[:start] + len(body).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:]


CORRUPT = {
    "empty": (b"", "empty"),
    "random": (np.random.default_rng(0).bytes(3000), "not JPEG or PNG"),
    "truncated": (jpeg(7)[:2000], "truncated"),
    "huge": (jpeg(7).replace(b"\x00\x70\x00\x70", b"\xff\xff\xff\xff", 1), "decompression bomb"),
    "sampling": (jpeg(7).replace(b"\x03\x01\x22\x00", b"\x03\x01\x34\x00", 1), "subsampling"),
    "revision": (jpeg(7).replace(b"JFIF\x00\x01", b"JFIF\x00\x6c", 1), "JFIF revision"),
    "table": (_bad_table(), "Huffman"),
    "png": (_bad_idat(), "PNG"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_image_is_one_clear_error(backend, kind):
    data, reason = CORRUPT[kind]
    records, sampler = good(), ShuffledSampler(60, 12, seed=1)
    at = int(sampler.batch(0, 3)[5])
    records.encoded[at] = data
    loader, before = make_loader(records, sampler, backend=backend), []
    with pytest.raises(UserError) as caught:
        for batch in loader.epoch(0):
            before.append(batch)
    assert len(before) == 3  # all batches before it came out
    message = str(caught.value)
    assert f"record {at} (memory[{at}]) is corrupt" in message and reason in message and "\n" not in message
    assert "protomem data verify" in message and "data.on_corrupt=skip" in message
    records.encoded[at] = jpeg(at)  # the loader is still of use
    assert same(list(loader.epoch(0)), batches(good(), sampler, backend=backend))
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_replaces_by_the_next_sound_record_and_counts(backend):
    records, sampler = good(), ShuffledSampler(60, 12, seed=1)
    order = np.concatenate([sampler.batch(0, s) for s in range(5)])
    replaced = {10: 13, 11: 13, 12: 13, 30: 31, 59: 0, 20: 21, 22: 23, 50: 51}
    bad, expected = list(replaced), order.copy()
    for position, (data, _) in zip(bad, CORRUPT.values(), strict=True):
        records.encoded[position] = data
    for position, replacement in replaced.items():
        expected[order == position] = replacement
    options = {"backend": backend, "on_corrupt": "skip", "augment": ALL}
    parts = batches(records, sampler, **options)
    index, labels, images = joined(parts)
    assert index.tolist() == expected.tolist()
    assert labels.tolist() == [records.label(i) for i in expected]
    assert [p.skipped for p in parts] == (order != expected).reshape(5, 12).sum(1).tolist()
    ranks = [batches(records, sampler, rank=r, world_size=5, **options) for r in range(5)]
    assert all(same([parts[s] for parts in ranks], [parts_s]) for s, parts_s in enumerate(parts))
    told = batches(good(), sampler, bad_positions=np.array(bad), **options)  # known from `data verify`
    assert same(told, parts) and [p.skipped for p in told] == [p.skipped for p in parts]


@needs_dali
def test_slight_damage_is_treated_alike_by_both_loaders():
    rng = np.random.default_rng(3)
    encoded = [bytearray(jpeg(i)) for i in range(40)]
    for data in encoded[::2]:
        for _ in range(4):  # behind the headers, in the entropy-coded data
            data[int(rng.integers(700, len(data) - 2))] = int(rng.integers(0, 255))
    records, sampler = MemoryRecords(map(bytes, encoded)), ShuffledSampler(40, 8, seed=0)
    a, b = (batches(records, sampler, backend=x, on_corrupt="skip") for x in ("torch", "dali"))
    assert same(a, b) and [p.skipped for p in a] == [p.skipped for p in b]


def test_a_set_of_nothing_but_corrupt_images_ends():
    records = MemoryRecords([b""] * 50)
    with pytest.raises(UserError, match="all 50 records"):
        batches(records, ShuffledSampler(50, 10, 0), backend="torch", on_corrupt="skip")


@pytest.mark.parametrize("label", [-1, 15])
def test_a_label_out_of_range_names_the_record(label):
    records, sampler = good(), ShuffledSampler(60, 12, seed=1)
    at = int(sampler.batch(0, 1)[0])
    records.labels[at] = label
    records.num_classes = 15
    with pytest.raises(UserError, match=rf"record {at} \(memory\[{at}\]\): label {label} is outside 0..14"):
        batches(records, sampler, backend="torch", on_corrupt="skip")


FUZZ = """
    import numpy as np, sys
    sys.path.insert(0, {root!r})
    from tests.test_pipeline import MemoryRecords, jpeg, make_loader, ShuffledSampler
    rng = np.random.default_rng({seed})
    encoded = []
    for i in range(400):
        data = bytearray(jpeg(i % 50))
        for _ in range(int(rng.choice([1, 3, 20]))):
            data[int(rng.integers(0, 700 if i % 4 else len(data)))] = int(rng.integers(0, 256))
        encoded.append(bytes(data) if i % 2 else jpeg(i % 50))
    loader = make_loader(MemoryRecords(encoded), ShuffledSampler(400, 64, 0), backend="dali", on_corrupt="skip")
    print("skipped", sum(batch.skipped for batch in loader.epoch(0)))
    left = loader.epoch(1)
    next(left)
"""


def run_python(code: str, **names) -> subprocess.CompletedProcess:
    root = __file__.rsplit("/", 2)[0]
    script = textwrap.dedent(code).format(root=root, **names)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@needs_dali
def test_two_hundred_mutated_images_do_not_end_the_process_nor_does_leaving_it_in_mid_epoch():
    done = run_python(FUZZ, seed=1)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 50


# --- leaving, choosing, normalising ---------------------------------------------------------------------------------

LEAVE = """
    import sys
    sys.path.insert(0, {root!r})
    from tests.test_pipeline import *
    for backend in {backends}:
        loader = make_loader(good(), ShuffledSampler(60, 6, 0), backend=backend, augment=ALL)
        iterator = loader.epoch(0)
        next(iterator), next(iterator)
    raise KeyError("on the way out")
"""


def test_an_error_in_the_middle_of_an_epoch_leaves_the_interpreter_cleanly():
    done = run_python(LEAVE, backends=["torch", "dali"] if dali.available() else ["torch"])
    assert done.returncode == 1 and "KeyError: 'on the way out'" in done.stderr.splitlines()[-1], done.stderr


def test_dali_missing_is_one_line_and_auto_takes_torch(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install protomem\[cuda13\]"):
        make_loader(good(), ShuffledSampler(60, 6, 0), backend="dali")
    with caplog.at_level(logging.INFO):
        assert len(batches(good(), ShuffledSampler(60, 30, 0))) == 2
    assert "torch" in caplog.text


@pytest.mark.parametrize("option, value", [("backend", "tensorflow"), ("on_corrupt", "ignore")])
def test_unknown_choices_are_refused(option, value):
    with pytest.raises(UserError, match=value):
        make_loader(good(), ShuffledSampler(60, 6, 0), **{option: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recordio_set_goes_through(backend, tmp_path):
    with RecordWriter(tmp_path) as writer:
        for i in range(24):
            writer.add(jpeg(i), i // 4)
    records = open_records(tmp_path)
    assert same(
        batches(records, ShuffledSampler(24, 8, 0), backend=backend), batches(good(24), ShuffledSampler(24, 8, 0))
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise(dtype, channels_last):
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1).expand(2, 8, 16, 3).contiguous()
    x = normalise(images, dtype, channels_last)
    assert x.shape == (2, 3, 8, 16) and x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    expected = (images.double() - 127.5) / 127.5
    assert torch.equal(x.permute(0, 2, 3, 1), expected.to(torch.promote_types(dtype, torch.float32)).to(dtype))
    assert images[0, 0, 3, 0] == 3  # untouched


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flip", [False, True])
def test_eval_batches_keep_the_order_and_the_last_short_batch(backend, flip):
    encoded = [jpeg(i) for i in range(11)]
    parts = list(eval_batches(encoded, 4, backend, torch.device("cpu"), 112, flip))
    assert [len(p) for p in parts] == [4, 4, 3]
    for image, data in zip(torch.cat(parts).numpy(), encoded):
        assert np.array_equal(image[:, ::-1] if flip else image, decode(data))
    assert list(eval_batches([], 4, backend)) == []
    assert next(eval_batches(encoded[:1], 4, backend, size=56)).shape == (1, 56, 56, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "table"])
def test_eval_batches_name_a_corrupt_image(backend, kind):
    encoded = [jpeg(i) for i in range(11)]
    encoded[9] = CORRUPT[kind][0]
    with pytest.raises(UserError, match=r"image 9 of 11 is corrupt"):
        list(eval_batches(encoded, 4, backend))
