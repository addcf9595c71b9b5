"""A tiny training set, networks for it and the trainer's loop: what every test of methods trains, in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.seeds import derive, generator
from data.table import Batch, TrainData
from hparams import build
from methods import METHODS
from methods.base import Clock, MakeNet, Method, SingleNet, Step, Task
from models.network import Network

N, K, EPOCHS, BATCH = 41, 4, 6, 8  # 41 = 5 * 8 + 1; no tensor of a network has a side of 41


def prototypes() -> Tensor:
    return torch.randint(40, 216, (K, 1, 8, 8), generator=generator("prototypes"))


def tiny_data(num_classes: int = K) -> TrainData:
    """41 images [1, 8, 8] that a network can tell apart, of the first ``num_classes`` classes."""
    stream = generator("tiny data")
    labels = torch.randint(num_classes, (N,), generator=stream)
    images = prototypes()[labels] + torch.randint(-40, 40, (N, 1, 8, 8), generator=stream)
    return TrainData(images.to(torch.uint8), labels)


def trusted_data() -> TrainData:
    """Eight further images with clean labels, two of each class."""
    stream = generator("trusted")
    labels = torch.arange(K).repeat(2)
    images = prototypes()[labels] + torch.randint(-40, 40, (2 * K, 1, 8, 8), generator=stream)
    return TrainData(images.to(torch.uint8), labels)


def tiny_net(num_classes: int | None = None) -> Network:
    features = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    return Network(features, 54, num_classes or K, 0.1)


def flat_net(num_classes: int | None = None) -> Network:
    """A network with batch normalisation over single numbers, which refuses a batch of one image."""
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU()), 12, num_classes or K, 0.1)


class TenThousandfold(nn.Linear):
    """A head whose logits are 10,000 times too large."""

    def forward(self, features: Tensor) -> Tensor:
        return 1e4 * super().forward(features)


def extreme_net(num_classes: int | None = None) -> Network:
    net = tiny_net(num_classes)
    net.head = TenThousandfold(net.num_features, num_classes or K)
    return net


def plain(images: Tensor) -> Tensor:
    return images.float() / 64 - 2


def weak(images: Tensor) -> Tensor:
    """A random shift and noise, from torch's default generator."""
    shift = int(torch.randint(-1, 2, ()))
    return plain(images).roll(shift, dims=3) + 0.1 * torch.randn(images.shape)


def tiny_task(data: TrainData, make_net: MakeNet = tiny_net) -> Task:
    return Task(K, data.labels, make_net, plain, weak, weak, trusted_data())


def make(name: str, task: Task, seed: int = 0, **values: Any) -> Method[Any]:
    torch.manual_seed(derive("init", seed))
    return METHODS[name](build(METHODS[name].Config, {"batch_size": BATCH, **values}), task)


def train(
    method: Method[Any], data: TrainData, first: int = 0, last: int = EPOCHS, seed: int = 0
) -> Iterator[tuple[Clock, Step]]:
    """What the trainer does, from epoch ``first`` to before ``last``."""
    for epoch in range(first, last):
        torch.manual_seed(derive("epoch", seed, epoch))
        method.train()
        clock = Clock(epoch, EPOCHS)
        for batch in method.batches(data, clock):
            yield clock, method.step(batch, clock)


def finish(method: Method[Any], data: TrainData, first: int = 0, last: int = EPOCHS) -> list[tuple[Clock, Step]]:
    return list(train(method, data, first, last))


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path."""
    if isinstance(state, (dict, list, tuple)):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for name, value in pairs for key, leaf in flat(value, f"{path}/{name}").items()}
    return {path: state}


def differences(left: Any, right: Any) -> list[str]:
    """The paths at which two states are not bit for bit alike (0 and -0 are)."""
    a, b = flat(left), flat(right)
    same = {key: torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a.keys() & b.keys()}
    return sorted((a.keys() ^ b.keys()) | {key for key, equal in same.items() if not equal})


def per_sample(method: Method[Any]) -> dict[str, Tensor]:
    return {
        key: value for key, value in flat(method.state_dict()).items() if isinstance(value, Tensor) and value.shape[:1] == (N,)
    }


def networks(method: Method[Any]) -> dict[str, Any]:
    """The state without its per-sample part, the optimisers' included."""
    return {key: value for key, value in flat(method.state_dict()).items() if key not in per_sample(method)}


