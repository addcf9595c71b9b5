"""Runs and experiments that users delete, restore and purge in MLflow: one resume later all of it is there again, once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from tests.tracked_sweeps import play, read_store, rebuilt, start_sweep, steps_once, without_ids
from tune.report import tracker as tracker_module
from tune.report.leaderboard import noted_runs
from tune.report.projection import Projection
from tune.report.tracker import Tracker
from tune.report.tracking import tracking_uri
from tune.search.ledger import Ledger
from tune.store.stored_sweep import Sweep

CHILD = 0  # a trial that completes


def client_of(storage: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri(storage, ""))


def experiment_id(storage: Path) -> str:
    return str(client_of(storage).get_experiment_by_name("first").experiment_id)


def run_id(storage: Path, what: str) -> str:
    return str(read_store(storage)[what]["run_id"])


def purge(storage: Path) -> None:
    """MLflow's own command, which clears all that is deleted."""
    from mlflow.cli import cli

    uri = tracking_uri(storage, "")
    done = CliRunner().invoke(cli, ["gc", "--backend-store-uri", uri], env={"MLFLOW_TRACKING_URI": uri})
    assert done.exit_code == 0, done.output


def delete(storage: Path, what: str) -> None:
    if what == "experiment":
        client_of(storage).delete_experiment(experiment_id(storage))
    else:
        client_of(storage).delete_run(run_id(storage, what))


def artifacts(storage: Path) -> dict[str, Any]:
    """The parent's files by name, without what names runs; of the page of plots that it is there."""
    client, parent = client_of(storage), run_id(storage, "parent")
    folder = storage / "mlartifacts" / "first" / parent / "artifacts"
    assert client.get_run(parent).info.artifact_uri == folder.as_uri()
    found: dict[str, Any] = {path.name: path.read_text() if path.suffix != ".html" else True for path in folder.iterdir()}
    assert set(found) == {file.path for file in client.list_artifacts(parent)}
    board = json.loads(found["leaderboard.json"])
    found["leaderboard.json"] = [{key: value for key, value in row.items() if key != "mlflow_run_id"} for row in board]
    return found


def check(storage: Path, expected: dict[str, Any]) -> None:
    """The store is the one of an undisturbed sweep: runs, values, statuses, tags, and who belongs to whom."""
    experiment = client_of(storage).get_experiment_by_name("first")
    assert experiment.lifecycle_stage == "active"
    store = read_store(storage)
    assert without_ids(store) == without_ids(expected)
    assert steps_once(store)
    parent = store["parent"]["run_id"]
    assert {run["links"]["mlflow.parentRunId"] for key, run in store.items() if key != "parent"} == {parent}
    assert store["parent"]["links"]["mlflow.note.content"] == expected["parent"]["links"]["mlflow.note.content"]
    ledger = Ledger(Sweep.find(storage, "first"), read_only=True)
    assert noted_runs(ledger) == {int(key): run["run_id"] for key, run in store.items() if key != "parent"}
    best = ledger.best()
    assert best is not None
    assert store["parent"]["links"]["best_run_id"] == store[str(best.number)]["run_id"]


def resume(storage: Path) -> list[str]:
    """What a resume does for MLflow, and what it says."""
    said: list[str] = []
    tracker = Tracker(Ledger(Sweep.find(storage, "first")), tracking_uri(storage, ""), said.append)
    tracker.close(finished=True)
    assert tracker.problem == ""
    return said


class Finished(NamedTuple):
    """A sweep that ended well, and all that MLflow holds of it."""

    storage: Path
    store: dict[str, Any]
    artifacts: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, migrated_store: Path) -> Finished:
    storage = tmp_path_factory.mktemp("finished") / "runs"
    storage.mkdir()
    shutil.copy(migrated_store, storage / "mlflow.db")
    sweep = start_sweep(storage, trials=4)
    play(Ledger(sweep), 4)
    Projection(Ledger(sweep), tracking_uri(storage, "")).close(finished=True)
    return Finished(storage, read_store(storage), artifacts(storage))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    _artifact_repos_cache.clear()  # a process keeps the place of a run's artifacts by the run's id, and here are two places
    shutil.copytree(finished.storage, tmp_path / "copy")
    return tmp_path / "copy"


def restored(storage: Path, what: str) -> None:
    """Out of sight while a resume makes another run in its place, as the version before did for one that was deleted, and then
    restored."""
    old, client = run_id(storage, what), client_of(storage)
    role = client.get_run(old).data.tags["role"]
    client.set_tag(old, "role", "hidden")
    client.delete_run(old)
    resume(storage)
    client.restore_run(old)
    client.set_tag(old, "role", role)


DISTURBANCES: dict[str, Callable[[Path], object]] = {
    "experiment deleted": lambda storage: delete(storage, "experiment"),
    "experiment purged": lambda storage: (delete(storage, "experiment"), purge(storage)),
    "parent deleted": lambda storage: delete(storage, "parent"),
    "parent purged": lambda storage: (delete(storage, "parent"), purge(storage)),
    "parent restored beside another": lambda storage: restored(storage, "parent"),
    "child deleted": lambda storage: delete(storage, str(CHILD)),
    "child purged": lambda storage: (delete(storage, str(CHILD)), purge(storage)),
    "child restored beside another": lambda storage: restored(storage, str(CHILD)),
    "all children purged": lambda storage: ([delete(storage, str(n)) for n in range(5)], purge(storage)),
    "child purged, then all deleted": lambda storage: (
        delete(storage, str(CHILD)),
        purge(storage),
        delete(storage, "experiment"),
    ),
}


