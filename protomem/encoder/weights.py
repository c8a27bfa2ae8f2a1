"""Load encoder weights from a file: insightface's backbone.pth, or safetensors. Nothing in the file is executed."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from protomem.errors import UserError


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The file's tensors by name, on the CPU, without the `module.` prefix that a DDP wrapper leaves.

    `*.safetensors` is read with the safetensors package, everything else with torch.load(weights_only=True).
    Raises UserError for a missing or damaged file, and for one that holds anything but tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of a backbone.pth or *.safetensors")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
            raise UserError(
                f"{path} is refused: damaged, or more than tensors{_first_line(named)}; save a plain state_dict"
            ) from None
        except Exception as error:  # damaged bytes make the parser fail in any way it likes
            raise UserError(f"{path} cannot be read as torch weights{_first_line(str(error).splitlines())}") from None
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        found = f"a dict with {', '.join(map(str, list(tensors)[:4]))}" if isinstance(tensors, dict) else type(tensors)
        raise UserError(f"{path} holds {found}, not a state_dict of tensors by name; save encoder.state_dict() alone")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _first_line(lines: list[str]) -> str:
    return f" ({lines[0].strip()[:120]})" if lines else ""


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {path} needs safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors{_first_line(str(error).splitlines())}") from None


def load_weights(encoder: nn.Module, path: str | Path) -> None:
    """Copy the file's tensors into the encoder: every key must be there with its shape, and no other.

    Only `num_batches_tracked`, a counter that inference and training here never read, may be missing. Checked before
    anything is copied, so that a UserError (which names the first few keys of each kind) leaves the encoder as it was.
    """
    tensors, own = read_tensors(path), encoder.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in tensors if k not in own]
    shapes = [
        f"{k} is {list(tensors[k].shape)} in the file and {list(own[k].shape)} in the encoder"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    problems = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise UserError(
            f"{path} does not fit this encoder: {'; '.join(problems)}; check encoder.name and encoder.embedding_size"
        )
    encoder.load_state_dict({k: tensors.get(k, own[k]) for k in own})
