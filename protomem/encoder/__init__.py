"""Encoders: aligned face images -> embeddings. `build_encoder` is the way in."""

from __future__ import annotations

import difflib
from functools import partial

from protomem.encoder.base import Encoder
from protomem.encoder.iresnet import DEPTHS, IResNet
from protomem.encoder.mobilefacenet import MobileFaceNet
from protomem.encoder.small import SmallNet
from protomem.encoder.vit import SIZES, ViT
from protomem.errors import UserError

ENCODERS = {
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in DEPTHS},
    "mobilefacenet": MobileFaceNet,
    **{size: partial(ViT, size) for size in SIZES},
    "small": SmallNet,
}


def build_encoder(
    name: str,
    embedding_size: int = 512,
    *,
    dropout: float = 0.0,
    last_bn: str = "frozen",
    checkpointing: bool = False,
    input_size: int = 112,
) -> Encoder:
    """An encoder with fresh weights: images [b,3,S,S] normalised to [-1,1] -> embeddings [b,D], not L2-normalised.

    name: iresnet18/34/50/100/200, mobilefacenet, vit_t/vit_s/vit_b/vit_l, small.
    dropout: probability in [0,1) of zeroing a feature before the fully connected layer.
    last_bn: `frozen` (the weight of the last BatchNorm stays 1, insightface's default and ours) or `learnable`.
    checkpointing: recompute each block's activations in backward: less memory, about a third more compute.
    input_size: S, pixels; the weights depend on it.

    Raises UserError for an unknown name (naming the nearest) and for options the encoder cannot honour.
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"encoder {name} is unknown; {hint}there are {', '.join(ENCODERS)}")
    if last_bn not in ("frozen", "learnable"):
        raise UserError(f"last_bn={last_bn} is not one of frozen, learnable")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} is not in [0, 1)")
    if embedding_size < 1 or input_size < 1:
        raise UserError(f"embedding_size={embedding_size} and input_size={input_size} must be positive")
    return ENCODERS[name](
        embedding_size=embedding_size,
        dropout=dropout,
        last_bn=last_bn,
        checkpointing=checkpointing,
        input_size=input_size,
    )
