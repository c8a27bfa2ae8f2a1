"""Encoders: public key layout, forward against plain formulas, frozen statistics, checkpointing, weight files."""

import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from protomem.encoder import ENCODERS, build_encoder
from protomem.encoder.compiled import compiled
from protomem.encoder.weights import load_weights
from protomem.errors import UserError

SMALL_SIZES = {"iresnet18": 16, "mobilefacenet": 16, "vit_t": 16, "small": 48}  # one of each kind, at a cheap size


def build(name, **options):
    torch.manual_seed(0)
    return build_encoder(name, 24, input_size=SMALL_SIZES[name], **options)


def images(name, count, seed=1):
    return (
        torch.rand(count, 3, SMALL_SIZES[name], SMALL_SIZES[name], generator=torch.Generator().manual_seed(seed)) * 2
        - 1
    )


# --- layout of the public weight files ------------------------------------------------------------------------------


def batchnorm(name, channels):
    shapes = {f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def iresnet_layout(blocks, embedding_size):
    """Keys and shapes of insightface's arcface_torch IResNet for 112 x 112, written from its description."""
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,)} | batchnorm("bn1", 64)
    previous = 64
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), blocks), start=1):
        for k in range(count):
            at, entering = f"layer{stage}.{k}", previous if k == 0 else channels
            shapes |= (
                batchnorm(f"{at}.bn1", entering) | batchnorm(f"{at}.bn2", channels) | batchnorm(f"{at}.bn3", channels)
            )
            shapes |= {
                f"{at}.conv1.weight": (channels, entering, 3, 3),
                f"{at}.conv2.weight": (channels, channels, 3, 3),
            }
            shapes[f"{at}.prelu.weight"] = (channels,)
            if k == 0:
                shapes[f"{at}.downsample.0.weight"] = (channels, entering, 1, 1)
                shapes |= batchnorm(f"{at}.downsample.1", channels)
        previous = channels
    shapes |= batchnorm("bn2", 512) | batchnorm("features", embedding_size)
    return shapes | {"fc.weight": (embedding_size, 512 * 7 * 7), "fc.bias": (embedding_size,)}


@pytest.mark.parametrize(
    "depth, blocks, millions",
    [
        (18, (2, 2, 2, 2), 24.03),
        (34, (3, 4, 6, 3), 34.14),
        (50, (3, 4, 14, 3), 43.59),
        (100, (3, 13, 30, 3), 65.16),
        (200, (6, 26, 60, 6), None),
    ],
)
def test_iresnet_has_the_keys_and_shapes_of_the_public_files(depth, blocks, millions):
    with torch.device("meta"):
        encoder = build_encoder(f"iresnet{depth}")
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == iresnet_layout(blocks, 512)
    if millions:
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == millions


def test_mobilefacenet_has_the_keys_and_shapes_of_the_public_files():
    def conv(at, shape, act=True):
        prelu = {f"{at}.layers.2.weight": (shape[0],)} if act else {}
        return {f"{at}.layers.0.weight": shape} | batchnorm(f"{at}.layers.1", shape[0]) | prelu

    def bottleneck(at, entering, middle, leaving):
        return (
            conv(f"{at}.layers.0", (middle, entering, 1, 1))
            | conv(f"{at}.layers.1", (middle, 1, 3, 3))
            | conv(f"{at}.layers.2", (leaving, middle, 1, 1), act=False)
        )

    shapes = conv("layers.0", (128, 3, 3, 3)) | conv("layers.1", (128, 2, 3, 3))
    for at, entering, middle, leaving in ((2, 128, 128, 128), (4, 128, 256, 256), (6, 256, 512, 256)):
        shapes |= bottleneck(f"layers.{at}", entering, middle, leaving)
    for at, channels, middle, count in ((3, 128, 128, 4), (5, 256, 256, 6), (7, 256, 256, 2)):
        for k in range(count):
            shapes |= bottleneck(f"layers.{at}.layers.{k}", channels, middle, channels)
    shapes |= conv("conv_sep", (512, 256, 1, 1)) | conv("features.layers.0", (512, 1, 7, 7), act=False)
    shapes |= {"features.layers.2.weight": (512, 512)} | batchnorm("features.layers.3", 512)
    encoder = build_encoder("mobilefacenet")
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == shapes
    assert sum(p.numel() for p in encoder.parameters()) == 2_059_520


