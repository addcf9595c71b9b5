"""Sweeps from end to end: real Ray, Optuna and MLflow, real kills."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from methods import METHODS, parameters
from tests.sweep_process import (
    PATIENCE,
    RAYS_SECONDS,
    ROOT,
    assert_ended,
    assert_nothing_left,
    assert_projected,
    assert_whole,
    board,
    end_all,
    epochs_by_trial,
    family,
    make_finished_sweep,
    metric_lines,
    rungs,
    search,
    start,
    wait_until,
    workers,
)
from training import checkpoint

SPEC = {"trials": 5, "epochs": 24, "checkpoint_seconds": 0, "report_seconds": 0.2, "concurrent": 2}


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


def spec_file(folder: Path, **changes: object) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


def without_ray(folder: Path) -> dict[str, str]:
    """An environment in which importing Ray is an error."""
    (folder / "ray").mkdir(parents=True, exist_ok=True)
    (folder / "ray" / "__init__.py").write_text("raise ImportError('Ray was started')\n")
    return {"PYTHONPATH": str(folder)}


def halfway(storage: Path, name: str) -> bool:
    """At least one trial is over, and two others have reported."""
    if not (storage / name / "metrics.jsonl").exists():
        return False
    states = [row["state"] for row in board(storage, name) if row["epochs"]]
    return states.count("running") == 2 and len(states) > 2


def test_driver_killed_resumed_torn_and_extended(tmp_path: Path, storage: Path) -> None:
    """kill -9 on the driver while two trials run; resume; a finished sweep; a torn journal; an extension."""
    folder, log = storage / "first", tmp_path / "log"
    spec = spec_file(tmp_path, trials=6, reduction_factor=2)
    launched = start(log, "launch", "first", "--storage", storage, "--spec", spec)
    wait_until(lambda: halfway(storage, "first"), launched, log)
    started = family(launched.pid)
    assert len(started) > 4, "Ray's servers, agents and workers"
    launched.kill()
    killed = time.monotonic()
    launched.wait()
    before, rungs_before = board(storage, "first"), rungs(storage, "first")
    assert any(rungs_before.values())
    recorded = epochs_by_trial(folder)
    resumed = search("resume", "first", "--storage", storage)
    rows = board(storage, "first")
    assert_whole(folder, rows, 6)
    assert_projected(storage, "first", rows)
    noise, made_with = json.loads((folder / "noise.json").read_text()), yaml.safe_load((folder / "sweep.yaml").read_text())
    assert (noise["noise"], noise["labels_sha256"]) == ("symmetric:0.4", made_with["provenance"]["noise_labels"])
    assert noise["realised_rate"] == pytest.approx(made_with["provenance"]["noise_rate"], abs=1e-6)
    assert noise["realised_rate"] == pytest.approx(0.4, abs=1e-3)
    assert [sum(row) for row in noise["matrix"]] == pytest.approx([1.0] * 10, abs=1e-4)
    assert sum(row[label] for label, row in enumerate(noise["matrix"])) / 10 == pytest.approx(0.6, abs=0.03)
    for epoch, standing in rungs_before.items():  # what stood at a rung still stands there
        assert standing.items() <= rungs(storage, "first")[epoch].items()
    after = {row["trial"]: row for row in rows}
    for row in before:
        assert epochs_by_trial(folder)[row["trial"]][: row["epochs"]] == recorded.get(row["trial"], [])
        if row["state"] == "running":
            if 0 < row["epochs"] < after[row["trial"]]["epochs"]:  # else its last epoch decided it
                assert f"trial {row['trial']} alr goes on from epoch {row['epochs']}" in resumed.stdout
            assert row["params"].items() <= after[row["trial"]]["params"].items()
        else:  # a finished trial did not run again
            assert after[row["trial"]] == {**row, "mlflow_run_id": after[row["trial"]]["mlflow_run_id"]}

    answered = search("resume", "first", "--storage", storage, env=without_ray(tmp_path / "poison"))
    assert "complete" in answered.stdout
    printed = search("best", "first", "--storage", storage, "--json", "--rungs")
    assert json.loads(printed.stdout) == {"rungs": rungs(storage, "first"), "trials": rows}

    whole = (folder / "journal.log").read_bytes()
    with (folder / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_id":"gone","study_id":0,"datet')
    search("resume", "first", "--storage", storage, "--trials", 7)
    extended = board(storage, "first")
    assert_whole(folder, extended, 7)
    assert_projected(storage, "first", extended)
    assert (folder / "journal.log").read_bytes().startswith(whole)
    for line in (folder / "journal.log").read_text().splitlines():
        json.loads(line)
    search("resume", "first", "--storage", storage, env=without_ray(tmp_path / "poison"))
    assert board(storage, "first") == extended
    assert_nothing_left(storage, "first")
    assert_ended(started, killed + RAYS_SECONDS)


def test_worker_killed(tmp_path: Path, storage: Path) -> None:
    """kill -9 on a trial's worker: the sweep goes on by itself and the trial ends under its own number. The storage is given
    relative to the working directory, which the workers do not share: the checkpoints are there all the same."""
    folder, log = storage / "worker", tmp_path / "log"
    spec = spec_file(tmp_path, trials=3, scheduler="none", epochs=60)
    launched = start(log, "launch", "worker", "--storage", storage.name, "--spec", spec, cwd=tmp_path)

    found = []

    def both_midway() -> bool:
        found[:] = workers(launched.pid)  # a process that is just being given its title does not show as one
        return bool(found) and sum(2 <= len(epochs) < 40 for epochs in epochs_by_trial(folder).values()) == 2

    wait_until(both_midway, launched, log)
    assert list(folder.glob("checkpoints/*/checkpoint.pt"))
    found[0].kill()
    assert launched.wait(PATIENCE) == 0, log.read_text()
    said = re.search(r"trial (\d) lost its process after epoch (\d+)", log.read_text())
    assert said
    number, epoch = map(int, said.groups())
    assert f"trial {number} alr goes on from epoch {epoch}" in log.read_text()
    rows = board(storage, "worker")
    assert_whole(folder, rows, 3)
    assert_projected(storage, "worker", rows)
    assert {path.parent.name for path in folder.glob("checkpoints/*/checkpoint.pt")} == {"0", "1", "2"}


def test_interrupted_stopped_retrained(tmp_path: Path, storage: Path, some_ray: dict[str, str]) -> None:
    """Ctrl-C saves what no checkpoint held yet and says how to go on; ``stop`` does the same from elsewhere; the winners are
    retrained over seeds; ``train``."""
    from mlflow.tracking import MlflowClient

    folder, log = storage / "calm", tmp_path / "log"
    spec = spec_file(tmp_path, trials=200, scheduler="none", epochs=48, checkpoint_seconds=1e6)  # never ends
    launched = start(log, "launch", "calm", "--storage", storage, "--spec", spec)
    wait_until(lambda: len(metric_lines(folder)) >= 6, launched, log)
    launched.send_signal(signal.SIGINT)
    assert launched.wait(PATIENCE) == 130, log.read_text()
    epochs = {row["trial"]: row["epochs"] for row in board(storage, "calm") if row["state"] == "running" and row["epochs"]}
    assert epochs
    files = {number: folder / "checkpoints" / str(number) / "checkpoint.pt" for number in epochs}
    assert {number: len(checkpoint.load(path)["history"]) for number, path in files.items()} == epochs
    command = f"python search.py resume calm --storage {storage}"
    assert command in log.read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("calm")
    assert experiment is not None
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} <= {"SCHEDULED", "FINISHED"}

    num_lines = len(metric_lines(folder))
    resumed = start(log, "resume", "calm", "--storage", storage)
    wait_until(lambda: len(metric_lines(folder)) > num_lines + 4, resumed, log)
    for verb in ("launch", "resume"):
        refused = search(verb, "calm", "--storage", storage, check=2).stderr
        assert f"sweep 'calm' is being run by process {resumed.pid} on " in refused, refused
    assert command in search("stop", "calm", "--storage", storage).stdout
    assert resumed.wait(PATIENCE) == 143, log.read_text()
    begun = len(board(storage, "calm"))
    search("resume", "calm", "--storage", storage, "--trials", begun, env=some_ray)
    rows = board(storage, "calm")
    assert_whole(folder, rows, len(rows))
    assert_projected(storage, "calm", rows)
    assert "sweep 'calm' exists in " in search("launch", "calm", "--storage", storage, check=2).stderr

    table = search("retrain", "calm", "--storage", storage, "--top", 1, "--seeds", 2, "--json", env=some_ray)
    (row,) = json.loads(table.stdout)
    assert row["source"] == rows[0]["trial"]
    assert row["params"] == rows[0]["params"]
    assert sorted(row["by_seed"]) == ["0", "1"]
    assert row["by_seed"]["0"] != row["by_seed"]["1"]
    assert row["test_accuracy"] == pytest.approx(sum(row["by_seed"].values()) / 2)

    (config,) = storage.glob("mlartifacts/calm/*/artifacts/best_config.yaml")
    trained = search("train", config).stdout
    assert f"{100 * rows[0]['value']:.2f}" in trained.splitlines()[-1]  # the same numbers, bit for bit on this machine


SIGNALLED = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
from search import leave
from tune.cluster import executor
from tune.search.coordinator import Coordinator
from tune.cluster.interruption import Interrupted, Interruption
from tune.search.ledger import Ledger
from tune.store.stored_sweep import Sweep

sweep = Sweep.read(Path(sys.argv[1]))
coordinator = Coordinator(Ledger(sweep), total=sweep.spec.trials, concurrent=2)
terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
with Interruption(coordinator, sweep.folder / "stop") as interruption:
    if sys.argv[2] == "early":
        threading.Timer(float(sys.argv[3]), terminate).start()
    with suppress(Interrupted):  # where Ray is so slow that the grace ends first
        executor.run(coordinator, sweep.spec, interruption, print)
    if sys.argv[2] == "late":
        terminate()
    time.sleep(0.1)
    print("noted", interruption.signal)
leave(0)
"""


