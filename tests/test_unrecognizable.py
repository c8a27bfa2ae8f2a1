"""Destroyed copies: what is lost, what hides them, and that they do not depend on the ranks that make them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protomem.data.unrecognizable import destroy, rows_here
from protomem.distributed import batch_bounds

SIZE = 112


def random_images(count, size=SIZE, seed=0):
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def cells(side, inverse=False):
    """One image of black and white squares of `side` pixels."""
    black = (torch.arange(SIZE)[:, None] // side + torch.arange(SIZE) // side) % 2 == int(inverse)
    return torch.where(black, 30, 220).to(torch.uint8)[None, :, :, None].repeat(10, 1, 1, 3)


def occluded(copies):
    """bool [m, H, W]: the pixels that have the commonest grey of their copy."""
    out = []
    for copy in copies:
        grey = copy[(copy[..., 0] == copy[..., 1]) & (copy[..., 1] == copy[..., 2])][:, 0]
        out.append((copy == grey.long().bincount().argmax()).all(-1))
    return torch.stack(out)


@pytest.mark.parametrize("total, batch, world", [(16, 512, 4), (7, 12, 5), (5, 5, 8), (9, 4, 3), (1, 6, 2)])
def test_each_copy_is_made_once_by_the_holder_of_its_image(total, batch, world):
    made = []
    for rank in range(world):
        start, stop = batch_bounds(batch, rank, world)
        numbers, rows = rows_here(total, batch, start, stop)
        assert all(0 <= row < stop - start for row in rows)
        made += [(i, start + row) for i, row in zip(numbers, rows, strict=True)]
    assert made == [(i, i * batch // total) for i in range(total)]


@pytest.mark.parametrize("total, world", [(12, 3), (7, 2), (3, 5)])  # the last: ranks without a copy
def test_ranks_make_together_what_one_process_makes(total, world):
    batch = random_images(20)
    numbers, rows = rows_here(total, 20, 0, 20)
    alone = destroy(batch[rows], numbers, total, seed=3, step=5)
    parts = []
    for rank in range(world):
        start, stop = batch_bounds(20, rank, world)
        numbers, rows = rows_here(total, 20, start, stop)
        parts.append(destroy(batch[start:stop][rows], numbers, total, seed=3, step=5))
    assert torch.equal(torch.cat(parts), alone) and alone.dtype == torch.uint8


def test_copies_follow_seed_step_and_number_alone():
    images = random_images(1).expand(12, -1, -1, -1)
    before = images.clone()
    copies = destroy(images, range(12), 12, seed=1, step=2)
    assert torch.equal(images, before)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(copies, destroy(images, range(12), 12, seed=1, step=2))
    for other in (destroy(images, range(12), 12, seed=1, step=3), destroy(images, range(12), 12, seed=2, step=2)):
        assert (occluded(copies) != occluded(other)).flatten(1).any(1).all()
    shapes = occluded(copies).flatten(1)
    assert len(shapes.unique(dim=0)) == 12  # one image, twelve different copies


def test_a_large_rectangle_of_one_random_grey_hides_each_copy():
    hidden = occluded(destroy(random_images(40), range(40), 40, seed=0, step=0))
    shares = hidden.float().mean((1, 2))
    assert 0.38 < shares.min() < 0.5 and 0.6 < shares.max() < 0.72
    rows, columns = hidden.float().mean(2).amax(1), hidden.float().mean(1).amax(1)  # its width and height
    assert ((rows * columns) / shares < 1.02).all()  # filled: it is a rectangle
    for dim in (1, 2):  # its first column, its first row
        first = hidden.any(dim).int().argmax(1)
        assert first.min() < 5 and first.max() > 20
    copies = destroy(random_images(40), range(40), 40, seed=0, step=0)
    greys = torch.stack([copy[h][0, 0] for copy, h in zip(copies, hidden)]).float()
    assert greys.min() < 50 and greys.max() > 200


def visible_difference(side):
    """Mean absolute difference, outside the rectangle, between the copies of a pattern and of its negative."""
    one, other = (destroy(cells(side, inverse), range(10), 10, 0, 0) for inverse in (False, True))
    seen = ~occluded(one)
    return torch.stack([(a.float() - b.float()).abs()[s].mean() for a, b, s in zip(one, other, seen)])


def test_features_are_gone_and_only_large_areas_are_left():
    assert (visible_difference(8) < 8).all()  # of 190 levels; squares as large as an eye
    assert (visible_difference(56) > 60).all()  # a quarter of the image each: it is still a copy of this image


def test_each_step_of_the_destruction_is_there():
    flat = torch.full((20, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    copies = destroy(flat, range(20), 20, 0, 0)
    noise = torch.stack([c[~h].float().std() for c, h in zip(copies, occluded(copies))])
    assert 8 < noise.min() < 18 and 32 < noise.max() < 42
    edge = torch.zeros(20, SIZE, SIZE, 3, dtype=torch.uint8)
    edge[:, :, SIZE // 2 :] = 255
    seen = destroy(edge, range(20), 20, 0, 0).double()
    seen[occluded(seen)] = float("nan")
    profile = seen.mean(-1).nanmean(1).nanmean(0)  # over rows and copies: noise averaged out
    rising = ((profile > 26) & (profile < 230)).sum()
    assert rising > 0.2 * SIZE  # shrinking alone gives 0.13


def test_small_and_oblong_images():
    for shape in ((2, 16, 16, 3), (2, 32, 48, 3)):
        assert destroy(torch.zeros(shape, dtype=torch.uint8), [1, 2], 4, 0, 0).shape == shape


@pytest.mark.parametrize("numbers", [[0], [0, 2], [1, 0], [3, 4], [-1, 0]])
def test_numbers_that_do_not_fit_are_refused(numbers):
    with pytest.raises(ValueError, match="numbers"):
        destroy(random_images(2, 16), numbers, 4, 0, 0)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device():
    with Operations() as seen:
        destroy(random_images(6, 32), range(6), 8, 0, 0)
    assert "avg_pool2d" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "index", "index_put_", "masked_select", "lift_fresh"}
