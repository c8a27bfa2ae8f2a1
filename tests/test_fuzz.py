"""Readers of foreign bytes take or refuse whatever they are given: every case that was found once, and some new ones.

The long runs are `python benchmarks/fuzz.py`; tests/corpus/READER/CASE/ holds the files of what they have found (those that
differ from the reader's first seed), and CASES what is better made than stored.
"""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protomem.errors import UserError
from protomem.files import read_array, read_arrays, replace_file
from tests import fuzz_targets
from tests.fuzz_targets import TARGETS, checkpoint_seeds, jpegs, recordio_seeds, run_folder_seeds
from tests.fuzzing import Target, fuzz, mutate

CORPUS = Path(__file__).parent / "corpus"


def outcome(name: str, cases: list[dict[str, bytes]]):
    return fuzz(TARGETS[name], lambda start: iter(list(enumerate(cases))[start:]))


# --- made cases: reader -> name -> files; all of them have to be refused, unless the name begins with "fine" --------


def _pickle(body: bytes) -> dict:
    return {"a.bin": body}


NEST = b")q\1" + b"h\1h\1\x86q\1" * 60  # a tuple of two times a tuple of two times ...: 2**60 items when spelled out
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\nq\2cnumpy\nndarray\nq\3" + (
    b"cnumpy\ndtype\n(U\2u1K\0K\1tRq\4(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)
SHARED = b"h\2(h\3K\0\x85U\1btR(K\1K\1\x85h\4\x89h\0tb"  # one more array over the data in memo 0


def _pairs() -> dict[str, dict]:
    megabyte = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\0"
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\0"
    flags = b"](" + b"\x88" * 10_000 + b"e"
    return {
        "fine: 20,000 arrays over the same data": _pickle(
            b"(" + megabyte + b"0" + ARRAY + b"000](" + SHARED * 20_000 + b"e" + flags + b"t."
        ),
        "20,000 arrays over copies of the same text": _pickle(
            b"(" + text + b"0" + ARRAY + b"000](" + SHARED * 20_000 + b"e" + flags + b"t."
        ),
        "a nested tuple as a dtype": _pickle(b"(" + NEST + b"cnumpy\ndtype\n(h\1K\0tRt."),
        "a nested tuple as a name": _pickle(b"(" + NEST + b"h\1U\1a\x93t."),
        "a nested tuple as an encoding": _pickle(b"(" + NEST + b"c_codecs\nencode\n(X\1\0\0\0ah\1tRt."),
        "a megabyte many times as a flag": _pickle(b"(](K\0K\0e](" + megabyte + b"0(" + b"h\0" * 20_000 + b"let."),
    }


def _rec(payload: bytes, lines: bytes) -> dict:
    return {"train.rec": payload, "train.idx": lines}


def _records() -> dict[str, dict]:
    good = recordio_seeds()[0]
    part = struct.pack("<II", fuzz_targets.rec_index.MAGIC, 2 << 29) * (1 << 19)  # 4 MB of empty middle parts
    split = struct.pack("<II", fuzz_targets.rec_index.MAGIC, 1 << 29) + part
    return {
        "a million identities too many": good | {"property": b"99999999999999999,112,112\n"},
        "5,000 digits": good | {"property": b"9" * 5000},
        "an offset behind all files": good | {"train.idx": b"0\t%d\n1\t0\n" % (2**63 - 1)},
        "one split record listed 5,000 times": _rec(split, b"".join(b"%d\t0\n" % k for k in range(5000))),
    }


def _rebuild() -> dict[str, dict]:
    lie = struct.pack("<II", fuzz_targets.rec_index.MAGIC, (1 << 29) - 1)
    return {"a million records that are too long": {"train.rec": lie * (1 << 17), "train.idx": b""}}


def _caches() -> dict[str, dict]:
    data = fuzz_targets.cache_seeds()[0]
    return {
        "fine: nested too deeply": data | {"train.index.cache": b"[" * 4096},
        "fine: verified, nested": data | {"train.verified.json": b'{"fingerprint":' * 5000},
    }


def _images() -> dict[str, dict]:
    def png(width, height, packed):
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        return {"image": b"\x89PNG\r\n\x1a\n" + body}

    jpeg = jpegs()[1]
    frame = jpeg.index(b"\xff\xc0") + 5
    return {
        "a JPEG of 60 million pixels in a kilobyte": {
            "image": jpeg[:frame] + struct.pack(">HH", 7700, 7800) + jpeg[frame + 4 :]
        },
        "a PNG of 60 million pixels": png(7700, 7800, zlib.compress(bytes(100))),
        "a PNG of four thousand million": png(65000, 65000, zlib.compress(bytes(100))),
        "text": {"image": b"<html>"},
    }


