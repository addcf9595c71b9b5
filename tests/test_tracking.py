"""What MLflow's environment variables do to a sweep."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import search
from tests.tracked_sweeps import Flaky, play, read_store, rebuilt, start_sweep, steps_once, without_ids
from tune import sweep as sweep_module
from tune.checks import clean, launch_tracking
from tune.execution import Outcome
from tune.report import projection as projection_module
from tune.report import tracker as tracker_module
from tune.report.tracker import Tracker
from tune.report.tracking import sqlite_uri, tracking_uri
from tune.search.ledger import Ledger

SETTINGS = {
    "MLFLOW_EXPERIMENT_NAME": "theirs",
    "MLFLOW_EXPERIMENT_ID": "77",
    "MLFLOW_RUN_ID": "0123456789abcdef0123456789abcdef",
    "MLFLOW_RUN_CONTEXT": '{"mlflow.user": "them"}',
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",
}


@pytest.mark.parametrize("failing", [False, True], ids=["a store that works", "a store that fails"])
def test_settings_of_mlflow_lose_and_change_nothing(
    failing: bool, storage: Path, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logging from a thread of MLflow's own would tell nobody what a store refused."""
    monkeypatch.setattr(tracker_module, "PAUSE", 3600.0)
    sweep = start_sweep(storage, trials=4)
    play(Ledger(sweep), 4)
    expected = without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    before = threading.active_count()
    with monkeypatch.context() as patch:
        if failing:
            Flaky(patch, seed=3, rate=0.15)
            real = patch_queue(patch)
        tracker = Tracker(Ledger(sweep), tracking_uri(storage, ""))
        while not tracker._attempt(lambda projection: projection.close(finished=True)):
            pass
        if failing:
            assert not real, "nothing went into MLflow's queue"
    tracker.close(finished=True)
    assert tracker.problem == ""
    assert threading.active_count() <= before, "MLflow logs from no thread of its own"
    store = read_store(storage)
    assert without_ids(store) == expected
    assert steps_once(store)


def patch_queue(patch: pytest.MonkeyPatch) -> list[Any]:
    """Makes MLflow's asynchronous queue refuse all that it is given; what it was given."""
    from mlflow.utils.async_logging.async_logging_queue import AsyncLoggingQueue

    given: list[Any] = []
    patch.setattr(AsyncLoggingQueue, "log_batch_async", lambda queue, **batch: given.append(batch))
    return given


def test_a_slow_import_is_no_server_that_does_not_answer(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are the pages, whose libraries take as long."""
    monkeypatch.setattr(tracker_module, "PAUSE", 3600.0)
    for name in ("load", "plots_page"):
        real = getattr(projection_module, name)
        monkeypatch.setattr(projection_module, name, lambda *given, real=real: (time.sleep(3), real(*given))[1])
    ledger = Ledger(start_sweep(storage, trials=2))
    play(ledger, 2)
    tracker = Tracker(ledger, tracking_uri(storage, ""))
    tracker.close(finished=True, patience=2)
    assert tracker.problem == ""
    assert read_store(storage)["parent"]["status"] == "FINISHED"


def test_the_variable_is_the_default_of_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch_tracking("") == ("", "--tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " ")
    assert launch_tracking("") == ("", "--tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert launch_tracking("") == (f"sqlite:///{tmp_path / 'mine.db'}", "MLFLOW_TRACKING_URI")
    assert launch_tracking("http://server:5000") == ("http://server:5000", "--tracking")


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("http://me:secret@127.0.0.1:1", ["MLFLOW_TRACKING_URI: the URL of 'http://127.0.0.1:1' holds a user"]),
        ("postgresql://me:secret@127.0.0.1:1/x", ["MLFLOW_TRACKING_URI: the URL", "holds a password"]),
        ("mlruns", ["MLFLOW_TRACKING_URI: 'mlruns' is not allowed", "http(s)://HOST:PORT"]),
        ("databricks", ["MLFLOW_TRACKING_URI: 'databricks' is not allowed"]),
        ("sqlite:///", ["MLFLOW_TRACKING_URI: 'sqlite:///' is not allowed", "sqlite:///FILE"]),
        ("http://127.0.0.1:9", ["tracking server http://127.0.0.1:9 of MLFLOW_TRACKING_URI does not answer"]),
    ],
)
def test_what_the_flag_refuses_the_variable_may_not_hold(
    variable: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    assert search.main(["launch", "bad", "--storage", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(word in said.err for word in words)
    assert "secret" not in said.err
    assert said.err.count("\n") == 1


def test_the_variable_counts_at_launch_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resume with another one, or with none, goes on where the sweep was launched to be tracked."""
    tracked: list[str] = []

    def execute(sweep: Any, *rest: Any) -> Outcome:
        tracked.append(sweep.spec.tracking)
        return Outcome(0)

    monkeypatch.setattr(sweep_module, "execute", execute)
    runs, mine = str(tmp_path / "runs"), f"sqlite:///{tmp_path / 'mine.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine)
    assert search.main(["launch", "first", "--storage", runs]) == 0
    assert f"MLflow's runs go to {mine}, as MLFLOW_TRACKING_URI says" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "runs" / "first" / "sweep.yaml").read_text())["spec"]["tracking"] == mine
    for variable, is_said in ((mine, False), ("", False), ("http://me:secret@127.0.0.1:9", True), ("http://127.0.0.1:9", True)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        assert search.main(["resume", "first", "--storage", runs]) == 0
        said = capsys.readouterr().out
        assert (f"MLflow's runs of 'first' stay in {mine}" in said) == is_said
        assert "secret" not in said
    assert tracked == [mine] * 5
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert search.main(["resume", "first", "--storage", runs, "--tracking", other]) == 0
    assert "stay in" not in capsys.readouterr().out
    assert tracked[-1] == other


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a b"])
def test_a_relative_database_means_the_same_from_a_folder_with_an_odd_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert clean("sqlite:///mine.db") == sqlite_uri(tmp_path / name / "mine.db")
    assert clean(clean("sqlite:///mine.db")) == clean("sqlite:///mine.db")
    with pytest.raises(ValueError, match="--tracking: 'sqlite:///:memory:' is not allowed"):
        clean("sqlite:///:memory:")
