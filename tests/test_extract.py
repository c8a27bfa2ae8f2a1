"""Extraction: every embedding in its place, whatever the batch size and the world size; the encoder left as it was."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from protomem.data import pipeline
from protomem.data.images import decode, encode_jpeg
from protomem.data.pairs import write_bin
from protomem.errors import UserError
from protomem.evaluate.extract import evaluate_bins, extract
from tests.ranks import run_ranks

CPU = {"device": "cpu", "backend": "torch"}


def make_images(n, seed=0):
    """Smooth pictures, all different."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (n, 3, 6, 6)))
    fine = nn.functional.interpolate(coarse, 112, mode="bilinear").permute(0, 2, 3, 1)
    return [encode_jpeg(np.ascontiguousarray(image)) for image in fine.to(torch.uint8).numpy()]


IMAGES = make_images(23)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 7, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 27 * 27, 16)
        self.rows = 0
        with torch.no_grad():
            for p in (self.conv.weight, self.fc.weight):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            for p in (self.conv.bias, self.fc.bias):
                p.zero_()
            self.norm.running_mean.copy_(torch.randn(8, generator=generator))

    def forward(self, x):
        self.rows += len(x)
        return self.fc(self.drop(self.frozen(self.norm(self.conv(x)).relu())).flatten(1))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: other thread counts add in another order
    yield
    torch.set_num_threads(before)


