"""MLflow read back through its own client: what the ledger says, once, however often it was sent, and rebuilt from nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from tests.sweeps import CREATED, epoch_record, metric_lines, new_storage
from tests.tracked_sweeps import TRACEBACK, Flaky, play, read_store, rebuilt, start_sweep, steps_once, without_ids
from tune.report import leaderboard as report
from tune.report import projection as projection_module
from tune.report import tracker as tracker_module
from tune.report.leaderboard import noted_runs, plots_page, rows
from tune.report.mlflow_database import prepare
from tune.report.projection import BATCH, Projection, run_name
from tune.report.tracker import Tracker
from tune.report.tracking import tracking_uri
from tune.search.ledger import RETRAIN, Ledger
from tune.search.recipes import from_yaml, of_trial
from tune.store.stored_sweep import Sweep

# -- read back --------------------------------------------------------------------------------------------------------


def test_what_happened_is_what_mlflow_shows(storage: Path) -> None:
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    play(ledger)
    Projection(ledger, tracking_uri(storage, "")).close(finished=True)
    store = read_store(storage)
    assert set(store) == {"parent", *map(str, range(7))}
    words = {record.number: record.status for record in ledger.records.values()}
    assert {"complete", "stopped", "diverged", "failed"} == set(words.values())
    status = {"complete": "FINISHED", "stopped": "KILLED", "diverged": "KILLED", "failed": "FAILED"}
    recorded = metric_lines(sweep)
    for record in ledger.records.values():
        run = store[str(record.number)]
        assert run["status"] == status[record.status]
        assert run["links"]["mlflow.parentRunId"] == store["parent"]["run_id"]
        assert run["name"] == run_name(record)
        assert run["times"] == (int(record.started * 1000), int(record.ended_at * 1000))
        expected = {"method": record.method, **record.values, "seed": ledger.seed(record)}
        assert run["params"] == {key: str(value) for key, value in expected.items()}
        tags = {"sweep": "first", "sweep_id": sweep.provenance["id"], "study": "sweep", "role": "trial", "method": "alr"}
        tags |= {"trial": str(record.number), "state": record.status, "epochs": str(record.epochs)}
        assert run["tags"] == tags | ({"error": TRACEBACK} if record.status == "failed" else {})
        lines = [line for line in recorded if line["trial"] == record.number]
        for key in ("val/objective", *lines[0]["metrics"]):
            told = [(line["epoch"], int(line["time"] * 1000), line["metrics"].get(key, line["objective"])) for line in lines]
            assert run["metrics"][key] == told
        assert set(run["metrics"]) == {"val/objective", *lines[0]["metrics"]}
    assert steps_once(store)
    assert noted_runs(ledger) == {number: store[str(number)]["run_id"] for number in words}


def test_the_parent_tells_the_best(storage: Path, tmp_path: Path) -> None:
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    play(ledger)
    sweep.files.write("noise.json", '{"realised_rate": 0.4}')
    projection = Projection(ledger, tracking_uri(storage, ""))
    projection.close(finished=True)
    parent, best = read_store(storage)["parent"], ledger.best()
    assert best is not None
    assert (parent["name"], parent["status"], parent["times"][0]) == ("first", "FINISHED", int(CREATED * 1000))
    assert parent["params"]["epochs"] == "9"
    assert parent["params"]["made_with.id"] == sweep.provenance["id"]
    assert json.loads(parent["params"]["set"]) == {"warmup": "0"}
    assert json.loads(parent["tags"]["best_params"]) == {"method": "alr", **best.values}
    assert parent["links"]["best_run_id"] == projection.runs[best.number]
    ended = sorted(ledger.records.values(), key=lambda record: record.ended_at)
    curve, so_far = [], -1.0
    for step, record in enumerate(ended, 1):
        so_far = max(so_far, record.value or 0.0) if record.state is TrialState.COMPLETE else so_far
        curve += [(step, int(record.ended_at * 1000), so_far)] if so_far >= 0 else []
    assert parent["metrics"]["val/objective"] == curve
    assert parent["metrics"]["val/objective"][-1][2] == best.value
    last = {name: parent["metrics"][f"trials/{name}"][-1][2] for name in ("complete", "pruned", "fail")}
    assert last == {"complete": ledger.count(TrialState.COMPLETE), "pruned": ledger.count(TrialState.PRUNED), "fail": 1}
    note = parent["links"]["mlflow.note.content"]
    assert f"| {best.number} | alr | complete | {100 * best.value:.2f} |" in note  # type: ignore[operator]
    run_id = parent["run_id"]
    held = {file.path for file in projection.client.list_artifacts(run_id)}
    assert {"best_config.yaml", "leaderboard.json", "noise.json", "plots.html"} <= held
    for name in held:
        projection.client.download_artifacts(run_id, name, str(tmp_path))
    assert json.loads((tmp_path / "leaderboard.json").read_text()) == rows(ledger, projection.runs)
    assert from_yaml(tmp_path / "best_config.yaml") == of_trial(ledger, best)
    assert json.loads((tmp_path / "noise.json").read_text()) == {"realised_rate": 0.4}
    assert "plotly" in (tmp_path / "plots.html").read_text().lower()
    (location,) = [path for path in storage.rglob("best_config.yaml") if "mlartifacts" in path.parts]
    assert location.is_relative_to(storage / "mlartifacts" / "first")


def test_the_parent_tells_what_was_spent_and_saved(storage: Path) -> None:
    """Half a second and a quarter GPU-second per epoch; of nine epochs each, those that ASHA's stops left out. What diverged or
    failed spent, and saved nothing."""
    sweep = start_sweep(storage, gpus_per_trial=0.5, gpu_hours=2.0)
    ledger = Ledger(sweep)
    play(ledger, gpus=0.5)
    Projection(ledger, tracking_uri(storage, "")).close(finished=True)
    parent = read_store(storage)["parent"]
    stopped = [record for record in ledger.records.values() if record.status == "stopped"]
    assert stopped
    num_epochs, num_saved = len(metric_lines(sweep)), sum(9 - record.epochs for record in stopped)
    last = {name: history[-1][2] for name, history in parent["metrics"].items()}
    assert (last["spent/epochs"], last["saved/epochs"]) == (num_epochs, num_saved)
    expected = {"spent/trial_hours": num_epochs / 7200, "saved/trial_hours": num_saved / 7200}
    expected |= {"spent/gpu_hours": num_epochs / 14400, "saved/gpu_hours": num_saved / 14400}
    assert {name: last[name] for name in expected} == pytest.approx(expected)
    assert 0 < last["spent/hours"] < last["spent/trial_hours"]
    assert [step for step, _, _ in parent["metrics"]["spent/hours"]] == list(range(1, 8))
    note = parent["links"]["mlflow.note.content"]
    assert f"{num_epochs} epochs" in note
    assert f"saved by ASHA: {num_saved} epochs" in note
    assert " of 2 GPU-hours" in note


def test_runs_of_the_store_that_is_tracked_to_now_are_the_ones_that_are_noted(
    storage: Path, tmp_path: Path, migrated_store: Path
) -> None:
    """Tracked to one store, to another, and to the first one again."""
    ledger = Ledger(start_sweep(storage))
    play(ledger)
    here, there = tracking_uri(storage, ""), tracking_uri(new_storage(tmp_path / "there", migrated_store), "")
    noted = []
    for uri in (here, there, here):
        projection = Projection(ledger, uri)
        projection.close(finished=True)
        noted.append(noted_runs(ledger))
        assert noted[-1] == projection.runs
    assert noted[0] == noted[2] != noted[1]


def test_drawing_says_nothing_on_the_screen(tmp_path: Path) -> None:
    """Parameters of a method that ran once or twice have no importance to speak of, and Optuna says so for each."""
    ledger = Ledger(start_sweep(tmp_path, method=("ce", "alr"), set={}, trials=4, scheduler="none"))
    assert plots_page(ledger) == ""
    play(ledger, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        page = plots_page(ledger)
    assert not said
    assert page.count("Plotly.newPlot") == 4


def test_the_plots_of_a_large_sweep_show_its_best_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(start_sweep(tmp_path, trials=20))
    play(ledger, 20)
    monkeypatch.setattr(report, "PLOTTED", 5)
    drawn: list[list[int]] = []
    real = optuna.visualization.plot_parallel_coordinate

    def plot(study: optuna.Study) -> Any:
        drawn.append(sorted(round(trial.datetime_start.timestamp() * 1e6) for trial in study.trials if trial.datetime_start))
        return real(study)

    monkeypatch.setattr(optuna.visualization, "plot_parallel_coordinate", plot)
    assert plots_page(ledger).startswith("<!doctype html>")
    assert drawn == [sorted(round(record.started * 1e6) for record in ledger.leaderboard()[:5])]


def test_a_configuration_comes_back_from_its_file_or_is_refused(storage: Path, tmp_path: Path) -> None:
    ledger = Ledger(start_sweep(storage, method=("alr", "co-teaching"), set={}))
    path = tmp_path / "config.yaml"
    for _ in range(6):
        recipe = of_trial(ledger, ledger.ask())
        path.write_text(yaml.safe_dump(vars(recipe)))
        assert from_yaml(path) == recipe
        assert from_yaml(path).fingerprint == recipe.fingerprint
    whole = yaml.safe_load(path.read_text())
    for change, message in (
        ({"values": {"learning": 1}}, "unknown hyperparameter 'learning'"),
        ({"values": {"lr": -1}}, "lr: -1.0 is not allowed"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"epochs": 0}, "--epochs: '0' is not allowed"),
        ({"data": "mnist9"}, "unknown data set 'mnist9'"),
        ({"more": 1}, "is no configuration; it must have the keys data, noise, "),
    ):
        path.write_text(yaml.safe_dump({**whole, **change}))
        with pytest.raises(ValueError, match=message):
            from_yaml(path)


# -- as often as you like ---------------------------------------------------------------------------------------------


def test_sent_twice_is_there_once(storage: Path) -> None:
    """By the same projection, by another process, and by one that lost its notes."""
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    play(ledger)
    uri = tracking_uri(storage, "")
    first = Projection(ledger, uri)
    first.close(finished=True)
    store = read_store(storage)
    first.sync()
    first.close(finished=True)
    Projection(Ledger(sweep), uri).close(finished=True)
    assert without_ids(read_store(storage)) == without_ids(store)
    (sweep.folder / "tracker.jsonl").unlink()
    Projection(Ledger(sweep), uri).close(finished=True)
    again = read_store(storage)
    assert without_ids(again) == without_ids(store)
    assert {key: run["run_id"] for key, run in again.items()} == {key: run["run_id"] for key, run in store.items()}
    assert noted_runs(ledger) == {int(key): run["run_id"] for key, run in again.items() if key != "parent"}
    assert steps_once(again)


def test_epoch_by_epoch_and_from_nothing_come_to_the_same(storage: Path, tmp_path: Path, migrated_store: Path) -> None:
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    projection = Projection(ledger, tracking_uri(storage, ""))
    play(ledger, between=projection.sync)
    projection.close(finished=True)
    store = read_store(storage)
    assert len(store) == 8
    assert without_ids(rebuilt(sweep, tmp_path / "again", migrated_store)) == without_ids(store)


def test_batches_smaller_than_what_there_is(
    storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BATCH <= 1000, "what a server takes in one request"
    sweep = start_sweep(storage, trials=3)
    ledger = Ledger(sweep)
    play(ledger, 3)
    expected = without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))
    monkeypatch.setattr(projection_module, "BATCH", 4)
    Projection(ledger, tracking_uri(storage, "")).close(finished=True)
    assert without_ids(read_store(storage)) == expected


def test_an_interrupted_sweep_waits_and_goes_on(storage: Path, tmp_path: Path, migrated_store: Path) -> None:
    sweep = start_sweep(storage, trials=5, scheduler="none")
    uri = tracking_uri(storage, "")
    ledger = Ledger(sweep)
    play(ledger, 5, keep=2)
    unfinished = {str(record.number) for record in ledger.unfinished()}
    assert len(unfinished) == 2
    projection = Projection(ledger, uri)
    projection.sync()
    statuses = {key: run["status"] for key, run in read_store(storage).items()}
    assert {key for key, status in statuses.items() if status == "RUNNING"} == {"parent", *unfinished}
    projection.close(finished=False)
    before = read_store(storage)
    statuses = {key: run["status"] for key, run in before.items()}
    assert {key for key, status in statuses.items() if status == "SCHEDULED"} == {"parent", *unfinished}
    assert "RUNNING" not in statuses.values()
    ledger = Ledger(sweep)
    projection = Projection(ledger, uri)
    projection.sync()
    statuses = {key: run["status"] for key, run in read_store(storage).items()}
    assert {key for key, status in statuses.items() if status == "RUNNING"} == {"parent", *unfinished}
    play(ledger, 5)
    projection.close(finished=True)
    store = read_store(storage)
    assert {run["status"] for run in store.values()} <= {"FINISHED", "KILLED", "FAILED"}
    assert {key: store[key]["run_id"] for key in before} == {key: run["run_id"] for key, run in before.items()}
    assert len(store) == len(before) == 7
    assert [step for step, _, _ in store[min(unfinished)]["metrics"]["val/objective"]] == list(range(1, 10))
    assert without_ids(rebuilt(sweep, tmp_path / "again", migrated_store)) == without_ids(store)


def test_a_retraining_has_a_parent_of_its_own(storage: Path) -> None:
    sweep = start_sweep(storage, trials=2, scheduler="none")
    ledger = Ledger(sweep)
    record = ledger.ask()
    ledger.report(record, [epoch_record(epoch, 0.5) for epoch in range(1, 10)])
    ledger.complete(record)
    uri = tracking_uri(storage, "")
    Projection(ledger, uri).close(finished=True)
    (sweep.folder / RETRAIN).mkdir()
    retraining = Ledger(sweep, RETRAIN, create=True)
    retraining.enqueue(record.params, {"source": 0, "seed": 4, "noise_draw": 5})
    again = retraining.ask()
    retraining.report(again, [epoch_record(epoch, 0.75) for epoch in range(1, 10)])
    retraining.complete(again)
    Projection(retraining, uri).close(finished=True)
    store = read_store(storage)
    assert set(store) == {"parent", "0", "retrain/parent", "retrain/0"}
    assert store["retrain/parent"]["name"] == "first retrain"
    assert store["retrain/0"]["links"]["mlflow.parentRunId"] == store["retrain/parent"]["run_id"]
    assert (store["retrain/0"]["tags"]["source"], store["retrain/0"]["tags"]["seed"]) == ("0", "4")
    assert store["parent"]["metrics"]["val/objective"][-1][2] == 0.5
    assert noted_runs(retraining) == {0: store["retrain/0"]["run_id"]}


def test_metrics_of_a_trial_that_the_ledger_does_not_have_are_left_out(storage: Path) -> None:
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    record = ledger.ask()
    ledger.report(record, [epoch_record(1, 0.5)])
    line = (sweep.folder / "metrics.jsonl").read_bytes()
    with (sweep.folder / "metrics.jsonl").open("ab") as file:
        file.write(line.replace(b'"trial":0', b'"trial":5'))
    Projection(Ledger(sweep), tracking_uri(storage, "")).close(finished=False)
    assert set(read_store(storage)) == {"parent", "0"}


# -- a store that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_at_random_loses_and_doubles_nothing(
    storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    sweep = start_sweep(storage, trials=5)
    ledger = Ledger(sweep)
    play(ledger, 5)
    expected = without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))
    monkeypatch.setattr(tracker_module, "PAUSE", 3600.0)  # its thread rests
    tracker = Tracker(ledger, tracking_uri(storage, ""))
    with monkeypatch.context() as patch:
        flaky = Flaky(patch, seed, rate=0.2)
        num_attempts = 1
        while not tracker._attempt(lambda projection: projection.close(finished=True)):
            assert tracker.problem.endswith("carried out")
            num_attempts += 1
            assert num_attempts < 500
    assert num_attempts > 3
    assert len(flaky.failed) > 2
    assert flaky.failed[flaky.DOUBLES]
    tracker.close(finished=True)
    assert tracker.problem == ""
    store = read_store(storage)
    assert without_ids(store) == expected
    assert steps_once(store)


def test_a_parent_whose_parameters_were_not_taken_gets_them_later(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    ledger = Ledger(start_sweep(storage))
    with monkeypatch.context() as patch:

        def refuses(*arguments: Any, **options: Any) -> None:
            raise ConnectionError("no")

        patch.setattr(MlflowClient, "log_batch", refuses)
        with pytest.raises(ConnectionError):
            Projection(ledger, tracking_uri(storage, ""))
    Projection(ledger, tracking_uri(storage, ""))
    assert read_store(storage)["parent"]["params"]["epochs"] == "9"


def test_resources_may_change_at_a_resume(storage: Path) -> None:
    """MLflow takes a parameter once; a resume with other execution flags must not be refused for that."""
    sweep = start_sweep(storage)
    Projection(Ledger(sweep), tracking_uri(storage, ""))
    spec = {**sweep.spec.to_dict(), "concurrent": 2, "method": ("alr",)}
    changed = dataclasses.replace(sweep, spec=type(sweep.spec)(**spec))
    Projection(Ledger(changed), tracking_uri(storage, "")).close(finished=False)
    assert read_store(storage)["parent"]["params"]["concurrent"] == "0"


def test_found_runs_are_not_written_again(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection that starts over on a store that is up to date asks a few questions, whatever the number of trials."""
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    play(ledger)
    Projection(ledger, tracking_uri(storage, "")).close(finished=True)
    calls = []
    from mlflow.tracking import MlflowClient

    for name in Flaky.CALLS:
        real = getattr(MlflowClient, name)

        def counted(*arguments: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(MlflowClient, name, counted)
    Projection(ledger, tracking_uri(storage, "")).sync()
    assert len(calls) <= 8, calls
    assert "log_batch" not in calls, "the parent's curve was not sent again"


@pytest.mark.parametrize("seen", ["by the next projection", "by this one"])
def test_runs_that_were_made_without_an_answer_go(storage: Path, seen: str) -> None:
    """A second parent and a second run of each trial; those that are noted stay."""
    from mlflow.tracking import MlflowClient

    ledger, uri = Ledger(start_sweep(storage)), tracking_uri(storage, "")
    play(ledger)
    projection = Projection(ledger, uri)
    projection.sync()
    before = {run["run_id"] for run in read_store(storage).values()}
    client = MlflowClient(tracking_uri=uri)
    for run in client.search_runs([projection.experiment_id]):
        client.create_run(projection.experiment_id, start_time=run.info.start_time, tags=run.data.tags)
    assert len(client.search_runs([projection.experiment_id])) == 2 * len(before)
    (projection if seen == "by this one" else Projection(Ledger(ledger.sweep), uri)).close(finished=True)
    assert {run["run_id"] for run in read_store(storage).values()} == before


def test_runs_of_a_copy_on_the_same_server_stay(storage: Path, tmp_path: Path) -> None:
    """A folder that was copied has the same id. Both are extended; neither's runs go when the other is brought up to date."""
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(storage, "")
    play(Ledger(start_sweep(storage)), trials=4)
    Projection(Ledger(Sweep.find(storage, "first")), uri).close(finished=True)
    copy = tmp_path / "copy"
    shutil.copytree(storage / "first", copy / "first")
    ledgers = [Ledger(Sweep.find(home, "first")) for home in (storage, copy)]
    projections = [Projection(ledger, uri) for ledger in ledgers]
    for ledger, projection in zip(ledgers, projections, strict=True):
        play(ledger, trials=6)
        projection.sync()
    runs = {run for projection in projections for run in projection.runs.values()}
    assert len(runs) > len(projections[0].runs), "each has runs of its own for the trials that came later"
    for projection in (*projections, *(Projection(ledger, uri) for ledger in ledgers)):
        projection.close(finished=True)
    found = MlflowClient(tracking_uri=uri).search_runs([projections[0].experiment_id])
    assert {run.info.run_id for run in found} == runs | {projections[0].parent}


def test_the_thread_keeps_up_while_a_sweep_runs(
    storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real thread beside a driver that reports all the time, on a store that fails now and then."""
    monkeypatch.setattr(tracker_module, "PAUSE", 0.01)
    sweep = start_sweep(storage)
    ledger = Ledger(sweep)
    with monkeypatch.context() as patch:
        flaky = Flaky(patch, seed=1, rate=0.03)
        prepare(storage / "mlflow.db", pytest.fail)  # it is looked at once, which takes as long as this sweep on a busy machine
        tracker = Tracker(ledger, tracking_uri(storage, ""))
        play(ledger, between=lambda: time.sleep(0.06))
        projected = noted_runs(ledger)
    assert projected, "nothing was sent while the sweep ran"
    assert flaky.failed
    tracker.close(finished=True)
    assert tracker.problem == ""
    assert not any(thread.name == "tracker" and thread.is_alive() for thread in threading.enumerate())
    assert without_ids(read_store(storage)) == without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))


def test_a_dead_store_holds_nothing_up_and_is_caught_up_with(
    storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "PAUSE", 0.05)
    sweep = start_sweep(storage)
    ledger, said = Ledger(sweep), list[str]()
    with monkeypatch.context() as patch:
        Flaky(patch, seed=0, rate=2.0)  # no call is carried out
        tracker = Tracker(ledger, tracking_uri(storage, ""), said.append)
        play(ledger)
        wait_for(lambda: bool(said))
        time.sleep(0.3)
        tracker.close(finished=True, patience=0.3)
    assert "was not carried out" in tracker.problem
    (line,) = said
    assert "MLflow is behind the ledger" in line
    assert "was not carried out" in line
    tracker = Tracker(Ledger(sweep), tracking_uri(storage, ""))
    tracker.close(finished=True)
    assert tracker.problem == ""
    assert without_ids(read_store(storage)) == without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))


def test_a_store_that_is_away_for_a_while_is_spoken_of_twice(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "PAUSE", 0.05)
    said: list[str] = []
    with monkeypatch.context() as patch:
        Flaky(patch, seed=0, rate=2.0)
        tracker = Tracker(Ledger(start_sweep(storage)), tracking_uri(storage, ""), said.append)
        wait_for(lambda: bool(said))
    wait_for(lambda: len(said) == 2)
    assert said[1] == "MLflow is up to date again"
    tracker.close(finished=True)
    assert len(said) == 2


def test_a_store_that_keeps_a_call_is_given_up(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes requests and never answers: the driver ends all the same, and nobody else touches the projection meanwhile."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracker_module, "PAUSE", 0.02)
    ledger = Ledger(start_sweep(storage))
    ledger.ask()
    let_go, callers = threading.Event(), []
    real = MlflowClient.log_batch

    def hangs(*arguments: Any, **options: Any) -> None:
        callers.append(threading.current_thread().name)
        let_go.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", hangs)
    tracker = Tracker(ledger, tracking_uri(storage, ""))
    wait_for(lambda: bool(callers))
    began = time.monotonic()
    tracker.close(finished=False, patience=0.5)
    assert 0.4 < time.monotonic() - began < 5
    assert tracker.problem == "no answer for 0.5 s"
    assert callers == ["tracker"]
    let_go.set()
    tracker._thread.join(30)
    assert tracker.problem == "", "it was slow, not dead"


def test_a_long_backlog_is_sent_for_as_long_as_it_is_taken(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer takes less than the patience, all of them together much more."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracker_module, "PAUSE", 3600.0)
    monkeypatch.setattr(projection_module, "BATCH", 10)
    ledger = Ledger(start_sweep(storage, trials=3, scheduler="none"))
    play(ledger, 3)
    real = MlflowClient.log_batch

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.1)
        real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    tracker = Tracker(ledger, tracking_uri(storage, ""))
    began = time.monotonic()
    tracker.close(finished=True, patience=1.5)
    assert time.monotonic() - began > 1.6
    assert tracker.problem == ""
    assert read_store(storage)["parent"]["status"] == "FINISHED"


def test_after_a_signal_the_store_gets_what_is_left_of_the_time(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However readily it answers; and what it is told first is that nothing runs any more."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracker_module, "PAUSE", 0.05)
    ledger = Ledger(start_sweep(storage))
    ledger.report(ledger.ask(), [epoch_record(1, 0.5)])
    let_go = threading.Event()

    def writes_for_ever(client: MlflowClient, *arguments: Any, **options: Any) -> None:
        while not let_go.wait(0.05):
            client.search_experiments()
            tracker._asked_at = time.monotonic()

    monkeypatch.setattr(MlflowClient, "log_text", writes_for_ever)
    tracker = Tracker(ledger, tracking_uri(storage, ""))
    wait_for(lambda: 0 in noted_runs(ledger))
    began = time.monotonic()
    tracker.close(finished=False, within=4)
    assert 3.5 < time.monotonic() - began < 8
    assert tracker.problem == "it had no time to be brought up to date"
    store = read_store(storage)
    let_go.set()
    tracker._thread.join(30)
    assert {key: run["status"] for key, run in store.items()} == {"parent": "SCHEDULED", "0": "SCHEDULED"}


def test_a_server_that_is_not_there_is_reported(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "PAUSE", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ledger = Ledger(start_sweep(storage))
    tracker = Tracker(ledger, "http://127.0.0.1:9")  # the port of "discard", where nothing listens
    ledger.report(ledger.ask(), [epoch_record(1, 0.5)])
    wait_for(lambda: bool(tracker.problem))
    tracker.close(finished=False, patience=0.2)
    assert "127.0.0.1" in tracker.problem
    assert "\n" not in tracker.problem


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
