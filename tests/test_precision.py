"""Lower precision, memory format and compilation: what they change of a network, and that every method trains with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from methods import METHODS
from models import make_model
from models.network import Network
from tests.tiny import finish, flat, make, tiny_data, tiny_net, tiny_task
from training.trial_run import Recipe, TrialRun


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_cnn() -> Network:
    torch.manual_seed(0)
    return make_model("small-cnn", in_channels=3, image_size=16, num_classes=10, dropout=0.0)


def convolution_outputs(network: Network) -> list[Tensor]:
    """What the network's convolutions give, appended when it runs."""
    seen: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: seen.append(output))
    return seen


def test_bfloat16_is_computed_in_and_float32_comes_out() -> None:
    images, plain, low = torch.randn(64, 3, 16, 16), small_cnn().eval(), small_cnn().tuned("cpu", "bfloat16").eval()
    seen = convolution_outputs(low)
    logits = low(images)
    assert {output.dtype for output in seen} == {torch.bfloat16}
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)
    assert logits.dtype == torch.float32
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    difference = (logits - plain(images)).abs().max() / logits.abs().max()
    assert 0 < difference < 0.03, "bfloat16 has 8 bits"


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    images, plain, tuned = torch.randn(4, 3, 16, 16), small_cnn(), small_cnn().tuned("cpu")
    seen = convolution_outputs(tuned)
    assert torch.equal(tuned(images), plain(images))
    assert {output.dtype for output in seen} == {torch.float32}


@pytest.mark.parametrize(("computes", "precision"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_can(
    computes: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones imitate it, and are slower for it; who asks for it gets it there, too."""
    monkeypatch.setattr(Network, "to", lambda self, *place, **layout: self)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: computes or including_emulation)
    assert small_cnn().tuned("cuda").features.precision == precision
    assert small_cnn().tuned("cuda", "bfloat16").features.precision == torch.bfloat16
    assert small_cnn().tuned("cuda", "float32").features.precision == torch.float32
    assert small_cnn().tuned("cpu").features.precision == torch.float32


def test_a_copy_computes_as_the_original_does() -> None:
    """An average of weights starts as a copy of the network."""
    images, low = torch.randn(4, 3, 16, 16), small_cnn().tuned("cpu", "bfloat16").eval()
    assert torch.equal(copy.deepcopy(low)(images), low(images))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_bfloat16(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data, lambda num_classes=None: tiny_net(num_classes).tuned("cpu", "bfloat16")))
    before = {key: value.clone() for key, value in flat(method.state_dict()).items()}
    steps = finish(method, data)
    assert all(bool(step.loss.isfinite()) and step.loss.dtype == torch.float32 for _, step in steps)
    after = flat(method.state_dict())
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert method.eval().predict(data.images).dtype == torch.float32


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts what is compiled, by a compiler that takes no time."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(len(compiled))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    yield compiled
    torch.compiler.reset()


def test_a_second_network_of_the_same_shape_is_not_compiled_again(graphs: list[int]) -> None:
    images = torch.randn(4, 3, 16, 16)
    first, second = small_cnn(), small_cnn()
    keys = list(first.state_dict())
    expected = first(images)
    assert torch.allclose(first.tuned("cpu", compiled=True)(images), expected, atol=1e-6)
    assert list(first.state_dict()) == keys
    num_compiled = len(graphs)
    assert num_compiled > 0
    assert torch.allclose(second.tuned("cpu", compiled=True)(images), expected, atol=1e-6)
    assert len(graphs) == num_compiled
    assert torch.allclose(copy.deepcopy(second)(images), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["alr", "mw-net"])
def test_a_compiled_trial_has_the_numbers_of_one_that_is_not(name: str, graphs: list[int]) -> None:
    """Meta-Weight-Net differentiates a gradient, which a compiled network cannot: its networks stay as they are."""
    recipe = Recipe(
        name, {"batch_size": 256}, data="digits", noise="symmetric:0.4", model="small-cnn", epochs=2, seed=0, trusted=20
    )
    numbers = []
    for compiled in ("off", "on"):
        recipe = Recipe(**{**vars(recipe), "compile": compiled})
        numbers.append([record.metrics["train/loss"] for record in TrialRun(recipe)])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert bool(graphs) == (name == "alr")
