"""`protomem data clean`: images far from their identity's dominant prototype, against a slow formula, sharded and not."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

from protomem import cleaning, config, distributed, state, trainer
from protomem.data.images import decode, encode_jpeg
from protomem.data.recordio import RecordWriter
from protomem.data.records import open_records
from protomem.errors import UserError
from protomem.prototypes.classifier import ClassifierShard
from protomem.signals import StopRequest
from tests.conftest import coloured_images
from tests.ranks import run_ranks
from tests.test_data_commands import run
from tests.test_training import settings

LABELS = [0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 4, 6, 6, 6, 6, 6, 6]  # nobody has 2 and 5
IDENTITIES, SIZE = 7, 6


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def degrees(x, w) -> float:
    cos = sum(a * b for a, b in zip(x, w)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in w))
    return math.degrees(math.acos(max(-1.0, min(1.0, cos))))


def slow(x, labels, rows, limit):
    """x [N][D], rows [C][K][D], float64 -> (angle [N], nearest [N], dominant {identity: k}, kept positions)."""
    nearest = [min(range(len(rows[y])), key=lambda k: degrees(v, rows[y][k])) for v, y in zip(x, labels)]
    dominant = {}
    for identity in set(labels):
        own = [k for k, y in zip(nearest, labels) if y == identity]
        dominant[identity] = max(range(len(rows[0])), key=own.count)
    angle = [degrees(v, rows[y][dominant[y]]) for v, y in zip(x, labels)]
    return angle, nearest, dominant, [i for i, a in enumerate(angle) if a <= limit]


class Encoder(torch.nn.Module):
    """The means of 2 x 2 x 3 parts of the picture, mixed: computed alike in any batch."""

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(12, SIZE, generator=torch.Generator().manual_seed(3))

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) @ self.mix


def features(images) -> list[list[float]]:
    x = np.stack([decode(image) for image in images]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return Encoder()((torch.from_numpy(x.astype(np.float32)) - 127.5) / 127.5).double().tolist()


def pictures():
    rng = np.random.default_rng(5)
    return [encode_jpeg(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)) for _ in LABELS]


def noisy_rows(k: int) -> torch.Tensor:
    return torch.randn(IDENTITIES, k, SIZE, generator=torch.Generator().manual_seed(k))


def write_set(folder, images, labels=LABELS):
    with RecordWriter(folder, classes=IDENTITIES) as writer:
        for image, label in zip(images, labels):
            writer.add(image, label)
    return folder


def measured(folder, k: int, batch_size: int, skip: bool):
    rank, world = distributed.rank(), distributed.world_size()
    context = distributed.Context(rank, world, rank, torch.device("cpu"), "torchrun")
    first, last = distributed.shard_bounds(IDENTITIES, rank, world)
    c = config.load([], ["data.train=x", "output=y", "data.size=32", "data.loader=torch"])
    try:
        return cleaning.measure(
            Encoder(), noisy_rows(k)[first:last], IDENTITIES, open_records(folder), c, context, batch_size, skip
        )
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("world", [1, 2, 3, 5])  # 5: a rank without rows
def test_equals_the_slow_formula(world, tmp_path):
    images = pictures()
    write_set(tmp_path, images)
    cases = [(k, batch_size) for k in (1, 3) for batch_size in ((2, 100) if world < 4 else (2,))]
    found = run_ranks(world, lambda: [measured(tmp_path, *case, False) for case in cases])[0]
    for (k, _), (angles, usable) in zip(cases, found):
        angle, nearest, dominant, kept = slow(features(images), LABELS, noisy_rows(k).double().tolist(), 70.0)
        got = cleaning.judge(angles, usable, np.array(LABELS), IDENTITIES, 70.0)
        assert usable.all() and 0 < len(kept) < len(LABELS)
        np.testing.assert_allclose(got.angle, angle, atol=1e-4)
        assert got.nearest.tolist() == nearest and np.flatnonzero(got.keep).tolist() == kept
        assert {y: got.dominant[y] for y in dominant} == dominant


@pytest.mark.parametrize("world", [1, 3])
def test_images_that_cannot_be_decoded(world, tmp_path):
    """They count for nothing, or every rank says which is the first of a batch; also where only decoding finds out."""
    images = pictures()
    write_set(tmp_path / "sound", images)
    images[6], images[12] = b"no image", b""
    write_set(tmp_path / "bad", images)
    both = run_ranks(world, lambda: [measured(tmp_path / name, 3, 2, True) for name in ("sound", "bad")])[0]
    (sound, _), (bad, usable) = both
    assert np.flatnonzero(~usable).tolist() == [6, 12]
    np.testing.assert_array_equal(bad[usable], sound[usable])
    angle, nearest, dominant, kept = slow(
        [x for i, x in enumerate(features(pictures())) if usable[i]],
        [y for i, y in enumerate(LABELS) if usable[i]],
        noisy_rows(3).double().tolist(),
        70.0,
    )
    got = cleaning.judge(bad, usable, np.array(LABELS), IDENTITIES, 70.0)
    np.testing.assert_allclose(got.angle[usable], angle, atol=1e-4)
    assert np.isnan(got.angle[~usable]).all() and not got.keep[~usable].any() and got.keep.sum() == len(kept)
    for text in run_ranks(world, lambda: measured(tmp_path / "bad", 3, 2, False)):
        assert "record 6 (" in text and "--skip-corrupt" in text


def test_of_equally_frequent_prototypes_the_first_is_dominant():
    angles = np.array([[50, 10], [10, 50], [30, 30], [20, 80], [80, 20], [90, 40]], np.float32)
    found = cleaning.judge(angles, np.ones(6, bool), np.array([0, 0, 1, 2, 2, 2]), 4, 45)
    assert found.nearest.tolist() == [1, 0, 0, 0, 1, 1] and found.dominant.tolist() == [0, 0, 1, 0]
    assert found.angle.tolist() == [50, 10, 30, 80, 20, 40] and found.keep.tolist() == [False, True, True, False, True, True]


def test_unusable_images_do_not_vote():
    angles, labels = np.array([[50, 10], [0, 0], [0, 0], [0, 0]], np.float32), np.array([0, -1, 0, 99])
    found = cleaning.judge(angles, np.array([True, False, False, False]), labels, 2, 45)
    assert found.dominant.tolist() == [1, 0] and found.keep.tolist() == [True, False, False, False]


@pytest.mark.parametrize("wrote, read", [(1, 3), (3, 2), (4, 1), (2, 5)])
def test_every_rank_reads_its_rows(wrote, read, tmp_path):
    def write():
        shard = ClassifierShard(IDENTITIES, SIZE, sub_centers=3)
        state.save(tmp_path, 1, state.named_state({"prototypes": shard}, {}), IDENTITIES, {}, keep=1)
        return shard.weight.detach().numpy()

    def load():
        rows, total = state.load_rows(state.newest(tmp_path), torch.device("cpu"))
        return rows.numpy(), total

    written = np.concatenate(run_ranks(wrote, write))
    found = run_ranks(read, load)
    assert {total for _, total in found} == {IDENTITIES}
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in found]), written)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A run with three prototypes of each of 31 identities on data of which a fifth has another identity's label, and which;
    the last identity's own images are gone."""
    folder = tmp_path_factory.mktemp("noisy")
    items, rng = list(coloured_images(31, 8)), np.random.default_rng(3)
    true = np.array([label for _, label in items])
    given = np.where(rng.random(len(items)) < 0.2, (true + rng.integers(1, 31, len(items))) % 31, true)
    order = np.argsort(given, kind="stable")
    with RecordWriter(folder / "set") as writer:
        for i in order.tolist():
            writer.add(items[i][0], given[i])
    np.save(folder / "set" / "train.quality.npy", np.arange(len(order), dtype=np.float32))
    np.save(folder / "set" / "train.features.npy", np.zeros((3, 2)))
    more = ("data.augment.photometric=0", "data.augment.flip=0", "margin.name=arcface", "optimizer.lr=0.05", "optimizer.clip=5")
    more += ("log.every=30", "prototypes.sub_centers=3", "checkpoint.every=0")
    trainer.train(config.load([], settings(folder / "set", folder / "run", *more)), StopRequest())
    return folder, (true != given)[order]


