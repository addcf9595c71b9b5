"""What a sweep leaves on disk does not grow with its trials but for the lines in its files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.sweeps import epoch_record, make_sweep
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import Ledger, Record
from tune.spec import KEPT_CHECKPOINTS
from tune.store.stored_sweep import Sweep

SLOTS = 3


def below(folder: Path) -> set[str]:
    """Every file and every folder, by its relative path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(sweep: Sweep, total: int, stream: random.Random) -> Ledger:
    """Runs a sweep up to ``total`` trials through drivers that die at random; trials save themselves when they please, are
    stopped, diverge, fail and lose their process. Returns the ledger of the last driver, which ended the sweep."""
    while True:
        coordinator = Coordinator(Ledger(sweep), total=total, concurrent=SLOTS)
        for number in range(10**6):
            given = coordinator.next(f"{number}")
            if given == FINISHED:
                return coordinator.ledger
            if isinstance(given, Record) and stream.random() < 0.9:  # else it dies before its first checkpoint
                folder = coordinator.ledger.checkpoints / str(given.number)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "checkpoint.pt").write_bytes(b"state")
                if stream.random() < 0.5:  # killed while it was writing, in another process
                    (folder / f".checkpoint.pt.{number}").write_bytes(b"st")
            if stream.random() < 0.02:
                break  # the driver is killed
            key = stream.choice(list(coordinator.live))
            record, luck = coordinator.live[key], stream.random()
            held = {path.name for path in coordinator.ledger.checkpoints.glob("*")}
            assert held <= {str(other.number) for other in [*coordinator.ledger.unfinished(), *coordinator.top]}, "at any time"
            if luck < 0.03:
                coordinator.lost(key)
                continue
            epochs = [epoch_record(record.epochs + 1, stream.random())]
            failure = "RuntimeError: out of paper" if luck > 0.97 else None
            if not coordinator.result(key, epochs, failure=failure, diverged=0.93 < luck <= 0.97):
                coordinator.released(key)


def test_files_after_a_hundred_trials_are_those_after_twenty(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=20, epochs=4, reduction_factor=2)
    stream = random.Random(0)
    found = []
    for total in (20, 100):
        ledger = run(sweep, total, stream)
        best = [str(record.number) for record in ledger.leaderboard()[:KEPT_CHECKPOINTS] if record.status == "complete"]
        saved = {name for name in best if f"checkpoints/{name}/checkpoint.pt" in below(sweep.folder)}
        expected = {"sweep.yaml", "journal.log", "metrics.jsonl", "checkpoints", "driver.lock"}
        expected |= {f"checkpoints/{name}" for name in saved} | {f"checkpoints/{name}/checkpoint.pt" for name in saved}
        assert below(sweep.folder) == expected
        found.append(len(below(sweep.folder)))
    assert max(found) <= 5 + 2 * KEPT_CHECKPOINTS
    assert {record.status for record in ledger.records.values()} == {"complete", "stopped", "diverged", "failed"}


def test_a_driver_removes_what_a_kill_left(tmp_path: Path) -> None:
    """Empty folders, halves of checkpoints, checkpoints of trials that are over or that never were."""
    sweep = make_sweep(tmp_path, trials=8, epochs=4, reduction_factor=2)
    ledger = run(sweep, 8, random.Random(1))
    before = below(sweep.folder)
    over = next(record.number for record in ledger.leaderboard() if record.status == "stopped")
    (ledger.checkpoints / str(over)).mkdir()
    (ledger.checkpoints / "77").mkdir()
    (ledger.checkpoints / "77" / "checkpoint.pt").write_bytes(b"state")
    best = next(record.number for record in ledger.leaderboard() if f"checkpoints/{record.number}" in before)
    (ledger.checkpoints / str(best) / ".checkpoint.pt.123").write_bytes(b"st")
    Coordinator(Ledger(sweep), total=8, concurrent=1)
    assert below(sweep.folder) == before


def test_what_cannot_be_removed_stays_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what NFS keeps of a file that another node has open; or the whole folder, where the server is away."""
    sweep = make_sweep(tmp_path, trials=2, epochs=2, scheduler="none")

    def run_one(number: int) -> None:
        coordinator.next("a")
        folder = coordinator.ledger.checkpoints / str(number)
        folder.mkdir(parents=True)
        for name in ("checkpoint.pt", ".checkpoint.pt.1", ".nfs0001", ".checkpoint.pt.2"):
            (folder / name).write_bytes(b"st")
        coordinator.result("a", [epoch_record(epoch, 0.5) for epoch in (1, 2)], failure=None, diverged=False)
        coordinator.released("a")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(".nfs"):
            raise OSError(16, "Device or resource busy")
        path.touch()
        path.rename(tmp_path / "removed")

    def glob(path: Path, pattern: str) -> None:
        raise OSError(116, "Stale file handle")

    coordinator = Coordinator(Ledger(sweep), total=2, concurrent=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        run_one(0)
        assert {path.name for path in (coordinator.ledger.checkpoints / "0").iterdir()} == {"checkpoint.pt", ".nfs0001"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", glob)
        run_one(1)
    assert [record.status for record in coordinator.ledger.leaderboard()] == ["complete", "complete"]
    Coordinator(Ledger(sweep), total=2, concurrent=1)
    assert [path for path in below(sweep.folder) if "/." in path] == []
