"""The rendered face set: exactness, purity, geometry, known quality, and the files that it writes."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
import torch

from protomem.data.faces import (
    DEGRADATIONS,
    ImageOptions,
    contact_sheet,
    render_faces,
    write_face_pairs,
    write_face_set,
)
from protomem.data.faces import degrade, geometry, pairs, raster, render, scene, synth
from protomem.data.faces.hashing import bits, key, normal, uniform
from protomem.data.faces.head import load_head
from protomem.data.faces.identity import identity_parameters
from protomem.data.images import decode
from protomem.data.pairs import read_bin
from protomem.data.recordio import RecordIO
from protomem.errors import UserError

CLEAN = ImageOptions(degrade=0)
# sha256 of the pixels of six pictures, clean and degraded. If the renderer is changed on purpose, count up render.RENDERER
# and write the new value here.
# An AMD EPYC with AVX2, and an Intel Xeon with AVX-512 and AMX: they differ, whatever instructions torch, numpy and OpenBLAS
# are told to use, and it is not known where (benchmarks/LOG.md). A change of the renderer changes both.
GOLDEN = {"545f9e3ba54da752e34d2a0f654614dd", "6e886ef4b2b061bcf29d71ca18d29fc6"}


# --- randomness


def test_hash_is_splitmix64():
    # the first outputs of splitmix64 seeded with 0, as in the literature
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert bits(np.zeros(1, np.uint64), 3)[0].tolist() == known


def test_streams_differ_and_have_their_moments():
    keys = key(3, "a name", np.arange(5000))
    assert len(np.unique(keys)) == 5000
    assert not np.intersect1d(keys, key(3, "b name", np.arange(5000))).size
    assert not np.intersect1d(keys, key(4, "a name", np.arange(5000))).size
    u, g = uniform(keys, 8), normal(keys, 8)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert abs(g.mean()) < 0.02 and abs(g.std() - 1) < 0.01 and np.abs(g).max() < 3.47
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.06


# --- the rasteriser


def slow_raster(x, y, z, triangles, two_sided, size):
    """Every sample against every triangle, in Python integers: the last of the nearest triangles, or -1."""
    best = np.full((size, size), -1)
    depth = np.full((size, size), -np.inf)
    for t, (a, b, c) in enumerate(triangles.tolist()):
        p = [(int(x[v]), int(y[v])) for v in (a, b, c)]
        area = (p[1][0] - p[0][0]) * (p[2][1] - p[0][1]) - (p[2][0] - p[0][0]) * (p[1][1] - p[0][1])
        if area == 0 or (area > 0 and not two_sided[t]):
            continue
        sign = 1 if area > 0 else -1
        for i in range(size):
            for j in range(size):
                s = (64 * j + 32, 64 * i + 32)
                e = [
                    ((p[n][0] - p[m][0]) * (s[1] - p[m][1]) - (p[n][1] - p[m][1]) * (s[0] - p[m][0])) * sign
                    for m, n in ((1, 2), (2, 0), (0, 1))
                ]
                if min(e) >= 0:
                    d = sum(float(w) * float(z[v]) for w, v in zip(e, (a, b, c))) / abs(area)
                    if d >= depth[i, j]:
                        best[i, j], depth[i, j] = t, d
    return best, depth


@pytest.mark.parametrize("grid", [1, 16, 32])  # coarse grids put edges and vertices exactly on samples
def test_raster_equals_every_sample_against_every_triangle(grid):
    rng = np.random.default_rng(grid)
    size, n = 10, 2
    x, y = (rng.integers(-4 * 64, 14 * 64, (40, n)) // grid * grid for _ in range(2))
    z = rng.random((40, n)).astype(np.float32)
    triangles, two_sided = rng.integers(0, 40, (40, 3)), rng.random(40) < 0.5
    seen = raster.rasterise(*(torch.from_numpy(v) for v in (x, y, z, triangles, two_sided)), size)
    found = np.full(n * size * size, -1)
    found[seen.sample] = seen.triangle
    depth = np.full(n * size * size, -np.inf)
    depth[seen.sample] = seen.depth
    for k in range(n):
        triangle, expected = slow_raster(x[:, k], y[:, k], z[:, k], triangles, two_sided, size)
        here = slice(k * size * size, (k + 1) * size * size)
        assert ((found[here] >= 0) == (triangle.reshape(-1) >= 0)).all()
        covered = triangle.reshape(-1) >= 0
        assert covered.sum() > 30
        np.testing.assert_allclose(depth[here][covered], expected.reshape(-1)[covered], atol=2e-4)
        # samples on shared vertices and edges are ties, and depths closer than one level may go either way
        assert (found[here] == triangle.reshape(-1))[covered].mean() > (0.97 if grid == 1 else 0.9)
    corners = torch.from_numpy(triangles)[seen.triangle]
    image = seen.sample // (size * size)
    mixed = sum(w * torch.from_numpy(z)[corners[:, m], image] for m, w in enumerate(seen.weights))
    torch.testing.assert_close(mixed, seen.depth, atol=1e-5, rtol=0)


def test_raster_leaves_no_cracks():
    """A net of triangles over the whole picture, vertices anywhere: every sample is covered."""
    rng = np.random.default_rng(0)
    side, size = 12, 32
    gy, gx = np.mgrid[0:side, 0:side] * (size * 64 // (side - 1))
    inner = (slice(1, -1), slice(1, -1))
    gx[inner] += rng.integers(-60, 60, (side - 2, side - 2))
    gy[inner] += rng.integers(-60, 60, (side - 2, side - 2))
    q = np.arange(side * side).reshape(side, side)
    a, b, c, d = (v.reshape(-1) for v in (q[:-1, :-1], q[:-1, 1:], q[1:, :-1], q[1:, 1:]))
    net = torch.from_numpy(np.concatenate([np.stack([a, b, c], 1), np.stack([b, c, d], 1)]))
    x, y = (torch.from_numpy(v.reshape(-1, 1)) for v in (gx, gy))
    seen = raster.rasterise(x, y, torch.zeros(side * side, 1), net, torch.ones(len(net), dtype=torch.bool), size)
    assert len(seen.sample) == size * size


def test_raster_hides_what_is_behind():
    x = torch.tensor([[0], [64 * 8], [0]])
    y = torch.tensor([[0], [0], [64 * 8]])
    triangle, both = torch.tensor([[0, 1, 2]]), torch.ones(1, dtype=torch.bool)
    z = torch.full((3, 1), 0.5)
    before = raster.rasterise(x, y, z, triangle, both, 8, torch.full((64,), 0.4))
    behind = raster.rasterise(x, y, z, triangle, both, 8, torch.full((64,), 0.6))
    assert len(before.sample) == 36 and len(behind.sample) == 0


# --- geometry


def test_morphing_is_exact_in_any_order():
    head = load_head()
    person = identity_parameters(head, 0, np.arange(3), 0.35)
    weights = person["weights"]
    order = np.random.default_rng(0).permutation(len(head.names) - len(head.expressions))
    slow = head.base.numpy()[:, None] + np.zeros(3)
    for k in order:
        slow = slow + head.targets[k].numpy()[:, None] * np.round(weights[:, k] * 65536)
    assert np.array_equal(head.exact(weights).numpy(), slow)
    assert np.abs(weights).max() <= 1 and np.array_equal(weights * 65536, np.round(weights * 65536))


def landmarks(options, size=112, n=24):
    """Projected landmarks [n, 5, 2] in pixels and the angles, without the jitter of the alignment."""
    head = load_head()
    identities, images = np.arange(n), np.arange(n)
    person = render._people(0, identities, 0.35)
    views = scene.scene_parameters(head, 0, identities, images, options)
    views["jitter"] = views["jitter"] * 0
    neutral = torch.from_numpy(person["exact"]).t().contiguous()
    solid, _ = geometry.build(head, neutral, person, views, size, render._tables("cpu"))
    x, y = solid.x.double() / 64, solid.y.double() / 64
    points = []
    for vertices in (head.right_eye, head.left_eye, [head.nose_tip], [head.right_mouth], [head.left_mouth]):
        points.append(torch.stack([x[vertices].mean(0), y[vertices].mean(0)], 1))
    return torch.stack(points, 1).numpy(), views


def test_faces_are_aligned_to_the_arcface_template():
    points, _ = landmarks(ImageOptions(yaw_std=0, pitch_std=0, expression=0, degrade=0))
    error = np.linalg.norm(points - geometry.ARCFACE_TEMPLATE, axis=2)
    assert error.mean() < 4 and error.max() < 14  # a similarity cannot fit every face
    assert np.abs(points.mean(1) - geometry.ARCFACE_TEMPLATE.mean(0)).max() < 0.2
    swapped = np.linalg.norm(points[:, [1, 0, 2, 4, 3]] - geometry.ARCFACE_TEMPLATE, axis=2)
    assert swapped.mean() > 15


def test_positive_yaw_moves_the_nose_one_way_and_truth_has_the_sign():
    points, views = landmarks(ImageOptions(yaw_range=(35, 60), pitch_std=0, expression=0, degrade=0))
    nose = points[:, 2, 0] - 0.5 * (points[:, 0, 0] + points[:, 1, 0])
    assert (np.sign(nose) == np.sign(views["yaw"])).all() and len(set(np.sign(nose))) == 2


def test_truth_about_pose():
    _, truth = render_faces(np.arange(3), np.arange(3), options=ImageOptions(yaw_range=(35, 60)), size=32)
    people, images = np.arange(2000), np.arange(2000)
    views = scene.scene_parameters(load_head(), 0, people, images, ImageOptions(yaw_range=(35, 60)))
    assert np.array_equal(views["yaw"][:3].astype(np.float32), truth["yaw"])
    assert (np.abs(views["yaw"]) >= 35).all() and (np.abs(views["yaw"]) <= 60).all()
    assert abs((views["yaw"] > 0).mean() - 0.5) < 0.05 and np.abs(views["yaw"]).std() > 7
    views = scene.scene_parameters(load_head(), 0, people, images, ImageOptions(yaw_std=6))
    assert abs(views["yaw"].std() - 6) < 0.3 and np.abs(views["yaw"]).max() < 20.9


# --- pictures


def test_pixels_are_those_of_a_known_machine():
    identities, images = np.array([0, 0, 1, 2, 3, 10_000_000]), np.array([0, 1, 5, 0, 2, 7])
    first, _ = render_faces(identities[:3], images[:3], seed=5, options=CLEAN)
    rest, truth = render_faces(identities[3:], images[3:], seed=5, options=ImageOptions(degrade=1))
    assert (truth["quality"] < 1).all()
    pixels = torch.cat([first, rest]).numpy()
    assert pixels.shape == (6, 112, 112, 3) and pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:32] in GOLDEN


def test_a_picture_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    identities, images = rng.integers(0, 9, 18), rng.integers(0, 5, 18)
    options = ImageOptions(degrade=0.6)
    together, truth = render_faces(identities, images, size=48, options=options)
    order = rng.permutation(18)
    shuffled, other = render_faces(identities[order], images[order], size=48, options=options)
    assert torch.equal(together[order], shuffled)
    assert all(np.array_equal(truth[k][order], other[k]) for k in truth)
    for k in (0, 17):
        alone, _ = render_faces(identities[k], images[k], size=48, options=options)
        assert torch.equal(alone[0], together[k])


def test_threads_do_not_change_pixels():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = render_faces(np.arange(4), np.zeros(4), size=64)
        torch.set_num_threads(3)
        three, _ = render_faces(np.arange(4), np.zeros(4), size=64)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


def test_seed_identity_and_image_each_matter():
    base = render_faces(3, 4, seed=1, size=32)[0]
    for identity, image, seed in ((3, 5, 1), (4, 4, 1), (3, 4, 2)):
        assert not torch.equal(base, render_faces(identity, image, seed=seed, size=32)[0])


def test_people_look_like_themselves():
    """Crude: average colours of 8 x 8 cells tell people apart far better than chance, over light, pose, background."""
    people, images = np.repeat(np.arange(12), 4), np.tile(np.arange(4), 12)
    pixels, _ = render_faces(people, images, size=80, options=ImageOptions(yaw_std=6, pitch_std=4, degrade=0))
    cells = pixels.float().view(48, 8, 10, 8, 10, 3).mean((2, 4))[:, :, 1:7].reshape(48, -1)
    cells = (cells - cells.mean(0)) / cells.std(0)
    distance = torch.cdist(cells, cells).numpy()
    first, second = np.triu_indices(48, 1)
    same = people[first] == people[second]
    genuine, impostor = (distance[first[m], second[m]] for m in (same, ~same))
    auc = (genuine[:, None] < impostor[None, :]).mean()
    assert auc > 0.9


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        render_faces(np.arange(3), np.arange(4))
    with pytest.raises(ValueError, match="multiple of 16"):
        render_faces(0, 0, size=100)
    assert render_faces(np.zeros(0), np.zeros(0))[0].shape == (0, 112, 112, 3)


# --- degradations and quality


def test_quality_is_one_when_clean_and_falls_with_every_severity():
    rng = np.random.default_rng(0)
    severities = rng.random((50, 6)) * 0.9
    assert degrade.quality(np.zeros((1, 6)))[0] == 1
    assert 0 < degrade.quality(np.ones((1, 6)))[0] < 0.01
    for k in range(6):
        worse = severities.copy()
        worse[:, k] += 0.05
        assert (degrade.quality(worse) < degrade.quality(severities)).all()


def test_truth_holds_the_severities_and_their_quality():
    pixels, truth = render_faces(np.arange(9), np.arange(9), size=32, options=ImageOptions(degrade=0.5))
    severities = np.stack([truth[name] for name in DEGRADATIONS], 1)
    assert set(truth) == {"quality", "yaw", "pitch", *DEGRADATIONS}
    assert all(v.dtype == np.float32 and v.shape == (9,) for v in truth.values())
    np.testing.assert_allclose(truth["quality"], degrade.quality(severities.astype(np.float64)), rtol=1e-6)
    clean, truth = render_faces(np.arange(9), np.arange(9), size=32, options=CLEAN)
    assert (truth["quality"] == 1).all()
    assert [not torch.equal(a, b) for a, b in zip(pixels, clean)] == severities.any(1).tolist()


def test_severities_follow_the_options():
    options = ImageOptions(degrade=0.3, severity=(0.2, 0.7))
    severities = scene.scene_parameters(load_head(), 0, np.arange(3000), np.zeros(3000), options)["severities"]
    kinds = (severities > 0).sum(1)
    assert abs((kinds > 0).mean() - 0.3) < 0.03 and kinds.max() == 3
    assert ((severities == 0) | ((severities >= 0.2) & (severities <= 0.7))).all()
    assert ((severities > 0).mean(0) > 0.05).all()


@pytest.mark.parametrize("kind", range(6))
def test_each_degradation_removes_more_as_its_severity_rises(kind):
    pixels, _ = render_faces(np.arange(4), np.zeros(4), options=CLEAN)
    linear = (pixels.permute(0, 3, 1, 2).float() / 255) ** 2
    keys = key(0, "test", np.arange(4))
    clean = degrade.degrade(linear, np.zeros((4, 6)), keys).float()
    assert (clean - pixels.permute(0, 3, 1, 2)).abs().max() <= 1
    errors = []
    for severity in (0.15, 0.45, 0.75, 1.0):
        severities = np.zeros((4, 6))
        severities[:, kind] = severity
        errors.append(((degrade.degrade(linear, severities, keys).float() - clean) ** 2).mean((1, 2, 3)).sqrt())
    errors = torch.stack(errors)
    assert (errors[0] > 0.3).all()
    assert (errors.mean(1).diff() > 0.5).all(), errors


def test_resampling_keeps_a_flat_picture():
    flat = torch.full((3, 48, 48), 201, dtype=torch.uint8)
    for matrix in (degrade._blur_matrix(48, 2.5), degrade._down_up_matrix(48, 7)):
        assert torch.equal(degrade._resample(flat, matrix), flat)


# --- files


@pytest.fixture(scope="module")
def face_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    arguments = dict(identities=5, images_per_identity=4, seed=3, first_identity=100, long_tail=True, workers=2)
    return folder, arguments, write_face_set(folder, **arguments)


def test_face_set_is_recordio_with_the_promised_pictures(face_set):
    folder, _, statistics = face_set
    records = RecordIO(folder)
    assert len(records) == statistics["images"] and records.num_classes == 5
    labels = records.labels
    assert (np.diff(labels) >= 0).all() and set(labels) == set(range(5))
    number = np.arange(len(labels)) - np.searchsorted(labels, labels)
    chosen = np.array([0, 7, len(labels) - 1])
    pixels, truth = render_faces(labels[chosen] + 100, number[chosen], seed=3)
    for k, i in enumerate(chosen):
        stored = decode(records.bytes(int(i))).astype(float)
        assert np.abs(stored - pixels[k].numpy()).mean() < (4 if truth["noise"][k] == 0 else 25)
        assert records.column("quality")[i] == truth["quality"][k]
    quality = records.column("quality")
    assert statistics["degraded"] == pytest.approx((quality < 1).mean()) and not statistics["cached"]


def test_face_set_is_cached_by_its_arguments(face_set):
    folder, arguments, statistics = face_set
    stamp = os.stat(folder / "train.rec").st_mtime_ns
    again = write_face_set(folder, **arguments)
    assert again == statistics | {"cached": True}
    assert os.stat(folder / "train.rec").st_mtime_ns == stamp
    (folder / "train.json").write_text((folder / "train.json").read_text().replace('"seed": 3', '"seed": 3 '))
    assert write_face_set(folder, **arguments)["cached"]
    for change in (dict(seed=4), dict(options=dataclasses.replace(ImageOptions(), degrade=0.31)), dict(identities=4)):
        wanted = json.loads((folder / "train.json").read_text())["arguments"]
        other = {**wanted, **{k: dataclasses.asdict(v) if k == "options" else v for k, v in change.items()}}
        assert synth.read_manifest(
            folder / "train.json", wanted, [folder / "train.rec", folder / "train.idx", folder / "property"]
        )
        assert synth.read_manifest(folder / "train.json", other, [folder / "train.rec"]) is None


def test_a_shortened_set_is_rendered_again(tmp_path):
    arguments = dict(identities=2, images_per_identity=2, progress=False)
    write_face_set(tmp_path, **arguments)
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[:-8])
    assert not write_face_set(tmp_path, **arguments)["cached"]
    assert (tmp_path / "train.rec").read_bytes() == whole


def test_an_interrupted_set_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return render_faces(*arguments, **options)

    monkeypatch.setattr(synth, "render_faces", fails)
    with pytest.raises(KeyboardInterrupt):
        write_face_set(tmp_path / "new", identities=20, images_per_identity=4, workers=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("identities,mean", [(1000, 20), (200, 5), (30, 3)])
def test_long_tail(identities, mean):
    counts = synth.images_per_person(identities, mean, True, 7)
    assert counts.min() >= 2 and counts.max() > 3 * mean and abs(counts.mean() - mean) < 0.1 * mean
    assert np.median(counts) < 0.7 * mean
    assert abs(np.corrcoef(np.arange(identities), counts)[0, 1]) < 0.3  # ranks are dealt at random


def test_face_set_refuses_impossible_numbers(tmp_path):
    with pytest.raises(UserError, match="identities"):
        write_face_set(tmp_path, identities=0, images_per_identity=4)
    with pytest.raises(UserError, match=">= 2"):
        write_face_set(tmp_path, identities=4, images_per_identity=1, long_tail=True)


def test_pairs_have_ten_folds_without_shared_people():
    for kind in pairs.PAIR_OPTIONS:
        people, same = pairs.plan_pairs(kind, 80, 40, 10_000_000, 0, 0.35)
        assert people.shape == (80, 2) and people.min() >= 10_000_000
        assert ((people[:, 0] == people[:, 1]) == same).all()
        folds = same.reshape(10, 8)
        assert (folds == [True] * 4 + [False] * 4).all()
        seen = [set(fold.reshape(-1)) for fold in people.reshape(10, 8, 2)]
        assert len(set.union(*seen)) == sum(map(len, seen))


def test_look_alikes_are_alike():
    people, same = pairs.plan_pairs("look_alike", 40, 40, 10_000_000, 0, 0.35)
    random_people, _ = pairs.plan_pairs("clean", 40, 40, 10_000_000, 0, 0.35)

    def distances(chosen):
        features = [pairs.identity_features(chosen[:, k], 0, 0.35) for k in range(2)]
        return np.linalg.norm(features[0] - features[1], axis=1)

    assert distances(people[~same]).max() < np.median(distances(random_people[~same]))


def test_pairs_are_written_with_their_quality_and_kept(tmp_path):
    arguments = dict(kinds=("low_quality",), pairs=20, identities=20, workers=2)
    path = write_face_pairs(tmp_path, **arguments)["low_quality"]
    encoded, same = read_bin(path)
    quality = np.load(tmp_path / "low_quality.quality.npy")
    assert len(encoded) == 40 and quality.shape == (40,) and same.tolist() == [True, False] * 10
    assert decode(encoded[0]).shape == (112, 112, 3)
    assert (quality[1::2] < 1).all() and 0 < (quality[::2] == 1).sum() < 20
    people, _ = pairs.plan_pairs("low_quality", 20, 20, pairs.FIRST_IDENTITY, 0, 0.35)
    sharp = int(2 * np.nonzero(quality[::2] == 1)[0][-1])
    number = pairs.picture_numbers(people, same)[sharp, 1]
    picture, _ = render_faces(people.reshape(-1)[sharp], number, options=pairs.PAIR_OPTIONS["low_quality"][0])
    assert np.abs(decode(encoded[sharp]).astype(float) - picture[0].numpy()).mean() < 4
    stamp = os.stat(path).st_mtime_ns
    assert write_face_pairs(tmp_path, **arguments)["low_quality"] == path
    assert stamp == os.stat(path).st_mtime_ns


def test_kinds_of_pairs_differ_as_they_say():
    yaw = {}
    for kind, options in pairs.PAIR_OPTIONS.items():
        views = [scene.scene_parameters(load_head(), 0, np.arange(500), np.arange(500), o) for o in options]
        yaw[kind] = [np.abs(v["yaw"]) for v in views]
        assert all((v["severities"] == 0).all() for v in views) == (kind != "low_quality")
    assert all(v.max() < 21 for kind in ("clean", "look_alike") for v in yaw[kind])
    assert yaw["cross_pose"][0].max() < 21 and yaw["cross_pose"][1].min() >= 35
    assert pairs.FIRST_IDENTITY >= 10_000_000


def test_pairs_refuse_what_cannot_be(tmp_path):
    with pytest.raises(UserError, match="'blurred'.*clean"):
        write_face_pairs(tmp_path, kinds=("blurred",))
    with pytest.raises(UserError, match="multiple of 20"):
        write_face_pairs(tmp_path, pairs=30)


def test_contact_sheet(tmp_path):
    from PIL import Image

    path = contact_sheet(tmp_path / "sub" / "sheet.png", identities=2, images=3, size=32)
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 34, 2 * 37)
        top = np.asarray(sheet)[:32, :32]
    assert np.array_equal(top, render_faces(0, 0, size=32)[0][0].numpy())
    assert list(path.parent.iterdir()) == [path]


def test_pairs_use_each_picture_several_times_but_no_genuine_pair_twice():
    people, same = pairs.plan_pairs("clean", 2000, 200, pairs.FIRST_IDENTITY, 0, 0.35)
    rows = pairs.picture_numbers(people, same).reshape(-1, 2, 2)
    assert (rows[:, :, 0] == people).all()
    assert (rows[:, 0, 1] % 2 == 0).all() and (rows[:, 1, 1] % 2 == 1).all()  # which options a picture is made with
    assert len(np.unique(rows.reshape(-1, 2), axis=0)) <= 6 * 200
    genuine = rows[same].reshape(-1, 4)
    assert len(np.unique(genuine, axis=0)) == len(genuine) == 1000
