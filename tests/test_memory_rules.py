"""What a prototype memory must do whatever its code looks like: scales, fallbacks, empty shards, one image, fillers."""

import pytest
import torch
import torch.nn.functional as F

from protomem import distributed
from protomem.data_parallel import data_parallel
from protomem.head import HEADS
from protomem.objective.margins import build_margin
from protomem.prototypes.memory import PrototypeMemory, generate
from protomem.prototypes.slots import FILLER
from protomem.quality import Quality
from protomem.step import MicroBatch, forward_backward
from tests.ranks import run_ranks

LABELS = [4, 4, 4, 7, 7, 2, 2, 2, 2, 7, 0, 0]
D = 6


def embeddings(seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(LABELS), D, generator=g, dtype=torch.float64)
    return (x * torch.exp(torch.rand(len(LABELS), 1, generator=g, dtype=torch.float64) * 3)).to(dtype)


def prototypes(x, quality: Quality, average="unit", external=None, step=0) -> dict[int, torch.Tensor]:
    """identity -> stored row, after one step of a fresh memory."""
    memory = PrototypeMemory(10, D, size=8, average=average, quality=quality).double()
    memory.begin_step(torch.tensor(LABELS), step, external)
    memory.columns(torch.tensor(LABELS), x)
    return {c: memory.rows[memory.slots.slot_of[c]].clone() for c in set(LABELS)}


def differ(a: dict, b: dict) -> float:
    return max((a[c] - b[c]).abs().max().item() for c in a)


def equal_weights(x) -> dict[int, torch.Tensor]:
    return prototypes(x, Quality(D))


def given(score_of, **options):
    """Prototypes with scores from outside."""
    quality = Quality(D, estimator="external", minimum=0.0, **options)
    return prototypes(embeddings(), quality, external=torch.tensor(score_of))


SCORES = [0.2, 0.9, 0.4, 0.7, 0.1, 0.3, 0.8, 0.05, 0.6, 0.5, 0.15, 1.0]


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_scale_of_quality_does_not_matter(factor):
    """Also where every identity has a factor of its own."""
    plain = given(SCORES)
    assert differ(plain, given([factor * v for v in SCORES])) < 1e-7  # the scores are float32
    own = {4: 1.0, 7: factor, 2: 3 * factor, 0: 7.0}
    assert differ(plain, given([own[c] * v for c, v in zip(LABELS, SCORES)])) < 1e-7
    assert differ(plain, equal_weights(embeddings())) > 1e-2


def test_norm_weights_are_the_mean_of_raw_embeddings():
    x = embeddings()
    by_norm = prototypes(x, Quality(D, estimator="norm", minimum=0.0))
    assert differ(by_norm, prototypes(x, Quality(D), average="raw")) < 1e-12
    by_hand = {c: F.normalize(sum(x[j] for j, y in enumerate(LABELS) if y == c), dim=0) for c in set(LABELS)}
    assert differ(by_norm, by_hand) < 1e-12
    assert differ(by_norm, equal_weights(x)) > 1e-2
    # Raw embeddings weighted by their norm count with its square.
    squared = {
        c: F.normalize(sum(x[j] * x[j].norm() for j, y in enumerate(LABELS) if y == c), dim=0) for c in set(LABELS)
    }
    assert differ(prototypes(x, Quality(D, estimator="norm", minimum=0.0), average="raw"), squared) < 1e-12


@pytest.mark.parametrize("usage", ["soft", "hard"])
def test_all_zero_is_equal(usage):
    """For all identities, and for one among others."""
    options = dict(usage=usage, threshold=0.3 if usage == "hard" else None)
    plain = equal_weights(embeddings())
    assert differ(plain, given([0.0] * len(LABELS), **options)) < 1e-12
    one = given([0.0 if c == 7 else v for c, v in zip(LABELS, SCORES)], **options)
    assert (one[7] - plain[7]).abs().max() < 1e-12 and (one[2] - plain[2]).abs().max() > 1e-2


def test_threshold_below_all_scores_is_equal():
    plain = equal_weights(embeddings())
    assert differ(plain, given(SCORES, usage="hard", threshold=min(SCORES) - 1e-6)) < 1e-12
    assert differ(plain, given(SCORES, usage="hard", quantile=0.0)) < 1e-12
    assert differ(plain, given(SCORES, usage="hard", threshold=0.5)) > 1e-2
    assert differ(plain, given(SCORES, usage="topk", keep=4)) < 1e-12
    assert differ(plain, given(SCORES, usage="topk", keep=3)) > 1e-2


