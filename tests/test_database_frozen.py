"""A PostgreSQL that is frozen: it takes what is sent to it, and says nothing. Nobody waits for it for ever."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import search
from tests.postgres import Postgres
from tests.sweep_process import PATIENCE, ROOT, STARTED, end_all, of_real_data
from tests.sweeps import epoch_record, made_up, make_sweep, play
from tests.test_database import check_whole, play_while
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import Ledger
from tune.store.base import StorageUnavailable
from tune.store.postgresql import connection as connection_module
from tune.store.postgresql import database as database_module
from tune.store.postgresql.database import Database
from tune.store.postgresql.store import PostgresStore
from tune.store.stored_sweep import Sweep

COMMAND = "the command that goes on"
DRIVER = """
import contextlib, sys, time
from pathlib import Path
from search import leave
from tests.sweeps import epoch_record
from tune.store.postgresql import connection
from tune.cluster import executor
from tune.store.postgresql.store import PostgresStore
from tune.search.ledger import SWEEP
from tune.store.stored_sweep import Sweep
from tune.execution import execute

url, storage, name, epoch_seconds, answer_seconds, command = sys.argv[1:]

def run(coordinator, spec, interruption, say, address):
    coordinator.concurrent = 1
    with contextlib.suppress(KeyboardInterrupt):
        coordinator.next("a")
        for epoch in range(1, 100_000):
            if not coordinator.result("a", [epoch_record(epoch, 0.5)], failure=None, diverged=False):
                return
            print("epoch", epoch, flush=True)
            time.sleep(float(epoch_seconds))

connection.ANSWER_SECONDS = float(answer_seconds)
executor.run = run
sweep = Sweep.find(PostgresStore(url, Path(storage)), name)
with sweep.files.lock(command):
    leave(execute(sweep, SWEEP, command).say())
"""


@pytest.fixture
def server() -> Iterator[Postgres]:
    """One of its own: whoever else has a connection to a frozen one waits, too."""
    server = Postgres()
    yield server
    end_all()
    server.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "ANSWER_SECONDS", 0.6)
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 2.0)
    monkeypatch.setitem(database_module.CONNECT, "connect_timeout", 2)  # libpq's least


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "endless", ["select pg_sleep(20)", "select pg_sleep(0.1), repeat('x', 100000) from generate_series(1, 200)"]
)
def test_no_answer_is_waited_for_without_a_limit(postgres: Postgres, endless: str) -> None:
    """Whether nothing comes or too little. Afterwards no thread waits for it, and the database is as good as before."""
    database = Database(postgres.new_database())
    assert database.select("select pg_sleep(0.2), 1")[0][1] == 1
    with pytest.raises(StorageUnavailable, match=r"^database postgresql://.*: the server has not answered within 0.6 s$"):
        database.select(endless)
    assert statements_in_progress() == []
    assert database.select("select 1") == [(1,)]


def test_a_signal_in_the_middle_of_an_answer_breaks_the_connection(postgres: Postgres) -> None:
    """Its handler is heard at once, and the statement is not waited for; the next one gets a connection of its own."""
    database = Database(postgres.new_database())
    before = database.select("select pg_backend_pid()")

    def handle(number: int, frame: object) -> None:
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(InterruptedError):
            database.select("select pg_sleep(600)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert statements_in_progress() == []
    assert database.select("select pg_backend_pid()") != before


def statements_in_progress() -> list[threading.Thread]:
    """The threads that wait for an answer, once those have had their time that need not wait any longer."""
    threads = [thread for thread in threading.enumerate() if thread.name == "statement"]
    for thread in threads:
        thread.join(5)
    return [thread for thread in threads if thread.is_alive()]


def test_a_frozen_database_that_thaws_in_time_costs_nothing(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some statements are broken off, and carried out all the same when the server goes on."""
    monkeypatch.setattr(connection_module, "ANSWER_SECONDS", 0.3)
    num_broken = 0
    real = connection_module.run_within_limit

    def counting(*arguments: Any) -> Any:
        nonlocal num_broken
        try:
            return real(*arguments)
        except psycopg.OperationalError as error:
            num_broken += "the server has not answered" in str(error)
            raise

    def freeze() -> None:
        with server.frozen():
            time.sleep(0.9)

    monkeypatch.setattr(database_module, "run_within_limit", counting)
    play_while(freeze, 0.5, PostgresStore(server.new_database(), tmp_path))
    assert num_broken > 0


