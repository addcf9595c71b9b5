"""Networks: sizes counted by hand, and a head on features."""

from __future__ import annotations

import pytest
import torch

from models import MODELS, Network, make_model


def digits_model(name: str, dropout: float = 0.0, num_classes: int = 10) -> Network:
    return make_model(name, in_channels=1, image_size=8, num_classes=num_classes, dropout=dropout)


def num_parameters(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes() -> None:
    head = 256 * 10 + 10
    convolutions = 9 * 1 * 32 + 9 * 32 * 64  # without bias: batch normalisation follows
    assert num_parameters(digits_model("small-cnn")) == convolutions + 2 * 32 + 2 * 64 + head
    hidden = 64 * 128 + 128 + 128 * 128 + 128
    assert num_parameters(digits_model("mlp")) == hidden + 128 * 10 + 10
    colour = make_model("small-cnn", in_channels=3, image_size=32, num_classes=100, dropout=0.0)
    assert num_parameters(colour) == 9 * 3 * 32 + 9 * 32 * 64 + 2 * 32 + 2 * 64 + 256 * 100 + 100


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_the_network_is_its_head_on_its_features(name: str, channels: int, size: int) -> None:
    network = make_model(name, in_channels=channels, image_size=size, num_classes=7, dropout=0.5).eval()
    images = torch.randn(5, channels, size, size)
    features = network.features(images)
    logits = network(images)
    assert features.shape == (5, network.head.in_features)
    assert logits.shape == (5, 7)
    assert torch.equal(network.head(features), logits)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_on_the_features_before_the_head(name: str) -> None:
    network = digits_model(name, dropout=0.5)
    seen: list[torch.Tensor] = []
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.train()
    images = torch.randn(64, 1, 8, 8)
    features = network.features(images)
    network(images)
    active = features > 0
    kept = seen[0][active] != 0
    assert torch.allclose(seen[0][active][kept], 2 * features[active][kept])
    assert abs(float(kept.float().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name: str) -> None:
    network = digits_model(name)
    torch.nn.functional.cross_entropy(network(torch.randn(32, 1, 8, 8)), torch.arange(32) % 10).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert float(parameter.grad.abs().sum()) > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_two_networks_start_differently(name: str) -> None:
    assert not torch.equal(digits_model(name).head.weight, digits_model(name).head.weight)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'x'; known are mlp, small-cnn$"):
        digits_model("x")