def one_by_one(images, flip=False):
    """The definition: decode, normalise, encode each image alone."""
    encoder, out = Encoder().eval(), []
    for data in images:
        x = torch.from_numpy((decode(data).astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            out.append(encoder(x)[0] + (encoder(torch.flip(x, [3]))[0] if flip else 0))
    return torch.stack(out).numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_equals_one_image_at_a_time_at_any_batch_size(batch_size, flip):
    expected = one_by_one(IMAGES, flip)
    got = extract(Encoder(), IMAGES, batch_size=batch_size, flip=flip, **CPU)
    assert got.dtype == np.float32 and got.shape == (23, 16)
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("n, batch_size", [(23, 4), (23, 16), (1, 8)])  # the last two leave ranks without a batch
def test_bitwise_equal_at_any_world_size(world, n, batch_size):
    expected = extract(Encoder(), IMAGES[:n], batch_size=batch_size, **CPU)
    for got in run_ranks(world, lambda: extract(Encoder(), IMAGES[:n], batch_size=batch_size, **CPU)):
        np.testing.assert_array_equal(got, expected)


def test_repeated_images_are_encoded_once_and_stay_in_place():
    order = [3, 1, 3, 3, 0, 1, 2]
    encoder = Encoder()
    got = extract(encoder, [IMAGES[i] for i in order], batch_size=2, **CPU)
    assert encoder.rows == 4
    np.testing.assert_allclose(got, one_by_one([IMAGES[i] for i in order]), atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_statistics_are_put_back(fails):
    encoder = Encoder().train()
    encoder.frozen.eval()
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    if fails:
        encoder.fc = nn.Linear(3, 3)
        with pytest.raises(RuntimeError):
            extract(encoder, IMAGES[:3], **CPU)
    else:
        extract(encoder, IMAGES[:3], **CPU)
        assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert [encoder.training, encoder.norm.training, encoder.frozen.training] == [True, True, False]


def test_ranks_evaluate_rank_0s_statistics_and_keep_their_own():
    def job():
        encoder = Encoder()
        encoder.norm.running_mean.fill_(0.5 + torch.distributed.get_rank())
        out = extract(encoder, IMAGES, batch_size=4, **CPU)
        return out, encoder.norm.running_mean.numpy(), encoder.training

    encoder = Encoder()
    encoder.norm.running_mean.fill_(0.5)
    expected = extract(encoder, IMAGES, batch_size=4, **CPU)
    for rank, (got, mean, training) in enumerate(run_ranks(3, job)):
        np.testing.assert_array_equal(got, expected)
        assert (mean == 0.5 + rank).all() and training


def test_ddp_is_looked_through():
    # Its forward would broadcast buffers in every batch, and ranks have different numbers of batches.
    ddp = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = Encoder()
    np.testing.assert_array_equal(extract(ddp, IMAGES[:3], **CPU), extract(Encoder(), IMAGES[:3], **CPU))


def raised(fn):
    try:
        fn()
    except UserError as error:
        return str(error)


def test_an_image_that_cannot_be_decoded_is_named_on_every_rank():
    half = IMAGES[5][: len(IMAGES[5]) // 2]
    broken = IMAGES[:3] + IMAGES[:3] + IMAGES[3:] + [half, b""]  # repetitions do not disturb the counting
    for message in run_ranks(2, lambda: raised(lambda: extract(Encoder(), broken, batch_size=4, **CPU))):
        assert message.startswith("image 26 of 28 cannot be decoded")


def test_a_rank_that_fails_does_not_leave_the_others_waiting(monkeypatch):
    def eval_batches(encoded, *args, **kwargs):
        if IMAGES[20] in encoded:  # rank 1's part
            raise UserError("the decoder is missing")
        return original(encoded, *args, **kwargs)

    original = pipeline.eval_batches
    monkeypatch.setattr(pipeline, "eval_batches", eval_batches)
    messages = run_ranks(2, lambda: raised(lambda: extract(Encoder(), IMAGES, batch_size=4, **CPU)))
    assert messages == ["the decoder is missing"] * 2


def test_precision():
    exact = extract(Encoder(), IMAGES[:4], **CPU)
    half = extract(Encoder(), IMAGES[:4], precision="bf16", **CPU)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.03 * np.abs(exact).max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(extract(Encoder(), IMAGES[:4], **CPU), exact)
    with pytest.raises(UserError, match="precision=fp8 is not one of fp32, bf16, fp16"):
        extract(Encoder(), IMAGES[:4], precision="fp8", **CPU)


def test_nothing_to_embed_is_said():
    with pytest.raises(UserError, match="the list is empty"):
        extract(Encoder(), [], **CPU)


def test_evaluate_bins(tmp_path):
    same = np.arange(20) % 2 == 0
    pictures = make_images(40, seed=5)
    rows = [pictures[2 * i] if side == 0 or same[i] else pictures[2 * i + 1] for i in range(20) for side in (0, 1)]
    write_bin(tmp_path / "easy.bin", rows, list(same))  # genuine pairs are the same picture twice
    write_bin(tmp_path / "other.bin", pictures, list(same))
    results = evaluate_bins(Encoder(), [tmp_path / "easy.bin", tmp_path / "other.bin"], **CPU)
    assert list(results) == ["easy", "other"]
    assert results["easy"].accuracy == 1 and results["easy"].auc == 1
    np.testing.assert_allclose(results["easy"].scores[same], 1)
    np.testing.assert_array_equal(results["easy"].same, same)
    assert results["other"].accuracy < 1


def test_what_lies_beside_a_bin_file(tmp_path):
    path = tmp_path / "clean.bin"
    write_bin(path, make_images(40), [True, False] * 10)
    quality = np.linspace(0, 1, 40, dtype=np.float32)
    np.save(tmp_path / "clean.quality.npy", quality)
    manifest = {"renderer": 1, "files": {"clean.bin": path.stat().st_size}}
    (tmp_path / "clean.json").write_text(json.dumps(manifest))
    result = evaluate_bins(Encoder(), [path], **CPU)["clean"]
    np.testing.assert_array_equal(result.quality, quality)
    assert result.rendered
    write_bin(path, make_images(40, seed=9), [True, False] * 10)  # another file under the old name
    assert not evaluate_bins(Encoder(), [path], **CPU)["clean"].rendered
    (tmp_path / "clean.json").unlink()
    np.save(tmp_path / "clean.quality.npy", quality[:5])
    with pytest.raises(UserError, match=r"clean\.quality\.npy must hold one value for each of the 40 images"):
        evaluate_bins(Encoder(), [path], **CPU)
    (tmp_path / "clean.quality.npy").unlink()
    result = evaluate_bins(Encoder(), [path], **CPU)["clean"]
    assert result.quality is None and not result.rendered


def test_dali_gives_the_same_embeddings():
    pytest.importorskip("nvidia.dali")
    expected = extract(Encoder(), IMAGES, batch_size=8, **CPU)
    job = lambda: extract(Encoder(), IMAGES, batch_size=8, device="cpu", backend="dali")  # noqa: E731
    (got,) = run_ranks(1, job)  # in a child: this process goes on forking ranks
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_evaluate_bins_names_the_file(tmp_path):
    write_bin(tmp_path / "a.bin", IMAGES[:4], [True, False])
    with pytest.raises(UserError, match=r"a\.bin: verification needs at least two folds.* got 2 pairs for 10"):
        evaluate_bins(Encoder(), [tmp_path / "a.bin"], **CPU)
    with pytest.raises(UserError, match=r"two verification files are called a\.bin"):
        evaluate_bins(Encoder(), [tmp_path / "a.bin", tmp_path / "b" / "a.bin"], **CPU)
    with pytest.raises(UserError, match=r"missing\.bin"):
        evaluate_bins(Encoder(), [tmp_path / "missing.bin"], **CPU)
