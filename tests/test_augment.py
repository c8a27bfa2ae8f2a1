"""Augmentation parameters are functions of (seed, epoch, position); each change does what its formula says."""

import numpy as np
import pytest

from protomem.data.augment import AugmentOptions, apply, draw, resample, windows
from protomem.errors import UserError

ALL = AugmentOptions(flip=0.5, crop=0.3, low_resolution=0.3, photometric=0.3, occlusion=0.3)


def _images(n, size=112, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_a_row_does_not_depend_on_who_draws_it_with_whom():
    whole = draw(ALL, 3, 2, np.arange(200), 112)
    assert set(whole) == {"flip", "crop", "low", "colour", "occlusion"}
    for rows in ([5], [199, 0, 17], range(60, 131)):
        part = draw(ALL, 3, 2, np.array(rows), 112)
        assert all(np.array_equal(part[name], whole[name][list(rows)]) for name in whole)
    for other in (draw(ALL, 4, 2, np.arange(200), 112), draw(ALL, 3, 1, np.arange(200), 112)):
        assert all((other[name] != whole[name]).any() for name in whole)


def test_switching_one_change_on_leaves_the_others_alone():
    whole = draw(ALL, 0, 0, np.arange(50), 112)
    for options, name in ((AugmentOptions(), "flip"), (AugmentOptions(flip=0, photometric=0.3), "colour")):
        alone = draw(options, 0, 0, np.arange(50), 112)
        assert list(alone) == [name] and np.array_equal(alone[name], whole[name])


def test_frequencies_and_ranges():
    n = 20_000
    options = AugmentOptions(0.5, 0.1, 0.2, 0.3, 0.4)
    p = draw(options, 1, 0, np.arange(n), 112)
    on = {
        "flip": p["flip"],
        "crop": (p["crop"] != [0, 0, 1, 1]).any(1),
        "low": p["low"] != 112,
        "colour": (p["colour"] != 1).any(1),
        "occlusion": p["occlusion"][:, 2] > 0,
    }
    for name, probability in zip(on, (0.5, 0.1, 0.2, 0.3, 0.4)):
        assert abs(on[name].mean() - probability) < 0.02, name
    pairs = np.corrcoef(np.stack(list(on.values())).astype(float)) - np.eye(5)
    assert np.abs(pairs).max() < 0.04  # independent of one another
    x, y, w, h = p["crop"][on["crop"]].T
    assert min(x.min(), y.min()) >= 0 and (x + w).max() <= 1 + 1e-12 and (y + h).max() <= 1 + 1e-12
    assert 0.6 < min(w.min(), h.min()) < 0.63 and np.isclose(max(w.max(), h.max()), 1)
    assert (w / h).min() >= 0.74 and (w / h).max() <= 1.34
    low = p["low"][on["low"]]
    assert low.min() in (22, 23) and low.max() == 111
    factors = p["colour"][on["colour"]]
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    x, y, w, h = p["occlusion"][on["occlusion"]].T
    assert min(x.min(), y.min()) == 0 and (x + w).max() == 112 and (y + h).max() == 112
    assert 1 <= min(w.min(), h.min()) <= 2 and max(w.max(), h.max()) == 56


def test_apply_changes_only_the_rows_that_are_on():
    images = _images(6)
    before = images.copy()
    apply(
        images,
        {
            "flip": np.array([1, 0, 0, 0, 0, 0], bool),
            "low": np.array([112, 20, 112, 112, 112, 112], np.int32),
            "colour": np.array([[1, 1, 1]] * 2 + [[0.7, 1.2, 0.4]] + [[1, 1, 1]] * 3, np.float32),
            "occlusion": np.array([[0, 0, 0, 0]] * 3 + [[100, 3, 12, 40]] + [[0, 0, 0, 0]] * 2, np.int32),
        },
    )
    assert np.array_equal(images[4:], before[4:])
    assert np.array_equal(images[0], before[0, :, ::-1])
    assert images[1].std() < 0.3 * before[1].std()
    covered = np.zeros((112, 112), bool)
    covered[3:43, 100:112] = True
    assert (images[3][covered] == 127).all() and np.array_equal(images[3][~covered], before[3][~covered])


def test_colour_change_equals_its_formula_pixel_by_pixel():
    images = _images(3, size=8)
    factors = np.array([[1.3, 0.6, 1.4], [0.6, 1.4, 0.2], [1.0, 1.0, 0.0]], np.float32)
    expected = np.empty_like(images)
    for i, (brightness, contrast, saturation) in enumerate(factors.astype(float)):
        for y in range(8):
            for x in range(8):
                pixel = images[i, y, x].astype(float)
                luma = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
                mixed = saturation * pixel + (1 - saturation) * luma
                value = brightness * (128 + contrast * (mixed - 128))
                expected[i, y, x] = np.clip(np.rint(value), 0, 255)
    apply(images, {"colour": factors})
    assert np.abs(images.astype(int) - expected).max() <= 1 and (images != expected).mean() < 0.01


def test_flip_mirrors_left_and_right_only():
    image = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    apply(image, {"flip": np.array([True])})
    assert image[0, 0].tolist() == [[3, 4, 5], [0, 1, 2]] and image[0, 1].tolist() == [[9, 10, 11], [6, 7, 8]]


def test_windows_are_inside_and_say_whether_anything_is_to_do():
    sizes = np.array([[112, 112], [250, 200], [112, 112], [1, 1], [112, 100]])
    window, resampled = windows(sizes, None, 112)
    assert window.tolist() == [[0, 0, 112, 112], [0, 0, 200, 250], [0, 0, 112, 112], [0, 0, 1, 1], [0, 0, 100, 112]]
    assert resampled.tolist() == [False, True, False, True, True]
    crop = np.array([[0, 0, 1, 1], [0.5, 0.2, 0.5, 0.8], [0.25, 0, 0.5, 1], [0.9, 0.9, 0.1, 0.1], [0, 0, 1, 1]])
    window, resampled = windows(sizes, crop, 112)
    assert window.tolist() == [[0, 0, 112, 112], [100, 50, 100, 200], [28, 0, 56, 112], [0, 0, 1, 1], [0, 0, 100, 112]]
    assert resampled.tolist() == [False, True, True, True, True]
    corner, resampled = windows(np.array([[224, 224]]), np.array([[0, 0, 0.5, 0.5]]), 112)  # of the right size, but cut
    assert corner.tolist() == [[0, 0, 112, 112]] and resampled.tolist() == [True]
    drawn = draw(AugmentOptions(crop=1), 0, 0, np.arange(500), 112)["crop"]
    heights = np.random.default_rng(0).integers(1, 400, (500, 2))
    x, y, w, h = windows(heights, drawn, 112)[0].T
    assert (np.minimum(x, y) >= 0).all() and (np.minimum(w, h) >= 1).all()
    assert (x + w <= heights[:, 1]).all() and (y + h <= heights[:, 0]).all()


def test_resample_cuts_the_window_it_is_given():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = np.arange(100)[:, None]
    cut = resample(ramp, (40, 10, 80, 50), 112)
    assert cut.shape == (112, 112, 3)
    centres = (np.arange(112) + 0.5) / 112
    assert np.abs(cut[50, :, 0] - np.clip(40 + centres * 80 - 0.5, 40, 119)).max() <= 1
    assert np.abs(cut[:, 50, 1] - np.clip(10 + centres * 50 - 0.5, 10, 59)).max() <= 1


def test_shrinking_averages_instead_of_picking():
    checker = (np.indices((112, 112)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(resample(checker, (0, 0, 112, 112), 28).astype(int) - 127).max() < 12


@pytest.mark.parametrize("field, value", [("flip", 1.5), ("crop_min", -0.1), ("occlusion", float("nan"))])
def test_a_probability_outside_0_1_is_refused(field, value):
    with pytest.raises(UserError, match=f"data.augment.{field}"):
        AugmentOptions(**{field: value})
