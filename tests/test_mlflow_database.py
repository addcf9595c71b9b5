"""MLflow's SQLite file: whole or not there, mended, moved, copied, and in folders with odd names."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from sqlalchemy import make_url

import search
from tests.sweeps import make_sweep, new_storage
from tests.tracked_sweeps import play, read_store, rebuilt, start_sweep, without_ids
from tune.report import mlflow_database
from tune.report.mlflow_database import Unusable, follow_storage, prepare, refusal
from tune.report.projection import Projection
from tune.report.tracking import artifacts_uri, sqlite_path, sqlite_uri, tracking_uri
from tune.search.ledger import Ledger
from tune.store.stored_sweep import Sweep

ODD = ["a?b", "a#b", "a%41b", "a b", "aéü", "a%b", "a?b=c&d"]


def opens(path: Path) -> bool:
    """Whether MLflow opens it; under a name of its own, since MLflow keeps files open by their path."""
    from mlflow.tracking import MlflowClient

    copy = Path(shutil.copy(path, path.with_name(f"opened-{time.monotonic_ns()}.db")))
    try:
        return bool(MlflowClient(tracking_uri=f"sqlite:///{copy}").search_experiments())
    finally:
        copy.unlink()


def set_version(path: Path, version: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("update alembic_version set version_num = ?", (version,))
    connection.close()


def last_but_one() -> str:
    """The version before MLflow's newest: what a kill leaves that came within the last migration."""
    import mlflow

    migrations = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    newest = migrations.get_revision("heads")
    assert newest is not None
    assert isinstance(newest.down_revision, str)
    return newest.down_revision


def leave_alembics_table(path: Path) -> None:
    """As a kill does while a table is copied: the version is an earlier one, and the copy is there."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("drop table scheduler_leases")
        connection.execute("create table _alembic_tmp_trace_info (x)")
        connection.execute("update alembic_version set version_num = 'c3d9e7f1a2b4'")  # of MLflow 3.x: one that copies it
    connection.close()


@pytest.fixture
def quickly_made(monkeypatch: pytest.MonkeyPatch, migrated_store: Path) -> None:
    """A new database is a copy of one, which saves the seconds of its migrations."""
    monkeypatch.setattr(mlflow_database, "_make", lambda path: shutil.copy(migrated_store, path))


def aged(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


# -- made and mended --------------------------------------------------------------------------------------------------


def test_a_database_is_made_whole(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    prepare(path, pytest.fail)
    assert opens(path)
    assert os.listdir(tmp_path) == ["mlflow.db"]
    before = path.read_bytes()
    prepare(path, pytest.fail)
    assert path.read_bytes() == before


def test_of_two_that_are_made_at_once_the_first_stays(tmp_path: Path) -> None:
    """Its maker may have written to it already."""
    path = tmp_path / "mlflow.db"
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
        mlflow_database._put(tmp_path / name, path)
    assert path.read_text() == "first"


@pytest.mark.parametrize("state", ["last migration", "copied table", "empty"])
def test_a_database_that_is_half_made_is_made_anew(
    state: str, tmp_path: Path, migrated_store: Path, quickly_made: None
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(migrated_store, path)
    if state == "last migration":
        set_version(path, last_but_one())
    elif state == "copied table":
        leave_alembics_table(path)
    else:
        path.write_bytes(b"")
    assert state == "empty" or not refuses_nothing(path)
    prepare(aged(path), pytest.fail)
    assert opens(path)
    assert set(os.listdir(tmp_path)) == {"mlflow.db", "mlflow.db.lock"}, "it held nothing, and nothing is kept"


def refuses_nothing(path: Path) -> bool:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return opens(path)
    except (MlflowException, SQLAlchemyError):
        return False


def test_a_database_that_holds_something_is_kept_and_all_is_tracked_again(
    storage: Path, tmp_path: Path, migrated_store: Path, quickly_made: None
) -> None:
    """Somebody else's run is in it, which no resume can make again."""
    from mlflow.tracking import MlflowClient

    sweep = start_sweep(storage, trials=3)
    play(Ledger(sweep), 3)
    path = storage / "mlflow.db"
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    foreign = client.create_run(client.create_experiment("theirs")).info.run_id
    other = tmp_path / "other"
    shutil.copytree(storage, other)
    set_version(other / "mlflow.db", last_but_one())
    aged(other / "mlflow.db")
    said: list[str] = []
    Projection(Ledger(Sweep.find(other, "first")), tracking_uri(other, ""), say=said.append).close(finished=True)
    (line,) = said
    assert line.startswith(f"MLflow's database {other / 'mlflow.db'} could not be opened (Detected out-of-date database schema")
    assert line.endswith("it is kept as mlflow.db.broken-1, and was made anew")
    connection = sqlite3.connect(other / "mlflow.db.broken-1")
    assert connection.execute("select run_uuid from runs").fetchall() == [(foreign,)]
    connection.close()
    assert without_ids(read_store(other)) == without_ids(rebuilt(sweep, tmp_path / "again", migrated_store))