def listed(output) -> list[dict]:
    return list(csv.DictReader((output / "dropped.csv").open()))


def test_finds_planted_wrong_labels(noisy, tmp_path):
    folder, wrong = noisy
    before = sorted(p.name for p in folder.iterdir())
    facts = json.loads(run("clean", folder / "run", tmp_path / "out", "--angle", 25, "--json"))
    assert facts == json.loads((tmp_path / "out" / "clean.json").read_text()) and facts["step"] == 60
    source, cleaned = open_records(folder / "set"), open_records(tmp_path / "out")
    rows = listed(tmp_path / "out")
    dropped = np.array([int(row["position"]) for row in rows])
    kept = np.setdiff1d(np.arange(len(source)), dropped)
    assert (facts["kept"], facts["dropped"], facts["images"]) == (len(kept), len(dropped), 248)
    precision, recall = wrong[dropped].mean(), wrong[dropped].sum() / wrong.sum()
    assert precision > 0.9 and recall > 0.8, (precision, recall)  # 0.2 by chance
    assert cleaned.labels.tolist() == source.labels[kept].tolist() and cleaned.num_classes == 31
    assert [cleaned.bytes(i) for i in range(len(cleaned))] == [source.bytes(int(i)) for i in kept]
    assert facts["columns"] == ["quality"] and cleaned.column("quality").tolist() == kept.tolist()
    for row in rows:
        assert int(row["label"]) == source.label(int(row["position"])) and float(row["angle"]) > 25
        assert row["where"] == source.where(int(row["position"]))
    assert sum(facts["histogram"]["images"]) == 248
    names = "angles.png clean.json dropped.csv dropped.png property train.idx train.quality.npy train.rec"
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.endswith(".cache")) == names.split()
    assert sorted(p.name for p in folder.iterdir()) == before and [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []


def test_ranks_find_what_one_process_finds(noisy, tmp_path):
    folder, _ = noisy
    run("clean", folder / "run", tmp_path / "one", "--angle", 0, "--list-only", "--batch-size", 16)
    options = dict(data=None, angle=0.0, list_only=True, skip_corrupt=False, force=False, batch_size=16, device="cpu")
    run_ranks(2, lambda: cleaning.clean(folder / "run", tmp_path / "two", json_output=False, **options))
    one, two = listed(tmp_path / "one"), listed(tmp_path / "two")
    assert len(one) == len(two) == 248 and not (tmp_path / "one" / "train.rec").exists()
    assert [{**a, "angle": 0} for a in one] == [{**b, "angle": 0} for b in two]
    np.testing.assert_allclose([float(a["angle"]) for a in one], [float(b["angle"]) for b in two], atol=2e-3)


def test_an_identity_without_images_keeps_its_number(noisy, tmp_path):
    """Training goes on from there with as many rows; the angle is such that the last identities are empty."""
    folder, _ = noisy
    angle = {}
    run("clean", folder / "run", tmp_path / "all", "--angle", 0, "--list-only")
    for row in listed(tmp_path / "all"):
        angle[int(row["label"])] = min(angle.get(int(row["label"]), 180.0), float(row["angle"]))
    limit = angle[30] - 0.001
    text = run("clean", folder / "run", tmp_path / "out", "--angle", limit)
    cleaned, facts = open_records(tmp_path / "out"), json.loads((tmp_path / "out" / "clean.json").read_text())
    emptied = sorted(label for label, least in angle.items() if least > limit)
    assert facts["first_emptied"] == emptied and 30 in emptied and facts["identities_with_images"] == 31 - len(emptied)
    assert cleaned.num_classes == 31 and 30 not in cleaned.labels and "keep their number" in text


def test_what_is_there_is_not_overwritten(noisy, tmp_path):
    folder, _ = noisy
    run("clean", folder / "run", tmp_path / "out", "--list-only")
    assert "--force replaces it" in run("clean", folder / "run", tmp_path / "out", code=2)
    run("clean", folder / "run", tmp_path / "out", "--force", "--angle", 25)
    assert len(listed(tmp_path / "out")) > 0 and (tmp_path / "out" / "train.rec").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    assert "was not written by this command" in run("clean", folder / "run", tmp_path / "mine", "--force", code=2)
    data = ("--data", tmp_path / "out")
    assert "which is read" in run("clean", folder / "run", tmp_path / "out", "--force", *data, code=2)
    (tmp_path / "link").mkdir()
    for path in (tmp_path / "out").iterdir():
        (tmp_path / "link" / path.name).symlink_to(path)
    data = ("--data", tmp_path / "link")
    assert "which is read" in run("clean", folder / "run", tmp_path / "out", "--force", *data, code=2)
    shutil.rmtree(tmp_path / "link")
    (tmp_path / "out" / "run").mkdir()
    assert "also holds run, which" in run("clean", folder / "run", tmp_path / "out", "--force", code=2)
    assert "lies within" in run("clean", folder / "run", folder / "set" / "cleaned", code=2)
    assert not (folder / "set" / "cleaned").exists() and (tmp_path / "out" / "run").exists()
    assert "raise --angle" in run("clean", folder / "run", tmp_path / "none", "--angle", 0, code=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["mine", "out"]
    assert "exists; --force" in run("clean", folder / "run", ".", code=2)
    (tmp_path / "file").touch()
    assert "cannot be written" in run("clean", folder / "run", tmp_path / "file" / "out", code=2)


def test_errors(noisy, small_set, tmp_path):
    folder, _ = noisy
    out = tmp_path / "out"
    assert "no complete checkpoint" in run("clean", tmp_path, out, code=2)
    write_set(tmp_path / "other", pictures())
    assert "has 7 identities, but" in run("clean", folder / "run", out, "--data", tmp_path / "other", code=2)
    text = run("clean", folder / "run", out, "--data", tmp_path / "nowhere", code=2)
    assert "nowhere does not exist" in text and "--data" not in text

    changed = tmp_path / "changed"
    shutil.copytree((folder / "run" / "checkpoints" / "last").resolve(), changed)
    info = json.loads((changed / "training.json").read_text())
    for path, why in ((str(small_set), "has changed since"), (str(tmp_path / "gone"), "--data names where they are")):
        info["config"]["data"]["train"] = path
        (changed / "training.json").write_text(json.dumps(info))
        assert why in run("clean", changed, out, code=2)
    run("clean", changed, out, "--data", small_set)
    info["config"]["prototypes"]["source"] = "memory"
    (changed / "training.json").write_text(json.dumps(info))
    assert "no prototype of each identity" in run("clean", changed, out, "--force", code=2)

    bad = tmp_path / "bad"
    records = open_records(folder / "set")
    with RecordWriter(bad, classes=31) as writer:
        for i in range(len(records)):
            writer.add(b"no image" if i == 5 else records.bytes(i), records.label(i))
    assert "record 5 (" in run("clean", folder / "run", tmp_path / "c", "--data", bad, code=2)
    text = run("clean", folder / "run", tmp_path / "c", "--data", bad, "--skip-corrupt", "--angle", 180)
    assert "247 of 248 images kept" in text and "cannot be decoded: 1 images" in text


def test_an_identity_that_cannot_be_read_is_told_as_empty(noisy, tmp_path):
    folder, _ = noisy
    records = open_records(folder / "set")
    with RecordWriter(tmp_path / "bad", classes=31) as writer:
        for i in range(len(records)):
            writer.add(b"no image" if records.label(i) == 3 else records.bytes(i), records.label(i))
    run("verify", tmp_path / "bad", code=1)  # they are known then, and nothing looks for others in their place
    options = ("--data", tmp_path / "bad", "--skip-corrupt", "--angle", 180)
    assert "1 identities have no image left and keep their number: 3" in run("clean", folder / "run", tmp_path / "out", *options)


@pytest.mark.parametrize("world", [1, 2])
def test_embeddings_that_are_no_numbers_are_not_dropped_but_told(world, tmp_path, monkeypatch):
    write_set(tmp_path / "set", pictures())
    monkeypatch.setattr(Encoder, "forward", lambda self, x: torch.full((len(x), SIZE), float("nan")))
    for text in run_ranks(world, lambda: measured(tmp_path / "set", 3, 2, True)):
        assert "record 0 (" in text and "is not finite" in text
