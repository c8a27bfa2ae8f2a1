"""The averaged encoder: the slow formula, what it leaves alone, and that it goes on after a reload."""

import copy

import pytest
import torch

from protomem.encoder import build_encoder
from protomem.encoder.ema import EmaEncoder
from protomem.errors import UserError

SIZE = 48


def small(**options):
    torch.manual_seed(0)
    return build_encoder("small", 16, input_size=SIZE, **options)


def images(seed, count=4):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def train(encoder, ema, steps, first=0):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        (encoder(images(step)) - ema(images(step)).roll(1, 0)).square().mean().backward()  # to other images: never zero
        optimizer.step()
        ema.update()
        yield step


def test_parameters_follow_the_slow_formula_and_buffers_are_the_sources():
    encoder = small()
    ema = EmaEncoder(encoder, 0.9)
    expected = {name: p.detach().double() for name, p in encoder.named_parameters()}
    for _ in train(encoder, ema, 5):
        for name, p in encoder.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double()
    for name, p in ema.encoder.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ema.encoder.fc.weight, encoder.fc.weight)
    buffers = dict(encoder.named_buffers())
    assert any(b.is_floating_point() for b in buffers.values()) and any(b.dtype == torch.int64 for b in buffers.values())
    for name, b in ema.encoder.named_buffers():
        assert torch.equal(b, buffers[name]) and b is not buffers[name], name


def test_without_decay_it_is_the_source():
    encoder = small()
    ema = EmaEncoder(encoder, 0.0)
    for step in train(encoder, ema, 3):
        assert all(torch.equal(a, b) for a, b in zip(ema.encoder.state_dict().values(), encoder.state_dict().values()))
        assert torch.equal(copy.deepcopy(ema)(images(step)), copy.deepcopy(encoder)(images(step)))


def test_gradients_never_flow():
    encoder = small()
    ema = EmaEncoder(encoder, 0.5).train()
    x = images(0).requires_grad_()
    assert not ema(x).requires_grad
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for name, p in encoder.named_parameters() if name != "features.weight")
    encoder(x).sum().backward()
    ema.update()
    assert all(p.grad is None for p in ema.parameters()) and encoder.fc.weight.grad is not None


def test_its_forward_in_training_mode_leaves_the_source_alone():
    encoder = small()
    ema = EmaEncoder(encoder, 0.5).train()
    before = copy.deepcopy(encoder.state_dict())
    ema(images(0))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    own = dict(ema.encoder.named_buffers())
    assert any(not torch.equal(before[name], b) for name, b in own.items())  # it does count the batch, in its own
    ema.update()
    assert all(torch.equal(before[name], b) for name, b in own.items())


def test_frozen_statistics_and_the_memory_format_are_the_sources():
    encoder = small().freeze_statistics().to(memory_format=torch.channels_last)
    ema = EmaEncoder(encoder, 0.5).train()
    x = images(0)
    torch.testing.assert_close(ema(x)[:1], ema(x[:1]))  # the other images of the batch have no say
    kernels = [p for p in ema.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_state_holds_the_copy_alone_and_goes_on_after_a_reload():
    encoder = small()
    ema = EmaEncoder(encoder, 0.9)
    assert list(ema.state_dict()) == [f"encoder.{name}" for name in encoder.state_dict()]
    assert len(list(ema.parameters())) == len(list(encoder.parameters()))
    list(train(encoder, ema, 3))
    stored = copy.deepcopy((encoder.state_dict(), ema.state_dict()))
    list(train(encoder, ema, 3, first=3))

    again = small()
    resumed = EmaEncoder(again, 0.9)
    again.load_state_dict(stored[0])
    resumed.load_state_dict(stored[1])
    list(train(again, resumed, 3, first=3))
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), ema.state_dict().values()))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(UserError, match=r"key_encoder=.* is not in \[0, 1\)"):
        EmaEncoder(small(), decay)