def test_orthogonal_unrecognizable_is_equal():
    """Embeddings that have nothing to do with u all score 1; so do all before anything was seen; others do not."""
    x = embeddings()
    x[:, -1] = 0
    plain = equal_weights(x)
    u = torch.zeros(3, D, dtype=torch.float64)
    u[:, -1] = 2.0
    for start in (u, None, x[:3]):
        quality = Quality(D, estimator="recognizability").double()
        if start is not None:
            quality.see(start, len(start))
        error = differ(plain, prototypes(x, quality))
        assert error > 1e-2 if start is x[:3] or (start is not None and start is not u) else error < 1e-12


def test_weights_before_the_warmup_ends():
    quality = Quality(D, estimator="norm", warmup=3)
    x = embeddings()
    assert differ(equal_weights(x), prototypes(x, quality, step=2)) < 1e-12
    assert differ(equal_weights(x), prototypes(x, quality, step=3)) > 1e-2


def test_opposite_images():
    """No direction in the sum: the image with the largest weight, the first of equals."""
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -1, 0], [-1, 0, 0]], dtype=torch.float64)
    group, one = torch.tensor([1, 0, 0, 1]), torch.ones(4, dtype=torch.float64)
    p, _ = generate(x, one, group, "unit", False)
    assert p[:2].tolist() == [[0, 1, 0], [1, 0, 0]] and not p[2:].any()
    p, own = generate(x * torch.tensor([[1.0], [2], [1], [3]]), torch.tensor([3.0, 1, 2, 1]).double(), group, "raw", True)
    assert p[:2].tolist() == [[0, -1, 0], [1, 0, 0]]
    assert own.tolist() == [[-1, 0, 0], [0, -1, 0], [0, 1, 0], [1, 0, 0]]


def test_what_is_left_beside_an_image_with_nearly_all_of_the_weight():
    """In fp32 too: the other two images' mean, though they have a millionth of the weight."""
    x = F.normalize(torch.randn(3, D, generator=torch.Generator().manual_seed(0)), dim=1)
    weight = torch.tensor([1.0, 3e-6, 2e-6])
    _, own = generate(x, weight, torch.zeros(3, dtype=torch.int64), "unit", True)
    expected = F.normalize(3 * x[1].double() + 2 * x[2].double(), dim=0)
    assert (own[0] - expected).abs().max() < 1e-6


def one_step(memory, labels, x, backend="blocked", step=0, margin=None):
    rank, world = distributed.rank(), distributed.world_size()
    bounds = [distributed.batch_bounds(len(labels), r, world) for r in range(world)]
    start, stop = bounds[rank]
    x = x[start:stop].clone().requires_grad_()
    part = MicroBatch(x, torch.tensor(labels)[start:stop], [b - a for a, b in bounds])
    margin = margin or build_margin("cosface", scale=64.0)
    stats = forward_backward([part], torch.nn.Identity(), memory, HEADS[backend], margin, step)
    return stats, x.grad


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("labels", [[3, 3], [3, 5, 3, 5]])
def test_first_step_of_a_large_memory(backend, labels):
    """One or two slots of 1000 are filled: most ranks have nothing at all, and with one identity nobody has a negative."""

    def work():
        memory = PrototypeMemory(10, D, size=1000)
        stats, grad = one_step(memory, labels, embeddings(dtype=torch.float32)[: len(labels)], backend)
        return stats["loss"].item(), grad.numpy(), memory.filled.sum().item(), stats["cos_y"].item()

    alone = run_ranks(1, work)[0]
    for rank, (loss, grad, filled, cos) in enumerate(run_ranks(4, work)):
        assert torch.tensor(grad).isfinite().all() and filled == len(set(labels))
        assert loss == pytest.approx(alone[0], rel=1e-5, abs=1e-7) and cos == pytest.approx(alone[3], abs=1e-6)
    assert (alone[0] > 0) == (len(set(labels)) > 1)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_one_image_is_its_own_prototype(backend):
    memory = PrototypeMemory(10, D, size=8).double()
    stats, grad = one_step(memory, [3, 1, 8], embeddings()[:3], backend)
    assert stats["cos_y"] == pytest.approx(1, abs=1e-12)
    assert grad.isfinite().all()