@pytest.mark.parametrize("when", [("early", "1.5"), ("late",)], ids=["while Ray starts", "after it has shut down"])
def test_sigterm_is_ours(when: tuple[str, ...], storage: Path) -> None:
    """Ray's start brings a handler that exits wherever it is; its shutdown lets SIGTERM kill without a word."""
    folder = make_finished_sweep(storage, "signalled")
    command = [sys.executable, "-c", SIGNALLED, folder, *when]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "noted 15\n"), done.stderr


def test_damaged_journal_is_left_alone(tmp_path: Path, storage: Path) -> None:
    """A journal that is damaged anywhere but at its end: one line, exit code 2, not modified."""
    folder = make_finished_sweep(storage, "hurt")
    journal = folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:10] + b"\n"
    journal.write_bytes(b"".join(lines))
    content = journal.read_bytes()
    for verb in ("resume", "best", "retrain"):
        done = search(verb, "hurt", "--storage", storage, check=2, env=without_ray(tmp_path / "poison"))
        assert done.stderr.count("\n") == 1
        assert "line 4 is damaged" in done.stderr
    assert "hurt   damaged" in search("list", "--storage", storage).stdout
    assert journal.read_bytes() == content


def test_every_method_in_one_search(storage: Path, some_ray: dict[str, str]) -> None:
    """``--method all`` runs each method's published configuration, and more; ``best`` names one and its own parameters."""
    total = len(METHODS) + 2
    options = ("--model", "mlp", "--trials", total, "--epochs", 2, "--trusted", 20, "--concurrent", 2)
    search("launch", "all", "--storage", storage, "--method", "all", *options, env=some_ray)
    rows = board(storage, "all")
    assert_whole(storage / "all", rows, total)
    assert_projected(storage, "all", rows)
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert row["state"] in ("complete", "stopped"), row
        searched = {name for name, parameter in parameters(row["method"]).items() if parameter.search}
        assert set(row["params"]) == searched, row["method"]
    best = search("best", "all", "--storage", storage, "--top", 1).stdout.splitlines()[2]
    named = {part.split("=")[0] for part in best.split() if "=" in part}
    assert f" {rows[0]['method']} " in best
    assert named == {name.removeprefix(rows[0]["method"] + ".") for name in rows[0]["params"]}


