"""What an encoder costs, without running it: a pass over meta tensors, which have shapes and no memory.

Every operation is seen once (a torch function mode), and what autograd would keep of it (saved-tensor hooks), each storage
counted once. The pass takes a prime number of images, so that bytes that are a multiple of it belong to images and the rest
to weights. Autocast does not exist on meta tensors: its casts are made here. Arithmetic has stand-ins that keep what the
real operations keep: torch's meta versions import 850 modules (1.5 s), and their attention keeps what no real kernel does.
An operation without a stand-in still works, more slowly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode

from protomem.encoder import build_encoder
from protomem.encoder.base import Encoder
from protomem.schema import Config

IMAGES = 10007  # of the pass: a prime, and no dimension of a weight
# Values that are not wanted.
RANDOM = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "erfinv_", "zeros_", "ones_", "fill_", "zero_"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What autocast runs in half precision and what in fp32: torch's lists for each kind of device, as far as encoders use them.
LOWER = {
    "cuda": {"conv2d", "linear", "matmul", "prelu", "scaled_dot_product_attention"},
    "cpu": {"conv2d", "linear", "matmul", "scaled_dot_product_attention"},
}
UPPER = {"cuda": {"layer_norm"}, "cpu": set()}
VIEWS = {"flatten", "unflatten", "transpose", "permute", "unbind", "view", "reshape", "chunk"}


@dataclass
class Op:
    """One operation, per image; `constant` (bytes kept whatever the batch: half-precision copies of weights, statistics of
    it) and `gradients` (bytes of the weights that get theirs here) are not."""

    name: str
    block: int | None  # what checkpointing would recompute together
    flops: float = 0.0
    half: bool = False  # computed in half precision
    moved: float = 0.0  # bytes read and written where nothing is fused
    out: float = 0.0
    kept: float = 0.0
    constant: float = 0.0
    gradients: float = 0.0


@dataclass(eq=False)
class EncoderCost:
    """weights, trained (of them), buffers in bytes; tensors that are trained; BatchNorms and their channels."""

    weights: int = 0
    trained: int = 0
    buffers: int = 0
    tensors: int = 0
    norms: int = 0
    channels: int = 0
    image: int = 0  # bytes of one as the encoder's input
    ops: list[Op] = field(default_factory=list)
    inputs: dict[int, float] = field(default_factory=dict)  # bytes of each block's input per image

    @functools.lru_cache(maxsize=None)  # noqa: B019  a plan ends with its process
    def kept(self, images: int, checkpointing: bool = False) -> float:
        """Bytes kept for backward when forward ends."""
        ops = [op for op in self.ops if not checkpointing or op.block is None]
        total = sum(op.kept * images + op.constant for op in ops)
        return total + (images * sum(self.inputs.values()) if checkpointing else 0.0)

    def inference_peak(self, images: int) -> float:
        """Bytes of a forward pass that keeps nothing: the images, an operation's input and output, a residual branch's."""
        return images * (self.image + max((2 * (a.out + b.out) for a, b in zip(self.ops, self.ops[1:])), default=0.0))

    @functools.lru_cache(maxsize=None)  # noqa: B019  a plan ends with its process
    def backward_peak(self, images: int, checkpointing: bool, with_gradients: bool) -> float:
        """Most bytes at any time of backward: what is still kept, the weights' gradients so far (if `with_gradients`; else
        they are counted elsewhere), and the maps in flight: gradients of an output, an input and a residual branch."""
        peak, left, gradients, inside, current = 0.0, self.kept(images, checkpointing), 0.0, 0.0, None
        before = [0.0] + [op.out for op in self.ops[:-1]]
        for op, incoming in zip(reversed(self.ops), reversed(before)):
            if checkpointing and op.block not in (None, current):  # the block runs once more, and then keeps its own
                current = op.block
                left -= images * self.inputs[current]
                inside = sum(o.kept * images + o.constant for o in self.ops if o.block == current)
            gradients += op.gradients if with_gradients else 0.0
            flying = images * (op.out + incoming + self.inputs.get(op.block, 0.0))
            peak = max(peak, left + inside + gradients + flying)
            freed = op.kept * images + op.constant
            if checkpointing and op.block is not None:
                inside -= freed
            else:
                left -= freed
        return peak

    def flops(self) -> float:
        """Of a forward pass of one image."""
        return sum(op.flops for op in self.ops)


class _Keep(torch.autograd.Function):
    """An empty tensor like `like`, of a shape, for which `kept` is kept: an operation that is never differentiated."""

    @staticmethod
    def forward(ctx, like, shape, *kept):
        ctx.save_for_backward(*kept)
        return like.new_empty(shape)


class _KeepResult(torch.autograd.Function):
    """The same, and the result is kept, too."""

    @staticmethod
    def forward(ctx, like, *kept):
        out = like.new_empty(like.shape)
        ctx.save_for_backward(out, *kept)
        return out


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *pairs)]
    return _Keep.apply(x, (len(x), len(weight), *size), x, weight)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    statistics = [torch.empty(x.shape[1], device="meta") for _ in range(2)] if training else []
    return _Keep.apply(x, x.shape, x, weight, *statistics)


def _attention(q, k, v):
    """As fused kernels do it, without the tokens x tokens matrix."""
    return _KeepResult.apply(q, q, k, v, q.new_empty(q.shape[:-1], dtype=torch.float32))


def _dropout(x, p=0.5, training=True, inplace=False):
    if p == 0 or not training:
        return x
    return _Keep.apply(x, x.shape, torch.empty(x.shape, dtype=torch.uint8, device="meta"))


def _linear(x, weight, bias=None):
    return _Keep.apply(x, (*x.shape[:-1], len(weight)), x, weight)


def _keeps_input(x, *weight):
    return _Keep.apply(x, x.shape, x, *weight[:1])


def _relu(x, inplace=False):
    return _KeepResult.apply(x)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    statistics = [torch.empty(x.shape[:-1], device="meta") for _ in range(2)]
    return _Keep.apply(x, x.shape, x, weight, *statistics)


def _add(x, y):
    like = x if torch.promote_types(x.dtype, y.dtype) == x.dtype else y
    return _Keep.apply(like, max(x.shape, y.shape))  # one of them may be the same for all images


STAND_INS = {
    "add": _add,
    "conv2d": _conv2d,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "prelu": _keeps_input,
    "gelu": _keeps_input,
    "relu": _relu,
    "layer_norm": _layer_norm,
}


class _Watch(TorchFunctionMode):
    """owned: bytes of the gradient of each of the encoder's storages (0: it has none)."""

    def __init__(self, cost: EncoderCost, owned: dict[int, int], device: str):
        super().__init__()
        self.cost, self.owned, self.device = cost, owned, device
        self.half: torch.dtype | None = None
        self.block: int | None = None
        self.op: Op | None = None
        self.seen: dict[int, object] = {}  # storages, held so that no address is given away again
        self.casts: dict[tuple, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen and storage._cdata not in self.owned and self.op is not None:
            self.seen[storage._cdata], size = storage, storage.nbytes()
            if size % IMAGES == 0:
                self.op.kept += size / IMAGES
            else:
                self.op.constant += size
        return tensor

    def _cast(self, value, dtype: torch.dtype):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        key = value.untyped_storage()._cdata
        if key not in self.owned:
            return value.to(dtype)
        if (key, dtype) not in self.casts:  # autocast casts a weight once
            self.casts[key, dtype] = value.to(dtype)
        return self.casts[key, dtype]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if self.half is not None and name in LOWER[self.device] | UPPER[self.device]:
            dtype = self.half if name in LOWER[self.device] else torch.float32
            args, kwargs = [self._cast(a, dtype) for a in args], {k: self._cast(v, dtype) for k, v in kwargs.items()}
        self.op = op = Op(name, self.block)
        out = STAND_INS.get(name, function)(*args, **kwargs)
        self.op = None
        if isinstance(out, torch.Tensor) and out.ndim > 1 and len(out) == IMAGES and name not in VIEWS:
            self._count(op, given, out)
        return out

    def _count(self, op: Op, given: list[torch.Tensor], out: torch.Tensor) -> None:
        per_image, weights = out.numel() / IMAGES, [t for t in given if t.ndim > 1 and len(t) != IMAGES]
        op.half = out.dtype in HALF.values()
        op.out = per_image * out.element_size()
        op.moved = op.out + sum(t.numel() / IMAGES * out.element_size() for t in given if t.ndim and len(t) == IMAGES)
        if op.name in ("conv2d", "linear"):
            op.flops = 2 * per_image * math.prod(weights[0].shape[1:])
        elif op.name == "scaled_dot_product_attention":
            op.flops = 4 * per_image * given[1].shape[-2]
        op.gradients = sum(self.owned.get(t.untyped_storage()._cdata, 0) for t in given)
        self.cost.ops.append(op)


class _NoValues(TorchFunctionMode):
    """Leaves out the initial values of weights, which meta tensors do not have."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def encoder_cost(config: Config, device: str) -> EncoderCost:
    """The cost of a config's encoder on `device` (cuda or cpu), whatever its checkpointing. Takes about 0.2 s."""
    c = config.encoder
    dropout = max(c.dropout, config.contrast.dropout if config.contrast.weight > 0 else 0.0)
    with _NoValues(), torch.device("meta"):
        encoder = build_encoder(c.name, c.embedding_size, dropout=dropout, last_bn=c.last_bn, input_size=config.data.size)
    return trace(encoder.freeze_statistics(c.freeze_statistics), config.data.size, c.precision, device)


def trace(encoder: Encoder, size: int, precision: str, device: str) -> EncoderCost:
    """The cost of an encoder on the meta device for images [b, 3, size, size]."""
    parameters, buffers = list(encoder.parameters()), list(encoder.buffers())
    trained = [p for p in parameters if p.requires_grad]
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    cost = EncoderCost(
        weights=sum(p.nbytes for p in parameters),
        trained=sum(p.nbytes for p in trained),
        buffers=sum(b.nbytes for b in buffers),
        tensors=len(trained),
        norms=len(norms),
        channels=sum(m.num_features for m in norms),
        image=3 * size**2 * 4,
    )
    owned = {t.untyped_storage()._cdata: 0 for t in parameters + buffers}
    owned |= {p.untyped_storage()._cdata: p.nbytes for p in trained}
    watch = _Watch(cost, owned, device)
    embed, blocks = encoder.embed, iter(range(10**6))

    def run_block(block, x):
        watch.block = next(blocks)
        cost.inputs[watch.block] = x.numel() / IMAGES * x.element_size()
        out = block(x)
        watch.block = None
        return out

    def embed_in_full(flat):  # `embed` leaves autocast, which meta tensors do not know
        watch.half = None
        return embed(flat)

    encoder.run_block, encoder.embed = run_block, embed_in_full
    encoder.train()
    images = torch.empty(IMAGES, 3, size, size, device="meta")
    watch.half = HALF.get(precision)
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda t: t), watch:
        encoder(images)
    return cost
