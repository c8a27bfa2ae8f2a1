"""Which records make up a global batch: pure functions of (seed, epoch, step), the same at every world size.

Nothing of the epoch's length is stored and any step costs the same, so training resumes in the middle of an epoch, also
with another number of ranks or loader threads, by asking for the next step. The permutation is a generalised Feistel
cipher with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 3); its round
function is the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), so no library's random stream is involved.

Legend: B global batch, N records, R identities that have records, P identities per batch, K images per identity.
"""

from __future__ import annotations

import numpy as np

from protomem.errors import UserError
from protomem.seeds import hash64

_ROUNDS = 8  # small domains need more than the 3-4 rounds of the theory; see the uniformity tests


def permute(index, n, key) -> np.ndarray:
    """Image of `index` (0 <= index < n) under the permutation of range(n) that `key` names; int64, arguments broadcast.

    O(1) memory per element: the domain a*b >= n has a = ceil(sqrt(n)), so fewer than a of its points lie outside
    range(n) and have to be walked on.
    """
    index, n, key = np.broadcast_arrays(
        np.atleast_1d(np.asarray(index, np.uint64)), np.asarray(n, np.uint64), np.asarray(key, np.uint64)
    )
    a = np.sqrt(n.astype(np.float64)).astype(np.uint64)
    a += a * a < n
    b = (n + a - np.uint64(1)) // a
    round_keys = hash64(key, np.arange(_ROUNDS)[:, None])
    out = index.copy()
    todo = np.arange(out.size)
    while todo.size:
        x, sizes, keys = out[todo], (a[todo], b[todo]), round_keys[:, todo]
        low, high = x % sizes[0], x // sizes[0]
        for i in range(_ROUNDS):
            low, high = high, (low + hash64(keys[i] ^ high) % sizes[i % 2]) % sizes[i % 2]
        out[todo] = low + sizes[0] * high  # after an even number of rounds `low` is again the digit of base a
        todo = todo[out[todo] >= n[todo]]
    return out.astype(np.int64)


class ShuffledSampler:
    """Every record once per epoch in a new random order; the last N mod B records of the order are left out.

    Raises UserError when there are fewer records than one batch needs.
    """

    together = 1  # rows of a batch that belong on one rank

    def __init__(self, num_images: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= num_images:
            raise UserError(f"a batch of {batch_size} cannot be drawn from {num_images} images; lower the batch size")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps_per_epoch = num_images // batch_size

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Record positions of the global batch at `step` of `epoch`, int64 [B]."""
        start = step * self.batch_size
        return permute(np.arange(start, start + self.batch_size), self.num_images, hash64(self.seed, 1, epoch))


class IdentitySampler:
    """What samplers of P distinct identities times K images (P x K) share: the records of each identity, drawn by visit.

    identities: the labels that occur, ascending, int64 [R]; a row is an index into it. An epoch is floor(N / (P K)) steps
    (our default): as many images as `ShuffledSampler` shows, though not each exactly once. together: so many neighbouring
    rows of a batch belong on one rank.

    Memory: 24 bytes per identity, and 4 (8 from 2**32 records) per record unless the labels are already in order.
    Raises UserError when there are fewer identities than P or fewer records than P*K.
    """

    def __init__(self, labels: np.ndarray, identities_per_batch: int, images_per_identity: int, seed: int):
        labels = np.asarray(labels)
        self.batch_size = identities_per_batch * images_per_identity
        if min(identities_per_batch, images_per_identity) < 1 or self.batch_size > len(labels):
            raise UserError(
                f"a batch of {identities_per_batch} identities x {images_per_identity} images cannot be drawn from "
                f"{len(labels)} images; lower one of the two"
            )
        self._order = None
        if (labels[1:] < labels[:-1]).any():
            order = np.argsort(labels, kind="stable")
            self._order = order.astype(np.uint32) if len(labels) < 2**32 else order
            labels = labels[order]
        self._starts = np.concatenate([[0], np.flatnonzero(labels[1:] != labels[:-1]) + 1])
        self._counts = np.diff(self._starts, append=len(labels))
        self.identities = labels[self._starts].astype(np.int64)
        if len(self.identities) < identities_per_batch:
            raise UserError(
                f"{identities_per_batch} identities per batch, but the set has only {len(self.identities)}; lower it"
            )
        self.identities_per_batch, self.images_per_identity, self.seed = identities_per_batch, images_per_identity, seed
        self.together = images_per_identity
        self.steps_per_epoch = len(labels) // self.batch_size

    def images(self, rows: np.ndarray, visit: int) -> np.ndarray:
        """Positions of K records of each identity [P] at its visit number `visit` (any integer), int64 [P*K].

        Numbered one after the other, visits continue through a permutation of an identity's images: an image comes back
        only after all others have had their turn, and after every K / gcd(n, K) passes over its n images the permutation
        is a new one. The K of a visit differ whenever it has at least K.
        """
        k, identity = self.images_per_identity, rows[:, None]  # [P, 1]
        n = self._counts[identity]
        drawn = visit * k + np.arange(k)  # [K], the running number of each draw from an identity
        period = np.lcm(n, k)  # after so many draws a visit begins exactly at the start of a pass
        key = hash64(self.seed, 3, identity, visit * k // period)
        inside = permute((drawn % period % n).ravel(), np.repeat(n, k), np.repeat(key, k)).reshape(len(rows), k)
        position = (self._starts[identity] + inside).ravel()
        return position if self._order is None else self._order[position].astype(np.int64)


class BalancedSampler(IdentitySampler):
    """P x K batches in which every identity is seen equally often; the K images of an identity are neighbours.

    Identities come in rounds. A round is a new permutation of all of them, cut into floor(R / P) batches: R mod P of
    them, others each time, sit it out. Rounds run on across epochs, so in the long run every identity is seen equally
    often. The number of the round is the number of the visit.
    """

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Record positions of the global batch at `step` of `epoch`, int64 [P*K]."""
        p, r = self.identities_per_batch, len(self.identities)
        visit, batch = divmod(epoch * self.steps_per_epoch + step, r // p)
        return self.images(permute(np.arange(batch * p, (batch + 1) * p), r, hash64(self.seed, 2, visit)), visit)
