"""Templates: pooling against a loop, protocols, and the command."""

import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from protomem import config
from protomem.cli import app
from protomem.errors import UserError
from protomem.evaluate.templates import pool, random_protocol, read_protocol, verify_templates
from protomem.trainer import train
from tests.test_training import settings


def slow_pool(x, template, weight, medium):
    """Per template: images of a medium averaged by weight, media summed by their mean weight, then unit length."""
    out = []
    for t in range(max(template) + 1):
        total = np.zeros(x.shape[1])
        for m in sorted({m for m, own in zip(medium, template) if own == t}):
            rows = [i for i in range(len(x)) if template[i] == t and medium[i] == m]
            mean = sum(weight[i] * x[i] / np.linalg.norm(x[i]) for i in rows) / sum(weight[i] for i in rows)
            total += mean * sum(weight[i] for i in rows) / len(rows)
        out.append(total / np.linalg.norm(total))
    return np.array(out)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("media", [False, True])
def test_pooling_equals_the_loop(weighted, media):
    rng = np.random.default_rng(0)
    x, template = rng.normal(size=(20, 5)) * rng.uniform(1, 9, (20, 1)), rng.permutation(np.arange(20) % 6)
    weight = np.linalg.norm(x, axis=1) if weighted else np.ones(20)
    medium = rng.integers(0, 3, 20) if media else np.arange(20)
    found = pool(x, template, weight if weighted else None, medium if media else None)
    assert np.allclose(found, slow_pool(x, template, weight, medium), atol=1e-12)
    if weighted and not media:  # the sum of the raw embeddings
        sums = np.array([x[template == t].sum(0) for t in range(6)])
        assert np.allclose(found, sums / np.linalg.norm(sums, axis=1, keepdims=True))


def test_random_protocol_uses_each_image_once_and_pairs_what_it_says():
    labels = np.repeat(np.arange(9), 7)
    p = random_protocol(labels, 3, 1000)
    counts = np.bincount(p.template[p.template >= 0])
    assert len(counts) == 18 and (counts == 3).all()  # two full templates an identity, the seventh image is left out
    person = np.array([labels[np.flatnonzero(p.template == t)] for t in range(18)])
    assert (person == person[:, :1]).all()
    assert ((person[p.pairs[:, 0], 0] == person[p.pairs[:, 1], 0]) == p.same).all()
    assert p.same.sum() == 9 and (~p.same).sum() == 9
    assert len({tuple(pair) for pair in p.pairs}) == len(p.pairs)
    with pytest.raises(UserError, match="lower --images-per-template"):
        random_protocol(labels, 4, 1000)
    uneven = random_protocol(np.repeat([3, 5, 9], [24, 1, 15]), 3, 1000)  # 8, 0 and 5 templates
    genuine = {tuple(pair) for pair in uneven.pairs[uneven.same].tolist()}
    assert genuine == {*itertools.combinations(range(8), 2), *itertools.combinations(range(8, 13), 2)}
    some = random_protocol(np.repeat([3, 5, 9], [24, 1, 15]), 3, 20)
    assert some.same.sum() == 20 and {tuple(pair) for pair in some.pairs[some.same].tolist()} < genuine


def test_lists_of_a_protocol(tmp_path):
    images, pairs = tmp_path / "tid_mid.txt", tmp_path / "pairs.txt"
    images.write_text("1.jpg 5 1\n2.jpg 5 1\n3.jpg 9 4\n")
    pairs.write_text("5 9 0\n5 5 1\n")
    names, p = read_protocol(images, pairs)
    assert names == ["1.jpg", "2.jpg", "3.jpg"] and p.template.tolist() == [0, 0, 1] and p.medium.tolist() == [1, 1, 4]
    assert p.pairs.tolist() == [[0, 1], [0, 0]] and p.same.tolist() == [False, True]
    for text, message in (("5 7 1", "line 1 names template 7"), ("5 9", "line 1 is not `template template same`"), ("", "is empty")):
        pairs.write_text(text)
        with pytest.raises(UserError, match=message):
            read_protocol(images, pairs)
    images.write_text("1.jpg five 1")
    with pytest.raises(UserError, match="line 1 is not `image template medium`"):
        read_protocol(images, pairs)


def test_weights_matter_to_the_result():
    """Of each template one image is noise: with the true quality as the weight every pair is told apart."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(30), 8)
    x, quality = rng.normal(size=(30, 16))[labels], np.where(np.arange(240) % 2 == 0, 1.0, 0.0)
    x = np.where(quality[:, None] > 0, x + 0.2 * rng.normal(size=x.shape), 5 * rng.normal(size=x.shape))
    p = random_protocol(labels, 4, 1000)
    weighted, plain = (verify_templates(x, p, how, quality + 1e-3) for how in ("quality", "mean"))
    assert weighted["auc"] > 0.98 > plain["auc"]
    with pytest.raises(UserError, match="needs a quality"):
        verify_templates(x, p, "quality")
    for wrong in (-0.1, np.nan):
        with pytest.raises(UserError, match="negative or not a number"):
            verify_templates(x, p, "quality", np.where(np.arange(240) == 7, wrong, quality))


def test_the_command(small_set, tmp_path):
    train(config.load([], settings(small_set, tmp_path / "run", "schedule.steps=2", "schedule.warmup_steps=0")))
    call = ["templates", str(tmp_path / "run"), str(small_set), "--images-per-template", "3"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0 and "pooled by mean" in shown.output and "pooled by norm" in shown.output, shown.output
    found = json.loads(CliRunner().invoke(app, [*call, "--json", "--pooling", "mean"]).output)
    assert list(found) == ["mean"] and 0 <= found["mean"]["auc"] <= 1
    assert isinstance(CliRunner().invoke(app, [*call, "--pooling", "max"]).exception, UserError)
    in_chunks = json.loads(CliRunner().invoke(app, [*call, "--json", "--pooling", "mean", "--batch-size", "1"]).output)  # 3 of them
    assert in_chunks["mean"] == pytest.approx(found["mean"], abs=1e-3, nan_ok=True)
    lists = ["--lists", str(tmp_path / "a"), str(tmp_path / "b"), "--pooling", "quality"]
    assert "not lists" in str(CliRunner().invoke(app, [*call, *lists]).exception)
