"""torch.compile for the encoder that is trained, plain or with CUDA graphs (not yet measured on a GPU).

A CUDA graph is recorded once and then started as a whole, so that the host no longer launches kernel by kernel: worth it where
the GPU waits for the host, with small encoders or few images a rank. What it asks for:

* Every run writes its outputs over those of the last one. The embeddings are therefore copied, and torch is told where a run
  begins; two views (CoReFace) come from one run.
* Gradients are written over, too, and `p.grad` may be that very memory: a second micro-batch would add to what it has just
  overwritten (pytorch issue 169545). Refused with train.accumulate > 1.
* A graph has one shape. The rows of a rank are as many in every step, so it is recorded once; ranks may differ by a row.
* Its memory stays reserved between steps. Evaluation, and the averaged encoder, run the module itself, without a graph.
"""

from __future__ import annotations

from typing import Callable

import torch


def compiled(model: torch.nn.Module, mode: str) -> Callable:
    """`model` as it is called in training; mode: off, default or graphs. The first step compiles, for a minute or more."""
    if mode == "off":
        return model
    if mode == "default":
        return torch.compile(model)
    run = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def graphed(*args):
        torch.compiler.cudagraph_mark_step_begin()
        out = run(*args)
        return tuple(o.clone() for o in out) if isinstance(out, tuple) else out.clone()

    return graphed
