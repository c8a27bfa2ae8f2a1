"""The triton head without a GPU: its numbers by Triton's interpreter, its kernels compiled ahead of time, its errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protomem import build, config
from protomem.block_update import BlockUpdate
from protomem.errors import UserError
from protomem.head import HEADS, Columns, GradSink, Injection, Live, Nearest, Negatives, objective, triton_head, tuning
from protomem.objective.margins import interclass_filter
from protomem.optim import build_optimizer
from tests.test_no_sync import no_waiting

ROOT = Path(__file__).resolve().parent.parent

try:
    import triton
    import triton.backends.compiler
except ImportError:
    triton = None
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed: python -m pip install triton==3.7.1")


def version(package) -> tuple[int, int]:
    return tuple(map(int, package.__version__.split(".")[:2]))


# Before 3.7 the interpreter made a number of an array [1], as the bounds of a loop are there; NumPy 2.4 refuses that.
OLD_INTERPRETER = triton is not None and version(triton) < (3, 7) and version(np) >= (2, 4)

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
TYPES[torch.int8] = "i8"
SPILLED = 192  # bytes of a thread's registers that a candidate of head.tune may lose to memory; Triton 3.6 loses 176 on sm_100
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, by compute capability x 10


@needs_triton
@pytest.mark.skipif(OLD_INTERPRETER, reason="this interpreter needs another NumPy: python -m pip install 'numpy<2.4'")
@pytest.mark.parametrize("name", ["triton_interpreted", "triton_updates", "triton_centers"])
def test_numbers_by_the_interpreter(name):
    """The dense head's loss and gradients, on one rank and on several; torch's updates of the rows, on one to four ranks."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{name}.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


# --- compiling ---------------------------------------------------------------------------------------------------------


def tensors(batch: int, classes: int, size: int, **more) -> tuple[torch.Tensor, Columns]:
    x = F.normalize(torch.ones(batch, size)).requires_grad_()
    rows, sink = torch.ones(classes, size), GradSink()
    sink.begin(rows)
    return x, Columns(rows, torch.zeros(batch, dtype=torch.long), sink, **more)


def everything(batch, classes, size):
    row, weight = torch.zeros(classes, dtype=torch.long), torch.full((classes,), 0.5)
    injection = Injection(torch.ones(9, size), row, weight)
    return tensors(batch, classes, size, valid=torch.ones(classes, dtype=torch.bool), nearest=Nearest(), injection=injection)


def stepped(problem, name: str, **options):
    """The same problem with rows that are updated inside the backward."""
    parameter = torch.nn.Parameter(problem[1].rows)
    update = BlockUpdate(build_optimizer([{"params": [parameter]}], name, lr=0.1, **options), parameter)
    problem[1].sink.update = update
    problem[1].sink.begin(parameter.detach())
    return problem


def calls() -> list[tuple]:
    """(arguments of the head, options, loss terms): between them every tile shape, every optional part on and off, shapes
    that divide well and that do not."""
    found = []
    for precision in ("fp32", "bf16"):
        options = dict(precision=precision, store_mb=0)
        found += [
            ((*tensors(64, 4000, 512), 64.0), options, 1),
            ((*everything(64, 4000, 512), 64.0, interclass_filter(0.3)), options, 2),
            ((*tensors(64, 4000, 512, unit=True), 64.0, None, torch.ones(1)), options, 1),
            ((*tensors(64, 3 * 4000, 512, centers=3, nearest=Nearest()), 64.0, interclass_filter(0.3)), options, 1),
            ((*tensors(64, 3 * 4000, 512, centers=3), 64.0, None, torch.ones(1)), options, 1),
        ]
    found += [
        ((*stepped(tensors(64, 4000, 512), "sgd"), 64.0), options, 1),
        ((*stepped(everything(64, 4000, 512), "sgd", nesterov=True), 64.0), options, 1),
        ((*stepped(everything(7, 1500, 33), "sgd", momentum=0.0), 64.0), options, 1),
        ((*stepped(tensors(64, 4000, 512), "adamw"), 64.0), options, 1),
        ((*stepped(everything(7, 1500, 33), "adamw"), 64.0), options, 1),
        ((*stepped(tensors(1, 1, 1), "adamw"), 64.0), options, 1),
    ]
    found.append(((*everything(7, 1500, 33), 64.0), options, 1))
    found.append(((*tensors(7, 2 * 1501, 33, centers=2), 64.0), options, 2))
    found.append(((*tensors(1, 1, 1), 64.0), options, 1))  # Triton makes a constant of every 1
    found.append(((*tensors(64, 4000, 512, unit=True), 64.0), options, 2))
    return found


def recorded(monkeypatch, calls: list[tuple]) -> dict:
    """Every launch of these calls, once: {what it is compiled for: (kernel, signature, constants, attributes, options)}."""
    launches = {}

    def note(kernel, grid, *args, **constants):
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
        signature, attributes = {}, {}
        for k, (name, value) in enumerate(zip(kernel.arg_names, args)):
            if value is None:
                signature[name], constants[name] = "constexpr", None
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[k,] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and name != "start":
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32"
                attributes[k,] = [["tt.divisibility", 16]] if value % 16 == 0 and name != "start" else []
        assert all(0 < size for size in grid) and len(args) + len(constants) >= len(kernel.arg_names)
        signature |= {name: "constexpr" for name in constants}
        attributes = {k: v for k, v in attributes.items() if v}
        key = (kernel.__name__, *map(str, (signature, constants, attributes, options)))
        launches[key] = (kernel, signature, constants, attributes, options)

    monkeypatch.setattr(triton_head, "launch", note)
    monkeypatch.setattr(triton_head, "check", lambda *_: None)
    for args, options, terms in calls:
        for _ in range(terms):
            cos_y, out = HEADS["triton"](*args[:4], **options, **({} if len(args) < 5 else dict(threshold=args[4])))
            objective(cos_y, out).sum().backward()
    return launches