# --- what they compute ----------------------------------------------------------------------------------------------


def shake(encoder):
    """Random statistics and affine parameters, so that no BatchNorm is close to the identity."""
    for v in encoder.state_dict().values():
        if v.ndim == 1:
            v.copy_(torch.rand_like(v) + 0.5)
    return encoder


def test_iresnet_equals_its_plain_formula():
    encoder = shake(build("iresnet18")).eval()
    w, x = encoder.state_dict(), images("iresnet18", 3)

    def norm(at, x):
        return F.batch_norm(x, *(w[f"{at}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-5)

    out = F.prelu(norm("bn1", F.conv2d(x, w["conv1.weight"], padding=1)), w["prelu.weight"])
    for at in [f"layer{stage}.{k}" for stage in (1, 2, 3, 4) for k in (0, 1)]:
        stride = 2 if at.endswith("0") else 1
        y = F.conv2d(norm(f"{at}.bn1", out), w[f"{at}.conv1.weight"], padding=1)
        y = F.prelu(norm(f"{at}.bn2", y), w[f"{at}.prelu.weight"])
        y = norm(f"{at}.bn3", F.conv2d(y, w[f"{at}.conv2.weight"], stride=stride, padding=1))
        if stride == 2:
            out = norm(f"{at}.downsample.1", F.conv2d(out, w[f"{at}.downsample.0.weight"], stride=2))
        out = out + y
    flat = norm("bn2", out).flatten(1)
    expected = norm("features", flat @ w["fc.weight"].T + w["fc.bias"])
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-4)


def test_vit_equals_its_plain_formula():
    encoder = shake(build("vit_t")).double().eval()
    w, x = encoder.state_dict(), images("vit_t", 2).double()

    def linear(at, x):
        return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]

    def norm(at, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]

    patches = torch.stack([x[:, :, i : i + 8, j : j + 8].flatten(1) for i in (0, 8) for j in (0, 8)], 1)
    tokens = patches @ w["patch.weight"].flatten(1).T + w["patch.bias"] + w["position"]
    for k in range(12):
        q, key, value = linear(f"blocks.{k}.qkv", norm(f"blocks.{k}.norm1", tokens)).chunk(3, -1)
        heads = []
        for h in range(8):
            at = slice(32 * h, 32 * h + 32)
            heads.append((q[..., at] @ key[..., at].mT / 32**0.5).softmax(-1) @ value[..., at])
        tokens = tokens + linear(f"blocks.{k}.proj", torch.cat(heads, -1))
        tokens = tokens + linear(
            f"blocks.{k}.fc2", F.gelu(linear(f"blocks.{k}.fc1", norm(f"blocks.{k}.norm2", tokens)))
        )
    torch.testing.assert_close(encoder(x), linear("fc", norm("norm", tokens).flatten(1)))


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_forward_is_embed_of_pre_fc(name):
    encoder, x = build(name, dropout=0.5), images(name, 4)
    flat = encoder.pre_fc(x)
    assert flat.shape == (4, encoder.embed.__self__.fc.in_features if name != "mobilefacenet" else 512)
    for mode in (True, False):
        encoder.train(mode)
        torch.manual_seed(3)
        whole = encoder(x)
        torch.manual_seed(3)
        assert torch.equal(whole, encoder.embed(encoder.pre_fc(x))) and whole.shape == (4, 24)
    encoder.train()
    flat = encoder.pre_fc(x)
    before = flat.clone()
    first, second = encoder.embed(flat), encoder.embed(flat)
    assert torch.equal(flat, before) and not torch.equal(first, second)  # two dropout views of one pre_fc


def test_the_last_batchnorm_is_frozen_or_learnable_and_starts_at_one():
    for name, at in (("iresnet18", "features"), ("mobilefacenet", "features.layers.3"), ("small", "features")):
        for last_bn in ("frozen", "learnable"):
            norm = build(name, last_bn=last_bn).get_submodule(at)
            assert norm.weight.requires_grad == (last_bn == "learnable") and norm.bias.requires_grad
            assert torch.equal(norm.weight.detach(), torch.ones(24))


def test_encoders_start_with_the_embedding_norm_that_a_frozen_batchnorm_pins():
    for name in SMALL_SIZES:
        assert 0.7 < build(name)(images(name, 16)).norm(dim=1).mean() / 24**0.5 < 1.3, name


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_frozen_statistics_make_images_independent_of_their_batch(name):
    encoder, x = build(name), images(name, 6)
    if name != "vit_t":
        assert not torch.allclose(
            encoder(x)[:3], encoder(x[:3]), rtol=1e-3
        )  # BatchNorm in training mode mixes the batch
    encoder.freeze_statistics().train()
    encoder.eval()
    encoder.train()
    buffers = {k: v.clone() for k, v in encoder.named_buffers()}
    out = encoder(x)
    torch.testing.assert_close(out[:3], encoder(x[:3]), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(torch.equal(v, buffers[k]) for k, v in encoder.named_buffers())
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    encoder(x[:0]).sum().backward()  # a rank without an image in this step
    encoder.freeze_statistics(False)
    assert all(m.training for m in encoder.modules())


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_checkpointing_changes_neither_gradients_nor_statistics_nor_random_numbers(name):
    results = []
    for checkpointing in (False, True):
        encoder, x = build(name, dropout=0.4, checkpointing=checkpointing).double(), images(name, 5).double()
        torch.manual_seed(7)
        for _ in range(2):
            encoder(x).square().sum().backward()
        results.append(
            {k: p.grad for k, p in encoder.named_parameters() if p.requires_grad}
            | {k: v.clone() for k, v in encoder.named_buffers()}
            | {"next random number": torch.rand(1)}
        )
    assert results[0].keys() == results[1].keys()
    for k, v in results[0].items():
        assert torch.equal(v, results[1][k]), k


def test_checkpointing_recomputes():
    encoder, calls = build("small", checkpointing=True), []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(images("small", 2)).sum().backward()
    assert len(calls) == 2 * len(encoder.blocks)
    calls.clear()
    encoder.eval()(images("small", 2)).sum().backward()
    assert len(calls) == len(encoder.blocks)


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_bf16_and_channels_last(name):
    encoder, x = build(name).freeze_statistics(), images(name, 4)
    if name != "vit_t":  # untouched statistics would let the iresnet blow up: take those of a batch
        encoder.freeze_statistics(False)
        for m in encoder.modules():
            if hasattr(m, "momentum"):
                m.momentum = None
        encoder(images(name, 16))
        encoder.freeze_statistics()
    expected = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, expected).min() > 0.99
    last = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)


