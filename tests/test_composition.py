"""Every combination of margin, prototype source and regulariser either trains or is refused with its reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import composition
from protomem import build, config, distributed, recipe_commands, signals, trainer
from protomem.composition import late_parts
from protomem.data.pipeline import normalise
from protomem.data_parallel import data_parallel
from protomem.errors import UserError
from protomem.step import Extras, MicroBatch, forward_backward
from tests.ranks import run_ranks
from tests.test_training import settings

# 4 of 40 identities a step, two images of each; some come back, and are injected then.
LABELS = [[0, 0, 3, 3, 27, 27, 31, 31], [1, 1, 3, 3, 28, 28, 31, 31], [0, 0, 3, 3, 27, 27, 5, 5]]
IDENTITIES, STEPS = 40, len(LABELS)
TINY = {
    "encoder.name": "small",
    "encoder.embedding_size": 8,
    "data.size": 16,
    "train.batch_size": 8,
    "schedule.epochs": 0,
    "schedule.steps": STEPS,
    "optimizer.lr": 0.05,
}
# Of what a combination has: early enough to be seen in three steps, and in a range where eight numbers have their norm.
WHERE = {
    "memory": {"prototypes.memory.size": 6, "data.sampler.images_per_identity": 2},
    "VPL": {"prototypes.injection.start": 1},
    "EPL": {"prototypes.empirical.start_epoch": 0},
    "contrast": {"contrast.start_epoch": 0},
    "sampled": {"prototypes.rate": 0.5},
    "recognizability": {"quality.quantile": 0.3},
    "zscore": {"quality.keep": 1},
    "MagFace": {"margin.magnitude.lower": 1, "margin.magnitude.upper": 51, "margin.magnitude.weight": 10},
}


@pytest.fixture(scope="module")
def document():
    return composition.text()


def tiny(key: tuple[str, str, str], settings: list[str]):
    """The config of a combination, made small."""
    loaded = config.load([], [*composition.NEEDED, *settings])
    for name, values in [("", TINY), *WHERE.items()]:
        if name in " ".join(key):
            for k, v in values.items():
                OmegaConf.update(loaded, k, v)
    config.check(loaded)
    return loaded


def train(c) -> list[float]:
    """Three steps as the trainer makes them; their losses. Asserts that they are finite and that the encoder learns."""
    device, rank, world = torch.device("cpu"), distributed.rank(), distributed.world_size()
    encoder = build.encoder_from(c, device)
    prototypes = build.prototypes_from(c, IDENTITIES, device, STEPS, STEPS)
    criterion = build.criterion_from(c, prototypes.num_identities, device)
    contrast = build.contrast_from(c, STEPS, device)
    optimizers = build.optimizers_from(c, encoder, prototypes, criterion)
    head, margin = build.head_from(c), build.margin_from(c)
    if contrast is not None:
        encoder.dropout.p = c.contrast.dropout
    extras = Extras(encoder=encoder)
    if c.quality.estimator == "recognizability":
        extras.copies, extras.total = lambda images: images.flip(1)[:1], world
    model, losses = data_parallel(encoder, device).train(), []
    for step, labels in enumerate(LABELS):
        images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        bounds = [distributed.batch_bounds(8, r, world, 2) for r in range(world)]
        lo, hi = bounds[rank]
        scores = torch.arange(1, 9)[lo:hi] / 8 if c.quality.estimator == "external" else None
        part = MicroBatch(images[lo:hi], torch.tensor(labels[lo:hi]), [b - a for a, b in bounds], scores)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(100 * step + rank)
        stats = forward_backward(
            [part],
            model,
            prototypes,
            head,
            margin,
            step,
            criterion=criterion,
            contrast=contrast,
            prepare=normalise,
            extras=extras,
            observe=True,
        )
        grads = [p.grad for p in (*encoder.parameters(), *criterion.parameters()) if p.requires_grad]
        assert all(g.isfinite().all() for g in grads) and all(stats[k].isfinite() for k in ("loss", "cos_y"))
        assert grads[0].abs().max() > 0 and encoder.fc.weight.grad.abs().max() > 0
        if (rows := prototypes.gradient()) is not None:
            assert rows.isfinite().all() and rows.abs().max() > 0
        for optimizer in optimizers.values():
            optimizer.step()
        losses.append(stats["loss"].item())
    return losses


def test_the_document_is_what_the_script_would_write(document):
    assert composition.FILE.read_text() == document, "run python benchmarks/composition.py"
    assert "NOT REFUSED" not in document


def test_every_allowed_combination_trains_and_every_part_counts():
    """On two ranks, all of them in one world; a part that is on changes the loss of the combination without it."""
    everything = {**composition.combinations(), **composition.qualities()}
    allowed = {k: s for k, s in everything.items() if composition.refusal(s) is None}
    assert len(allowed) == 168 + 20
    configs = {key: tiny(key, settings) for key, settings in allowed.items()}

    def work():
        found = {}
        for key, c in configs.items():
            try:
                found[key] = train(c)
            except Exception as error:
                raise AssertionError(" × ".join(key)) from error
        return found

    first, second = run_ranks(2, work, timeout=400)
    assert first == second  # the loss is that of the global batch
    silent = []
    for (m, r, s), losses in first.items():
        if r in composition.QUALITIES:  # counts beside the memory whose images count alike
            # Norms of eight numbers are all below 10, where `magface` begins unless the margin says otherwise.
            small = (m, r) == ("CosFace", "magface")
            silent += [f"{m}, {r}, {s}"] if losses == first[m, "–", s] and not small else []
            continue
        source, *more = s.split(" + ")
        others = [(m, "–", s)] if r != "–" else []
        others += [(m, r, " + ".join([source, *(x for x in more if x != part)])) for part in more]
        others += [(m, r, "classifier")] if s in ("sampled", "memory", "sub-centres", "sampled sub-centres") else []
        others += [("softmax", r, s)] if m != "softmax" else []
        others += [("CosFace", r, s)] if m == "CosFace, unified criterion" else []
        silent += [f"{m}, {r}, {s} = {other}" for other in others if losses == first[other]]
    assert not silent, silent


def test_every_recipe_trains_from_its_file(small_set, tmp_path):
    """Four steps of the trainer on two ranks; what a file starts late starts after the first step, or the second."""
    data = tmp_path / "data"
    shutil.copytree(small_set, data)
    np.save(data / "train.quality.npy", np.linspace(0.1, 1, 248, dtype=np.float32))
    early = {
        "prototypes.injection.weight": "prototypes.injection.start=1",
        "prototypes.empirical.enabled": "prototypes.empirical.start_epoch=0.1",  # of 10 steps
        "contrast.weight": "contrast.start_epoch=0.2",
    }

    def work():
        context = distributed.Context(distributed.rank(), 2, distributed.rank(), torch.device("cpu"), "torchrun")
        for name in recipe_commands.names():
            c, file = recipe_commands.load(name), str(recipe_commands.folder() / f"{name}.yaml")
            more = [setting for key, setting in early.items() if OmegaConf.select(c, key)]
            more += ["prototypes.memory.size=20"] if c.prototypes.source == "memory" else []
            given = settings(data, tmp_path / name, "schedule.steps=4", "schedule.warmup_steps=0", "checkpoint.every=0", *more)
            run = trainer.Run(config.load([file], [s for s in given if not s.startswith("margin.")]), context)
            run.run(signals.StopRequest())

    run_ranks(2, work, timeout=300)
    for name in recipe_commands.names():
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "loss" in line][-1]
        c = recipe_commands.load(name)
        assert last["step"] == 4, name
        assert (last.get("injected", 0) > 0) == (c.prototypes.injection.weight > 0), name
        assert ("contrast" in last, "norm_penalty" in last) == (c.contrast.weight > 0, c.margin.name == "magface"), name


@pytest.mark.parametrize("what", [*composition.UNDEFINED, *composition.WITHOUT_EFFECT])
def test_refused(what):
    """For a reason of its own: without its last setting it is not refused, or for another one."""
    settings = {**composition.UNDEFINED, **composition.WITHOUT_EFFECT}[what]
    with pytest.raises(UserError) as error:
        config.load([], [*composition.NEEDED, *settings])
    assert "\n" not in str(error.value)
    assert composition.refusal(settings[:-1]) != str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ("encoder.sync_bn=true encoder.freeze_statistics=true", "sync_bn has no effect with encoder.freeze_statistics"),
        ("encoder.name=vit_t encoder.last_bn=learnable", "last_bn=learnable has no effect on encoder.name=vit_t"),
        ("optimizer.nesterov=true optimizer.momentum=0", "nesterov has no effect"),
        ("margin.name=combined margin.m2=0 margin.gradient=straight_through", "no effect without an angle"),
        ("MEMORY quality.estimator=norm quality.minimum=1", "gives every image the same weight"),
        ("MEMORY quality.estimator=norm quality.usage=hard train.batch_size=8", "less than one image"),
        ("MEMORY margin.magnitude.weight=40 prototypes.memory.self_exclusion=split MAGFACE", "below the bound 45.17"),
    ],
)
def test_more_settings_without_effect(settings, message):
    settings = settings.replace("MEMORY", "prototypes.source=memory data.sampler.name=mixed")
    settings = settings.replace("MAGFACE", "margin.name=magface encoder.last_bn=learnable")
    assert message in composition.refusal(settings.split())


@pytest.mark.parametrize(
    "settings",
    [
        "encoder.name=vit_s margin.name=magface",  # there is no BatchNorm that could hold the norm
        "prototypes.source=memory data.sampler.name=mixed margin.criterion=unified optimizer.head.lr=0.01",  # the threshold's
        "margin.name=combined margin.m1=1.35 margin.m2=0 margin.beyond_pi=monotone margin.gradient=straight_through",
        "prototypes.injection.weight=0.15 schedule.epochs=1",  # how many steps that is the data decide
    ],
)
def test_not_refused(settings):
    assert composition.refusal(settings.split()) is None


def test_what_begins_too_late_is_found_when_the_data_are_known():
    c = config.load([], [*composition.NEEDED, "prototypes.injection.weight=0.15", "schedule.epochs=2"])
    assert list(late_parts(c, epoch_steps=4001)) == []
    assert "injection.start=8000 is step 8000 of only 8000" in next(late_parts(c, epoch_steps=4000))
    more = ["prototypes.empirical.enabled=true", "contrast.weight=0.05", "schedule.epochs=0", "schedule.steps=300"]
    c = config.load([], [*composition.NEEDED, *more])
    assert [len(list(late_parts(c, epoch_steps=steps))) for steps in (100, 50, 40)] == [2, 1, 0]


def test_what_begins_too_late_is_told_by_a_run(small_set, tmp_path):
    more = ["contrast.weight=0.05", "contrast.start_epoch=1.5", "contrast.dropout=0.5"]  # 10 steps an epoch
    with pytest.raises(UserError, match="start_epoch=1.5 is step 15 of only 8, so it would never begin"):
        trainer.train(config.load([], settings(small_set, tmp_path, "schedule.steps=8", *more)))


def test_quality_takes_magfaces_own_range():
    """The score is the place of the norm in the range that the margin trains, else in that of MagFace's own settings."""
    memory = ["prototypes.source=memory", "data.sampler.name=mixed", "quality.estimator=magface", "encoder.embedding_size=4"]
    magface = ["margin.name=magface", "encoder.last_bn=learnable", "margin.magnitude.lower=20", "margin.magnitude.upper=60"]
    x = torch.eye(4) * torch.tensor([[5.0], [30.0], [60.0], [100.0]])

    def scores(more):
        c = config.load([], [*composition.NEEDED, *memory, *more])
        return build.memory_from(c, 20, 100).quality.scores(x).tolist()

    assert scores(magface + ["margin.magnitude.weight=260"]) == pytest.approx([0, 0.25, 1, 1])
    assert scores([]) == pytest.approx([0, 0.2, 0.5, 0.9])
