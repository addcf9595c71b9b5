"""The command line as a user runs it: in processes of its own, which tests watch, kill and read back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.sweeps import make_sweep, play
from tune.report import leaderboard as report
from tune.report.leaderboard import noted_runs
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.search.recipes import dataset
from tune.spec import KEPT_CHECKPOINTS
from tune.store.stored_sweep import Sweep

ROOT = Path(__file__).resolve().parent.parent
SEARCH = [sys.executable, str(ROOT / "search.py")]
PATIENCE = 240.0
RAYS_SECONDS = 180.0  # after a driver was killed, until nothing is left of what it had started
STARTED: list[subprocess.Popen[str]] = []


def search(*arguments: object, check: int | None = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; ``check`` is the exit code that it must have."""
    command = [*SEARCH, *map(str, arguments)]
    environment = os.environ | (env or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert check is None or done.returncode == check, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def start(log: Path, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Starts a command in the background, its output in ``log``."""
    with log.open("w") as file:
        process = subprocess.Popen([*SEARCH, *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, text=True, cwd=cwd)
    STARTED.append(process)
    return process


def hostile_folder(folder: Path) -> Path:
    """A working directory with packages that have our names, or usual ones, and do not let themselves be imported."""
    for name in ("tune", "data", "models", "methods", "training", "losses", "modules", "errors", "hparams", "search"):
        package = folder / name if name not in ("errors", "hparams", "search") else folder
        package.mkdir(parents=True, exist_ok=True)
        file = package / "__init__.py" if package != folder else folder / f"{name}.py"
        file.write_text("raise RuntimeError('what the user has was imported')")
    return folder


def end_all() -> None:
    """Ends what a failed test left running."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE)


def wait_until(condition: Any, process: subprocess.Popen[str], log: Path) -> None:
    """Waits for ``condition()`` while ``process`` runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"the process ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def workers(driver: int) -> list[psutil.Process]:
    """The processes in which trials of this driver run."""
    found = []
    for process in family(driver):
        with suppress(psutil.NoSuchProcess):  # it has just ended, or is a zombie
            if "Trainable" in " ".join(process.cmdline()):
                found.append(process)
    return found


def family(parent: int) -> set[psutil.Process]:
    """What the process has started, and what that has; nothing where it has ended. To be asked before a kill: of the orphans
    some, Ray's agents, cannot be recognised, as a title that they give themselves overwrites their environment."""
    try:
        return set(psutil.Process(parent).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def still_there(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended, whether or not anybody has asked for their exit codes."""
    left = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


def assert_ended(processes: Iterable[psutil.Process], deadline: float) -> None:
    """All of them by ``deadline``, on the monotonic clock."""
    while left := still_there(processes):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a sweep's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def epochs_by_trial(folder: Path) -> dict[int, list[int]]:
    """What was recorded of each trial, in the order of recording."""
    found: dict[int, list[int]] = {}
    for line in metric_lines(folder):
        found.setdefault(line["trial"], []).append(line["epoch"])
    return found


def board(storage: Path, name: str) -> list[dict[str, Any]]:
    """What ``best --json`` prints."""
    ledger = Ledger(Sweep.find(storage, name), read_only=True)
    return report.rows(ledger, noted_runs(ledger))


def rungs(storage: Path, name: str) -> dict[str, dict[str, float]]:
    """What ``best --rungs`` prints."""
    return report.rungs(Ledger(Sweep.find(storage, name), read_only=True))


def assert_whole(folder: Path, rows: list[dict[str, Any]], trials: int) -> None:
    """Every trial asked for is there once, and of each every epoch up to its last, once."""
    states = Counter(row["state"] for row in rows)
    assert states["complete"] + states["stopped"] + states["diverged"] == trials, states
    assert sorted(row["trial"] for row in rows) == list(range(len(rows)))
    recorded = epochs_by_trial(folder)
    for row in rows:
        assert recorded[row["trial"]] == list(range(1, row["epochs"] + 1)), row


def assert_projected(storage: Path, name: str, rows: list[dict[str, Any]], uri: str = "") -> None:
    """MLflow holds one parent, and of each trial one run with each step once, and nothing is left RUNNING."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.study = 'sweep'", max_results=1000)
    parents = [run for run in runs if run.data.tags["role"] == "sweep"]
    children = {int(run.data.tags["trial"]): run for run in runs if run.data.tags["role"] == "trial"}
    assert len(parents) == 1
    assert len(runs) == 1 + len(rows) == 1 + len(children)
    word = {"complete": "FINISHED", "stopped": "KILLED", "diverged": "KILLED", "failed": "FAILED"}
    for row in rows:
        run = children[row["trial"]]
        assert run.info.status == word[row["state"]], row
        assert run.info.run_id == row["mlflow_run_id"]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/accuracy")]
        assert sorted(steps) == list(range(1, row["epochs"] + 1)), row
        assert run.data.params["method"] == row["method"]
        assert {"val/accuracy", "val/objective", "train/loss"} <= set(run.data.metrics)
        if row["method"] == "alr":
            assert "refine/changed" in run.data.metrics
    assert parents[0].info.status == "FINISHED"
    best = rows[0]
    assert parents[0].data.metrics["val/objective"] == best["value"]
    assert parents[0].data.tags["best_run_id"] == best["mlflow_run_id"]
    assert json.loads(parents[0].data.tags["best_params"])["method"] == best["method"]
    artifacts = {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)}
    assert {"leaderboard.json", "best_config.yaml"} <= artifacts


def assert_nothing_left(storage: Path, name: str) -> None:
    """After the end of a sweep no trial is RUNNING in the study; on disk are the best few trials' checkpoints and no other file
    than a sweep has, and nothing is in the temporary folder."""
    backend = optuna.storages.JournalStorage(JournalFileBackend(str(storage / name / "journal.log")))
    trials = optuna.load_study(study_name="sweep", storage=backend).get_trials(deepcopy=False)
    assert all(trial.state.is_finished() for trial in trials)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:KEPT_CHECKPOINTS]
    held = {str(path.relative_to(storage / name / "checkpoints")) for path in (storage / name / "checkpoints").rglob("*")}
    numbers = {str(trial.number) for trial in best}
    assert held == numbers | {f"{number}/checkpoint.pt" for number in numbers}
    files = {path.name for path in (storage / name).iterdir()} - {"checkpoints"}
    expected = {"sweep.yaml", "journal.log", "metrics.jsonl", "tracker.jsonl", "driver.lock", "noise.json", "best_config.yaml"}
    assert files == expected
    scratch = hashlib.sha256(str(storage / name).encode()).hexdigest()[:16]
    assert not list(Path(tempfile.gettempdir()).glob(f"noisy-label-*{scratch}*")), "what Tune wrote"
    assert {path.name for path in storage.iterdir()} <= {name, "mlartifacts", "mlflow.db", "mlflow.db-shm", "mlflow.db-wal"}


def of_real_data(sweep: Sweep) -> Sweep:
    """The same with the checksum of its data, as ``resume`` wants it."""
    sweep = replace(sweep, provenance={**sweep.provenance, "data": dataset(sweep.spec).fingerprint})
    sweep.write()
    return sweep


def make_finished_sweep(storage: Path, name: str) -> Path:
    """A sweep of three made-up trials that has ended, with the checksum of the real data; returns its folder."""
    sweep = of_real_data(make_sweep(storage, name, trials=3, epochs=3))
    play(Coordinator(Ledger(sweep), total=3, concurrent=2))
    return sweep.folder
