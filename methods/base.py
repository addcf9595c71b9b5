"""What a learning algorithm is: three verbs over tensors, and a documented configuration.

A method is an ``nn.Module`` that owns its networks, optimisers and per-sample state. ``state_dict()`` is all of it, its keys
are fixed at construction, and phases are functions of the :class:`Clock`. Methods draw random numbers from torch's default
generators only, which the trainer seeds at the start of each epoch from (seed, epoch).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from data.table import Batch, TrainData
from methods.clock import Clock as Clock
from methods.clock import first_epoch as first_epoch
from methods.config import Config as Config
from methods.config import GivenLabelsConfig as GivenLabelsConfig
from models.network import Network

View = Callable[[Tensor], Tensor]
B = TypeVar("B")


class MakeNet(Protocol):
    """Makes a new network with its own initialisation: float32 [B, C, H, W] -> logits [B, ``num_classes``]."""

    def __call__(self, num_classes: int | None = None) -> Network:
        """``num_classes`` where it is not the task's."""
        ...


@dataclass(frozen=True)
class Task:
    """What a method may know: shapes, the given labels, views and a way to make networks. Never truth or noise rate."""

    num_classes: int
    labels: Tensor  # [N] int64, given labels of the training set, in index order
    make_net: MakeNet
    plain: View  # uint8 [B, C, H, W] -> normalised float32, no augmentation
    weak: View  # the same after small random shifts, drawn per sample
    strong: View  # the same after larger random changes, drawn per sample
    trusted: TrainData | None = None  # samples with clean labels, none of them in the training set, where the user has some

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def view(self, augmentation: str) -> View:
        return {"none": self.plain, "weak": self.weak, "strong": self.strong}[augmentation]


@dataclass(frozen=True)
class Step:
    """What one update tells the trainer. Everything stays on the device."""

    loss: Tensor  # scalar, detached
    index: Tensor  # [B] int64, rows of the training set that were seen
    probabilities: Tensor | None = None  # [B, K] float32, detached, where the unmixed batch was seen
    scalars: dict[str, Tensor] = field(default_factory=dict)  # further scalars to average over the epoch, "group/name"


def half_cosine(start: float, fraction: float) -> float:
    """From ``start`` at 0 along half a cosine to 0 at ``fraction`` 1."""
    return start * 0.5 * (1 + math.cos(math.pi * fraction))


class Learner(nn.Module):
    """A network with SGD: float32 logits, all state in ``state_dict``.

    The update is torch's own functional SGD with the momentum in buffers of this module: its keys exist from the start, they
    move with the network, and a worker is spared the seconds that the optimiser classes take to import a compiler.
    """

    def __init__(self, net: nn.Module, config: Config) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self._parameters_in_order = [parameter for parameter in net.parameters() if parameter.requires_grad]
        for number, parameter in enumerate(self._parameters_in_order):
            self.register_buffer(f"momentum_{number}", torch.zeros_like(parameter, requires_grad=False))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images).float()
        return logits

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of SGD at learning rate ``rate`` on the scalar ``loss``."""
        self.descend(self.gradients(loss), rate)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Of the scalar ``loss`` in the parameters that are trained, in their order; None where it does not depend on one."""
        for parameter in self._parameters_in_order:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in self._parameters_in_order]

    def descend(self, gradients: list[Tensor | None], rate: float) -> None:
        """One step of SGD at learning rate ``rate`` along ``gradients``; a parameter without one stays as it is."""
        held = [
            (parameter, gradient, self.get_buffer(f"momentum_{number}"))
            for number, (parameter, gradient) in enumerate(zip(self._parameters_in_order, gradients, strict=True))
            if gradient is not None
        ]
        with torch.no_grad():
            sgd(
                [parameter for parameter, _, _ in held],
                [laid_out_as(parameter, gradient) for parameter, gradient, _ in held],
                [momentum for _, _, momentum in held],
                fused=True,
                weight_decay=self.config.weight_decay,
                momentum=self.config.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` in the memory format of ``parameter``: the fused update walks through memory and would take one entry for
    another. Nothing is copied where autograd has done that already."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


class Method(nn.Module, Generic[B]):
    """The interface; ``B`` is what the method's batches are. The registry reads what is declared above ``__init__``.

    ``batches`` is a generator: code before its first ``yield`` is the start of an epoch, code after the last is its end.
    """

    Config: ClassVar[type[Config]] = Config
    summary: ClassVar[str] = ""
    needs_trusted: ClassVar[bool] = False  # True where it learns from samples with clean labels, too
    second_order: ClassVar[bool] = False  # True where it differentiates a gradient, which compiled networks cannot

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__()
        self.config = config
        self.task = task

    @abstractmethod
    def batches(self, data: TrainData, clock: Clock) -> Iterable[B]:
        """What this epoch is made of."""

    @abstractmethod
    def step(self, batch: B, clock: Clock) -> Step:
        """One update on one batch."""

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> probabilities [B, K], float32. The caller sets evaluation mode and disables gradients."""

    def learning_rate(self, clock: Clock) -> float:
        """Half a cosine from ``config.lr`` at the start of the budget to 0 at its end; constant within an epoch."""
        return half_cosine(self.config.lr, clock.fraction)

    def refined_labels(self) -> Tensor | None:
        """What the method now believes, rows [N, K] that sum to 1; None where it keeps the given labels. For diagnostics."""
        return None


class SingleNet(Method[Batch]):
    """A method with one network that is trained on shuffled batches, each seen once: what is left to write is ``losses``."""

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.learner = Learner(task.make_net(), config)

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        return data.shuffled(self.config.batch_size)

    def step(self, batch: Batch, clock: Clock) -> Step:
        logits = self.learner(self.task.view(self.config.augmentation)(batch.images))
        loss = self.losses(logits, batch, clock).mean()
        self.learner.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), batch.index, logits.detach().softmax(dim=1))

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        """What is minimised, per sample: logits [B, K] of the training step -> [B]. Moves the per-sample state, if any."""

    def predict(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.learner(self.task.plain(images)).softmax(dim=1)
        return probabilities


def memory_momentum(memory: float, epochs: int) -> float:
    """The factor, per epoch, of a moving average whose memory is a fraction of the budget: exp(-1 / (memory epochs)).

    0.9 at 200 epochs is a memory of 0.047; the same memory at 30 epochs is a factor of 0.49.
    """
    return math.exp(-1.0 / (memory * epochs))
