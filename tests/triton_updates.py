"""Updates of the classifier by the triton head's kernels, by Triton's interpreter, against torch.optim in float64. Run by
tests/test_triton.py in a process of its own."""

import os

assert os.environ.get("TRITON_INTERPRET") == "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protomem.block_update import BlockUpdate
from protomem.head import HEADS, Columns, GradSink, Injection, objective, triton_head
from protomem.optim import build_optimizer
from tests.ranks import run_ranks
from tests.test_block_update import MARGINS, OPTIMIZERS, VPL, configured, run

SGD = dict(name="sgd", weight_decay=0.1)
ADAMW = dict(name="adamw", weight_decay=0.1)
CASES = {  # (optimizer, batch, classes, size, share of rows with features)
    "sgd": (dict(SGD), 9, 75, 21, 0.0),
    "no decay": (dict(name="sgd", weight_decay=0.0), 9, 40, 16, 0.0),
    "nesterov": (dict(SGD, nesterov=True), 4, 40, 96, 0.0),
    "no momentum": (dict(SGD, momentum=0.0), 40, 9, 512, 0.0),
    "adamw": (dict(ADAMW), 9, 75, 21, 0.0),
    "adamw, other betas": (dict(ADAMW, betas=(0.5, 0.9), eps=1e-3), 3, 33, 512, 0.0),
    "one sample": (dict(ADAMW), 1, 33, 96, 0.0),
    "one class": (dict(SGD), 7, 1, 96, 0.0),
    "one of each": (dict(ADAMW), 1, 1, 1, 0.0),
    "injection": (dict(SGD, nesterov=True), 9, 75, 21, 0.3),
    "injection, adamw": (dict(ADAMW), 9, 75, 21, 0.3),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes its time for each program, hardly for what is in it."""
    monkeypatch.setattr(triton_head, "INTERPRETED", triton_head.Tiles(32, 32, 128, 32, 1, 1))


def built(parameter, fused, name, **options):
    return build_optimizer([{"params": [parameter]}], name, lr=0.1, fused=fused, **options)


@pytest.mark.parametrize("name", list(CASES))
def test_steps_are_torchs(name):
    """The same gradients, in fp32, for torch's optimizer in float64: four steps, each with other rates and decay."""
    options, batch, classes, size, share = CASES[name]
    g = torch.Generator().manual_seed(classes)
    rows = torch.nn.Parameter(torch.randn(classes, size, generator=g))
    exact = torch.nn.Parameter(rows.detach().double())
    optimizer, reference = built(rows, None, **options), built(exact, False, **options)
    update, injection = BlockUpdate(optimizer, rows), None
    assert update.fused
    if share:
        weight = 0.5 * (torch.rand(classes, generator=g) < share)
        injection = Injection(F.normalize(torch.randn(classes, size, generator=g)), None, weight)
    for step in range(4):
        for group in (optimizer.param_groups[0], reference.param_groups[0]):
            group["lr"], group["weight_decay"] = 0.1 * 0.6**step, group["weight_decay"] * 0.8
        x = F.normalize(torch.randn(batch, size, generator=g)).requires_grad_()
        target = torch.randint(-1, classes, (batch,), generator=g)
        sinks = GradSink(), GradSink()
        sinks[1].update = update
        for sink in sinks:  # the gradient, then the rows
            sink.begin(rows.detach())
            columns = Columns(rows.detach(), target, sink, injection=injection)
            cos_y, lse = HEADS["triton"](x, columns, 16.0, block=32)
            objective(16 * (cos_y - 0.4), lse).sum().backward()
        exact.grad = sinks[0].buffer.double()
        reference.step()
    assert exact.grad.abs().max() > 0.01 or classes == 1 == size
    if update.adam:  # as float64 has them, also where 1 - beta^t is small
        (beta1, beta2), t = optimizer.param_groups[0]["betas"], 4
        assert update.corrections.tolist() == pytest.approx([1 / (1 - beta1**t), (1 - beta2**t) ** -0.5], rel=1e-7)
    pairs = [(rows, exact), *((v, reference.state[exact][k]) for k, v in optimizer.state[rows].items() if v is not None)]
    assert len(pairs) == {"sgd": 1 + (options.get("momentum", 0.9) > 0), "adamw": 4}[options["name"]]
    for found, expected in pairs:
        error = (found.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error < 1e-6, (name, error.item())


@pytest.mark.parametrize("world, classes", [(1, 75), (2, 75), (3, 40), (4, 5)])  # 4 ranks hold 2, 2, 1 and 0 of five rows
def test_training_is_that_of_whole_gradients_in_float64(world, classes):
    """Four steps through the gather, with the chunks' gradients in kernels, or handed to torch (optimizer.fused=false)."""
    cases = [("sgd", "cosface", None), ("nesterov", "arcface", VPL), ("adamw", "cosface", VPL)]
    cases.append(("adamw, unfused", "arcface", None))
    stable = ("optimizer.eps=0.01",)  # AdamW's first steps are signs of the gradient, where it is small of fp32's errors
    settings = {o: (*OPTIMIZERS[o], *(stable if "adamw" in o else ())) for o, *_ in cases}
    configs = {o: [configured(*s, f"optimizer.fuse_prototypes={f}") for f in ("false", "true")] for o, s in settings.items()}
    options = dict(batch=9, size=21)

    def work():
        results = []
        for o, margin, injection in cases:
            plain, fused = configs[o]
            launched, real = set(), triton_head.launch

            def launch(kernel, *args, **constants):
                launched.add(kernel.fn.__name__)
                real(kernel, *args, **constants)

            triton_head.launch = launch
            given = dict(dtype=torch.float32, backend="triton", head={"block": 32, "store_mb": 0.004}, **options)
            found = run(fused, MARGINS[margin], classes, injection, **given)
            triton_head.launch = real
            results.append((found, run(plain, MARGINS[margin], classes, injection, **options), launched))
        return results

    for rank, results in enumerate(run_ranks(world, work, timeout=300)):
        for (o, *_), (found, expected, launched) in zip(cases, results):
            if len(found[1][0]):
                kernel = "finish" if configs[o][1].optimizer.fused is False else "finish_" + configs[o][1].optimizer.name
                assert {k for k in launched if k.startswith("finish")} == {kernel}
            assert found[3].keys() == expected[3].keys()
            pairs = [*zip(found[:3], expected[:3]), *((found[3][k], expected[3][k]) for k in expected[3])]
            for a, b in pairs:
                a, b = np.stack(a) if isinstance(a, list) else a, np.stack(b) if isinstance(b, list) else b
                assert a.shape == b.shape and np.abs(a - b).max(initial=0) <= 3e-6 * np.abs(b).max(initial=1e-3), (rank, o)


def test_a_run_goes_on_in_either_way():
    """A step with a whole gradient, one inside the backward, from a state that has been saved and loaded, and back."""
    for options in (dict(SGD), dict(ADAMW, eps=1e-2)):
        rows = torch.nn.Parameter(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)))
        exact = torch.nn.Parameter(rows.detach().double())
        optimizer, reference = built(rows, None, **options), built(exact, None, **options)
        for step in range(4):
            x = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(step)))
            for p, o, head in ((rows, optimizer, "triton"), (exact, reference, "dense")):
                sink = GradSink()
                sink.update = BlockUpdate(o, p) if step % 2 and p is rows else None
                p.grad = sink.begin(p.detach())
                target = torch.tensor([3, 3, 9, -1, 30])
                cos_y, lse = HEADS[head](x.to(p.dtype).requires_grad_(), Columns(p.detach(), target, sink), 16.0)
                objective(16 * (cos_y - 0.4), lse).sum().backward()
                o.step()
            state = optimizer.state_dict()
            optimizer = built(rows, None, **options)
            optimizer.load_state_dict(state)
        mine, torchs = optimizer.state_dict(), reference.state_dict()
        assert mine["param_groups"] == torchs["param_groups"]
        assert {k: (v.shape, v.device) for k, v in mine["state"][0].items()} == {
            k: (v.shape, v.device) for k, v in torchs["state"][0].items()
        }
        for a, b in [(rows, exact), *zip(mine["state"][0].values(), torchs["state"][0].values())]:
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
