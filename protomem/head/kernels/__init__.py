"""Triton kernels of the `triton` head. Triton is imported by `load`, when that head is asked for, and not before."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from protomem.errors import UserError


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of a GPU (TRITON_INTERPRET=1 before the first import): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules `rows`, `products` and `updates`. Raises UserError without Triton."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise UserError(
            f"head.backend=triton needs the package triton ({error}): python -m pip install 'triton>=3.5', or use blocked"
        ) from None
    return tuple(importlib.import_module(f"protomem.head.kernels.{name}") for name in ("rows", "products", "updates"))
