"""Numbers of devices and fabrics that the plan computes with, and where each comes from. Everything else is arithmetic.

Data sheet: dense tensor-core rates and bandwidths as NVIDIA gives them, which nobody reaches. Measured: what a large GEMM or
copy really did (protomem's own measurements). Assumed: a guess of ours, to be replaced by a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protomem.errors import UserError

NODE = 8  # GPUs of a machine (assumed), among which the fast links are
CONTEXT_GB = 1.5  # CUDA context with cuBLAS and cuDNN and their workspaces (assumed)
NCCL_GB = 1.0  # NCCL's buffers with several ranks (assumed)
FRAGMENTS = 0.05  # share of what comes and goes in a step that the allocator loses in gaps (assumed)
ENCODER_EFFICIENCY = 0.4  # of the encoder's floor (assumed)
GEMM_EFFICIENCY = 0.7  # of the head's GEMMs and of optimizers (assumed)
LAUNCH_US = 5.0  # host time of one kernel launch from Python (assumed): what small blocks of the head are bound by
OVERLAP = 0.8  # share of a phase behind which its collectives can hide (assumed): DDP's behind the encoder's backward


@dataclass(frozen=True)
class Device:
    """half, tf32, full: TFLOP/s of bf16/fp16, TF32 and fp32 arithmetic; bandwidth in TB/s; memory in 10^9 bytes."""

    name: str
    half: float
    tf32: float
    full: float
    bandwidth: float
    memory: float
    fabric: str
    source: str

    @property
    def kind(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"


@dataclass(frozen=True)
class Fabric:
    """GB/s in one direction per GPU within a machine (None: that of the GPU's own links) and between machines; latency of a
    hop in microseconds within and between."""

    name: str
    within: float | None
    between: float
    latency: tuple[float, float]
    source: str


DEVICES = {
    "h200": Device("h200", 788, 494, 67, 4.3, 141, "ib400", "bf16 and bandwidth measured, the rest from the data sheet"),
    "h100": Device("h100", 989, 494, 67, 3.35, 80, "ib400", "data sheet (SXM)"),
    "a100": Device("a100", 312, 156, 19.5, 2.04, 80, "ib200", "data sheet (SXM, 80 GB)"),
    "b200": Device("b200", 2250, 1100, 75, 8.0, 180, "ib400", "data sheet"),
    "a6000": Device("a6000", 155, 77, 38.7, 0.768, 48, "eth100", "data sheet (RTX A6000)"),
    "cpu": Device("cpu", 0.1, 0.1, 0.1, 0.02, 12, "gloo", "assumed: one core a rank and 12 GB"),
}
LINKS = {"h200": 450, "h100": 450, "a100": 300, "b200": 900, "a6000": 25, "cpu": 0.18}  # GB/s one way: NVLink, PCIe, memory
FABRICS = {
    "ib800": Fabric("ib800", None, 100, (3, 6), "data sheet: 800 Gbit/s per GPU"),
    "ib400": Fabric("ib400", None, 50, (3, 6), "data sheet: 400 Gbit/s per GPU"),
    "ib200": Fabric("ib200", None, 25, (3, 6), "data sheet: 200 Gbit/s per GPU"),
    "eth100": Fabric("eth100", None, 12.5 / NODE, (3, 30), "100 Gbit/s per machine, shared by 8 GPUs"),
    "eth25": Fabric("eth25", None, 3.125 / NODE, (3, 30), "25 Gbit/s per machine, shared by 8 GPUs"),
    "gloo": Fabric("gloo", 0.18, 0.1, (600, 1000), "within a machine measured on 2 cores (16 MiB), between assumed"),
}


def device(name: str) -> Device:
    if name not in DEVICES:
        raise UserError(f"--gpu {name} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]


def fabric(name: str | None, on: Device) -> Fabric:
    """By its name; None: the usual one of a device."""
    name = name or on.fabric
    if name not in FABRICS:
        raise UserError(f"--fabric {name} is not one of {', '.join(FABRICS)}")
    return FABRICS[name]


def collective_seconds(kind: str, size: float, world: int, on: Device, via: Fabric) -> float:
    """Time of one collective over `world` ranks. size: bytes of the whole result (all_gather), of the whole input
    (reduce_scatter), or of the reduced buffer (all_reduce).

    A ring moves (W - 1) / W of the bytes past each rank, twice for an all-reduce, at the speed of its slowest link; of the
    latency a tree's share is taken, ceil(log2 W) hops, since that is how small messages travel (an assumption).
    """
    if world == 1:
        return 0.0
    beyond = world > NODE
    speed = via.between if beyond else (via.within or LINKS[on.name])
    hops = math.ceil(math.log2(min(world, NODE))) * via.latency[0]
    hops += math.ceil(math.log2(-(-world // NODE))) * via.latency[1] if beyond else 0.0
    passes = 2 if kind == "all_reduce" else 1
    return passes * ((world - 1) / world * size / (speed * 1e9) + hops * 1e-6)