def test_refusals_name_the_setting():
    with pytest.raises(UserError, match="iresnet51 is unknown; did you mean iresnet50"):
        build_encoder("iresnet51")
    with pytest.raises(UserError, match="last_bn=maybe"):
        build_encoder("small", last_bn="maybe")
    with pytest.raises(UserError, match="vit_s, which has no BatchNorm"):
        build_encoder("vit_s", last_bn="learnable")
    with pytest.raises(UserError, match="divisible by 8, not 100"):
        build_encoder("vit_t", input_size=100)
    with pytest.raises(UserError, match="dropout=1"):
        build_encoder("small", dropout=1)
    assert len(ENCODERS) == 11


@pytest.mark.skipif(not os.environ.get("PROTOMEM_SLOW"), reason="takes a minute; set PROTOMEM_SLOW=1")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_encoder_equals_eager(checkpointing):
    x, results = images("small", 4), []
    for mode in ("off", "default"):
        encoder = build("small", checkpointing=checkpointing)
        out = compiled(encoder, mode)(x)
        out.square().sum().backward()
        results.append(
            {k: p.grad for k, p in encoder.named_parameters() if p.requires_grad} | dict(encoder.named_buffers())
        )
    for k, v in results[0].items():
        torch.testing.assert_close(results[1][k], v, rtol=1e-3, atol=1e-3)