def test_what_is_no_database_is_kept(tmp_path: Path, quickly_made: None) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"my thesis" * 1000)
    said: list[str] = []
    prepare(aged(path), said.append)
    assert (tmp_path / "mlflow.db.broken-1").read_bytes() == b"my thesis" * 1000
    assert "file is not a database" in said[0]
    path.write_bytes(b"again" * 1000)
    prepare(aged(path), said.append)
    assert "kept as mlflow.db.broken-2" in said[1]


def test_a_database_of_a_newer_version_is_left_as_it_is(storage: Path, tmp_path: Path) -> None:
    sweep = start_sweep(storage, trials=2)
    Projection(Ledger(sweep), tracking_uri(storage, ""))
    path = Path(shutil.copy(storage / "mlflow.db", tmp_path / "newer.db"))
    set_version(path, "0123456789ab")
    before = aged(path).read_bytes()
    with pytest.raises(Unusable, match="of another version of MLflow"):
        prepare(path, pytest.fail)
    assert path.read_bytes() == before


def test_what_another_process_is_making_is_left_to_it(tmp_path: Path, migrated_store: Path) -> None:
    path = Path(shutil.copy(migrated_store, tmp_path / "mlflow.db"))
    set_version(path, last_but_one())
    before = path.read_bytes()
    with pytest.raises(Unusable, match="may be in the making"):
        prepare(path, pytest.fail)
    assert path.read_bytes() == before


def test_a_locked_database_is_no_damaged_one(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage / "mlflow.db"
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: real(path, timeout=0.1))
    other = real(path)
    other.execute("begin exclusive")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        prepare(path, pytest.fail)
    other.close()
    assert os.listdir(storage) == ["mlflow.db"]