def _metadata() -> dict[str, dict]:
    class Call:
        def __init__(self, function, *arguments):
            self.parts = function, arguments

        def __reduce__(self):
            return self.parts

    good = checkpoint_seeds()[0]

    def with_(body: bytes) -> dict:
        return good | {"step-00000003/.metadata": body}

    kinds = b"ctorch.distributed.checkpoint.metadata\n"
    plain = good["step-00000003/.metadata"]
    assert b"__0_0.distcp" in plain
    return {
        "a program": with_(pickle.dumps(Call(os.system, "touch executed"))),
        "a memo of 64 GB": with_(b"\x80\x04Nr\xff\xff\xff\xff."),
        "bytes of a terabyte": with_(b"\x80\x05\x96\0\0\0\0\0\1\0\0."),
        "a nested tuple as a key": with_(b"\x80\x04" + NEST + b"}h\1Ns."),
        "an attribute of a class": with_(b"\x80\x04" + kinds + b"Metadata\nN}X\7\0\0\0versionK\1s\x86b."),
        "a file elsewhere": with_(plain.replace(b"__0_0.distcp", b"../../x.dist")),
        "no metadata": with_(pickle.dumps("text")),
    }


def _checkpoint() -> dict[str, dict]:
    good = checkpoint_seeds()[0]
    info = json.loads(good["step-00000003/training.json"])

    def told(**changes):
        return good | {"step-00000003/training.json": json.dumps(info | changes).encode()}

    return {
        "best is no JSON": good | {"best.json": b"{"},
        "best is nested": good | {"best.json": b"[" * 100_000},
        "training.json is a list": good | {"step-00000003/training.json": b"[]"},
        "training.json is nested": good | {"step-00000003/training.json": b"[" * 100_000},
        "a secret of the environment": told(config=info["config"] | {"encoder": {"name": "${oc.env:HOME}"}}),
        "an embedding of 10**12 numbers": told(config=info["config"] | {"encoder": {"embedding_size": 10**12}}),
        "the config is a list": told(config=[1]),
        "step is a text": told(step="3"),
    }


def _runs() -> dict[str, dict]:
    good = run_folder_seeds()[0]
    log = good["metrics.jsonl"]
    return {
        "an evaluation that is none": good | {"evaluations/final.lfw.npz": b"PK"},
        "fine: a tag that is no number": {
            k.replace("step-2", "step-²"): v.replace(b"step-2", "step-²".encode()) for k, v in good.items()
        },
        "fine: markup in names": {
            k.replace("lfw", "<script>a"): v.replace(b"lfw", b"<script>a") if k.endswith("jsonl") else v
            for k, v in good.items()
        },
        "fine: lines of anything": good
        | {"metrics.jsonl": log + b'[]\n{"event": [], "step": 1}\n{"step": "x"}\n' + b"[" * 10**5},
        "fine: environment of anything": good
        | {"environment.json": b'{"gpus": {"a": 1}, "cpu": ["<script>"]}', "config.yaml": b"\xff"},
        "fine: numbers that are none": good
        | {"metrics.jsonl": log + b'{"step": 3, "loss": "<script>"}\n{"event": "templates"}\n'},
    }


def _configs() -> dict[str, dict]:
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    doubled = ", ".join(["aaaaaaaaaaaaaaaa", *(f"'${{data.eval.{i}}}${{data.eval.{i}}}'" for i in range(60))])
    return {
        "a billion laughs": {"a.yaml": f"a0: &a0 [x]\n{laughs}\n".encode()},
        "references that double": {"a.yaml": f"data: {{eval: [{doubled}]}}\n".encode()},
        "a circle": {"a.yaml": b"log: {wandb: {project: '${log.wandb.name}', name: '${log.wandb.project}'}}\n"},
        "nested": {"a.yaml": b"[" * 100_000},
        "a program": {"a.yaml": b"output: !!python/object/apply:os.system [touch executed]\n"},
        "a secret": {"a.yaml": b"log: {wandb: {project: '${oc.env:WANDB_API_KEY}'}}\n"},
        "another resolver": {"a.yaml": b"log: {wandb: {name: \"${oc.decode:'${oc.env:HOME}'}\"}}\n"},
        "a key given twice": {"a.yaml": b"output: a\noutput: b\n"},
        "no UTF-8": {"a.yaml": b"output: \xff\xfe\n"},
        "5,000 digits": {"a.yaml": b"data: {size: %s}\n" % (b"9" * 5000)},
        "10**30 rows": {"a.yaml": b"train: {batch_size: %d}\n" % 10**30},
        "two megabytes": {"a.yaml": b"#" * (2 << 20)},
    }


def _overrides() -> dict[str, dict]:
    def lines(text: str) -> dict:
        return {"lines": f"output=a\n{text}".encode()}

    return {
        "10**20 identities": lines(f"data.train=patterns:identities={10**20},images=4"),
        "10**17 identities": lines(f"data.train=patterns:identities={10**17},images=4"),
        "5,000 digits": lines(f"data.train=patterns:identities={'9' * 5000},images=4"),
        "no value": lines("data.train"),
        "no key": lines("=d"),
    }