def test_what_a_cuda_graph_writes_over_has_been_copied(monkeypatch):
    """By a stand-in that writes every run's outputs into the same memory, as a graph does."""
    told = []

    def stand_in(model, mode, dynamic):
        memory = torch.empty(2, 3)

        def run(x, views=1):
            told.append("run")
            memory.copy_(model(x).detach())
            return memory if views == 1 else (memory, memory)

        assert (mode, dynamic) == ("reduce-overhead", False)
        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append("begin"))
    model = torch.nn.Linear(4, 3)
    run, inputs = compiled(model, "graphs"), torch.randn(3, 2, 4)
    outs = [run(x) for x in inputs[:2]] + [t for t in run(inputs[2], 2)]
    for out, x in zip(outs, inputs[[0, 1, 2, 2]]):
        assert torch.equal(out, model(x))
    assert told == ["begin", "run"] * 3 and compiled(model, "off") is model


# --- weight files ---------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_round_trip(tmp_path, suffix):
    source, target, path = shake(build("iresnet18")), build("iresnet18"), tmp_path / f"backbone{suffix}"
    if suffix == ".pth":
        torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    load_weights(target, path)
    assert same(source, target)


def test_weights_without_batch_counters_load(tmp_path):
    source, target = shake(build("small")), build("small")
    counted = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({k: v.half() for k, v in counted.items()}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(target.state_dict()[k], v.half().float()) for k, v in counted.items())


def test_weights_that_do_not_fit_are_listed_and_change_nothing(tmp_path):
    encoder, before = build("small"), build("small")
    tensors = shake(build("small")).state_dict()
    del tensors["bn1.weight"]
    tensors |= {f"extra{k}": torch.zeros(1) for k in range(5)}
    tensors["fc.weight"] = torch.zeros(7, 3)
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load_weights(encoder, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing (bn1.weight)" in message and "5 unexpected (extra0, extra1, extra2, ...)" in message
    assert "fc.weight is [7, 3] in the file and [24, 1152] in the encoder" in message and "\n" not in message
    assert same(encoder, before)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bad_weight_files_give_one_line_and_execute_nothing(tmp_path):
    encoder, path = build("small"), tmp_path / "w.pth"
    with pytest.raises(UserError, match="is not a file"):
        load_weights(encoder, tmp_path / "none.pth")
    for save in (
        lambda value: path.write_bytes(pickle.dumps(value, protocol=2)),
        lambda value: torch.save(value, path),
    ):
        save({"conv1.weight": Malicious(tmp_path / "executed")})
        with pytest.raises(UserError, match="refused") as caught:
            load_weights(encoder, path)
        assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()
    torch.save({"epoch": 3, "state_dict": {}}, path)
    with pytest.raises(UserError, match="a dict with epoch, state_dict"):
        load_weights(encoder, path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(UserError, match="not a state_dict"):
        load_weights(encoder, path)
    torch.save(encoder.state_dict(), path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"hello", b"\x80\x02"):
        for target in (path, tmp_path / "w.safetensors"):
            target.write_bytes(broken)
            with pytest.raises(UserError) as caught:
                load_weights(encoder, target)
            assert str(target) in str(caught.value) and "\n" not in str(caught.value)