def test_a_users_images_without_clean_labels(tmp_path: Path, storage: Path, some_ray: dict[str, str]) -> None:
    """A manifest of paths and labels only: launch, best, retrain and the tracker leave out what needs the truth."""
    from mlflow.tracking import MlflowClient
    from PIL import Image

    lines = ["path,label"]
    for number in range(60):
        Image.new("RGB", (8, 8), (80 * (number % 3), number, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{('ant', 'bee', 'cat')[number % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    options = (
        "--model",
        "mlp",
        "--trials",
        2,
        "--epochs",
        2,
        "--concurrent",
        2,
        "--data",
        f"manifest:{tmp_path / 'labels.csv'}",
    )
    launched = search("launch", "mine", "--storage", storage, *options, env=some_ray).stdout
    sizes = "3 classes, images of 8 x 8 x 3; 42 training, 18 validation (noisy labels)"
    assert f"{sizes}\nimages 60 files of 8 x 8 pixels, " in launched
    assert "\nnoise none (seed 0); network mlp\n" in launched
    assert "\nviews shift: " in launched
    rows = board(storage, "mine")
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert {row["test_accuracy"] for row in rows} == {None}
    header = search("best", "mine", "--storage", storage).stdout.splitlines()[0]
    assert header.split() == ["trial", "method", "state", "val", "epochs", "seconds", "parameters"]
    table = search("retrain", "mine", "--storage", storage, "--top", 1, "--seeds", 2, env=some_ray).stdout
    assert "val: noisy validation accuracy (there are no clean test labels) %" in table
    client = MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    run = client.get_run(rows[0]["mlflow_run_id"])
    assert "val/accuracy" in run.data.metrics
    assert not {name for name in run.data.metrics if name.startswith("test/")}
    (tmp_path / "labels.csv").unlink()
    assert search("best", "mine", "--storage", storage).stdout.startswith("trial"), "also where the data are gone"
    assert "there is no such file" in search("resume", "mine", "--storage", storage, "--trials", 3, check=2).stderr
