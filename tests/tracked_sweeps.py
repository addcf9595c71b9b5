"""Sweeps whose MLflow store is read back through MLflow's own client, or whose server fails at random."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sweeps import epoch_record, made_up, make_sweep, new_storage
from tune.report.projection import Projection
from tune.report.tracking import tracking_uri
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.store.stored_sweep import Sweep

OURS = {"sweep", "sweep_id", "study", "role", "trial", "method", "state", "epochs", "error", "source", "seed", "best_params"}


def start_sweep(storage: Path, **fields: Any) -> Sweep:
    """Its trials' made-up values follow from what is drawn, so the ranges are its own."""
    space = {"set": {"warmup": "0"}, "range": {"memory": "0.02:0.1:log"}}
    return make_sweep(storage, **{"method": ("alr",), "trials": 6, "epochs": 9, "reduction_factor": 2, **space, **fields})


def play(
    ledger: Ledger, trials: int = 6, *, keep: int = 0, gpus: float = 0.0, between: Callable[[], None] = lambda: None
) -> None:
    """Trials two at a time, one epoch each in turn: the second diverges, the third fails, ``keep`` are left in progress;
    ``between`` is called after each epoch."""
    coordinator = Coordinator(ledger, total=trials, concurrent=2)
    for given in range(10**6):
        while len(coordinator.live) < 2 and coordinator.ledger.num_counted() + len(coordinator.live) < trials - (
            0 if coordinator.waiting else keep
        ):
            coordinator.next(f"{given}-{len(coordinator.live)}-{time.monotonic_ns()}")
        if not coordinator.live:
            break
        for key, record in list(coordinator.live.items()):
            epoch = record.epochs + 1
            diverged, failed = record.number == 1 and epoch == 3, record.number == 2 and epoch == 2
            value = made_up(record.values, epoch)
            more = {"test/accuracy": value / 2, "refine/drift": 0.0} | ({"gpu_seconds": gpus * 0.5} if gpus else {})
            new = [] if diverged or failed else [epoch_record(epoch, value, **more)]
            if not coordinator.result(key, new, failure=TRACEBACK if failed else None, diverged=diverged):
                coordinator.released(key)
            between()
    for kept in range(keep):
        coordinator.next(f"kept-{kept}")
        coordinator.result(f"kept-{kept}", [epoch_record(1, 0.25)], failure=None, diverged=False)


def read_store(storage: Path, name: str = "first") -> dict[str, Any]:
    """All of ours that an MLflow store holds of a sweep: the parent, and the children by trial. Run ids are left out."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(storage, ""))
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found: dict[str, Any] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        tags = run.data.tags
        study = {} if tags["study"] == "sweep" else {"study": tags["study"]}
        key = "/".join([*study.values(), "parent" if tags["role"] == "sweep" else tags["trial"]])
        assert key not in found, "two runs of one trial"
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        found[key] = {
            "name": run.info.run_name,
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": {key: value for key, value in tags.items() if key in OURS},
            "metrics": {key: sorted((m.step, m.timestamp, m.value) for m in history) for key, history in histories.items()},
            "run_id": run.info.run_id,
            "links": {key: tags.get(key) for key in ("mlflow.parentRunId", "best_run_id", "mlflow.note.content")},
        }
    return found


def without_ids(store: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in two stores of one sweep. The parent's own end is the time of the last close."""
    kept = {key: {k: v for k, v in run.items() if k not in ("run_id", "links")} for key, run in store.items()}
    for key in kept:
        if key.endswith("parent"):
            kept[key]["times"] = kept[key]["times"][:1]
    return kept


def steps_once(store: dict[str, Any]) -> bool:
    """Every metric of every run has each step once."""
    return all(
        len({step for step, _, _ in history}) == len(history) for run in store.values() for history in run["metrics"].values()
    )


def rebuilt(sweep: Sweep, folder: Path, migrated_store: Path) -> dict[str, Any]:
    """The store that ledger and metrics alone make, from nothing, in one go."""
    other = new_storage(folder, migrated_store)
    (other / sweep.name).mkdir()
    for name in ("sweep.yaml", "journal.log", "metrics.jsonl"):
        shutil.copy(sweep.folder / name, other / sweep.name / name)
    ledger = Ledger(Sweep.read(other / sweep.name))
    spent = not ledger.unfinished()
    Projection(ledger, tracking_uri(other, "")).close(finished=spent)
    return read_store(other)


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: out of paper\n'


class Flaky:
    """Makes the client's calls fail at random, half of them after they were carried out, as when an answer is lost. Every
    other run is made twice, as by a proxy that tries again."""

    CALLS = "log_batch", "create_run", "set_tag", "set_terminated", "update_run", "search_runs", "create_experiment", "log_text"
    DOUBLES = "doubled create_run"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, rate: float) -> None:
        from mlflow.tracking import MlflowClient

        self.stream, self.rate = random.Random(seed), rate
        self.failed: dict[str, int] = {}
        for name in self.CALLS:
            monkeypatch.setattr(MlflowClient, name, self.failing(name, getattr(MlflowClient, name)))

    def failing(self, name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            dice = self.stream.random()
            if dice < self.rate / 2:
                self.failed[name] = self.failed.get(name, 0) + 1
                raise ConnectionError(f"{name} was not carried out")
            if name == "create_run" and self.stream.random() < 0.5:
                self.failed[self.DOUBLES] = self.failed.get(self.DOUBLES, 0) + 1
                call(*arguments, **options)
            answer = call(*arguments, **options)
            if dice < self.rate:
                self.failed[name] = self.failed.get(name, 0) + 1
                raise ConnectionError(f"{name} was carried out")
            return answer

        return wrapper
