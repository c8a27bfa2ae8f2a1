"""The commands as a user types them: train, evaluate, embed, report; errors are one line and exit code 2."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from protomem import checksums
from protomem.data.pairs import write_bin
from tests.conftest import coloured_images
from tests.test_training import settings


def protomem(*arguments, **env):
    command = [sys.executable, "-m", "protomem", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.fixture(scope="module")
def trained(small_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    images = [jpeg for jpeg, _ in coloured_images(20, 4, seed=9)]
    same = [bool(i % 2 == 0) for i in range(40)]
    pairs = [(4 * (i // 2) + (i % 2) * 2, 4 * (i // 2) + 1 if s else 4 * ((i // 2 + 7) % 20)) for i, s in enumerate(same)]
    write_bin(folder / "unseen.bin", [images[k] for pair in pairs for k in pair], same)
    more = ("schedule.steps=40", "log.every=10", f"data.eval=[{folder / 'unseen.bin'}]", "log.tensorboard=true")
    more += ("log.wandb.mode=offline", "encoder.precision=bf16")
    done = protomem("train", *settings(small_set, folder / "run", *more), WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_training_leaves_what_it_promises(trained):
    folder, output = trained
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tags = [line["tag"] for line in lines if line.get("event") == "evaluation"]
    assert tags == ["initial", "final"] and "images/s" in output and "accuracy" in output
    for name in ("report.html", "config.yaml", "environment.json", "checkpoints/last", "checkpoints/best", "tensorboard", "wandb"):
        assert (run / name).exists(), name
    assert (run / "checkpoints" / "last").resolve().name == "step-00000040"


def test_evaluate_gives_the_accuracy_of_the_run(trained):
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (final,) = [line for line in lines if line.get("tag") == "final"]
    done = protomem("evaluate", folder / "run", folder / "unseen.bin", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["unseen"]
    assert found["accuracy"] == pytest.approx(final["accuracy"]) and found["auc"] == pytest.approx(final["auc"])


def test_embed_writes_rows_in_order(trained, small_set):
    folder, _ = trained
    done = protomem("embed", folder / "run", small_set, folder / "out.npz")
    assert done.returncode == 0, done.stderr
    out = np.load(folder / "out.npz")
    assert out["embeddings"].shape == (248, 16) and out["labels"].tolist() == [i // 8 for i in range(248)]
    unit = out["embeddings"] / np.linalg.norm(out["embeddings"], axis=1, keepdims=True)
    cos = unit @ unit.T
    same = out["labels"][:, None] == out["labels"][None]
    assert cos[same].mean() > cos[~same].mean() + 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["train", "output=runs/never", "data.train=/nowhere"], "/nowhere"),
        (["evaluate", "/nowhere", "a.bin"], "a.bin does not exist"),
        (["train", "output=runs/never", "data.train=patterns:identities=9,images=2", "train.batch_size=6", "encoder.name=resnet50"], "iresnet50"),
        (["train", "output=runs/never", "data.train=patterns:identities=9,images=2", "train.batch_size=6", "distributed.device=cuda"], "no GPU"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = protomem(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_checkpoint_with_a_hostile_pickle_is_refused_unexecuted(trained, tmp_path):
    import pickle
    import shutil

    class Boom:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder, _ = trained
    copy = tmp_path / "step-00000040"
    shutil.copytree((folder / "run" / "checkpoints" / "last").resolve(), copy)
    (copy / ".metadata").write_bytes(pickle.dumps(Boom()))
    info = json.loads((copy / "training.json").read_text())  # whoever plants a pickle mends its checksum
    info["checksums"][".metadata"] = checksums.sha256(copy / ".metadata")
    (copy / "training.json").write_text(json.dumps(info))
    done = protomem("evaluate", copy, folder / "unseen.bin")
    assert done.returncode == 2 and "refused" in done.stderr and not (tmp_path / "executed").exists()
