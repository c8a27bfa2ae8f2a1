"""The learning rate at its boundaries, and against torch's schedulers."""

import math

import pytest
import torch

from protomem.errors import UserError
from protomem.schedule import DECAYS, learning_rate


def curve(total, **options):
    return [learning_rate(step, total, 0.4, **options) for step in range(total + 1)]


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_linear_and_ends_at_the_base_rate(decay):
    options = {"milestones": (0.9,)} if decay == "step" else {}
    rates = curve(20, warmup_steps=4, decay=decay, **options)
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert curve(20, decay=decay, **options)[0] == pytest.approx(0.4)  # no warm-up
    assert curve(4, warmup_steps=4, decay=decay, **options)[3] == pytest.approx(0.4)  # nothing but warm-up


@pytest.mark.parametrize("decay", ["polynomial", "cosine"])
def test_decay_ends_at_the_final_rate_and_falls_all_the_way(decay):
    rates = curve(30, warmup_steps=3, decay=decay, final_lr=0.05)
    assert rates[30] == pytest.approx(0.05) and learning_rate(99, 30, 0.4, 3, decay, final_lr=0.05) == rates[30]
    assert all(a > b for a, b in zip(rates[3:], rates[4:]))


def test_polynomial_and_cosine_halfway():
    assert learning_rate(15, 20, 0.4, 10, "polynomial", power=2.0) == pytest.approx(0.4 / 4)
    assert learning_rate(15, 20, 0.4, 10, "polynomial", power=1.0, final_lr=0.2) == pytest.approx(0.3)
    assert learning_rate(15, 20, 0.4, 10, "cosine", final_lr=0.2) == pytest.approx(0.3)
    assert learning_rate(5, 20, 0.4, 0, "cosine") == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))


def test_cosine_and_polynomial_equal_torchs_schedulers():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    for decay, scheduler in (
        ("cosine", torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0.02)),
        ("polynomial", torch.optim.lr_scheduler.PolynomialLR(optimizer, 12, power=2.0)),
    ):
        final = 0.02 if decay == "cosine" else 0.0
        optimizer.param_groups[0]["lr"] = 0.4
        for step in range(13):
            ours = learning_rate(step, 12, 0.4, decay=decay, final_lr=final)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_steps_fall_exactly_at_the_milestones_given_as_steps_or_fractions():
    for milestones in ((10, 15), (0.5, 0.75), (0.75, 10)):
        rates = curve(20, decay="step", milestones=milestones)
        assert rates[:10] == pytest.approx([0.4] * 10)
        assert rates[10:15] == pytest.approx([0.04] * 5) and rates[15:] == pytest.approx([0.004] * 6)
    assert curve(100, decay="step", milestones=(0.55,))[54:56] == pytest.approx(
        [0.4, 0.04]
    )  # 0.55 * 100 > 55 in floats
    assert curve(20, decay="step", milestones=(10, 15), gamma=0.5, final_lr=0.15)[15] == 0.15
    assert curve(20, decay="constant") == [0.4] * 21


def test_refusals_name_the_setting():
    for options, text in (
        ({"decay": "linear"}, "decay=linear is not one of"),
        ({"warmup_steps": 21}, "warmup_steps=21 must lie between 0 and total_steps=20"),
        ({"decay": "step"}, "needs positive milestones"),
        ({"milestones": (5,)}, "do nothing with decay=polynomial"),
        ({"decay": "constant", "final_lr": 0.1}, "final_lr=0.1 has no effect"),
        ({"final_lr": -0.1}, "must not be negative"),
    ):
        with pytest.raises(UserError, match=text):
            learning_rate(0, 20, 0.4, **options)