def test_self_cosine_of_random_embeddings():
    """E cos(x_j, p) = 1 / sqrt(k) for k independent images."""
    for k, expected in ((2, 0.7068), (4, 0.4998), (8, 0.3537)):
        x = torch.randn(800 * k, 512, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        group = torch.arange(800).repeat(k)
        p, own = generate(x, torch.ones(len(x), dtype=torch.float64), group, "unit", True)
        unit = F.normalize(x, dim=1)
        assert (unit * p[group]).sum(1).mean() == pytest.approx(expected, abs=2e-3)
        assert (unit * own).sum(1).mean() == pytest.approx(0, abs=5e-3), "left out, an image knows nothing of the others"


def filled_at_random(size=11):
    memory = PrototypeMemory(30, D, size=size, fill="random", seed=3)
    rows = memory.rows.numpy().copy()
    labels = memory.slots.label[:-1].tolist()
    one_step(memory, LABELS, embeddings(dtype=torch.float32))
    return rows, labels, memory.slots.label[:-1].tolist()


def test_random_fill_does_not_depend_on_ranks():
    (rows, labels, after), *_ = run_ranks(1, filled_at_random)
    assert labels == [FILLER] * 11 and after[:4] == [0, 2, 4, 7] and after[4:] == [FILLER] * 7
    assert (torch.tensor(rows).norm(dim=1) - 1).abs().max() < 1e-6
    assert len({tuple(r) for r in rows.tolist()}) == 11
    for world in (2, 3):
        ranks = run_ranks(world, filled_at_random)
        for slot in range(11):
            assert (ranks[slot % world][0][slot // world] == rows[slot]).all()


def test_replicas_that_differ_are_reported():
    def work(spoil):
        memory = PrototypeMemory(10, D, size=8)
        one_step(memory, LABELS, embeddings(dtype=torch.float32))
        memory.check_replicas()
        if distributed.rank() == 1:
            spoil(memory)
        with pytest.raises(RuntimeError, match="differs at step 0"):
            memory.check_replicas()

    def spoil_label(memory):
        memory.slots.label[2] += 1

    def spoil_filled(memory):
        memory.filled[1] = False

    for spoil in (spoil_label, spoil_filled):
        run_ranks(2, work, spoil)


def test_embedding_that_overflowed_is_not_stored():
    """An identity with a NaN keeps its old row; a new one is left out of the softmax until it has a proper one."""
    memory = PrototypeMemory(10, D, size=8)
    x = embeddings(dtype=torch.float32)
    one_step(memory, [4, 4, 4], x[:3])
    before = memory.rows[0].clone()
    x[3] = torch.nan
    one_step(memory, [4, 6, 6], torch.stack([x[3], x[3], x[4]]), step=1)
    assert (memory.rows[0] == before).all() and not memory.filled[memory.slots.slot_of[6]]
    stats, grad = one_step(memory, [6, 6, 2], x[:3], step=2)
    assert memory.filled[memory.slots.slot_of[6]] and stats["loss"].isfinite() and grad.isfinite().all()


def encoder_gradients(gradient: str) -> list:
    """Gradient of a linear encoder under DDP in three steps on the same 12 images."""
    torch.manual_seed(0)
    images = torch.randn(len(LABELS), 5, dtype=torch.float64)
    encoder = torch.nn.Linear(5, D).double()
    rank, world = distributed.rank(), distributed.world_size()
    model = data_parallel(encoder, torch.device("cpu"))
    memory = PrototypeMemory(10, D, size=5, gradient=gradient, quality=Quality(D, estimator="norm")).double()
    sizes = [12] if world == 1 else [7, 5] if world == 2 else [1, 8, 3]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    out = []
    for step in range(3):
        labels = (torch.tensor(LABELS) + step) % 10
        encoder.zero_grad()
        part = MicroBatch(images[mine], labels[mine], sizes)
        forward_backward([part], model, memory, HEADS["blocked"], build_margin("arcface", scale=8.0), step)
        out += [encoder.weight.grad.numpy().copy(), encoder.bias.grad.numpy().copy()]
    return out


@pytest.mark.parametrize("gradient", ["none", "batch"])
def test_encoder_gradient_is_that_of_one_process(gradient):
    """The factor W of the gather and the mean of DDP cancel."""
    alone = run_ranks(1, encoder_gradients, gradient)[0]
    for world in (2, 3):
        for ranks in run_ranks(world, encoder_gradients, gradient):
            for got, want in zip(ranks, alone):
                assert abs(got - want).max() <= 1e-9 * abs(want).max()


def test_prototypes_of_another_encoder():
    """`keys` make the prototypes and are scored; the images are compared with them; no gradient goes there."""
    x, keys = embeddings().requires_grad_(), embeddings(seed=1).requires_grad_()
    memory = PrototypeMemory(10, D, size=8, quality=Quality(D, estimator="norm")).double()
    memory.begin_step(torch.tensor(LABELS), 0)
    columns = memory.columns(torch.tensor(LABELS), x, keys)
    expected = prototypes(keys.detach(), Quality(D, estimator="norm"))
    assert max((memory.rows[memory.slots.slot_of[c]] - expected[c]).abs().max() for c in expected) < 1e-12
    assert not columns.rows.requires_grad and columns.live is None
