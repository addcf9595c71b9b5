"""One trial from its recipe to its metrics: built, resumed, advanced epoch by epoch and saved. No Ray, no search."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from data.dataset import Dataset
from data.memory import dataset_on, shared_dataset
from data.seeds import derive
from data.spec import DataSpec
from data.views import make_views
from hparams import Value, build
from methods import find_method
from methods.base import Task
from models import make_model
from models.network import Network
from training import checkpoint
from training.epoch_record import EpochRecord as EpochRecord
from training.fit import Epoch, fit
from training.locations import Location
from training.statistics import RefinementStatistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe(DataSpec):
    """All that a trial's numbers depend on. ``values`` are the fields of the method's Config that differ from its defaults."""

    method: str
    values: dict[str, Value]
    model: str
    epochs: int
    seed: int  # initialisation and order
    precision: str = "auto"  # see models.Network.tuned
    compile: str = "off"  # on or off

    @property
    def fingerprint(self) -> str:
        """Equal for equal recipes only; a checkpoint carries it, one of a version before too."""
        newer = {f.name for f in dataclasses.fields(self) if f.metadata.get("newer") and getattr(self, f.name) == f.default}
        said = {name: value for name, value in dataclasses.asdict(self).items() if name not in newer}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def dataset(self, device: str = "cpu") -> Dataset:
        """The data set that it is run on, for batches on ``device``."""
        spec = DataSpec.of(self)
        return shared_dataset(spec) if device == "cpu" else dataset_on(device, spec)


def objective_window(epochs: int) -> int:
    """How many epochs the objective averages over: the last tenth of the budget, at least one."""
    return max(1, round(0.1 * epochs))


def tested_epochs(epochs: int, rungs: Collection[int]) -> set[int]:
    """When clean test accuracy is measured for the report: every tenth of the budget, at rungs, and at the end."""
    return {max(1, round(tenth * epochs / 10)) for tenth in range(1, 11)} | set(rungs)


class TrialRun:
    """A trial that can be advanced and saved. ``epochs_done`` and ``history`` say how far it is.

    With a ``folder`` it starts from the checkpoint there, if one is readable and of the same recipe, and :meth:`save` writes
    it. Building one has no side effect on the folder. ``device`` is torch's name of where it runs.
    """

    def __init__(
        self, recipe: Recipe, folder: Location | None = None, rungs: Collection[int] = (), device: str = "cpu"
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.path = folder / "checkpoint.pt" if folder else None
        dataset = recipe.dataset(device)
        method_class = find_method(recipe.method)
        config = build(method_class.Config, recipe.values)
        channels, size = dataset.input_shape
        stored_size = dataset.train.images.shape[2]
        views = dataset.source.views if config.views == "auto" else config.views
        plain, weak, strong = make_views(dataset.mean, dataset.std, stored_size, views, size)

        def make_net(num_classes: int | None = None) -> Network:
            network = make_model(
                recipe.model,
                in_channels=channels,
                image_size=size,
                num_classes=num_classes or dataset.num_classes,
                dropout=config.dropout,
            )
            return network.tuned(device, recipe.precision, compiled=recipe.compile == "on" and not method_class.second_order)

        torch.manual_seed(derive("initialisation", recipe.seed))
        task = Task(dataset.num_classes, dataset.train.labels, make_net, plain, weak, strong, dataset.trusted)
        self.method = method_class(config, task).to(device)
        self.statistics = RefinementStatistics(dataset.train.labels, dataset.train_truth, dataset.num_classes)
        self.history: list[EpochRecord] = []
        self.saved_epochs: int | None = None
        self._restore()
        self._epochs = fit(
            self.method,
            dataset,
            self.statistics,
            epochs=recipe.epochs,
            seed=recipe.seed,
            start=self.epochs_done,
            test_at=tested_epochs(recipe.epochs, rungs),
        )

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def advance(self) -> EpochRecord:
        """Trains one epoch. Raises :class:`training.fit.Diverged`; StopIteration past the end of the budget."""
        epoch = next(self._epochs)
        record = EpochRecord(epoch.number, time.time(), self._objective(epoch), epoch.metrics)
        self.history.append(record)
        return record

    def __iter__(self) -> Iterator[EpochRecord]:
        while self.epochs_done < self.recipe.epochs:
            yield self.advance()

    def _objective(self, epoch: Epoch) -> float:
        """Noisy validation accuracy, mean over the last tenth of the budget (over what there is, before that)."""
        window = objective_window(self.recipe.epochs) - 1
        recent = [record.metrics["val/accuracy"] for record in self.history[-window:]] if window else []
        recent.append(epoch.metrics["val/accuracy"])
        return sum(recent) / len(recent)

    def save(self) -> None:
        """Writes the state, and with it every epoch's metrics, which a ledger may still lack. Without a folder: nothing."""
        if self.path is None or self.saved_epochs == self.epochs_done:
            return
        state = {
            "recipe": self.recipe.fingerprint,
            "method": self.method.state_dict(),
            "statistics": self.statistics.state_dict(),
            "history": [dataclasses.asdict(record) for record in self.history],
        }
        checkpoint.save(self.path, state, read_back=self.saved_epochs is None)
        self.saved_epochs = self.epochs_done

    def _restore(self) -> None:
        if self.path is None:
            return
        try:
            state = checkpoint.load(self.path, self.device)
        except FileNotFoundError:
            return
        except checkpoint.UnreadableCheckpoint as error:
            log.warning("%s; the trial starts over", error)
            return
        if state.get("recipe") != self.recipe.fingerprint:
            log.warning("checkpoint %s belongs to another configuration; the trial starts over", self.path)
            return
        self.method.load_state_dict(state["method"])
        self.statistics.load_state_dict(state["statistics"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.saved_epochs = self.epochs_done