@pytest.mark.parametrize(
    ("what", "notes"),
    [(what, "noted") for what in DISTURBANCES]
    # without notes a second run may be that of a copy of the sweep
    + [(what, "notes lost") for what in DISTURBANCES if "beside" not in what],
)
def test_what_was_deleted_at_the_end_is_back_after_one_resume(what: str, notes: str, copy: Path, finished: Finished) -> None:
    DISTURBANCES[what](copy)
    if notes == "notes lost":
        (copy / "first" / "tracker.jsonl").unlink()
    said = resume(copy)
    check(copy, finished.store)
    assert artifacts(copy) == finished.artifacts
    if what == "experiment deleted":
        assert said == ["MLflow's experiment 'first' had been deleted and is restored"]
    elif what.endswith(" deleted") and "," not in what:
        assert said == ["1 run of 'first' had been deleted in MLflow and is restored"]
    assert resume(copy) == [], "the second one has nothing to say"


def test_ids_stay_where_mlflow_can_restore_them(copy: Path, finished: Finished) -> None:
    for what in ("parent", str(CHILD), "experiment"):
        delete(copy, what)
        resume(copy)
    ids = {key: run["run_id"] for key, run in read_store(copy).items()}
    assert ids == {key: run["run_id"] for key, run in finished.store.items()}


@pytest.mark.parametrize("what", [name for name in DISTURBANCES if "beside" not in name and "all " not in name])
def test_what_is_deleted_while_the_sweep_runs_is_back_after_one_resume(
    what: str, storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half of the epochs; trial 0 is running then. The projection goes on as its thread does."""
    monkeypatch.setattr(tracker_module, "PAUSE", 3600.0)
    sweep = start_sweep(storage, trials=4, scheduler="none")
    ledger = Ledger(sweep)
    tracker, num_epochs = Tracker(ledger, tracking_uri(storage, "")), iter(range(10**6))

    def between() -> None:
        epoch = next(num_epochs)
        if epoch == 8:
            assert not ledger.records[CHILD].finished
            DISTURBANCES[what](storage)
        if epoch % 4 == 3:
            tracker._attempt(lambda projection: projection.sync())

    play(ledger, 4, between=between)
    tracker.close(finished=True)
    assert tracker.problem == ""
    resume(storage)
    check(storage, rebuilt(sweep, tmp_path / "again", migrated_store))


def test_a_sweep_under_a_deleted_experiments_name_is_tracked(storage: Path, tmp_path: Path, migrated_store: Path) -> None:
    """The experiment is that of an earlier sweep, whose runs stay where the user put them; so do those of anybody else."""
    old = start_sweep(storage, trials=2)
    play(Ledger(old), 2)
    Projection(Ledger(old), tracking_uri(storage, "")).close(finished=True)
    client = client_of(storage)
    foreign = client.create_run(experiment_id(storage)).info.run_id
    olds = {run["run_id"] for run in [*read_store_without(storage, foreign).values()]}
    client.delete_experiment(experiment_id(storage))
    shutil.rmtree(storage / "first")
    sweep = start_sweep(storage, trials=3)
    provenance = {**sweep.provenance, "id": "another"}
    dataclasses.replace(sweep, provenance=provenance).write()
    sweep = Sweep.find(storage, "first")
    play(Ledger(sweep), 3)
    said = resume(storage)
    assert said == [
        f"MLflow's experiment 'first' had been deleted and is restored; {len(olds) + 1} other runs in it stay deleted"
    ]
    check(storage, rebuilt(sweep, tmp_path / "again", migrated_store))
    assert {client.get_run(run).info.lifecycle_stage for run in olds | {foreign}} == {"deleted"}


def read_store_without(storage: Path, foreign: str) -> dict[str, Any]:
    client = client_of(storage)
    client.delete_run(foreign)
    found = read_store(storage)
    client.restore_run(foreign)
    return found


def test_an_older_state_of_the_database_gets_what_it_lacks(
    storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup from the middle of the sweep is put back: the notes know all runs, and each of them lacks epochs."""
    sweep = start_sweep(storage, trials=4)
    ledger = Ledger(sweep)
    projection, num_epochs = Projection(ledger, tracking_uri(storage, "")), iter(range(10**6))

    def between() -> None:
        epoch = next(num_epochs)
        if epoch == 9:
            projection.sync()
            shutil.copy(storage / "mlflow.db", tmp_path / "backup.db")

    play(ledger, 4, between=between)
    projection.close(finished=True)
    other = tmp_path / "restored"  # the path is another one: MLflow keeps a file open by its path in this process
    shutil.copytree(storage, other)
    shutil.copy(tmp_path / "backup.db", other / "mlflow.db")
    resume(other)
    check(other, rebuilt(sweep, tmp_path / "again", migrated_store))


def test_nothing_is_sent_again_to_a_run_that_holds_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One child lacks all; of the others not a metric is sent."""
    from mlflow.tracking import MlflowClient

    delete(copy, str(CHILD))
    purge(copy)
    sent: list[tuple[str, int]] = []
    real = MlflowClient.log_batch

    def counted(client: MlflowClient, run: str, metrics: Any = (), **rest: Any) -> Any:
        sent.append((run, len(metrics)))
        return real(client, run, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    resume(copy)
    new = run_id(copy, str(CHILD))
    assert {run for run, num in sent if num} == {new}
    lines = [json.loads(line) for line in (copy / "first" / "metrics.jsonl").read_text().splitlines()]
    assert sum(num for _, num in sent) == sum(1 + len(line["metrics"]) for line in lines if line["trial"] == CHILD)
