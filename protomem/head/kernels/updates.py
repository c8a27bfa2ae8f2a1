"""Kernels that finish the gradient of prototype rows and step the rows at once: no gradient of theirs is written.

Arguments up to `first` as for `gradient` (protomem/head/kernels/rows.py); what follows comes from BlockUpdate.kernel
(protomem/block_update.py). The arithmetic is that of torch's optimizers, in fp32, but not operation by operation.
"""

import triton
import triton.language as tl

from protomem.head.kernels.rows import gradient


@triton.jit
def finish_sgd(
    grads, rows, features, place, shares, inverse, x, pull, order, first, buffer, lr, momentum, decay, K, D,
    UNIT: tl.constexpr, NESTEROV: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """torch.optim.SGD: g = d loss / d w + decay w; buffer = momentum buffer + g; w -= lr buffer, or with NESTEROV
    lr (g + momentum buffer). buffer [K, D]; None: w -= lr g."""
    k, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, WIDTH)
    w, g = gradient(grads, rows, features, place, shares, inverse, x, pull, order, first, k, d, K, D, UNIT)
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = k.to(tl.int64)[:, None] * D + d[None, :]
    g += decay * w
    if buffer is not None:
        b = momentum * tl.load(buffer + at, mask=inside, other=0.0) + g
        tl.store(buffer + at, b, mask=inside)
        if NESTEROV:
            g += momentum * b
        else:
            g = b
    tl.store(rows + at, w - lr * g, mask=inside)


@triton.jit
def finish_adamw(
    grads, rows, features, place, shares, inverse, x, pull, order, first, exp_avg, exp_avg_sq, corrections,
    lr, decay, new1, new2, eps, K, D,
    UNIT: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """torch.optim.AdamW with moments [K, D]. corrections [2]: 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) of step t. decay:
    lr times the weight decay. new1, new2: 1 - beta1, 1 - beta2."""
    k, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, WIDTH)
    w, g = gradient(grads, rows, features, place, shares, inverse, x, pull, order, first, k, d, K, D, UNIT)
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = k.to(tl.int64)[:, None] * D + d[None, :]
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    m += new1 * (g - m)
    tl.store(exp_avg + at, m, mask=inside)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    v += new2 * (g * g - v)
    tl.store(exp_avg_sq + at, v, mask=inside)
    direction = m * tl.load(corrections) / (tl.sqrt(v) * tl.load(corrections + 1) + eps)
    tl.store(rows + at, w - (decay * w + lr * direction), mask=inside)
