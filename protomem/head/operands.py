"""GEMMs of the head with fp32 or bf16 operands; the sums are always fp32, and so are the logits.

bf16 *logits* would be wrong: a cosine rounded to bf16 and multiplied by s = 64 costs 7.5 % of the gradient, while bf16 operands
cost 1 %. GPUs have a GEMM of bf16 operands with fp32 results (`out_dtype`). CPUs with bf16 units (AVX512-BF16, AMX) only have
one with bf16 results, at half the time of fp32. There logits come from fp32 operands, and the products of the backward, whose
results may be rounded (0.2 % of each number, not systematic), from bf16. On other CPUs operands are rounded and multiplied as
fp32: the numbers of a GPU, at the time of fp32.
"""

from __future__ import annotations

import contextlib

import torch


@contextlib.contextmanager
def _cpu_bf16_units():
    """oneDNN may round fp32 operands where the processor can sum such products in fp32 (AMX); others go on in fp32."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def has_units(device: torch.device) -> bool:
    """Whether this device is a CPU that multiplies bf16 faster than fp32."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it in all versions
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and asked is not None and asked()


class Operands:
    """The GEMM forms that a head needs; `prepare` an operand once and use it in several. dtype: of the sums."""

    def __init__(self, precision: str, dtype: torch.dtype = torch.float32, device: torch.device = torch.device("cpu")):
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"head precision {precision!r} is not one of fp32, bf16")
        self.half, self.dtype = precision == "bf16" and dtype == torch.float32, dtype
        self.units = self.half and has_units(device)

    def prepare(self, t: torch.Tensor) -> torch.Tensor:
        """An operand of `matmul` and `addmm`."""
        if not self.half:
            return t.to(self.dtype)  # rows may be stored in bf16
        return t.bfloat16() if t.is_cuda or self.units else t.bfloat16().float()

    def prepare_logits(self, t: torch.Tensor) -> torch.Tensor:
        """An operand of a `matmul` that makes logits."""
        return t.to(self.dtype) if self.units else self.prepare(t)

    def matmul(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out = a @ b"""
        if a.dtype == torch.bfloat16:
            return out.copy_(self._rounded(a, b))
        with _cpu_bf16_units() if self.half else contextlib.nullcontext():
            return torch.mm(a, b, out=out)

    def addmm(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """total += a @ b"""
        if a.dtype == torch.bfloat16:
            return total.add_(self._rounded(a, b))
        with _cpu_bf16_units() if self.half else contextlib.nullcontext():
            return total.addmm_(a, b)

    def _rounded(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b of bf16 operands, summed in fp32; rounded to bf16 on CPUs."""
        return torch.mm(a, b) if self.units else torch.mm(a, b, out_dtype=torch.float32)
