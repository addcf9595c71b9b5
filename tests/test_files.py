"""A sweep's folder: made whole or not at all, and what a launch that was killed leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path
from typing import NoReturn

import optuna
import pytest

import search
from tests.sweep_process import make_finished_sweep
from tests.sweeps import in_child, make_sweep, play
from tune.report.leaderboard import rows
from tune.search.coordinator import Coordinator
from tune.search.ledger import RETRAIN, SWEEP, Ledger
from tune.spec import make_spec
from tune.store.folder import FolderStore
from tune.store.journal import Journal, LineFile, open_storage
from tune.store.stored_sweep import Sweep
from tune.sweep import enqueue_retraining


def left_by_a_killed_launch(storage: Path, name: str, minutes: float) -> Path:
    """The folder that it was making, last written to so many minutes ago."""

    def die() -> None:
        with FolderStore(storage).create(name):
            os._exit(9)

    before = set(storage.glob(".*"))
    assert in_child(die) == 9
    (left,) = set(storage.glob(".*")) - before
    written(left, minutes)
    return left


def written(folder: Path, minutes: float) -> None:
    os.utime(folder, (time.time() - 60 * minutes,) * 2)


def make(storage: Path, name: str) -> None:
    with FolderStore(storage).create(name) as (folder, _):
        (folder / "sweep.yaml").write_text("")


def test_a_second_launch_leaves_the_first_alone_however_long_that_takes(tmp_path: Path) -> None:
    with FolderStore(tmp_path).create("first") as (folder, _):
        assert isinstance(folder, Path)
        (folder / "journal.log").write_text("x")
        written(folder, 120)
        with contextlib.suppress(InterruptedError), FolderStore(tmp_path).create("first"):
            raise InterruptedError
        assert (folder / "journal.log").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first" / "journal.log").read_text() == "x"
    assert not FolderStore(tmp_path).files("first").running()


def test_what_killed_launches_left_goes(tmp_path: Path) -> None:
    """But for that of another name, and for what is so new that its lock may be about to be taken."""
    left = left_by_a_killed_launch(tmp_path, "first", 2)
    new = left_by_a_killed_launch(tmp_path, "first", 0)
    others = [left_by_a_killed_launch(tmp_path, name, 2) for name in ("first.x", "first.12345678")]
    unlocked = tmp_path / ".first.abcdefgh"
    unlocked.mkdir()
    written(unlocked, 2)
    make(tmp_path, "first")
    assert set(tmp_path.iterdir()) == {new, *others, tmp_path / "first"}
    assert left not in tmp_path.iterdir()


def test_a_name_that_was_taken_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sweep 'first' exists in "), FolderStore(tmp_path).create("first"):
        make_sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_folder_that_cannot_be_renamed_for_another_reason_is_not_said_to_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path, "first")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("identity", ["'*'", "../other", "a/b", "''", "[x]", "12", "a'b", '"a\\nb"', None])
def test_an_id_that_is_none_is_damage(tmp_path: Path, identity: str | None) -> None:
    """It becomes part of the name of a folder, and of a pattern by which such folders are removed."""
    sweep = make_sweep(tmp_path)
    record = sweep.folder / "sweep.yaml"
    lines = [line for line in record.read_text().splitlines() if not line.startswith("  id: ")]
    assert lines[-1].startswith("  ")
    record.write_text("\n".join([*lines, *([f"  id: {identity}"] if identity else [])]))
    with pytest.raises(ValueError, match=r"sweep\.yaml is damaged: "):
        Sweep.find(tmp_path, "first")
    record.write_text("\n".join([*lines, "  id: first-0123456789abcdef"]))
    assert Sweep.find(tmp_path, "first") == sweep


# -- file systems that can less ---------------------------------------------------------------------------------------


NO_LOCKS = [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS]  # of CIFS or FUSE, as they may be mounted


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> str:
    """From now on no file is locked; returns what is said."""

    def refuse(file: object, how: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    return os.strerror(number)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_look_at_a_sweep_needs_no_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_finished_sweep(tmp_path, "seen")
    expected = rows(Ledger(Sweep.find(tmp_path, "seen"), read_only=True), {})
    refuse_locks(monkeypatch, number)
    assert rows(Ledger(Sweep.find(tmp_path, "seen"), read_only=True), {}) == expected
    assert search.main(["best", "seen", "--storage", str(tmp_path)]) == 0
    assert search.main(["list", "--storage", str(tmp_path)]) == 0
    assert search.main(["stop", "seen", "--storage", str(tmp_path)]) == 0


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_driver_without_locks_is_refused(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the folder and the way out, and nothing is left of the sweep."""
    said = refuse_locks(monkeypatch, number)
    sweep = Sweep(tmp_path / "kept", make_spec({}), {}, FolderStore(tmp_path).files("kept"))
    (tmp_path / "kept").mkdir()
    way_out = "give --storage a folder on another one, or --ledger a database"
    expected = f"the file system of {tmp_path} locks no files ({said}); {way_out}"
    with pytest.raises(ValueError, match="locks no files") as raised, sweep.files.lock("resume"):
        raise AssertionError("it is not held")
    assert str(raised.value) == expected
    with pytest.raises(ValueError, match="locks no files") as raised, FolderStore(tmp_path).create("first"):
        raise AssertionError("it is not held")
    assert str(raised.value) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_another_error_of_a_lock_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_finished_sweep(tmp_path, "seen")
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Ledger(Sweep.find(tmp_path, "seen"), read_only=True)


