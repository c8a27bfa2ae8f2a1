"""optimizer.untouched=exact: rows that were not drawn are where dense SGD with a gradient of zero has them."""

import pytest
import torch

from protomem import build, config, distributed, missed_steps, state
from protomem.errors import UserError
from protomem.head import HEADS, objective
from protomem.optim import RowSGD
from protomem.prototypes.sampled import SampledShard
from tests.ranks import run_ranks
from tests.test_no_sync import no_waiting

OPTIONS = [
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.0},
]


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-11, atol=1e-13)


class Pair:
    """A sampled shard with exact RowSGD, and dense torch.optim.SGD that is given the same gradients of the drawn rows."""

    def __init__(self, options, rows=23, rate=0.2):
        self.shard = SampledShard(rows, 4, rate=rate, std=0.5).double()
        self.optimizer = RowSGD([self.shard.weight], lr=0.1, untouched="exact", **options)
        self.shard.before_use = self.optimizer.catch_up
        self.dense = torch.nn.Parameter(self.shard.weight.detach().clone())
        self.reference = torch.optim.SGD([self.dense], lr=0.1, **options)

    def step(self, number):
        for optimizer in (self.optimizer, self.reference):
            optimizer.param_groups[0]["lr"] = 0.5 / (number + 1)
        g = torch.Generator().manual_seed(number)
        x = torch.nn.functional.normalize(torch.randn(3, 4, generator=g, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(0, self.shard.num_identities, (3,), generator=g)
        self.shard.begin_step(labels, number)
        close(self.shard.active, self.dense.detach()[self.shard.index])  # what the head is about to read
        cos_y, lse = HEADS["blocked"](x, self.shard.columns(labels), 8.0)
        objective(8 * cos_y, lse).mean().backward()
        self.dense.grad = torch.zeros_like(self.dense).index_copy_(0, self.shard.index, self.shard.sink.buffer)
        self.optimizer.step()
        self.reference.step()

    def compare(self):
        self.optimizer.catch_up()
        close(self.shard.weight, self.dense)
        state, expected = self.optimizer.state[self.shard.weight], self.reference.state[self.dense]
        if "momentum_buffer" in state:
            close(state["momentum_buffer"], expected["momentum_buffer"])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_and_momentum_are_those_of_dense_sgd(world):
    def work():
        for k, options in enumerate(OPTIONS):
            missed_steps.MOST = (4096, 3)[k % 2]  # with 3 the table ends early, and often
            pair = Pair(options, rows=(23, 3)[k // 2])  # 3 rows: the fourth rank has none
            for number in range(25):
                pair.step(number)
                if number in (11, 24):
                    pair.compare()
                elif number == 5 and world == 1 and k < 2:
                    assert not torch.allclose(pair.shard.weight, pair.dense)  # somebody has missed steps

    run_ranks(world, work)


def test_a_checkpoint_holds_up_to_date_rows_and_goes_on_at_another_world_size(tmp_path):
    def write():
        pair = Pair(OPTIONS[0])
        for number in range(6):
            pair.step(number)
        pair.compare()
        named = state.named_state({"prototypes": pair.shard}, {"prototypes": pair.optimizer})
        assert named["optimizer.prototypes.weight.last_step"].tolist() == [6] * len(pair.dense)
        state.save(tmp_path, 6, named, 23, {}, keep=1)

    def go_on():
        pair = Pair(OPTIONS[0])
        state.load(tmp_path / "step-00000006", {"prototypes": pair.shard}, {"prototypes": pair.optimizer})
        pair.dense.data.copy_(pair.shard.weight)
        momentum = pair.optimizer.state[pair.shard.weight]["momentum_buffer"].clone()
        pair.reference.state[pair.dense]["momentum_buffer"] = momentum
        for number in range(6, 14):
            pair.step(number)
        pair.compare()
        return pair.optimizer.missed[pair.shard.weight].now, distributed.rank()

    run_ranks(2, write)
    assert [now for now, _ in run_ranks(3, go_on)] == [14] * 3


def test_it_waits_for_no_device_after_its_first_step():
    pair = Pair(OPTIONS[0])
    pair.step(0)
    labels, grad = torch.tensor([3, 20]), torch.ones(4, 4, dtype=torch.float64)
    with no_waiting():
        for step in (1, 2):
            pair.shard.begin_step(labels, step)
            pair.shard.sink.add(grad)
            pair.optimizer.step()


def test_state_survives_torchs_own_saving():
    pair, other = Pair(OPTIONS[0]), Pair(OPTIONS[0])
    pair.step(0)
    pair.compare()
    pair.optimizer.state[pair.shard.weight]["last_step"][0] = 2**53 + 1
    other.optimizer.load_state_dict(pair.optimizer.state_dict())
    assert other.optimizer.state[other.shard.weight]["last_step"][0] == 2**53 + 1


def load(*settings):
    return config.load([], ["data.train=x", "output=y", "optimizer.untouched=exact", *settings])


def test_the_config_reaches_it():
    shard, sampled = SampledShard(9, 4, rate=0.5), "prototypes.source=sampled"
    optimizer = build.optimizers_from(load(sampled), torch.nn.Linear(2, 2), shard, torch.nn.Module())["prototypes"]
    assert optimizer.missed and shard.before_use == optimizer.catch_up
    for settings, message in (
        ((sampled, "optimizer.name=adamw"), "adamw: its missed steps have no closed form; use sgd"),
        ((sampled, "optimizer.momentum=0", "optimizer.weight_decay=0"), "no effect without momentum and weight decay"),
        ((), "optimizer.untouched"),
    ):
        with pytest.raises(UserError, match=message):
            load(*settings)