@needs_triton
def test_kernels_compile_and_fit_into_shared_memory(monkeypatch):
    """For all of these GPUs; and fp32 operands stay fp32. About a minute."""
    launches = recorded(monkeypatch, calls())
    names = {kernel.__name__ for kernel, *_ in launches.values()}
    assert names == {"operands", "finish", "finish_sgd", "finish_adamw", "merge", "logits", "add_dx", "row_grads"}
    for key, launch in launches.items():
        for found in compiled(key, *launch):
            if launch[2].get("HALF") is False:
                assert "tf32" not in found.asm["ptx"], key
            if key[0] == "logits":  # the nearest sub-centre; the interpreter's maximum takes up what is not a number in any case
                assert ("max.NaN.f32" in found.asm["ptx"]) == (launch[2]["CENTERS"] > 1), key


def compiled(key, kernel, signature, constants, attributes, options):
    """What is compiled for each of the GPUs; it fits into their shared memory."""
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    for capability, most in SHARED_MEMORY.items():
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        found = triton.compile(source, target=target, options=options)
        assert found.metadata.shared <= most, (capability, found.metadata.shared, *key)
        yield found


def spilled(cubin: bytes, path: Path) -> int:
    """Bytes of each thread's registers that a program keeps in memory."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


@needs_triton
def test_every_candidate_of_the_tuner_fits_and_keeps_its_registers(monkeypatch, tmp_path):
    """The three products, which alone depend on tiles, with all that a head can do. Less than a minute."""
    tried = [(p, centers, tiles) for p in tuning.TRIED for centers in (1, 3) for tiles in tuning.tried(p, centers)]
    calls = []
    for precision, centers, tiles in tried:
        options = dict(precision=precision, store_mb=1e6, tiles=tiles)
        all_of_it = everything(64, 4000, 512) if centers == 1 else tensors(64, 12000, 512, centers=centers, nearest=Nearest())
        calls.append(((*all_of_it, 64.0, interclass_filter(0.3)), options, 1))
    launches = {k: launch for k, launch in recorded(monkeypatch, calls).items() if k[0] in ("logits", "add_dx", "row_grads")}
    one_of_each = {(p, centers, t.m, t.n, t.k, t.warps, t.stages) for p, centers, t in tried}
    assert sum(name == "logits" for name, *_ in launches) == len(one_of_each)  # and some share the other two
    for key, launch in launches.items():
        for found in compiled(key, *launch):
            assert spilled(found.asm["cubin"], tmp_path / "cubin") <= SPILLED, key


# --- errors and waiting ------------------------------------------------------------------------------------------------


def configured(*more: str):
    return config.load([], ["data.train=x", "output=y", "head.backend=triton", *more])


def test_without_triton_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="head.backend=triton needs the package triton.*: python -m pip install 'triton>=3.5'"):
        build.head_from(configured())
    assert build.head_from(configured("head.backend=blocked"))  # nothing else asks for it


@needs_triton
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_the_error_names_the_alternative(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="head.backend=triton needs an NVIDIA GPU; use head.backend=blocked"):
        build.head_from(configured(f"distributed.device={device}"))


def test_what_has_no_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(triton_head, "check", lambda *_: None)
    x, columns = tensors(4, 9, 5)
    with pytest.raises(UserError, match="no kernel for this margin's effect on negatives; use head.backend=blocked"):
        HEADS["triton"](x, columns, 8.0, Negatives(lambda cos, cos_y: cos, lambda cos, cos_y: cos))
    with pytest.raises(ValueError, match="float32 embeddings, not torch.float64"):
        HEADS["triton"](x.double(), columns, 8.0)
    columns.rows = torch.ones(5, 9).t()
    with pytest.raises(ValueError, match="contiguous rows"):
        HEADS["triton"](x, columns, 8.0)


def test_precision_and_sizes_belong_to_the_kernels_too():
    assert configured("head.precision=bf16", "head.block=4096", "head.store_mb=2000").head.block == 4096


@needs_triton
def test_nothing_between_the_launches_waits_for_the_device(monkeypatch):
    """The kernels do nothing here; what is around them runs under the guard of tests/test_no_sync.py."""
    monkeypatch.setattr(triton_head, "check", lambda *_: None)
    monkeypatch.setattr(triton_head, "launch", lambda *_, **__: None)
    x, live = tensors(6, 40, 8, unit=True)
    live.live, live.own = Live(torch.ones(3, 8).requires_grad_(), torch.tensor([1, -1, 4])), torch.ones(6, 8).requires_grad_()
    live.uses_own, live.sink = torch.ones(6, dtype=torch.bool), None
    several = (*tensors(6, 3 * 40, 8, centers=3, nearest=Nearest()), None, None)
    others = several, (*everything(6, 40, 8), interclass_filter(0.2), None), (*tensors(6, 40, 8), None, torch.ones(1))
    updated = [(*stepped(tensors(6, 40, 8), name), None, None) for name in ("sgd", "adamw")]
    for inputs, columns, negatives, threshold in ((x, live, None, None), *others, *updated):
        with no_waiting():
            if columns.sink is not None:
                columns.sink.begin(columns.rows)
            cos_y, out = HEADS["triton"](inputs, columns, 8.0, negatives, threshold, block=16, store_mb=0.001)
            objective(cos_y, out).sum().backward()