@pytest.mark.usefixtures("impatient")
def test_a_frozen_database_stops_the_sweep(
    server: Postgres, tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it has been waited for long enough, with the command that goes on as the last line; then nothing is missing."""
    (tmp_path / "mlflow.db").write_bytes(migrated_store.read_bytes())
    store = PostgresStore(server.new_database(), tmp_path)
    sweep = make_sweep(store, trials=2, epochs=3, scheduler="none")
    of_real_data(sweep)
    waited = 0.0

    def run(coordinator: Coordinator, *rest: object) -> None:
        nonlocal waited
        coordinator.concurrent = 1
        record = coordinator.next("a")
        assert record not in (None, FINISHED)
        values = record.values  # type: ignore[union-attr]
        assert coordinator.result("a", [epoch_record(1, made_up(values, 1))], failure=None, diverged=False)
        stack.enter_context(server.frozen())
        began = time.monotonic()
        assert not coordinator.result("a", [epoch_record(2, made_up(values, 2))], failure=None, diverged=False)
        waited = time.monotonic() - began
        coordinator.released("a")

    monkeypatch.setattr("tune.cluster.executor.run", run)
    with contextlib.ExitStack() as stack:
        assert search.main(["resume", "first", "--ledger", store.url]) == 1
    assert 0.5 < waited < 8
    said = capsys.readouterr().err
    assert "warning: the table cannot be shown: database " in said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: the ledger cannot be written: database {store.url}: ")
    assert last.endswith(f"; go on with: python search.py resume first --ledger '{store.url}'")
    sweep = Sweep.find(PostgresStore(store.url, None), "first")
    with sweep.files.lock("x"):
        play(Coordinator(Ledger(sweep), total=2, concurrent=2))
    check_whole(sweep, 2, 3)


def test_ctrl_c_is_heard_while_the_database_is_frozen(server: Postgres, tmp_path: Path, migrated_store: Path) -> None:
    """In the three states that a driver can be in, at once: its main thread waits for the database, it waits for a trial while
    others wait for the database, and the connection was given up and is being made anew."""
    store = PostgresStore(server.new_database(), tmp_path / "runs")
    cases = {
        "recording": (0.05, 30, signal.SIGINT),
        "training": (1000, 30, signal.SIGTERM),
        "lost": (0.05, 0.5, signal.SIGTERM),
    }
    drivers, logs = {}, {}
    for name, (epoch_seconds, answer_seconds, _) in cases.items():
        make_sweep(store, name, epochs=100_000, scheduler="none", tracking=f"sqlite:///{tmp_path / name}.db")
        shutil.copy(migrated_store, tmp_path / f"{name}.db")
        command = [sys.executable, "-c", DRIVER, store.url, store.storage, name, epoch_seconds, answer_seconds, COMMAND]
        logs[name] = tmp_path / f"{name}.log"
        with logs[name].open("w") as log:
            drivers[name] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT, text=True)
        STARTED.append(drivers[name])
    deadline = time.monotonic() + PATIENCE
    while not all("epoch" in log.read_text() for log in logs.values()):
        assert all(driver.poll() is None for driver in drivers.values()), [log.read_text() for log in logs.values()]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with server.frozen():
        time.sleep(2)
        began = time.monotonic()
        for name, (_, _, number) in cases.items():
            drivers[name].send_signal(number)
        took: dict[str, float] = {}
        while len(took) < len(cases) and time.monotonic() < began + 60:
            took |= {n: time.monotonic() - began for n, d in drivers.items() if n not in took and d.poll() is not None}
            time.sleep(0.05)
    said = {name: log.read_text().splitlines() for name, log in logs.items()}
    assert {name: driver.returncode for name, driver in drivers.items()} == {"recording": 130, "training": 143, "lost": 143}
    assert max(took.values()) < 11, took
    for name, lines in said.items():
        assert lines[-1] == COMMAND, lines
        sweep = Sweep.find(PostgresStore(store.url, None), name)
        with sweep.files.lock("x"):
            epochs = [record["epoch"] for record in sweep.files.lines("metrics.jsonl").read()]
        num_told = sum(line.startswith("epoch") for line in lines)
        assert epochs == list(range(1, len(epochs) + 1))
        assert num_told <= len(epochs) <= num_told + 1, "the last one may have arrived after all"


@pytest.mark.parametrize("answer_seconds", [30, 0.3], ids=["in a statement", "while it connects"])
def test_once_it_is_ending_nobody_waits_for_another_thread(
    server: Postgres, monkeypatch: pytest.MonkeyPatch, answer_seconds: float
) -> None:
    """Nor is a connection attempted, of which each would take seconds."""
    monkeypatch.setattr(connection_module, "ANSWER_SECONDS", answer_seconds)
    monkeypatch.setattr(connection_module, "ENDING_SECONDS", 0.5)
    monkeypatch.setitem(database_module.CONNECT, "connect_timeout", 3)
    database = Database(server.new_database())
    assert database.select("select 1") == [(1,)]

    def wait_in_vain() -> None:
        with pytest.raises(StorageUnavailable):
            database.select("select 1")

    with server.frozen():
        other = threading.Thread(target=wait_in_vain)
        other.start()
        time.sleep(1.2)
        monkeypatch.setattr(psycopg, "connect", lambda *_, **__: pytest.fail("an attempt"))
        began = time.monotonic()
        database.stop_waiting()
        for _ in range(5):
            with pytest.raises(StorageUnavailable):
                database.execute("select 1")
        database.release("first")
        assert time.monotonic() - began < 1
        other.join(10)
        assert not other.is_alive()
