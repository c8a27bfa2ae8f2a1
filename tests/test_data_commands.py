"""`protomem data ...`, and what verify remembers for training."""

import inspect
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from protomem.data.commands import app
from protomem.data.images import encode_jpeg
from protomem.data.inspect import known_bad, save_report, statistics, verify
from protomem.data.pairs import read_bin, write_bin
from protomem.data.recordio import RecordWriter
from protomem.data.records import open_records
from protomem.errors import UserError
from tests.test_records import add

RNG = np.random.default_rng(0)
LABELS = [0, 0, 0, 1, 1, 3, 3, 3, 3, 3, 3, 3]


def jpeg(size=16) -> bytes:
    return encode_jpeg(RNG.integers(0, 256, (size, size + 8, 3), dtype=np.uint8))


GOOD = [jpeg() for _ in LABELS]
BAD = list(GOOD)
BAD[2] = b""
BAD[5] = GOOD[5][:-40]
BAD[6] = GOOD[6][: len(GOOD[6]) - 40] + b"\xff\xd9"  # whole by its structure, half its pixels are missing
BAD[9] = RNG.bytes(500)


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments, code=0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if code == 2:
        assert isinstance(result.exception, UserError), (result.output, result.exception)
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def rec_set(folder, images, labels=LABELS):
    with RecordWriter(folder) as writer:
        for image, label in zip(images, labels):
            writer.add(image, label)
    return folder


