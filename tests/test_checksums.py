"""A checkpoint whose bytes are not those that were written is refused when it is loaded, in any of its files."""

import json
import shutil

import pytest

from protomem import checksums, commands, config, state
from protomem.errors import UserError
from protomem.trainer import train
from tests.ranks import run_ranks
from tests.test_training import settings

SHORT = ("schedule.steps=2", "schedule.warmup_steps=0")
MORE = ("schedule.steps=4", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def trained(small_set, tmp_path_factory):
    """A run of two steps on two ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(2, lambda: train(config.load([], settings(small_set, folder, *SHORT))))
    return folder


def flipped(run, name: str, output):
    """A copy of the run with one bit of this file of its checkpoint flipped, in the middle."""
    shutil.copytree(run, output, symlinks=True)
    path = state.newest(output / "checkpoints") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_every_file_has_its_checksum(trained):
    path = state.newest(trained / "checkpoints")
    sums = json.loads((path / "training.json").read_text())["checksums"]
    assert set(sums) == {p.name for p in path.iterdir()} - {"training.json"}
    assert {name.split("_")[2] for name in sums if name.startswith("__")} == {"0", "1"}  # both ranks wrote
    assert all(checksums.sha256(path / name) == value for name, value in sums.items())


@pytest.mark.parametrize("which", ["rank 0", "rank 1", ".metadata"])
@pytest.mark.parametrize("world", [1, 3])
def test_a_flipped_bit_is_found(trained, small_set, tmp_path, which, world):
    names = [p.name for p in state.newest(trained / "checkpoints").iterdir()]
    name = which if which.startswith(".") else next(n for n in names if n.startswith(f"__{which[-1]}_"))
    flipped(trained, name, tmp_path / "run")
    with pytest.raises((UserError, AssertionError), match="is damaged|refused") as error:
        run_ranks(world, lambda: train(config.load([], settings(small_set, tmp_path / "run", *MORE))))
    if not which.startswith("."):
        assert str(error.value).count(f"{name} is not what was written") >= world  # on every rank


def test_an_encoder_alone_is_compared_too(trained, tmp_path):
    names = [p.name for p in state.newest(trained / "checkpoints").iterdir() if p.name.startswith("__0_")]
    flipped(trained, names[0], tmp_path / "run")
    with pytest.raises(UserError, match="is not what was written"):
        commands.load_run(tmp_path / "run", "cpu")


def test_a_missing_file_and_an_old_checkpoint_without_checksums(trained, small_set, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    path = state.newest(tmp_path / "run" / "checkpoints")
    info = json.loads((path / "training.json").read_text())
    del info["checksums"]
    (path / "training.json").write_text(json.dumps(info))
    train(config.load([], settings(small_set, tmp_path / "run", *MORE)))  # as before there were any
    shutil.copytree(trained, tmp_path / "cut", symlinks=True)
    lost = next(state.newest(tmp_path / "cut" / "checkpoints").glob("__1_*"))
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} cannot be read"):
        train(config.load([], settings(small_set, tmp_path / "cut", *MORE)))


def test_a_rank_that_is_lost_while_loading_is_no_damage(trained, small_set, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(state.dcp, "load", lost)
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    with pytest.raises(RuntimeError, match="gloo"):
        train(config.load([], settings(small_set, tmp_path / "run", *MORE)))
