"""Foreign and damaged training sets through the whole trainer: both RecordIO forms train, damage is one clear line."""

import json

import pytest

from protomem import config
from protomem.errors import UserError
from protomem.trainer import train
from tests.conftest import coloured_images
from tests.test_records import write_set
from tests.test_training import curve, settings

STEPS = ("schedule.steps=3", "schedule.warmup_steps=0", "data.sampler.name=shuffled")


def jpegs(identities=12, images=4):
    pairs = list(coloured_images(identities, images))
    return [jpeg for jpeg, _ in pairs], [label for _, label in pairs]


def go(folder, output, *more):
    train(config.load([], settings(folder, output, *STEPS, *more)))
    return curve(output)


@pytest.mark.parametrize("form", ["header", "plain"])
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_both_recordio_forms_train(tmp_path, form, loader):
    encoded, labels = jpegs()
    write_set(tmp_path / "set", encoded, labels, form, classes=12)
    assert len(go(tmp_path / "set", tmp_path / "run", f"data.loader={loader}")) == 3


def test_both_loaders_train_alike(small_set, tmp_path):
    a, b = (go(small_set, tmp_path / name, f"data.loader={name}", "data.augment.photometric=0") for name in ("dali", "torch"))
    assert a == b


def cut_short(folder):
    rec = folder / "train.rec"
    rec.write_bytes(rec.read_bytes()[:-700])


DAMAGE = {
    "corrupt": (lambda e, y: e.__setitem__(5, bytes(900)), None, r"record 5 .*is corrupt: not JPEG or PNG"),
    "empty": (lambda e, y: e.__setitem__(7, b""), None, r"record 7 .*is corrupt: empty"),
    "half_a_jpeg": (lambda e, y: e.__setitem__(9, e[9][: len(e[9]) // 2]), None, r"record 9 .*is corrupt: truncated"),
    "label_too_large": (lambda e, y: y.__setitem__(47, 12), None, r"(record|key) .*label 12"),
    "label_inexact": (lambda e, y: y.__setitem__(47, 2**24 + 2), None, r"2\*\*24|16777216|16777218|float32"),
    "record_cut_short": (None, cut_short, r"(key|record) .*(past the end|end of|truncated)"),
    "no_idx": (None, lambda folder: (folder / "train.idx").unlink(), r"train.idx.*protomem data index"),
}


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_one_clear_line(tmp_path, damage, loader):
    before, after, message = DAMAGE[damage]
    encoded, labels = jpegs()
    if before:
        before(encoded, labels)
    folder = write_set(tmp_path / "set", encoded, labels, "plain", classes=12)
    if after:
        after(folder)
    with pytest.raises(UserError, match=message) as error:
        go(folder, tmp_path / "run", f"data.loader={loader}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_training_can_skip_corrupt_images_and_counts_them(tmp_path, loader):
    encoded, labels = jpegs()
    for position in range(0, 48, 6):
        encoded[position] = b"" if position % 12 else encoded[position][:100]
    folder = write_set(tmp_path / "set", encoded, labels, "header", classes=12)
    assert len(go(folder, tmp_path / "run", f"data.loader={loader}", "data.on_corrupt=skip", "schedule.steps=2")) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped_images", 0) for line in lines) == 8  # one epoch is two steps: each bad record once
