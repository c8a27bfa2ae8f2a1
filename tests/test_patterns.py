"""Generated identities at scale: the reader interface, exactness, and that pictures carry their identity."""

import hashlib
import pickle
import time

import numpy as np
import pytest

from protomem.data.faces.long_tail import images_per_person
from protomem.data.images import check_image, decode
from protomem.data.pairs import read_bin
from protomem.data.patterns import PatternRecords
from protomem.data.records import open_records
from protomem.errors import UserError
from tests.test_data_commands import run


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


def test_pictures_of_the_first_version_are_kept():
    """Hashes made before tail, first and hard were there, of pictures and of who the set says it is."""
    for arguments, positions, print_, pixels in (
        ((1000, 5, 3, 48), range(0, 5000, 777), "613079a66380d19b", "2dce12dead359d0984dc50091898fcb5"),
        ((50, 3), range(0, 150, 17), "1bbfe924ae24c274", "012f056403e82e46ff494c11f96b524a"),
    ):
        records = PatternRecords(*arguments)
        drawn = np.stack([records.array(i) for i in positions])
        assert hashlib.sha256(drawn.tobytes()).hexdigest()[:32] == pixels and records.fingerprint == print_


def test_long_tailed_numbers_of_images():
    records = open_records("patterns:identities=3000,images=4,tail=1,seed=5,size=32")
    counts = np.bincount(records.labels, minlength=3000)
    assert counts.min() == 2 and counts.max() == 80 and abs(counts.mean() - 4) < 0.02 and len(records) == counts.sum()
    assert (counts == 2).mean() > 0.5 and (np.diff(records.labels) >= 0).all() and records.labels.dtype == np.int64
    for i in (0, 1, 2, 777, len(records) - 1):
        assert records.label(i) == records.labels[i] and records.where(i) == f"picture {i} of {records.path}"
    with pytest.raises(IndexError):
        records.array(len(records))
    plain = PatternRecords(3000, 4, 5, 32)  # the same people, with other numbers of pictures
    for label in (0, 1234, 2999):
        assert np.array_equal(records.array(int(np.searchsorted(records.labels, label)) + 1), plain.array(4 * label + 1))
    assert records.fingerprint != plain.fingerprint and open_records(records.path).fingerprint == records.fingerprint
    assert len(pickle.dumps(records)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(records)).labels, records.labels)


def test_long_tail_of_rendered_sets_is_kept():
    """Hashes made by the slower first form."""
    for identities, mean, seed, stored in (
        (1000, 20, 7, "b41587310986c699"),
        (30, 3, 2, "799aa79cbf66bbbf"),
        (1, 2, 5, "d86e8112f3c4c444"),
    ):
        counts = images_per_person(identities, mean, True, seed)
        assert hashlib.sha256(counts.tobytes()).hexdigest()[:16] == stored


def test_a_million_identities_with_a_tail_are_quick():
    records = PatternRecords(1_000_000, 4, tail=True)
    begun = time.process_time()
    assert abs(len(records) / 4e6 - 1) < 1e-5 and records.label(len(records) - 1) == 999_999
    assert time.process_time() - begun < 5  # measured: 0.4 s


def test_first_makes_other_people():
    records, later = (open_records(f"patterns:identities=30,images=3,size=32{more}") for more in ("", ",first=20"))
    assert later.num_classes == 30 and later.label(0) == 0 and "first=20" in later.path
    assert np.array_equal(later.array(5), records.array(20 * 3 + 5)) and later.fingerprint != records.fingerprint
    far = open_records("patterns:identities=30,images=3,size=32,first=50000000")
    assert not np.array_equal(far.array(0), records.array(0))


def test_hard_pictures():
    records = open_records("patterns:identities=300,images=3,seed=1,size=48,hard=1")
    drawn = np.stack([records.array(i) for i in range(900)])
    assert drawn.max() <= 254 and np.abs(np.diff(drawn.astype(int), axis=1)).max() < 160  # nothing wraps around
    assert hashlib.sha256(drawn[:20].tobytes()).hexdigest()[:32] == "89150ae137b39565d51f49ed592939d5"
    cells = drawn.reshape(300, 3, 12, 4, 12, 4, 3).mean((3, 5)).reshape(300, 3, -1)
    cells -= cells.mean(2, keepdims=True)
    cells /= np.linalg.norm(cells, axis=2, keepdims=True)
    right = ((cells[:, 0] @ cells[:, 1].T).argmax(1) == np.arange(300)).mean()
    assert 0.05 < right < 0.7  # pixels know something, but not much; the easy pictures: above 0.95


def test_options_are_checked():
    for text, message in (
        ("tail=2", "tail is 0"),
        ("hard=3", "hard is 0"),
        ("images=1,tail=1", "tail=1 need images >= 2"),
        (f"first={2**63}", "whole numbers"),
        ("first=-1", "whole numbers"),
        ("tall=1", "'tall=1' is not one"),
    ):
        with pytest.raises(UserError, match=message):
            open_records(f"patterns:identities=9,images=2,{text}")


def test_pairs_of_patterns(tmp_path):
    text = "patterns:identities=200,images=4,tail=1,first=50000000,size=32"
    assert "400 pairs, 200 of them genuine" in run("pairs", tmp_path / "a.bin", "--patterns", text, "--count", 400)
    run("pairs", tmp_path / "b.bin", "--patterns", text, "--count", 400)
    run("pairs", tmp_path / "c.bin", "--patterns", text, "--count", 400, "--seed", 1)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() != (tmp_path / "c.bin").read_bytes()
    encoded, same = read_bin(tmp_path / "a.bin")
    records = open_records(text)
    who = {records.bytes(i): records.label(i) for i in range(len(records))}
    people = np.array([who[image] for image in encoded]).reshape(-1, 2)  # every picture is one of the set
    assert np.array_equal(people[:, 0] == people[:, 1], same)
    assert all(encoded[2 * i] != encoded[2 * i + 1] for i in range(400))
    assert (same.reshape(10, 2, 20) == [[[True], [False]]]).all()
    assert np.array_equal(people // 20, np.repeat(range(10), 40)[:, None].repeat(2, 1))  # nobody in two folds
    assert len(np.unique(people[same])) == 200


def test_pairs_of_patterns_that_cannot_be_made(tmp_path):
    for text, count, message in (
        ("patterns:identities=200,images=4,size=32", 410, "multiple of 20"),
        ("patterns:identities=19,images=4,size=32", 400, "identities >= 20"),
        ("patterns:identities=200,images=1,size=32", 400, "images >= 2"),
        ("identities=200,images=4", 400, "write patterns:identities"),
    ):
        assert message in run("pairs", tmp_path / "a.bin", "--patterns", text, "--count", count, code=2)
    assert "or --patterns" in run("pairs", tmp_path / "a.bin", "--patterns", "patterns:x", "--synth", code=2)
