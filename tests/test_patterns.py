"""Generated identities at scale: the reader interface, exactness, and that pictures carry their identity."""

import hashlib
import pickle

import numpy as np
import pytest

from protomem.data.images import check_image, decode
from protomem.data.patterns import PatternRecords
from protomem.data.records import open_records
from protomem.errors import UserError


def test_reader_interface():
    records = open_records("patterns:identities=7,images=3,seed=2,size=64")
    assert isinstance(records, PatternRecords)
    assert len(records) == 21 and records.num_classes == 7
    assert records.labels.dtype == np.int64 and records.labels.tolist() == [i // 3 for i in range(21)]
    assert [records.label(i) for i in range(21)] == records.labels.tolist()
    assert records.array(5).shape == (64, 64, 3) and records.array(5).dtype == np.uint8
    assert check_image(records.bytes(5)) is None
    assert np.abs(decode(records.bytes(5)).astype(float) - records.array(5)).mean() < 8  # JPEG of a noisy picture
    assert len(records.damaged) == 0 and "picture 5" in records.where(5)
    for i in (-1, 21):
        with pytest.raises(IndexError):
            records.array(i)
        with pytest.raises(IndexError):
            records.label(i)
    with pytest.raises(UserError, match="no column 'quality'"):
        records.column("quality")


def test_fingerprint_changes_with_every_argument():
    variants = [(7, 3, 2, 64), (8, 3, 2, 64), (7, 4, 2, 64), (7, 3, 1, 64), (7, 3, 2, 112)]
    prints = [PatternRecords(*v).fingerprint for v in variants]
    assert len(set(prints)) == 5 and prints[0] == PatternRecords(*variants[0]).fingerprint


def test_pixels_are_the_same_on_every_machine():
    records = PatternRecords(1_000_000, 4, seed=1)
    pixels = np.stack([records.array(i) for i in (0, 1, 2_345_678, 3_999_999)])
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:32] == "9b8ee7524ac1cc0134a43f79cc9940ac"
    assert pixels.min() >= 0 and pixels.max() <= 254


def test_extremes_do_not_wrap_around():
    records = PatternRecords(400, 1, size=32)
    extremes = np.array([(a.min(), a.max()) for a in map(records.array, range(400))])
    neighbours = max(np.abs(np.diff(records.array(i).astype(int), axis=0)).max() for i in range(0, 400, 10))
    assert extremes[:, 1].max() <= 254 and neighbours < 160


def test_a_million_identities_cost_nothing():
    records = PatternRecords(10_000_000, 8)
    assert records.label(len(records) - 1) == 9_999_999
    assert records.array(len(records) - 1).shape == (112, 112, 3)
    records = PatternRecords(1000, 4)
    records.labels
    assert len(pickle.dumps(records)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(records)).array(9), records.array(9))


def test_pictures_carry_their_identity():
    """Mean colours of 7 x 7 cells, brightness and contrast taken out, find the identity among 200 from one example."""
    records = PatternRecords(200, 3, seed=5)
    cells = np.stack([records.array(i).reshape(7, 16, 7, 16, 3).mean((1, 3)) for i in range(600)]).reshape(600, -1)
    cells = (cells - cells.mean(1, keepdims=True)) / cells.std(1, keepdims=True)
    gallery, probe = cells[0::3], cells[1::3]
    assert ((probe @ gallery.T).argmax(1) == np.arange(200)).mean() > 0.95
    assert not np.array_equal(records.array(0), records.array(1))


def test_bad_arguments_are_refused():
    for arguments in ((0, 4), (4, 0), (4, 4, 0, 8)):
        with pytest.raises(UserError, match="patterns need"):
            PatternRecords(*arguments)
