"""Prototypes belong to global ranks: on two nodes, where local ranks repeat, a step computes what one process computes."""

import os

import pytest
import torch

from protomem import distributed
from protomem.prototypes.classifier import ClassifierShard
from protomem.prototypes.memory import PrototypeMemory
from tests.memory_cases import USUAL, run_memory
from tests.ranks import run_ranks
from tests.test_equivalence import CASES, MARGINS, close, expected, train_once
from tests.test_memory import difference

NODES, PER_NODE, STEPS = 2, 2, 6


def ranks(work, per_node=PER_NODE):
    return run_ranks(NODES * PER_NODE, work, per_node=per_node)


def own_by_local_rank(patch, kind):
    """The mistake, put in: a rank owns the rows of its local rank."""
    right = kind.__init__

    def wrong(self, *arguments, **options):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(distributed, "rank", lambda: int(os.environ["LOCAL_RANK"]))
            right(self, *arguments, **options)

    patch.setattr(kind, "__init__", wrong)


def compare_classifier(per_node=PER_NODE):
    """Loss, encoder gradient and all shards' gradients against the slow formula in float64."""
    batch, classes, labels, accumulate = CASES["uneven"]

    def work():
        return train_once("blocked", MARGINS["cosface"], batch, classes, labels, accumulate, torch.float64, 4)

    results, (loss, encoder_grad, weight_grad) = ranks(work, per_node), expected("uneven", "cosface")
    for got, gradient, _ in results:
        assert got == pytest.approx(loss, rel=1e-9)
        close(gradient, encoder_grad, 1e-9)
    close(torch.cat([torch.as_tensor(shard) for *_, shard in results]), weight_grad, 1e-9)


def compare_memory(per_node=PER_NODE):
    """Loss, gradients, labels, ages and rows of six steps against the memory's reference in float64."""
    found = difference(USUAL, ranks(lambda: run_memory(USUAL, STEPS), per_node), STEPS)
    assert found is None, found


@pytest.mark.parametrize("kind, compare", [(ClassifierShard, compare_classifier), (PrototypeMemory, compare_memory)])
def test_two_nodes_of_two_ranks_equal_one_process(kind, compare, monkeypatch):
    assert ranks(lambda: (distributed.rank(), os.environ["LOCAL_RANK"])) == [(0, "0"), (1, "1"), (2, "0"), (3, "1")]
    compare()
    own_by_local_rank(monkeypatch, kind)
    compare(NODES * PER_NODE)  # one node: the mistake cannot be seen
    with pytest.raises(AssertionError) as error:
        compare()
    assert "Traceback" not in str(error.value)  # other numbers, not a crash
