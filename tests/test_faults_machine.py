"""Faults of the machine: a disk that is full, for which a small one is made, and memory that is used up."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.faulty_sweep import faulty_sweep, wait_for
from tests.sweep_process import (
    assert_projected,
    assert_whole,
    board,
    end_all,
    metric_lines,
    search,
    start,
    wait_until,
)
from training.trial_run import TrialRun
from tune.search.ledger import Ledger
from tune.search.recipes import of_trial
from tune.store.stored_sweep import Sweep


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], check=True)
    yield place
    end_all()
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Takes what room there is, to the last byte."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    return filler


@pytest.mark.root
def test_a_full_disk_stops_the_sweep_and_loses_nothing(tmp_path: Path, small_disk: Path, migrated_store: Path) -> None:
    """Full in the middle of a sweep: it stops with the command that goes on. While it is full that command says so, and
    ``best`` still answers; when there is room again it goes on, to the values of an undisturbed run."""
    storage, log = small_disk / "runs", tmp_path / "log"
    storage.mkdir()
    shutil.copy(migrated_store, storage / "mlflow.db")
    spec = {"method": "ce", "model": "mlp", "trials": 4, "epochs": 20, "scheduler": "none", "sampler": "random"}
    timing = {"checkpoint_seconds": 0, "report_seconds": 0.2, "concurrent": 2}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | timing))
    launched = start(log, "launch", "full", "--storage", storage, "--spec", tmp_path / "spec.yaml")
    folder = storage / "full"
    wait_until(lambda: len(metric_lines(folder)) >= 10, launched, log)
    filler = fill(small_disk)
    assert launched.wait(240) == 1, log.read_text()
    said = log.read_text()
    command = f"python search.py resume full --storage {storage}"
    assert f"error: the ledger cannot be written: [Errno 28] No space left on device; go on with: {command}" in said
    assert "Traceback" not in said
    before = metric_lines(folder)
    assert json.loads(search("best", "full", "--storage", storage, "--json").stdout)
    refused = search("resume", "full", "--storage", storage, check=None)
    assert refused.returncode in (1, 2)
    assert "No space left on device" in refused.stderr
    filler.unlink()
    search("resume", "full", "--storage", storage)
    assert metric_lines(folder)[: len(before)] == before
    rows = board(storage, "full")
    assert_whole(folder, rows, 4)
    assert_projected(storage, "full", rows)
    sweep = Sweep.find(storage, "full")
    ledger = Ledger(sweep, read_only=True)
    for record in ledger.records.values():
        undisturbed = [epoch.objective for epoch in TrialRun(of_trial(ledger, record))]
        assert list(record.objectives.values()) == undisturbed


ONE = {"trials": 1, "epochs": 3, "scheduler": "none", "report_seconds": 0, "checkpoint_seconds": 0, "concurrent": 1}


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group that holds its processes to 64 MB beyond what they have when they enter it."""
    top = Path("/sys/fs/cgroup")
    old = (top / "memory" / "memory.limit_in_bytes").exists()
    group = top / "memory" / "noisy-label-test" if old else top / "noisy-label-test"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    yield group
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # its process is not quite gone
            group.rmdir()
            return
        time.sleep(0.5)


@pytest.mark.root
def test_a_process_that_the_kernel_ends_for_its_memory(
    tmp_path: Path, migrated_store: Path, little_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as lost, and the trial goes on in another."""
    monkeypatch.setenv("FAULTS_GROUP", str(little_memory))
    with faulty_sweep(tmp_path, migrated_store, {0: ("swallow", 3, 1)}, **ONE) as sweep:
        assert sweep.process.wait(300) == 0, sweep.said
        assert "trial 0 lost its process after epoch 2 (Ray says: Worker unexpectedly exits" in sweep.said
        (row,) = board(sweep.storage, "faulty")
        assert (row["state"], row["epochs"]) == ("complete", 3)


@pytest.mark.slow
def test_processes_that_ray_ends_for_the_nodes_memory(
    tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's monitor with a threshold that any process passes: after three the trial has failed, and says so."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with faulty_sweep(tmp_path, migrated_store, {}, **ONE) as sweep:
        wait_for(sweep, lambda: "trial 0 ce failed" in sweep.said)
        sweep.process.send_signal(signal.SIGINT)
        assert sweep.process.wait(60) == 130
        (failed, *_) = [row for row in board(sweep.storage, "faulty") if row["state"] == "failed"]
        last = failed["error"].splitlines()[-1]
        assert last.startswith("lost its process 3 times in a row; the last epoch reported was 0; the last time Ray says: ")
        assert "killed due to the node running low on memory" in last