def folder_set(folder, images):
    for i, (image, label) in enumerate(zip(images, LABELS)):
        (folder / f"id{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"id{label}" / f"{i:03d}.jpg").write_bytes(image)
    return folder


def tar_set(folder, images):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, (image, label) in enumerate(zip(images, LABELS)):
            add(tar, f"{i:03d}.jpg", image)
            add(tar, f"{i:03d}.cls", b"%d" % label)
    return folder


@pytest.mark.parametrize("make", [rec_set, folder_set, tar_set])
def test_verify_lists_what_cannot_be_used(tmp_path, make):
    path = make(tmp_path / "set", BAD)
    report = json.loads(run("verify", path, "--json", "--workers", 2, code=1))
    assert [entry[0] for entry in report["bad"]] == [2, 5, 6, 9]
    reasons = [entry[2] for entry in report["bad"]]
    assert reasons[0] == "empty" and "no end-of-image" in reasons[1] and reasons[3] == "not JPEG or PNG"
    assert report["report"] == str(path / "train.verified.json") and report["images"] == 12
    assert (report["missing_identities"], report["first_missing"]) == ((0, []) if make is folder_set else (1, [2]))
    assert known_bad(open_records(path)).tolist() == [2, 5, 6, 9]
    text = run("verify", path, code=1)
    assert "position 9 (" in text and "4 of 12 records cannot be used" in text
    assert [e[0] for e in json.loads(run("verify", path, "--no-decode", "--json", code=1))["bad"]] == [2, 5, 9]


def test_verify_of_a_sound_set(tmp_path):
    path = rec_set(tmp_path, GOOD)
    assert "0 of 12 records cannot be used" in run("verify", path)
    assert len(known_bad(open_records(path))) == 0


def test_verify_reports_damage_and_labels_together(tmp_path):
    path = rec_set(tmp_path / "set", BAD)
    (path / "property").write_text("3,112,112")  # label 3 is outside now
    rec, idx = path / "train.rec", path / "train.idx"
    offsets = dict(line.split() for line in idx.read_text().splitlines())
    data = bytearray(rec.read_bytes())
    data[int(offsets["4"])] ^= 255  # position 3
    rec.write_bytes(data)
    idx.write_text("".join(f"{k}\t{o}\n" for k, o in offsets.items() if k != "1"))  # key 1 is missing: one image less
    report = json.loads(run("verify", path, "--json", code=1))
    assert {entry[0] for entry in report["bad"]} == {1, 2, 4, 5, 6, 7, 8, 9, 10}
    reasons = {entry[0]: entry[2] for entry in report["bad"]}
    assert reasons[1] == "empty" and reasons[2] == "no RecordIO magic number at this offset"
    assert reasons[10] == "label 3 is outside 0..2" and reasons[8] == "label 3 is outside 0..2; not JPEG or PNG"
    assert report["notes"] == ["the header record speaks of 12 images, the index lists 11"]
    with pytest.raises(UserError):
        open_records(path)
    assert known_bad(open_records(path, strict=False)).tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_labels_above_2_to_24_are_listed(tmp_path):
    path = rec_set(tmp_path, GOOD[:3], [0, 1, 2])
    data = bytearray((path / "train.rec").read_bytes())
    at = int((path / "train.idx").read_text().splitlines()[2].split()[1]) + 12
    data[at : at + 4] = np.float32(2**24 + 2).tobytes()
    (path / "train.rec").write_bytes(data)
    (path / "property").write_text("20000000,112,112")
    report = verify(open_records(path, strict=False))
    assert [(position, "2**24" in reason) for position, _, reason in report.bad] == [(1, True)]
    assert report.missing_identities == 20_000_000 - 3 and len(report.first_missing) == 1000


def test_known_bad_forgets_what_belongs_to_other_data(tmp_path):
    path = rec_set(tmp_path / "set", BAD)
    records = open_records(path)
    assert len(known_bad(records)) == 0
    written = save_report(records, verify(records))
    assert known_bad(records).tolist() == [2, 5, 6, 9]
    report = json.loads(written.read_text())
    written.write_text(json.dumps({**report, "fingerprint": "another"}))
    assert len(known_bad(records)) == 0
    written.write_text("{")
    assert len(known_bad(records)) == 0
    run("verify", path, "--output", tmp_path / "deep" / "r.json", code=1)
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["bad"][0][0] == 2 and len(known_bad(records)) == 0
    written.unlink()
    written.mkdir()  # the place beside the data is taken: the cache folder is used
    run("verify", path, code=1)
    assert known_bad(records).tolist() == [2, 5, 6, 9]
    written.rmdir()
    rec_set(path, GOOD)
    assert len(known_bad(open_records(path))) == 0


def test_inspect(tmp_path):
    path = rec_set(tmp_path, BAD)
    facts = json.loads(run("inspect", path, "--json"))
    assert (facts["images"], facts["identities"], facts["num_classes"], facts["form"]) == (12, 3, 4, "RecordIO")
    assert facts["images_per_identity"] == {"min": 2, "median": 3.0, "mean": 4.0, "max": 7}
    assert facts["images_per_identity_histogram"] == {"1": 0, "2-3": 2, "4-7": 1}
    assert facts["sampled"] == 12 and facts["sampled_unusable"] == 3
    assert facts["height"]["max"] == 16 and facts["width"]["min"] == 24 and facts["encoded_bytes"]["min"] == 0
    assert statistics(open_records(path), sample=5)["sampled"] == 5
    assert "images per identity" in run("inspect", path)
    assert "does not exist" in run("inspect", tmp_path / "nothing", code=2)


def test_inspect_pairs(tmp_path):
    write_bin(tmp_path / "a.bin", [*GOOD[:3], BAD[6]], [True, False])
    facts = json.loads(run("inspect", tmp_path / "a.bin", "--json"))
    assert (facts["pairs"], facts["genuine"], facts["unusable"]) == (2, 1, 1)
    assert facts["notes"][0].startswith("image 3 (pair 1): ")
    assert "note: image 3" in run("inspect", tmp_path / "a.bin")


def test_index(tmp_path):
    path = rec_set(tmp_path, GOOD)
    before = (path / "train.idx").read_text()
    assert "--force" in run("index", path, code=2)
    (path / "train.idx").unlink()
    assert "16 records" in run("index", path / "train.rec")  # 12 images, the header, 3 identities
    assert (path / "train.idx").read_text() == before
    with open(path / "train.rec", "ab") as file:
        file.write(b"garbage!")
    assert "broken at byte" in run("index", path, "--force")
    assert "does not exist" in run("index", tmp_path / "nothing", code=2)


@pytest.mark.parametrize("make", [folder_set, tar_set])
def test_pack(tmp_path, make):
    source = make(tmp_path / "source", GOOD)
    run("pack", source, tmp_path / "out")
    packed, records = open_records(tmp_path / "out"), open_records(source)
    assert packed.labels.tolist() == records.labels.tolist()
    assert [packed.bytes(i) for i in range(12)] == [records.bytes(i) for i in range(12)] == GOOD
    assert "--force" in run("pack", source, tmp_path / "out", code=2)
    source = make(tmp_path / "bad source", BAD)
    before = (tmp_path / "out" / "train.rec").read_bytes()
    assert "empty; --skip-corrupt" in run("pack", source, tmp_path / "out", "--force", code=2)
    assert (tmp_path / "out" / "train.rec").read_bytes() == before
    assert "9 images, 3 left out" in run("pack", source, tmp_path / "out", "--force", "--skip-corrupt")
    run("verify", source, code=1)  # knows the fourth
    assert "8 images, 4 left out" in run("pack", source, tmp_path / "out", "--force", "--skip-corrupt")
    packed = open_records(tmp_path / "out")
    assert [packed.bytes(i) for i in range(8)] == [image for i, image in enumerate(GOOD) if i not in (2, 5, 6, 9)]


def test_synth_and_pairs_hand_their_options_on(tmp_path, monkeypatch):
    from protomem.data import faces

    calls = {}

    def stand_in(name, result):
        signature = inspect.signature(getattr(faces, name))

        def call(*arguments, **options):
            calls[name] = signature.bind(*arguments, **options).arguments  # fails where the real function would
            return result

        monkeypatch.setattr(faces, name, call)

    stand_in("write_face_set", {"images": 6, "cached": False})
    stand_in("contact_sheet", None)
    stand_in("write_face_pairs", {"clean": tmp_path / "bins" / "clean.bin"})
    options = "--identities 3 --images 2 --long-tail --first-identity 9 --degrade 0.5 --quality 80 --seed 4".split()
    facts = json.loads(run("synth", tmp_path / "set", *options, "--sheet", tmp_path / "s.png", "--json"))
    assert facts == {"images": 6, "cached": False, "sheet": str(tmp_path / "s.png")}
    made = calls["write_face_set"]
    assert made["options"] == faces.ImageOptions(degrade=0.5) and made["long_tail"] and made["first_identity"] == 9
    assert (made["identities"], made["images_per_identity"], made["quality"], made["seed"]) == (3, 2, 80, 4)
    sheet = calls["contact_sheet"]
    assert (sheet["identities"], sheet["images"], sheet["first_identity"], sheet["seed"]) == (3, 2, 9, 4)
    options = "--synth --kinds clean,look_alike --count 40 --identities 50 --first-identity 7 --seed 2".split()
    assert "clean.bin" in run("pairs", tmp_path / "bins", *options)
    made = calls["write_face_pairs"]
    assert made["kinds"] == ("clean", "look_alike") and made["pairs"] == 40 and made["folder"] == tmp_path / "bins"
    assert (made["identities"], made["first_identity"], made["seed"]) == (50, 7, 2)


def test_synth_renders_a_set(tmp_path):
    facts = json.loads(run("synth", tmp_path / "set", "--identities", 2, "--images", 1, "--json"))
    assert facts["images"] == 2
    records = open_records(tmp_path / "set")
    assert records.labels.tolist() == [0, 1] and len(records.column("quality")) == 2


def test_pairs_from_a_list(tmp_path):
    folder_set(tmp_path / "root", GOOD)
    (tmp_path / "list.txt").write_text("id0/000.jpg id0/001.jpg 1\nid0/000.jpg id1/003.jpg 0\n")
    assert "2 pairs, 1 of them genuine" in run(
        "pairs", tmp_path / "a.bin", "--list", tmp_path / "list.txt", "--images", tmp_path / "root"
    )
    assert read_bin(tmp_path / "a.bin")[0] == [GOOD[0], GOOD[1], GOOD[0], GOOD[3]]
    for options in ([], ["--list", "x"], ["--images", "x"], ["--synth", "--list", "x", "--images", "y"]):
        assert "--list FILE with --images FOLDER, or --synth" in run("pairs", tmp_path / "b.bin", *options, code=2)


@pytest.mark.parametrize("command", ["inspect", "verify", "index", "pack", "clean", "synth", "pairs"])
def test_help(command):
    text = run(command, "--help")
    assert len(text) > 300 and "[required]" in text


def test_the_command_line_starts_without_heavy_modules():
    code = "import sys, protomem.data.commands; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