@pytest.mark.slow
def test_kills_while_the_database_is_made_leave_it_whole_or_absent(tmp_path: Path) -> None:
    """MLflow's own way leaves two in three of such kills a file that it does not open again."""
    program = (
        "import sys, pathlib; from tune.report.mlflow_database import prepare; from tune.report.projection import load; load();"
    )
    program += "print('ready', flush=True); prepare(pathlib.Path(sys.argv[1]), print)"
    stream, path = random.Random(0), tmp_path / "mlflow.db"
    seconds = 10.0
    for number in range(12):
        command = [sys.executable, "-c", program, str(path)]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(search.__file__).parent)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        if number:  # the first is left alone, and says how long it takes
            time.sleep(stream.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
        process.wait()
        seconds = seconds if number else time.monotonic() - began
        if path.exists():
            assert refusal(path) == ""
            path.unlink()


# -- where the artifacts lie ------------------------------------------------------------------------------------------


@pytest.fixture
def moved(storage: Path, tmp_path: Path) -> Path:
    """A copy of a storage with a sweep that was tracked."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    sweep = start_sweep(storage, trials=3)
    play(Ledger(sweep), 3)
    Projection(Ledger(sweep), tracking_uri(storage, "")).close(finished=True)
    _artifact_repos_cache.clear()  # a process keeps the place of a run's artifacts by the run's id, and here are two places
    shutil.copytree(storage, tmp_path / "moved")
    return tmp_path / "moved"


def artifact_files(storage: Path) -> set[Path]:
    return {path for path in (storage / "mlartifacts").rglob("*") if path.is_file()}


def resume(storage: Path, uri: str = "") -> None:
    Projection(Ledger(Sweep.find(storage, "first")), tracking_uri(storage, uri)).close(finished=True)


def test_a_moved_storage_writes_to_where_it_is(storage: Path, moved: Path) -> None:
    names = {path.relative_to(storage) for path in artifact_files(storage)}
    shutil.rmtree(storage)
    shutil.rmtree(moved / "mlartifacts")
    resume(moved)
    assert not storage.exists(), "the old place was made anew"
    assert {path.relative_to(moved) for path in artifact_files(moved)} == names


def test_clearing_deleted_runs_of_a_copy_leaves_the_originals_files(storage: Path, moved: Path) -> None:
    from mlflow.cli import cli
    from mlflow.tracking import MlflowClient

    before = {path: path.read_bytes() for path in artifact_files(storage)}
    assert before
    follow_storage(moved)
    uri = tracking_uri(moved, "")
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("first").experiment_id)  # type: ignore[union-attr]
    done = CliRunner().invoke(cli, ["gc", "--backend-store-uri", uri], env={"MLFLOW_TRACKING_URI": uri})
    assert done.exit_code == 0, done.output
    assert {path: path.read_bytes() for path in artifact_files(storage)} == before
    assert artifact_files(moved) == set(), "the copy's own are cleared"


def test_a_moved_storage_that_is_tracked_elsewhere_writes_to_where_it_is(tmp_path: Path, migrated_store: Path) -> None:
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    database = new_storage(tmp_path / "database", migrated_store) / "mlflow.db"
    old, new = tmp_path / "old", tmp_path / "new"
    play(Ledger(start_sweep(old, trials=3)), 3)
    resume(old, sqlite_uri(database))
    names = {path.relative_to(old) for path in artifact_files(old)}
    old.rename(new)
    shutil.rmtree(new / "mlartifacts")
    _artifact_repos_cache.clear()
    resume(new, sqlite_uri(database))
    assert not old.exists()
    assert {path.relative_to(new) for path in artifact_files(new)} == names


def test_other_storages_in_the_same_database_keep_their_places(storage: Path, tmp_path: Path) -> None:
    """A sweep of another storage, of a name that is not here, and an experiment of the user's own."""
    from mlflow.tracking import MlflowClient

    uri, elsewhere = tracking_uri(storage, ""), tmp_path / "elsewhere"
    Projection(Ledger(make_sweep(elsewhere, "second")), uri)
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("mine", artifact_location="file:///mine/mlartifacts/others")
    before = {e.name: e.artifact_location for e in client.search_experiments()}
    resume_with = Projection(Ledger(make_sweep(storage, "first")), uri)
    assert resume_with.parent
    after = {e.name: e.artifact_location for e in client.search_experiments()}
    assert after == {**before, "first": (storage / "mlartifacts" / "first").as_uri()}


@pytest.mark.parametrize("name", ODD)
def test_a_storage_with_an_odd_name(name: str, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = new_storage(tmp_path / name, migrated_store)
    sweep = start_sweep(storage, trials=2)
    play(Ledger(sweep), 2)
    uri = tracking_uri(storage, "")
    assert make_url(uri).database == str(storage / "mlflow.db"), "as SQLAlchemy reads it"
    Projection(Ledger(sweep), uri).close(finished=True)
    assert os.listdir(tmp_path) == [name], "nothing lies beside it"
    assert {path.name for path in artifact_files(storage)} >= {"best_config.yaml", "leaderboard.json"}
    connection = sqlite3.connect(storage / "mlflow.db")
    assert connection.execute("select count(*) from runs").fetchone() == (1 + len(Ledger(sweep).records),)
    connection.close()
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    search.main(["ui", "--storage", str(storage), "--port", "18213"])
    assert started[0][started[0].index("--backend-store-uri") + 1] == uri
    assert sqlite_path(uri) == storage / "mlflow.db"
    assert artifacts_uri(uri, storage, "x") == (storage / "mlartifacts" / "x").as_uri()