def test_a_sweep_needs_no_change_of_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS and some FUSE refuse it."""

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    make_sweep(tmp_path)
    assert (tmp_path / "first" / "sweep.yaml").is_file()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_folders_mode_follows_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        make_sweep(tmp_path)
        (tmp_path / "other").mkdir()
        (tmp_path / "file").touch()
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "first").stat().st_mode) == mode == 0o777 & ~umask
    for name in ("sweep.yaml", "journal.log"):
        assert (tmp_path / "first" / name).stat().st_mode == (tmp_path / "file").stat().st_mode


# -- studies that were renamed ----------------------------------------------------------------------------------------


def rename(sweep: Sweep, old: str, new: str) -> None:
    """As optuna-dashboard renames a study: its trials are copied to a new one, and it is deleted."""
    storage = open_storage(Journal(LineFile(sweep.folder / "journal.log")))  # type: ignore[operator,arg-type]
    study = optuna.load_study(study_name=old, storage=storage)
    other = optuna.create_study(storage=storage, study_name=new, directions=study.directions)
    other.add_trials(study.get_trials(deepcopy=False))
    optuna.delete_study(study_name=old, storage=storage)


def half_done(storage: Path) -> Sweep:
    """A sweep with trials that are complete, stopped and running, and its retraining."""
    sweep = make_sweep(storage, trials=6, epochs=9)
    play(Coordinator(Ledger(sweep), total=6, concurrent=2), keep={0})
    ledger = Ledger(sweep, RETRAIN, create=True)
    enqueue_retraining(ledger, [record for record in Ledger(sweep).leaderboard() if record.status == "complete"][:1], 2)
    return sweep


def test_a_renamed_study_is_found(tmp_path: Path) -> None:
    sweep = half_done(tmp_path)
    before = rows(Ledger(sweep, read_only=True), {})
    assert {"complete", "running"} <= {row["state"] for row in before}
    rename(sweep, SWEEP, "my best search")
    ledger = Ledger(sweep)
    assert rows(ledger, {}) == before
    assert ledger.kinds == {SWEEP, RETRAIN}
    play(Coordinator(ledger, total=6, concurrent=2))
    assert Ledger(sweep).is_finished
    rename(sweep, RETRAIN, "again")
    assert Ledger(sweep, RETRAIN).num_stored == 2
    assert rows(Ledger(sweep, read_only=True), {}) == rows(ledger, {})


def test_studies_of_which_none_is_the_right_one(tmp_path: Path) -> None:
    """Somebody's copy, and the original renamed: both may be meant."""
    sweep = half_done(tmp_path)
    rename(sweep, SWEEP, "one")
    storage = open_storage(Journal(LineFile(tmp_path / "first" / "journal.log")))
    optuna.copy_study(from_study_name="one", from_storage=storage, to_storage=storage, to_study_name="two")
    told = r"^sweep 'first' has no study named 'sweep'; its journal holds '.*': name the right one back$"
    with pytest.raises(ValueError, match=told) as raised:
        Ledger(sweep)
    assert "'one'" in str(raised.value)
    assert "'two'" in str(raised.value)
    optuna.delete_study(study_name="two", storage=storage)
    assert Ledger(sweep).count(optuna.trial.TrialState.COMPLETE)
