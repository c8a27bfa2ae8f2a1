"""The plan against the real thing: allocations of a step, its collectives, the head's kernels, known floors."""

import gc
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protomem import build, config, distributed, interval, step
from protomem.block_update import BlockUpdate
from protomem.data.pipeline import normalise
from protomem.data_parallel import data_parallel, settle_buckets
from protomem.errors import UserError
from protomem.head import Columns, GradSink, blocked, blocked_head, triton_head
from protomem.optim import build_optimizer
from protomem.plan import advice, estimate, hardware, scale, show
from protomem.plan.case import make_case
from protomem.plan.collectives import collectives
from protomem.plan.encoder import encoder_cost
from protomem.plan.memory import _head_work, rank_bytes
from protomem.trainer import Run
from tests.ranks import run_ranks
from tests.test_cli import protomem

SMALL = ("encoder.name=small", "data.size=64", "encoder.embedding_size=64", "train.batch_size=32")
MEMORY = ("prototypes.source=memory", "data.sampler.name=balanced", "prototypes.memory.size=20000")
IRESNET = ("encoder.name=iresnet18", "data.size=32", "encoder.embedding_size=64", "train.batch_size=24")


def load(*settings):
    return config.load([], list(settings), optional=config.RUN_KEYS)


def case_of(*settings, world=1, gpu="cpu", fabric=None, **numbers):
    device = hardware.device(gpu)
    return make_case(load(*settings), world, device, hardware.fabric(fabric, device), **numbers)


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        del self.sizes[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


def allocations(settings, identities, steps=2):
    """(bytes that stay between steps, most bytes in a step) of training in one process, as measured."""
    c, cpu, live = load(*settings), torch.device("cpu"), Live()
    blocked._pool.free = []
    with live:
        encoder = build.encoder_from(c, cpu).train()
        prototypes = build.prototypes_from(c, identities, cpu, 100, 100)
        criterion = build.criterion_from(c, identities, cpu)
        optimizers = build.optimizers_from(c, encoder, prototypes, criterion)
        key_encoder = build.key_encoder_from(c, encoder)
    for tensor in (*encoder.parameters(), *encoder.buffers(), *prototypes.parameters(), *prototypes.buffers()):
        live.see(tensor)
    margin, head, half = build.margin_from(c), build.head_from(c), {"bf16": torch.bfloat16}.get(c.encoder.precision)
    b, k = c.train.batch_size, 1 if c.data.sampler.name == "shuffled" else c.data.sampler.images_per_identity
    for number in range(steps):
        gc.collect()
        live.peak = live.now
        with live:
            images = torch.randint(0, 256, (b, c.data.size, c.data.size, 3), dtype=torch.uint8)
            labels = torch.randint(0, identities, (b // k,)).repeat_interleave(k)
            cut = zip(images.chunk(c.train.accumulate), labels.chunk(c.train.accumulate))
            step.forward_backward(
                [step.MicroBatch(part, own, [len(own)]) for part, own in cut],
                encoder,
                prototypes,
                head,
                margin,
                number,
                criterion=criterion,
                prepare=lambda x: normalise(x, channels_last=c.encoder.channels_last),
                autocast=lambda: torch.autocast("cpu", dtype=half, enabled=half is not None),
                extras=step.Extras(encoder=encoder, key_encoder=key_encoder),
            )
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            del images, labels, cut
    gc.collect()
    return live.now, live.peak


VPL = ("prototypes.injection.weight=0.15", "prototypes.injection.start=1")
EPL = ("prototypes.empirical.enabled=true", "prototypes.empirical.start_epoch=0")
CONTRAST = ("contrast.weight=0.05", "contrast.start_epoch=0")
ALLOCATED = {  # (settings, identities, phase in which the most is there)
    "classifier": (SMALL, 20000, "encoder backward"),
    "classifier, wide": ((*SMALL, "encoder.embedding_size=512", "train.batch_size=128"), 3000, "encoder backward"),
    "classifier, adamw": ((*SMALL, "optimizer.name=adamw"), 20000, "encoder backward"),
    "classifier, lamb": ((*SMALL, "optimizer.name=lamb", "train.batch_size=4"), 20000, "optimizer"),
    "classifier, no momentum": ((*SMALL, "optimizer.momentum=0"), 20000, "encoder backward"),
    "classifier, fused update": ((*SMALL, "optimizer.fuse_prototypes=true"), 20000, "encoder backward"),
    "classifier, fused update, adamw": (
        (*SMALL, "optimizer.fuse_prototypes=true", "optimizer.name=adamw", "train.batch_size=4"),
        20000,
        None,
    ),
    "classifier, sub-centres": ((*SMALL, "prototypes.sub_centers=3"), 7000, "encoder backward"),
    "classifier, sub-centres, few images": ((*SMALL, "prototypes.sub_centers=2", "train.batch_size=4"), 20000, None),
    "sampled, sub-centres": (
        (*SMALL, "prototypes.source=sampled", "prototypes.sub_centers=3", "prototypes.rate=0.9", "train.batch_size=4"),
        7000,
        None,
    ),
    "classifier, sub-centres + EPL": ((*SMALL, *EPL, "prototypes.sub_centers=3"), 7000, None),
    "classifier, dense head": ((*SMALL, "head.backend=dense"), 20000, "head"),
    "classifier, bf16": ((*SMALL, "encoder.precision=bf16", "head.precision=bf16"), 2000, None),
    "classifier, micro-batches": ((*SMALL, "train.accumulate=2"), 20000, "encoder backward"),
    "sampled": ((*SMALL, "prototypes.source=sampled"), 40000, "encoder backward"),
    "sampled, most rows": (
        (*SMALL, "prototypes.source=sampled", "prototypes.rate=0.9", "train.batch_size=4"),
        20000,
        "optimizer",
    ),
    "sampled, adamw": (
        (*SMALL, "prototypes.source=sampled", "prototypes.rate=0.9", "train.batch_size=4", "optimizer.name=adamw"),
        20000,
        "optimizer",
    ),
    "sampled, exact": (
        (*SMALL, "prototypes.source=sampled", "prototypes.rate=0.9", "train.batch_size=4", "optimizer.untouched=exact"),
        20000,
        None,
    ),
    "memory": ((*SMALL, *MEMORY), 100000, "encoder backward"),
    "memory, bf16 rows": ((*SMALL, *MEMORY, "prototypes.memory.storage=bf16"), 100000, "head"),
    "memory that learns": ((*SMALL, *MEMORY, "prototypes.memory.gradient=sgd"), 100000, "encoder backward"),
    "classifier + VPL": ((*SMALL, *VPL), 20000, "head"),
    "classifier + EPL": ((*SMALL, *EPL), 20000, "encoder backward"),
    "memory + VPL": ((*SMALL, *MEMORY, *VPL), 100000, "head"),
    "unified": ((*SMALL, "margin.criterion=unified"), 20000, "encoder backward"),
    "memory, averaged encoder": ((*SMALL, *MEMORY, "prototypes.memory.key_encoder=0.9"), 100000, "forward"),
    "iresnet18": (IRESNET, 2000, "encoder backward"),
    "iresnet18, checkpointing": ((*IRESNET, "encoder.checkpointing=true"), 2000, "encoder backward"),
    "mobilefacenet": ((*IRESNET, "encoder.name=mobilefacenet"), 2000, "encoder backward"),
    "vit_t": ((*IRESNET, "encoder.name=vit_t", "train.batch_size=16"), 2000, "encoder backward"),
}


@pytest.mark.parametrize("name", ALLOCATED)
def test_bytes_are_those_that_are_allocated(name):
    settings, identities, phase = ALLOCATED[name]
    stay, peak = allocations(settings, identities)
    plan = rank_bytes(case_of(*settings, identities=identities))
    between = ("input images", "encoder gradients")  # both of a step: the last are dropped after it
    assert sum(v for k, v in plan.stays.items() if k not in between) == pytest.approx(stay, rel=0.005)
    assert plan.counted == pytest.approx(peak, rel=0.05)
    assert phase is None or plan.worst == phase


COMMUNICATING = {
    "classifier": ("train.batch_size=7", "optimizer.clip=5"),
    "classifier, magface, lamb": ("margin.name=magface", "encoder.last_bn=learnable", "optimizer.name=lamb"),
    "classifier, micro-batches": ("train.accumulate=3", "head.backend=dense"),
    "classifier + VPL": VPL,
    "classifier + EPL": EPL,
    "contrast": CONTRAST,
    "large scale": ("margin.scale=301",),
    "unified": ("margin.criterion=unified",),
    "sampled": ("prototypes.source=sampled", "encoder.name=mobilefacenet"),
    "memory": (*MEMORY, "data.sampler.name=mixed", "prototypes.memory.size=20", "data.sampler.refresh=0"),
    "memory, recognizability, averaged encoder": (
        *MEMORY,
        "prototypes.memory.size=20",
        "quality.estimator=recognizability",
        "prototypes.memory.key_encoder=0.9",
    ),
    "memory, look-alikes": (
        *MEMORY,
        "prototypes.memory.size=20",
        "data.sampler.name=mixed",
        "data.sampler.pick=look_alike",
        "data.sampler.refresh=0.5",
        "data.sampler.images_per_identity=2",
    ),
}
DATA = ("data.train=patterns:identities=64,images=6,size=32", "data.size=32", "data.loader=torch", "log.every=1000")
DATA += ("encoder.name=small", "encoder.embedding_size=16", "train.batch_size=16", "schedule.epochs=0", "schedule.steps=9")
# In their order, with bytes: 16 images on two ranks, D = 16; without DDP's. Labels are int64 (16 x 8 bytes), embeddings float32
# (16 x 16 x 4), statistics two float64 for each row (16 x 2 x 8).
LABELS, X, STATISTICS, DX = ("all_gather", 128), ("all_gather", 1024), ("all_reduce", 256), ("reduce_scatter", 1024)
IN_ORDER = {
    "classifier": [  # 7 images: 4 and 3, which travel as 4; and the norm of all gradients
        *(("all_gather", 64), ("all_gather", 512), ("all_reduce", 112), ("reduce_scatter", 512), ("all_reduce", 4)),
    ],
    "sampled": [LABELS, X, STATISTICS, DX],
    "memory": [LABELS, X, STATISTICS, DX],
    "classifier, magface, lamb": [LABELS, X, STATISTICS, DX, ("all_reduce", 8)],  # norms are not sent; LAMB's two are
    "classifier, micro-batches": [  # of 6, 6 and 4; the labels of all of them at once
        *(LABELS, ("all_gather", 384), ("all_reduce", 96), ("reduce_scatter", 384)),
        *(("all_gather", 384), ("all_reduce", 96), ("reduce_scatter", 384)),
        *(("all_gather", 256), ("all_reduce", 64), ("reduce_scatter", 256)),
    ],
    "classifier + VPL": [LABELS, X, STATISTICS, DX],
    "classifier + EPL": [LABELS, X, STATISTICS, STATISTICS, DX],
    # Two views; the running margin is one number.
    "contrast": [LABELS, ("all_gather", 2048), ("all_reduce", 512), ("all_reduce", 4), ("reduce_scatter", 2048)],
    "unified": [LABELS, X, ("all_reduce", 192), DX],  # three float32 for each row
    "large scale": [LABELS, X, *[("all_reduce", 64)] * 3, DX],
}


def _counted(names, output):
    """{name: ([(kind, bytes)] of the second step, bytes of each of DDP's buckets)} on this rank."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    found, rank = {}, distributed.rank()
    context = distributed.Context(rank, distributed.world_size(), rank, torch.device("cpu"), "torchrun")
    calls, buckets, in_hook = [], [], []

    def record(kind, real, which):
        def call(*args, **kwargs):
            if not in_hook:
                calls.append((kind, args[which].nbytes))
            return real(*args, **kwargs)

        return call

    def hook(state, bucket):
        buckets.append(bucket.buffer().nbytes)
        in_hook.append(True)
        future = allreduce_hook(state, bucket)
        in_hook.pop()
        return future

    distributed._all_gather_flat = record("all_gather", distributed._all_gather_flat, 0)
    distributed._reduce_scatter_flat = record("reduce_scatter", distributed._reduce_scatter_flat, 1)
    torch.distributed.all_reduce = record("all_reduce", torch.distributed.all_reduce, 0)
    for name in names:
        run = Run(config.load([], [*DATA, f"output={output}", *COMMUNICATING[name]]), context)
        run.model = data_parallel(run.encoder, run.device).train()
        run.model.register_comm_hook(None, hook)
        settle_buckets(run.model, run.encoder, run.config.data.size, run.device)
        run.finite = torch.ones(())
        interval.begin(run)
        loader = run._loader(run.sampler)
        for batch, _ in zip(loader.epoch(0), range(2)):
            calls.clear(), buckets.clear()
            run._one_step(batch)
            found[name] = list(calls), list(buckets)
        loader.close()
        if run.memory:
            run.memory.close()
    return found


def test_collectives_are_those_of_a_step(tmp_path):
    for counted in run_ranks(2, _counted, list(COMMUNICATING), tmp_path, timeout=120):
        for name, (calls, buckets) in counted.items():
            case = case_of(*DATA, *COMMUNICATING[name], world=2)
            assert calls == IN_ORDER.get(name, calls), name
            planned = [c for c in collectives(case) if c.behind != "encoder backward"]
            assert sorted(calls) == sorted((c.kind, int(c.size)) for c in planned for _ in range(c.count)), name
            (ddp,) = [c for c in collectives(case) if c.behind == "encoder backward"]
            assert sum(buckets) == case.encoder.trained == ddp.count * ddp.size and ddp.count == len(buckets), name


def test_one_block_of_the_head_is_as_many_kernels_as_the_estimate_says():
    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.number += "view" not in str(function) and not function.is_view
            return function(*args, **(kwargs or {}))

    def operations(blocks, centers=1):
        sink, x = GradSink(), torch.nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
        rows = torch.randn(60 * blocks, 16)
        sink.begin(rows)
        Count.number = 0
        with Count():
            cos, lse = blocked_head(x, Columns(rows, torch.arange(8), sink, centers=centers), 64.0, block=60)
            (lse - cos).sum().backward()
        return Count.number

    each = [(operations(9, k) - operations(1, k)) / 8 for k in (1, 3, 5)]
    assert each[0] == pytest.approx(estimate.BLOCK_KERNELS["fp32"], rel=0.15)
    once, more = estimate.CENTER_KERNELS
    assert each[1] - each[0] == pytest.approx(once + 2 * more, rel=0.15)
    assert each[2] - each[1] == pytest.approx(2 * more, rel=0.15)


def test_floors_are_the_known_ones():
    """Three GEMMs of 1024 x 1,000,000 x 512 in bf16 take 3.99 ms at 788 TFLOP/s, two 2.66; SGD's update 2.4 ms more."""
    common = ("train.batch_size=1024", "head.precision=bf16", "encoder.name=small", "data.size=32")
    case = case_of(*common, gpu="h200", identities=10**6)
    head, update = estimate.phases(case)[-2:]
    assert head.floor == pytest.approx(3.99e-3, rel=0.01) and update.floor == pytest.approx(2.4e-3, rel=0.02)
    memory = ("prototypes.source=memory", "prototypes.memory.size=1000000", "data.sampler.name=balanced")
    case = case_of(*common, *memory, gpu="h200", identities=10**8)
    assert estimate.phases(case)[-2].floor == pytest.approx(2.66e-3, rel=0.01)


def test_flops_and_weights_of_a_known_encoder():
    cost = encoder_cost(case_of("encoder.name=iresnet100", identities=9).config, "cuda")
    assert cost.flops() == pytest.approx(2 * 12.1e9, rel=0.01)  # 12.1 G multiply-adds, as published
    assert cost.weights == pytest.approx(4 * 65.2e6, rel=0.01) and cost.trained < cost.weights
    half = encoder_cost(case_of("encoder.name=iresnet100", "encoder.precision=bf16", identities=9).config, "cuda")
    assert half.kept(1000) == pytest.approx(cost.kept(1000) / 2, rel=0.02)


def test_the_largest_number_of_identities_is_where_it_stops_to_fit():
    case = case_of("train.batch_size=1024", world=8, gpu="a100", identities=10**8)
    most = advice.largest_identities(case)
    assert advice.fits(case.with_identities(most)) and not advice.fits(case.with_identities(most + most // 400))
    assert not advice.fits(case)
    sizes = [change.total for change in advice.changes(case)]
    assert sizes == sorted(sizes) and sizes[-1] < rank_bytes(case).total
    settings = " ".join(change.setting for change in advice.changes(case))
    for word in ("sampled", "memory.size", "checkpointing", "precision=bf16", "world-size"):
        assert word in settings
    assert advice.largest_identities(case_of("train.batch_size=65536", gpu="a6000", identities=9)) == 0


def test_changes_of_a_memory():
    settings = (*SMALL, *MEMORY, "prototypes.memory.size=400000000", "prototypes.memory.gradient=sgd")
    case = case_of(*settings, world=2, gpu="a100", identities=10**9)
    named = {change.setting for change in advice.changes(case)}
    assert {"prototypes.memory.size=200000000", "prototypes.memory.gradient=none"} <= named
    assert "prototypes.memory.storage=bf16" not in named  # refused with gradient=sgd


def test_json_and_table_say_the_same(capsys, tmp_path):
    case = case_of(*SMALL, world=2, gpu="h100", identities=10**6, images=10**7)
    cells = scale.table(case)
    assert len(cells) == 55
    show.print_json(case, cells)
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_total"] == pytest.approx(
        sum(found["bytes_per_rank"].values())
        + sum(found["bytes_by_phase"][found["worst_phase"]].values())
        + sum(found["bytes_assumed"].values())
    )
    (same,) = [c for c in found["table"] if c["world"] == 2 and c["identities"] == 10**6]
    assert same["total"] == pytest.approx(found["bytes_total"])
    assert same["images_per_s"] == pytest.approx(found["images_per_s_estimate"])
    show.print_plan(case)
    show.print_table(case, cells)
    text = capsys.readouterr().out
    assert "estimate, not measured" in text and "fits" in text and "(assumed)" in text and " !" in text
    scale.plot(case, cells, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_command_needs_no_data_and_imports_nothing_slow():
    code = "import sys; from protomem.cli import app; app(standalone_mode=False); "
    code += "assert not {'matplotlib', 'sympy', 'torch._dynamo'} & set(sys.modules)"
    arguments = ["plan", "configs/scale/100m.yaml", "--world-size", "64"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "100,000,000 identities" in done.stdout and "images/s" in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize(
    "settings, options, message",
    [
        ((), {}, "data.train is not set: say how many identities there are with --identities"),
        (("data.train=/nowhere",), {}, "--identities"),
        ((), {"identities": 0}, "--identities 0 must be at least 1"),
        ((), {"identities": 9, "world": 0}, "--world-size 0"),
        ((), {"identities": 9, "world": 1024}, "train.batch_size=512"),
        ((), {"identities": 9, "gpu": "v100"}, "--gpu v100 is not one of h200, h100"),
        ((), {"identities": 9, "fabric": "carrier-pigeon"}, "--fabric carrier-pigeon is not one of"),
    ],
)
def test_errors_say_what_to_do(settings, options, message):
    with pytest.raises(UserError, match=message):
        case_of(*settings, **options)


def test_an_error_of_the_command_is_one_line():
    done = protomem("plan", "train.batch_sise=9", "--world-size", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "train.batch_size" in done.stderr
    assert done.stderr.count("\n") == 1


def test_identities_of_a_set_that_is_here(small_set):
    case = case_of(f"data.train={small_set}")
    assert (case.identities, case.images) == (31, 248)
    assert case_of(f"data.train={small_set}", identities=77).identities == 77


@pytest.mark.parametrize(
    "identities, centers, fuse, precision, store",
    [
        (50_000, 1, "false", "bf16", 16),
        (50_000, 1, "true", "bf16", 16),
        (50_000, 1, "false", "bf16", 2000),
        (50_000, 1, "false", "fp32", 100),
        (20_000, 3, "false", "bf16", 16),
        (20_000, 3, "true", "fp32", 2000),
    ],
)
def test_bytes_of_the_triton_head(identities, centers, fuse, precision, store, monkeypatch):
    """What it allocates, while its kernels do nothing."""
    monkeypatch.setattr(triton_head, "check", lambda device: None)
    monkeypatch.setattr(triton_head, "launch", lambda *a, **k: None)
    names = ("operands", "merge", "finish", "logits", "add_dx", "row_grads", "finish_sgd")
    monkeypatch.setattr(triton_head.kernels, "load", lambda: (SimpleNamespace(**dict.fromkeys(names)),) * 3)
    b, d = 512, 512
    settings = ("head.backend=triton", f"head.precision={precision}", f"head.store_mb={store}", f"train.batch_size={b}")
    settings += (f"prototypes.sub_centers={centers}", f"optimizer.fuse_prototypes={fuse}", f"encoder.embedding_size={d}")
    case, live = case_of(*settings, "encoder.name=small", identities=identities), Live()
    rows = torch.nn.Parameter(torch.ones(centers * identities, d))
    sink, x = GradSink(), torch.nn.functional.normalize(torch.randn(b, d)).requires_grad_()
    if fuse == "true":
        sink.update = BlockUpdate(build_optimizer([{"params": [rows]}], "sgd", lr=0.1, fused=True), rows)
    sink.begin(rows.detach())
    stays = [sink.buffer] if fuse == "false" else sink.update.optimizer.state[rows].values()
    for tensor in (x, rows, *stays):
        live.see(tensor)
    before = live.now
    with live:
        columns = Columns(rows.detach(), torch.zeros(b, dtype=torch.long), sink, centers=centers)
        cos_y, lse = triton_head.triton_head(x, columns, 64.0, precision=precision, store_mb=store)
        (lse - cos_y).sum().backward()
    assert _head_work(case, 4.0 * b * d) == pytest.approx(live.peak - before, rel=0.05)