def assert_finite(method: Method[Any], steps: list[tuple[Clock, Step]]) -> None:
    assert steps
    for _, step in steps:
        assert bool(step.loss.isfinite())
        assert step.probabilities is None or bool(step.probabilities.isfinite().all())
    for key, value in flat(method.state_dict()).items():
        assert not isinstance(value, Tensor) or bool(value.isfinite().all()), key


class InOrder(TrainData):
    """A training set that hands out given batches: ``shuffled`` yields the rows of ``parts`` in turn."""

    parts: list[Tensor]

    @classmethod
    def of(cls, data: TrainData, parts: list[Tensor]) -> InOrder:
        made = cls(data.images, data.labels)
        object.__setattr__(made, "parts", parts)
        return made

    def shuffled(self, batch_size: int, keep: Tensor | None = None) -> Iterator[Batch]:
        for part in self.parts:
            index = part if keep is None else part[keep[part]]
            if len(index):
                yield self.gather(index)


def linear_net(num_classes: int | None = None) -> Network:
    """A network whose prediction for an image depends on nothing else; with a tiny learning rate it never changes."""
    return Network(nn.Flatten(), 64, num_classes or K, 0.0)


def without_dropout() -> Network:
    net = tiny_net()
    net.dropout.p = 0.0
    return net


def nets_in_turn(*nets: nn.Module) -> Any:
    """A ``make_net`` that hands out copies of ``nets`` in turn."""
    turns: Iterator[nn.Module] = iter([copy.deepcopy(net) for net in nets])
    return lambda num_classes=None: next(turns)


def given_one_hot() -> Tensor:
    return functional.one_hot(tiny_data().labels, K).float()


def trained(name: str, **values: Any) -> Method[Any]:
    """The method after the whole budget, from seed 0."""
    method = make(name, tiny_task(tiny_data()), **values)
    finish(method, tiny_data())
    return method


def net_state(method: Method[Any]) -> dict[str, Any]:
    assert isinstance(method, SingleNet)
    return method.learner.state_dict()


def one_step_gradient(method: SingleNet, clock: Clock) -> tuple[Tensor, Step, Batch]:
    """The gradient of one step's loss in the logits, [B, K]."""
    batch = tiny_data().gather(torch.arange(BATCH))
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _images: Any, logits: Tensor) -> None:
        logits.register_hook(kept.append)

    handle = method.learner.net.register_forward_hook(keep)
    method.train()
    step = method.step(batch, clock)
    handle.remove()
    return kept[0], step, batch


def without_chance(num_classes: int | None = None) -> Network:
    """A network with batch normalisation and no dropout."""
    features = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    return Network(features, 54, num_classes or K, 0.0)


def in_order() -> InOrder:
    """Every row once per epoch in a fixed order, the last two batches joined."""
    data = tiny_data()
    parts = list(torch.arange(N).split(BATCH))
    return InOrder.of(data, [*parts[:-2], torch.cat(parts[-2:])])


def trained_in_order(name: str, **values: Any) -> SingleNet:
    """The method after the whole budget, from seed 0, with nothing left to chance."""
    method = make(name, tiny_task(tiny_data(), without_chance), augmentation="none", **values)
    finish(method, in_order())
    assert isinstance(method, SingleNet)
    return method


def losses_of(name: str, logits: Tensor, labels: Tensor, clock: Clock | None = None, **values: Any) -> Tensor:
    """What the method minimises for these logits, per sample."""
    method = make(name, tiny_task(tiny_data()), **values)
    index = torch.arange(len(labels))
    losses: Tensor = method.losses(logits, Batch(torch.empty(0), labels, index), clock or Clock(0, EPOCHS))
    return losses
