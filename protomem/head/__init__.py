"""Heads: interchangeable back ends behind one contract (protomem/head/contract.py)."""

from protomem.head import triton_head
from protomem.head.blocked import blocked_head
from protomem.head.contract import Columns, GradSink, Injection, Live, Nearest, Negatives, objective
from protomem.head.dense import dense_head

HEADS = {"dense": dense_head, "blocked": blocked_head, "triton": triton_head.triton_head}

__all__ = [
    *("HEADS", "Columns", "GradSink", "Injection", "Live", "Nearest", "Negatives", "blocked_head", "dense_head", "objective"),
    "triton_head",
]