CASES = {
    "pairs": _pairs,
    "recordio": _records,
    "rebuild": _rebuild,
    "cache": _caches,
    "images": _images,
    "metadata": _metadata,
    "checkpoint": _checkpoint,
    "report": _runs,
    "config": _configs,
    "overrides": _overrides,
}


@pytest.mark.parametrize("name", CASES)
def test_made_cases(name):
    cases = CASES[name]()
    tally = outcome(name, list(cases.values()))
    numbered = dict(enumerate(cases))
    told = {what: [numbered.get(i, i) for i in where] for what, where in tally.findings.items()}
    assert not told, told
    fine = sum(case.startswith("fine") for case in cases)
    assert (tally.accepted, tally.refused) == (fine, len(cases) - fine)


@pytest.mark.parametrize("name", sorted(p.name for p in CORPUS.iterdir()))
def test_corpus(name):
    cases, seed = sorted((CORPUS / name).iterdir()), TARGETS[name].seeds()[0]
    files = [seed | {str(p.relative_to(case)): p.read_bytes() for p in case.rglob("*") if p.is_file()} for case in cases]
    tally = outcome(name, files)
    assert not tally.findings, {what: [cases[i].name for i in where] for what, where in tally.findings.items()}
    assert tally.inputs == len(cases)


STEP = st.tuples(*[st.integers(0, 65535)] * 4)
SLOW = {"metadata": 8, "checkpoint": 8, "config": 8, "overrides": 8, "report": 8, "dali": 20, "names": 5}  # inputs; others: 25


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "figures"])
def test_new_inputs(name):
    target, seeds, count = TARGETS[name], TARGETS[name].seeds(), SLOW.get(name, 25)
    few = settings(max_examples=2, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

    @settings(few, phases=(Phase.generate, Phase.shrink))
    @given(st.lists(st.lists(STEP, min_size=1, max_size=5), min_size=count, max_size=count))
    def check(batch):
        tally = fuzz(target, lambda start: iter(list(enumerate(mutate(target, seeds, steps) for steps in batch))[start:]))
        assert not tally.findings, f"{tally.findings} {tally.examples}"
        assert tally.inputs == count

    check()


# --- the harness sees what it is for -------------------------------------------------------------------------------


def _write_outside(folder):
    Path("/tmp/outside-of-its-folder").write_bytes(b"x")


def _loop(folder):
    while True:
        pass


FAULTS = {
    "memory without bound": lambda folder: np.ones(1 << 33),
    "ZeroDivisionError escapes": lambda folder: 1 / 0,
    "outside of its folder": _write_outside,
    "outside of its folder: ": lambda folder: os.system("true"),
    "the process died": lambda folder: os.abort(),
    "message names no file": lambda folder: (_ for _ in ()).throw(UserError("something is wrong")),
    "no end within": _loop,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_harness_sees(kind, monkeypatch):
    from tests import fuzzing

    monkeypatch.setattr(fuzzing, "SECONDS", 1)

    def run(folder):  # the seed is tried first, before anything is bounded
        if (folder / "file").read_bytes() == b"bad":
            FAULTS[kind](folder)

    target = Target("fault", "", lambda: [{"file": b"good"}], run)
    tally = fuzz(target, lambda start: iter([(i, {"file": b"bad" if i == 1 else b"good"}) for i in range(start, 3)]))
    seen = list(tally.findings)
    assert len(seen) == 1 and kind.rstrip(": ") in seen[0] and tally.inputs == 3 and tally.accepted == 2
    assert not os.path.exists("/tmp/outside-of-its-folder")


def test_lying_arrays_are_not_allocated(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }" % 2**50
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(lie)
    with pytest.raises(ValueError):
        read_array(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", lie)
    with pytest.raises(ValueError, match="another size"):
        read_arrays(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", a=np.arange(6).reshape(2, 3), b=np.array("text"), c=np.zeros(0))
    found = read_arrays(tmp_path / "b.npz")
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and str(found["b"]) == "text" and found["c"].shape == (0,)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / f"new.tmp-{os.getpid()}").symlink_to(tmp_path / "precious")
    replace_file(tmp_path / "new", b"data")
    assert (tmp_path / "precious").read_bytes() == b"kept" and (tmp_path / "new").read_bytes() == b"data"


def test_pipes_in_the_place_of_files_do_not_block(tmp_path):
    from protomem.data.records import open_records

    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="no .tar file"):
        open_records(tmp_path)
    os.mkfifo(tmp_path / "train.rec")
    with pytest.raises(UserError, match="is no file"):
        open_records(tmp_path)


def test_a_name_with_dollars_is_no_formula(tmp_path):
    from protomem import report_plots

    events = [{"event": "evaluation", "name": "$\\frac$", "step": step, "accuracy": 0.5} for step in (1, 2)]
    assert (report_plots.draw(tmp_path, [], events, {})["accuracy"]).stat().st_size > 1000
