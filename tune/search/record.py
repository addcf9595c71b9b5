"""One trial as the ledger hands it out, and the order of the leaderboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from hparams import Value
from tune.search.budget import Usage


@dataclass
class Record:
    """One trial as the driver keeps it: identity, configuration, and how far it is. Values by epoch are the objective."""

    number: int
    state: TrialState
    method: str
    read_values: Callable[[], dict[str, Value]] = field(repr=False, compare=False)
    params: dict[str, Value]
    attrs: dict[str, Any]
    objectives: dict[int, float] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)  # epoch -> how many of all trials were recorded up to it
    epochs: int = 0  # the last epoch whose value is in the ledger; 0 before the first
    metrics: dict[str, float] = field(default_factory=dict)  # the latest of each name
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    usage: Usage = field(default_factory=Usage)  # by all trials, up to its last epoch's recording
    started: float = 0.0
    ended_at: float = 0.0
    lost_because: str = ""  # why it lost its last process, as far as this driver was told

    @cached_property
    def values(self) -> dict[str, Value]:
        """All fields of its method's Config; empty while its proposal is being written."""
        return self.read_values()

    @property
    def value(self) -> float | None:
        return self.objectives.get(self.epochs)

    @property
    def finished(self) -> bool:
        return self.state.is_finished()

    @property
    def summary(self) -> dict[str, Any]:
        """What was noted at its end; a kill may leave that of a trial that runs on, and it does not count."""
        summary: dict[str, Any] = self.attrs.get("summary", {}) if self.finished else {}
        return summary

    @property
    def status(self) -> str:
        """``complete``, ``stopped`` (by ASHA), ``diverged``, ``failed`` or ``running``."""
        if self.summary.get("diverged"):
            return "diverged"
        words = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
        return words.get(self.state, "running")


def speaks_for_itself(trials: Sequence[FrozenTrial], methods: tuple[str, ...]) -> bool:
    """Whether trials can be shown by what is recorded of them, without the space that they were drawn from.

    That is so where no finished trial lacks a parameter that another one of its method has, and where one was drawn from a
    range without an end of values, so that the number of configurations is no budget.
    """
    names: dict[str, set[frozenset[str]]] = {}
    for trial in trials:
        if trial.state.is_finished():
            method = str(trial.params.get("method")) if len(methods) > 1 else methods[0]
            names.setdefault(method, set()).add(frozenset(trial.params))
    distributions = [one for trial in trials for one in trial.distributions.values()]
    endless = any(isinstance(one, FloatDistribution) and one.step is None and not one.single() for one in distributions)
    return endless and set(names) <= set(methods) and all(len(alike) == 1 for alike in names.values())


def rank(record: Record) -> tuple[int, int, float, int]:
    """What trials are sorted by. That of a finished one does not change."""
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
    epochs = 0 if record.state is TrialState.COMPLETE else record.epochs
    return order.index(record.state), -epochs, -(record.value if record.value is not None else -1.0), record.number
