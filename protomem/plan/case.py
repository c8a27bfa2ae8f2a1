"""What a plan is about: a config, a number of identities and ranks, and the shapes that follow from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from protomem import config as configs
from protomem.checks import cut_rows
from protomem.data.records import open_records
from protomem.distributed import shard_bounds
from protomem.errors import UserError
from protomem.head.blocked import block_rows
from protomem.head.operands import has_units
from protomem.head.triton_head import Tiles, chunk_rows, default_tiles
from protomem.plan.encoder import EncoderCost, encoder_cost
from protomem.plan.hardware import Device, Fabric
from protomem.schema import Config

_rows = functools.lru_cache(maxsize=None)(cut_rows)


@dataclass(frozen=True)
class Case:
    """Shapes of rank 0, which has the most rows of everything. images: of the whole set, 0 if unknown. config: the schema's
    plain objects, which are read a thousand times faster than OmegaConf's."""

    config: Config
    identities: int
    images: int
    world: int
    device: Device
    fabric: Fabric
    encoder: EncoderCost

    # --- rows ------------------------------------------------------------------------------------------------------

    @property
    def together(self) -> int:
        s = self.config.data.sampler
        return 1 if s.name == "shuffled" else s.images_per_identity

    @functools.cached_property
    def parts(self) -> list[list[int]]:
        """[micro-batch][rank] -> images. Raises UserError where there are too few for the ranks."""
        t = self.config.train
        return [[b - a for a, b in row] for row in _rows(t.batch_size, self.together, self.world, t.accumulate)]

    @functools.cached_property
    def local(self) -> int:
        """b: images of rank 0 in its largest micro-batch."""
        return max(row[0] for row in self.parts)

    @functools.cached_property
    def batch(self) -> int:
        """B: images of all ranks in the largest micro-batch."""
        return max(sum(row) for row in self.parts)

    @property
    def views(self) -> int:
        return 2 if self.config.contrast.weight > 0 else 1

    @property
    def size(self) -> int:
        """D."""
        return self.config.encoder.embedding_size

    @property
    def source(self) -> str:
        return self.config.prototypes.source

    @property
    def slots(self) -> int:
        """M, of all ranks; 0 without a memory."""
        return min(self.config.prototypes.memory.size, self.identities) if self.source == "memory" else 0

    @property
    def centers(self) -> int:
        """K, prototypes of an identity."""
        return self.config.prototypes.sub_centers

    @property
    def row(self) -> int:
        """Bytes of an identity's prototypes in fp32."""
        return 4 * self.centers * self.size

    @property
    def rows(self) -> int:
        """Slots, or identities with all of their prototypes, that this rank holds."""
        if self.source == "memory":
            return -(-(self.slots + self.config.quality.unrecognizable.pinned) // self.world)
        first, last = shard_bounds(self.identities, 0, self.world)
        return last - first

    @property
    def active(self) -> int:
        """Of these, how many the head sees in a step."""
        if self.source != "sampled":
            return self.rows
        return max(int(self.config.prototypes.rate * self.rows), min(self.config.train.batch_size, self.rows))

    @property
    def learns(self) -> bool:
        """Whether prototype rows get a gradient of their own."""
        return self.source != "memory" or self.config.prototypes.memory.gradient == "sgd"

    @functools.cached_property
    def tiles(self) -> Tiles | None:
        """Of the triton head, as its table has them."""
        h = self.config.head
        return default_tiles(h.precision, self.centers) if h.backend == "triton" else None

    @functools.cached_property
    def block(self) -> int:
        """Rows of a block of the head, or of a chunk of the triton head: whole identities, or tiles of them."""
        k, b, rows = self.centers, self.views * self.batch, max(1, self.centers * self.active)
        if self.tiles is None:
            return min(-(-(self.config.head.block or block_rows(b)) // k) * k, rows)
        n = k * self.tiles.n
        wanted = self.config.head.block or chunk_rows(b, self.size, self.tiles.n, k)
        return min(-(-wanted // n) * n, -(-rows // n) * n)

    @property
    def blocks(self) -> int:
        return -(-self.centers * self.active // self.block)

    @property
    def kept_bytes(self) -> int:
        """Of what is kept for the backward of one block: logits, or exponentials; with the triton head these, which sub-centre
        was the nearest, and the tiles' maxima."""
        c, b = self.config, self.views * self.batch
        half = c.head.precision == "bf16"
        if self.tiles is not None:
            each = (2 if half else 4) + (self.centers > 1) * (1 if half else 4)
            return b * (self.block // self.centers * each + 4 * self.tiles_of_a_block)
        units = self.device.kind == "cpu" and half and has_units(torch.device("cpu"))
        plain = c.margin.filter_above == 0 and c.margin.criterion == "softmax" and c.prototypes.injection.weight == 0
        light = units and plain and self.centers == 1 and c.prototypes.memory.gradient != "batch"
        return (2 if light else 4) * b * self.block

    @property
    def tiles_of_a_block(self) -> int:
        return self.block // (self.centers * self.tiles.n)

    @property
    def kept_blocks(self) -> int:
        """Blocks of which something is kept for the backward."""
        if self.tiles is not None and not self.learns:
            return 0
        return min(self.blocks, int(self.config.head.store_mb * 2**20) // max(1, self.kept_bytes))

    @property
    def key_encoder(self) -> bool:
        return bool(self.config.prototypes.memory.key_encoder or self.config.prototypes.injection.key_encoder)

    # --- variations ------------------------------------------------------------------------------------------------

    def with_identities(self, identities: int) -> Case:
        return replace(self, identities=identities)

    def with_world(self, world: int) -> Case:
        return replace(self, world=world)

    def with_setting(self, *settings: str) -> Case | None:
        """With other values of config keys; None where these are refused."""
        try:
            config = OmegaConf.merge(OmegaConf.structured(self.config), OmegaConf.from_dotlist(list(settings)))
            configs.check(config)
            changed = replace(self, config=OmegaConf.to_object(config))
            changed.parts
        except UserError:
            return None
        if any(s.startswith("encoder.") and not s.startswith("encoder.checkpointing") for s in settings):
            changed = replace(changed, encoder=encoder_cost(changed.config, self.device.kind))
        return changed


def make_case(
    config: DictConfig, world: int, device: Device, fabric: Fabric, identities: int | None = None, images: int | None = None
) -> Case:
    """Raises UserError if the number of identities is not known, or the batch is too small for the ranks."""
    if world < 1:
        raise UserError(f"--world-size {world} must be at least 1")
    if identities is None:
        identities, found = _count(config)
        images = found if images is None else images
    if identities < 1:
        raise UserError(f"--identities {identities} must be at least 1")
    config = config.copy()
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "-")
    plain = OmegaConf.to_object(config)
    case = Case(plain, identities, images or 0, world, device, fabric, encoder_cost(plain, device.kind))
    case.parts
    return case


def _count(config: DictConfig) -> tuple[int, int]:
    """(identities, images) of data.train: pictures that are generated, or a set that exists."""
    train = None if OmegaConf.is_missing(config.data, "train") else str(config.data.train)
    if train is None:
        raise UserError("data.train is not set: say how many identities there are with --identities N (and --images N)")
    if train.startswith("patterns:"):
        records = open_records(train)
        return records.num_classes, records.num_classes * records.images_per_identity  # with a tail that is the mean
    if not Path(train).expanduser().exists():
        raise UserError(f"data.train={train} is not here: say how many identities it has with --identities N (and --images N)")
    records = open_records(train, strict=False)
    return records.num_classes, len(records)
