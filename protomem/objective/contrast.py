"""CoReFace: two dropout views of an image are drawn together, against the other images of the batch (Song & Wang 2023,
arXiv 2304.11668; in the published code it is called ContraFace).

The views x_i^1, x_i^2 of image i (unit embeddings; i = 1..N over the images that are compared) differ by the dropout before
the fully connected layer alone; the classification loss is the mean over both. On top of it comes weight * the mean over
the anchors of the whole batch of

    CE = -log( e^{s (C_pos - m)} / ( e^{s (C_pos - m)} + sum over the other keys e^{s C} ) ),   C = clamp(cos, -1, 1)

C_pos is the cosine of the image's two views. m is a running margin that lowers it to the level of the hardest negative:

    g = C_pos - max(0, max of C over the keys of other identities)     without gradient
    m <- (1 - momentum) mean g + momentum m                            before it is used, in the same step

The mean is taken over the anchors of all ranks, so m is equal everywhere. With the published momentum 0.01 the new value
counts .99. m starts at 0, hence momentum=1 means: no margin.

coupling, who is compared with whom:
  one_way    anchors x^1_i, keys x^2_j (published; "pair coupling"): no view meets another one of its own draw
  two_way    the mean of that and of anchors x^2_i with keys x^1_j; g: the mean over both (our reading of the "double-way"
             protocol, which the published code holds with weight 0)
  all_views  the mean over both x^1_i and x^2_i as anchors; keys: all 2N views but the anchor itself, so that views of one
             draw repel each other, too, as in SimCLR (our reading of the opposite of pair coupling)
negatives, the N images: this rank's (local; published) or the whole batch's (global; our addition: results then do not
depend on the number of ranks).
mask, the keys of other images of the anchor's identity: zero, C counts as 0 and e^0 stays in the sum (published), or
exclude, they are left out (our addition). For g they count as 0, which changes nothing, either way.

An image that has nobody to be compared with (alone on its rank) has the loss 0 and g = C_pos; nothing is NaN.
Legend: B global batch, b rows of this rank, K keys, D feature size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from protomem import distributed


class Contrast(nn.Module):
    """The loss above. start: the first step in which it is active; dropout: of the encoder from then on.

    State: `m`, a 0-d buffer that is equal on every rank.
    """

    def __init__(
        self,
        weight: float,
        *,
        coupling: str = "one_way",
        negatives: str = "local",
        mask: str = "zero",
        scale: float = 64.0,
        momentum: float = 0.01,
        start: int = 0,
        dropout: float = 0.6,
    ):
        super().__init__()
        self.weight, self.coupling, self.negatives, self.mask = weight, coupling, negatives, mask
        self.scale, self.momentum, self.start, self.dropout = scale, momentum, start, dropout
        self.register_buffer("m", torch.zeros(()))

    def active(self, step: int) -> bool:
        return step >= self.start

    def forward(self, views: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """weight * sum over this rank's anchors [0-d], to be divided by B; updates m. Collective.

        views: the unit embeddings [B, D] of all ranks, twice, with the graph of the one gather (which holds the factor W, so
        that gradients are exact for keys of other ranks, too); labels [B]; sizes[r]: rows of rank r, in rank order.
        """
        rank, everybody = distributed.rank(), self.negatives == "global"
        first = sum(sizes[:rank])
        own = slice(first, first + sizes[rank])
        keys = slice(None) if everybody else own

        def cos(anchors, others):
            return (anchors[own] @ others[keys].t()).clamp(-1, 1)

        one, two = views
        if self.coupling == "all_views":  # K keys of the other draw, then K of the anchor's own
            cosines = [torch.cat([cos(one, two), cos(one, one)], 1), torch.cat([cos(two, one), cos(two, two)], 1)]
        else:
            cosines = [cos(one, two)] + ([cos(two, one)] if self.coupling == "two_way" else [])
        same = labels[own, None] == labels[None, keys]
        place = torch.arange(len(same), device=labels.device)[:, None] + (first if everybody else 0)
        column = torch.arange(cosines[0].shape[1], device=labels.device)
        positive, itself = place == column, place + same.shape[1] == column
        same = same.repeat(1, 2) if self.coupling == "all_views" else same
        twins = same & ~positive & ~itself
        with torch.no_grad():
            # One more column of 0 is the floor, which a rank without rows needs, too.
            hardest = [F.pad(c.masked_fill(same, 0), (0, 1)).amax(1, keepdim=True) for c in cosines]
            gaps = sum((c.gather(1, place) - h).sum() for c, h in zip(cosines, hardest)) / len(cosines)
            mean = distributed.all_reduce(gaps) / sum(sizes)
            new = self.momentum * self.m + (1 - self.momentum) * mean
            self.m.copy_(torch.where(mean.isfinite(), new, self.m))  # a step that overflowed must not stay in it

        def loss(c):
            z = self.scale * (c.masked_fill(twins, 0) - self.m * positive)
            hidden = itself if self.mask == "zero" else itself | twins
            return F.cross_entropy(z.masked_fill(hidden, float("-inf")), place[:, 0], reduction="sum")

        return self.weight * sum(loss(c) for c in cosines) / len(cosines)
