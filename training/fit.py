"""One trial's training loop: a generator of epochs, with no knowledge of Ray, of a search, or of files."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from data.seeds import derive
from data.table import Labelled
from methods.base import Clock, Method
from training.statistics import RefinementStatistics

EVALUATION_BATCH = 1024  # as much memory as a training step or two takes, and no faster with more


class Diverged(ArithmeticError):
    """The loss or the predictions of a trial are no longer finite numbers."""


@dataclass(frozen=True)
class Epoch:
    """``number`` epochs are done; ``metrics`` by name, all finite."""

    number: int
    metrics: dict[str, float]


def fit(
    method: Method[Any],
    dataset: Dataset,
    statistics: RefinementStatistics,
    *,
    epochs: int,
    seed: int,
    start: int = 0,
    test_at: Container[int] = (),
) -> Iterator[Epoch]:
    """Trains from epoch ``start`` to ``epochs`` (the full budget) and yields after each epoch, when state can be saved.

    All randomness of an epoch follows from (``seed``, epoch), so a method restored from its state goes on bit for bit.
    Clean test accuracy is measured at the epochs in ``test_at``. Raises :class:`Diverged`.
    """
    for done in range(start, epochs):
        clock = Clock(done, epochs)
        torch.manual_seed(derive("epoch", seed, done))
        began = time.perf_counter()
        metrics = _train(method, dataset, statistics, clock)
        trained = time.perf_counter() - began
        number = done + 1
        if not statistics.observed and number in test_at:
            statistics.probabilities = predict(method, dataset.train)
        metrics |= {
            "lr": method.learning_rate(clock),
            "val/accuracy": accuracy(method, dataset.validation),
        }
        if dataset.test is not None and number in test_at:
            metrics["test/accuracy"] = accuracy(method, dataset.test)
        metrics |= statistics.finish(method.refined_labels())
        metrics["seconds"] = time.perf_counter() - began
        metrics["samples_per_second"] = len(dataset.train) / trained
        yield Epoch(number, metrics)


def _train(method: Method[Any], dataset: Dataset, statistics: RefinementStatistics, clock: Clock) -> dict[str, float]:
    """One epoch of updates. Sums stay on the device; the host reads them once."""
    method.train()
    statistics.start()
    sums: dict[str, Tensor] = {}
    num_seen = 0
    for batch in method.batches(dataset.train, clock):
        step = method.step(batch, clock)
        statistics.observe(step)
        num_seen += len(step.index)
        for name, value in {"train/loss": step.loss, **step.scalars}.items():
            total = value * len(step.index)
            sums[name] = sums[name] + total if name in sums else total
    metrics = {name: float(value) / num_seen for name, value in sums.items()}
    for name, mean in metrics.items():
        if not math.isfinite(mean):
            raise Diverged(f"{name} is {mean} in epoch {clock.epoch + 1}")
    return metrics


def predict(method: Method[Any], data: Labelled) -> Tensor:
    """Probabilities [N, K] of every sample, in evaluation mode. Raises :class:`Diverged`."""
    method.eval()
    batches = data.in_order(data.fitting(EVALUATION_BATCH))
    with torch.no_grad():
        probabilities = torch.cat([method.predict(batch.images) for batch in batches])
    if not bool(probabilities.isfinite().all()):
        raise Diverged("a prediction is not a finite number")
    return probabilities


def accuracy(method: Method[Any], data: Labelled) -> float:
    """Share of the samples whose most probable class is the label, in [0, 1]."""
    return float((predict(method, data).argmax(dim=1) == data.labels).float().mean())
