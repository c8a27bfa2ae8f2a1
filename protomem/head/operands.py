"""GEMMs of the head with fp32 or bf16 operands; the sums, and so the results, are always fp32.

bf16 *results* would be wrong here: a cosine rounded to bf16 and multiplied by s = 64 costs 7.5 % of the gradient, while
bf16 operands cost 1 %. GPUs have such a GEMM (`out_dtype`); on CPUs the operands are rounded to bf16 and multiplied as
fp32, with oneDNN allowed to use the bf16 units where the processor has them: the same numbers everywhere.
"""

from __future__ import annotations

import contextlib

import torch


@contextlib.contextmanager
def _cpu_bf16_units():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


class Operands:
    """The three GEMM forms that a head needs; `prepare` an operand once and use it in several. dtype: of the sums."""

    def __init__(self, precision: str, dtype: torch.dtype = torch.float32):
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"head precision {precision!r} is not one of fp32, bf16")
        self.half, self.dtype = precision == "bf16" and dtype == torch.float32, dtype

    def prepare(self, t: torch.Tensor) -> torch.Tensor:
        if not self.half:
            return t.to(self.dtype)  # rows may be stored in bf16
        return t.bfloat16() if t.is_cuda else t.bfloat16().float()

    def matmul(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out = a @ b"""
        if not self.half:
            return torch.mm(a, b, out=out)
        if a.is_cuda:
            return out.copy_(torch.mm(a, b, out_dtype=torch.float32))
        with _cpu_bf16_units():
            return torch.mm(a, b, out=out)

    def addmm(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """total += a @ b"""
        if not self.half:
            return total.addmm_(a, b)
        if a.is_cuda:
            return total.add_(torch.mm(a, b, out_dtype=torch.float32))
        with _cpu_bf16_units():
            return total.addmm_(a, b)
