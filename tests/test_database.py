"""A ledger in a real PostgreSQL: whole appends, one driver at a time, and a database that goes away."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest

import search
from tests.postgres import Postgres, dumped
from tests.sweep_process import end_all, of_real_data, start, wait_until
from tests.sweep_process import search as process
from tests.sweeps import epoch_record, everything, files_with, in_child, kept_lines, made_up, make_sweep, play, stored_trials
from training.locations import check_writable, names
from tune.cluster.interruption import Interruption
from tune.cluster.nodes import Nodes
from tune.report.leaderboard import noted_runs, rows, sweep_lines
from tune.report.projection import Projection
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import RETRAIN, Ledger
from tune.search.space import Space
from tune.search.warm_start import warm_start
from tune.spec import make_spec
from tune.store.base import LOCK, PROBE, StorageUnavailable
from tune.store.journal import DamagedFile
from tune.store.postgresql import database as database_module
from tune.store.postgresql import store as store_module
from tune.store.postgresql.database import Database, check_url, lock_key
from tune.store.postgresql.store import PostgresLines, PostgresStore
from tune.store.postgresql.tables import APPEND_LINES, WRITE_TEXT
from tune.store.stored_sweep import Sweep

RECORDS: list[dict[str, Any]] = [{"n": 0}, {"n": 1, "text": 'ü\n"{\0'}, {"n": 2, "list": [1.5, None, True]}]
SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray writes, with a short path for the sake of its sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture
def store(url: str, tmp_path: Path) -> PostgresStore:
    found = PostgresStore(url, tmp_path / "runs")
    found.database.make_tables()
    return found


def elsewhere(store: PostgresStore) -> PostgresStore:
    """The same place as another process sees it: over a connection of its own."""
    return PostgresStore(store.url, store.storage)


def name_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def lines(store: PostgresStore, name: str = "metrics.jsonl") -> PostgresLines:
    return store.files("first").lines(name)


class Failing:
    """Breaks the connection at the statements that ``when`` chooses, by their number: before they are carried out, or after,
    so that only the answer is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], *, after: bool) -> None:
        self.count = self.failed = 0
        real = psycopg.Connection.execute

        def execute(connection: Any, query: Any, *values: Any, **options: Any) -> Any:
            if query not in (APPEND_LINES, WRITE_TEXT):
                return real(connection, query, *values, **options)
            self.count += 1
            answer = real(connection, query, *values, **options) if after or not when(self.count) else None
            if when(self.count):
                self.failed += 1
                connection.close()
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return answer

        monkeypatch.setattr(psycopg.Connection, "execute", execute)


# -- lines and texts --------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_and_a_reader_goes_on(store: PostgresStore) -> None:
    writer, reader = lines(store), lines(elsewhere(store))
    for record in RECORDS:
        writer.append([record])
        assert list(reader.read()) == [record]
        assert list(reader.read()) == []
    writer.append(RECORDS)
    assert list(reader.read()) == RECORDS
    assert (reader.line, reader.offset) == (6, 6)
    later = lines(store)
    later.offset = later.line = 4
    assert list(later.read()) == RECORDS[1:]
    assert list(lines(store, "other.jsonl").read()) == []


def test_more_lines_than_are_read_at_a_time(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK", 3)
    for number in (1, 2, 3, 7):
        lines(store).append([{"n": n} for n in range(number)])
    assert [record["n"] for record in lines(store).read()] == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_several_writers_and_a_reader_see_whole_appends_in_order(store: PostgresStore) -> None:
    """There is one writer of a sweep; should there be three, nothing is lost, and a reader never has to go back."""

    def many(who: int) -> None:
        own = lines(elsewhere(store))
        for n in range(40):
            own.append([{"who": who, "n": n, "half": half} for half in (1, 2)])

    threads = [threading.Thread(target=many, args=[who]) for who in range(3)]
    for thread in threads:
        thread.start()
    reader, seen = lines(store), []
    while any(thread.is_alive() for thread in threads):
        seen += list(reader.read())
        assert len(seen) % 2 == 0
    seen += list(reader.read())
    assert seen == list(lines(store).read())
    for who in range(3):
        own = [(record["n"], record["half"]) for record in seen if record["who"] == who]
        assert own == [(n, half) for n in range(40) for half in (1, 2)]


@pytest.mark.parametrize("after", [False, True], ids=["not carried out", "answer lost"])
def test_an_append_that_is_tried_again_is_written_once(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(database_module, "PAUSE", 0.01)
    lines(store).append(RECORDS)
    failing = Failing(monkeypatch, lambda count: count in (1, 2, 5), after=after)
    for n in range(3):
        lines(store).append([{"n": n}, {"n": n}])
    assert failing.failed == 3
    assert list(lines(store).read()) == [*RECORDS, *({"n": n} for n in (0, 0, 1, 1, 2, 2))]


def test_a_line_that_is_missing_or_no_record_is_named(store: PostgresStore, url: str, postgres: Postgres) -> None:
    lines(store).append(RECORDS)
    for change in ("update noisy_label_lines set line = '[1]'", "delete from noisy_label_lines"):
        postgres.query(f"{change} where number = 1", name_of(url))
        read = lines(store).read()
        assert next(read) == RECORDS[0]
        with pytest.raises(DamagedFile, match=r"metrics.jsonl of sweep 'first' in postgresql://.*: line 2 is damaged"):
            next(read)


def test_texts_are_replaced_whole(store: PostgresStore) -> None:
    files = store.files("first")
    assert files.read("best_config.yaml") is None
    for text in ("a: ü\n", "b: 2\n" * 1000):
        files.write("best_config.yaml", text)
        assert elsewhere(store).files("first").read("best_config.yaml") == text
    assert store.files("second").read("best_config.yaml") is None
    files.stop_request.touch()
    assert elsewhere(store).files("first").stop_request.exists()
    files.stop_request.unlink()
    assert not files.stop_request.exists()
    files.stop_request.unlink(missing_ok=True)


# -- one driver at a time ---------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_with_the_process_that_holds_it(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "LOCK_PATIENCE", 0.2)
    other = elsewhere(store)
    with store.files("first").lock("python search.py resume first"):
        for refused in (other, store):  # the same process, too
            with pytest.raises(ValueError, match=f"sweep 'first' is being run by process {os.getpid()} on "):
                refused.files("first").lock("x").__enter__()
        assert other.files("first").running()
        assert other.files("first").command() == "python search.py resume first"
        with other.files("second").lock("x"):
            pass
    assert not other.files("first").running()
    assert other.files("first").command() == "python search.py resume first", "for who wants to go on"
    with other.files("first").lock("x"):
        assert store.files("first").running()


def test_a_killed_driver_holds_nothing(store: PostgresStore) -> None:
    def die() -> None:
        store.files("first").lock("python search.py resume first").__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    with store.files("first").lock("x"):
        pass


def break_connections(postgres: Postgres, url: str) -> None:
    postgres.query(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name_of(url)}'")


def test_a_broken_connection_is_made_anew_and_the_lock_with_it(store: PostgresStore, url: str, postgres: Postgres) -> None:
    other = elsewhere(store)
    with store.files("first").lock("x"):
        for n in range(3):
            break_connections(postgres, url)
            lines(store).append([{"n": n}])
            assert other.files("first").running()
    assert not other.files("first").running()
    assert [record["n"] for record in lines(store).read()] == [0, 1, 2]


def test_a_driver_whose_sweep_was_taken_meanwhile_writes_nothing_more(
    store: PostgresStore, url: str, postgres: Postgres
) -> None:
    """Also where the other one has come and gone: what the first knows of the sweep is no longer true."""
    sweep = make_sweep(store, trials=4)
    with sweep.files.lock("x"):
        coordinator = Coordinator(Ledger(sweep), total=4, concurrent=2)
        assert coordinator.next("a") not in (None, FINISHED)
        break_connections(postgres, url)
        with elsewhere(store).files("first").lock("y"):
            before = dumped(url)
            assert coordinator.result("a", [epoch_record(1, 0.5)], failure=None, diverged=False) is False
            assert coordinator.next("b") == FINISHED
        assert "the connection was lost, and since then sweep 'first' is being run by process" in coordinator.problem
        with pytest.raises(StorageUnavailable):
            sweep.files.write("best_config.yaml", "a: 1\n")
        assert dumped(url) == before
    with elsewhere(store).files("first").lock("z"):
        pass


def test_a_driver_learns_that_its_sweep_was_taken_without_writing(store: PostgresStore, url: str, postgres: Postgres) -> None:
    """Its watch for a stop request does, while trials are at work on long epochs."""
    sweep = make_sweep(store)
    with sweep.files.lock("x"):
        coordinator = Coordinator(Ledger(sweep), total=4, concurrent=2)
        with Interruption(coordinator, sweep.files.stop_request):
            other = elsewhere(store)
            other.names()  # it is connected
            take_away(store, other, url, postgres)
            assert coordinator.halted.wait(10)
    assert "is being run by" in coordinator.problem


def take_away(store: PostgresStore, other: PostgresStore, url: str, postgres: Postgres) -> None:
    """Another driver is quicker than the first one's next look."""
    with store.database._guard:
        holder = f"select pid from pg_locks where locktype = 'advisory' and objid = {lock_key('first') % 2**32}"
        postgres.query(f"select pg_terminate_backend(({holder}))", name_of(url))
        assert other.database.acquire("first", "process 1 on another\nx\n")


def test_a_stop_request_reaches_the_driver(store: PostgresStore) -> None:
    sweep = make_sweep(store)
    with sweep.files.lock("x"):
        coordinator = Coordinator(Ledger(sweep), total=4, concurrent=2)
        with Interruption(coordinator, sweep.files.stop_request) as interruption:
            elsewhere(store).files("first").stop_request.touch()
            deadline = time.monotonic() + 10
            while not interruption.signal and time.monotonic() < deadline:
                time.sleep(0.05)
            interruption.stop_timer()
            assert coordinator.halted.is_set()
        assert interruption.signal == signal.SIGTERM
    assert not sweep.files.stop_request.exists()


# -- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_same_in_a_folder_and_in_a_database(store: PostgresStore, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": ("alr", "ce"), "trials": 6, "epochs": 9, "defaults_first": True}
    there, here = make_sweep(store, **fields), make_sweep(tmp_path / "folder", **fields)
    boards = []
    for sweep in (there, here):
        play(Coordinator(Ledger(sweep), total=6, concurrent=2))
        boards.append(rows(Ledger(sweep, read_only=True), {}))
    assert boards[0] == boards[1]
    assert len(boards[0]) == 6
    assert kept_lines(there, "metrics.jsonl") == kept_lines(here, "metrics.jsonl")
    told = [[(t.state, t.params, t.intermediate_values, t.user_attrs) for t in stored_trials(sweep)] for sweep in (there, here)]
    assert told[0] == told[1]
    assert not list(there.folder.glob("*.*")), "nothing but checkpoints"
    found = Sweep.find(PostgresStore(store.url, None), "first")
    assert found == there, "its storage is noted"
    assert sweep_lines(PostgresStore(store.url, None))[2].split()[:2] == ["first", "alr,ce"]


def test_a_look_at_a_sweep_changes_nothing(store: PostgresStore) -> None:
    sweep = make_sweep(store, trials=6, epochs=9, scheduler="none")
    with sweep.files.lock("x"):
        play(Coordinator(Ledger(sweep), total=6, concurrent=2), keep={3})
        sweep.files.lines("metrics.jsonl").append(
            [{"trial": 3, "epoch": 2, "time": 0.0, "objective": 0.5, "metrics": {"seconds": 1.0}}]
        )
        before = everything(sweep)
        ledger = Ledger(Sweep.find(elsewhere(store), "first"), read_only=True)
        assert [row["epochs"] for row in rows(ledger, {}) if row["trial"] == 3] == [1]
        assert everything(sweep) == before
    assert Ledger(sweep).records[3].epochs == 2, "the next driver puts it into the study"


def test_extended_and_retrained(store: PostgresStore) -> None:
    sweep = make_sweep(store, trials=3)
    play(Coordinator(Ledger(sweep), total=3, concurrent=2))
    play(Coordinator(Ledger(sweep), total=5, concurrent=2))
    assert len(stored_trials(sweep)) == 5
    best = Ledger(sweep).best()
    assert best is not None
    sweep.files.add_part(RETRAIN)
    ledger = Ledger(sweep, RETRAIN, create=True)
    ledger.enqueue(best.params, {"source": best.number, "seed": 0, "noise_draw": 1})
    play(Coordinator(Ledger(sweep, RETRAIN), total=1, concurrent=2))
    assert [t.state.name for t in stored_trials(sweep, RETRAIN)] == ["COMPLETE"]
    assert len(kept_lines(sweep, "retrain/metrics.jsonl")) == 4


def test_mlflow_is_a_projection_of_it(store: PostgresStore, migrated_store: Path, tmp_path: Path) -> None:
    sweep = make_sweep(store, trials=3)
    ledger = Ledger(sweep)
    play(Coordinator(ledger, total=3, concurrent=2))
    (tmp_path / "mlflow.db").write_bytes(migrated_store.read_bytes())
    projection = Projection(ledger, f"sqlite:///{tmp_path / 'mlflow.db'}")
    projection.sync()
    noted = kept_lines(sweep, "tracker.jsonl")
    assert noted_runs(Ledger(sweep, read_only=True)) == projection.runs
    again = Projection(Ledger(sweep), projection.uri)
    again.close(finished=True)
    assert again.runs == projection.runs
    assert kept_lines(sweep, "tracker.jsonl") == noted, "nothing was sent twice"


def test_another_storage_is_not_touched_and_refused_where_it_matters(
    store: PostgresStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There may be another sweep's checkpoints, of the same name and the same numbers."""
    sweep = make_sweep(store, trials=3)
    play(Coordinator(Ledger(sweep), total=3, concurrent=2))
    other = tmp_path / "other"
    for number in range(9):
        (other / "first" / "checkpoints" / str(number)).mkdir(parents=True)
    before = sorted(other.rglob("*"))
    found = Sweep.find(PostgresStore(url, other), "first")
    assert found == sweep
    Coordinator(Ledger(found), total=3, concurrent=2)
    assert sorted(other.rglob("*")) == before
    line = f"--storage: sweep 'first' keeps its checkpoints in {sweep.storage}, not in {other}"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        found.check_storage()
    for good in (None, sweep.storage):
        Sweep.find(PostgresStore(url, good), "first").check_storage()
    make_sweep(tmp_path / "folder").check_storage()  # a folder's sweeps are where they are looked for
    flags = ["--ledger", url, "--storage", str(other)]
    assert search.main(["list", *flags]) == 0
    assert search.main(["best", "first", *flags]) == 0
    assert "complete" in capsys.readouterr().out
    space = Space(sweep.spec)
    assert warm_start("first", PostgresStore(url, other), sweep.spec, space).provenance["from"]["id"] == sweep.provenance["id"]


def test_names_that_are_taken(store: PostgresStore, url: str) -> None:
    make_sweep(store)
    with pytest.raises(ValueError, match="sweep 'first' exists in postgresql://"):
        make_sweep(elsewhere(store))
    (store.storage / "second" / "checkpoints").mkdir(parents=True)
    (store.storage / "third").write_text("")
    for name in ("second", "third"):
        with pytest.raises(ValueError, match=f"{name} exists and belongs to no sweep in postgresql://"):
            make_sweep(store, name)
    assert store.names() == ["first"]


def test_a_launch_that_is_refused_leaves_nothing_in_the_way(store: PostgresStore) -> None:
    """As where a node of the cluster cannot run trials: the question to it is a file in the sweep's folder."""

    def refused() -> None:
        with store.create("first") as (folder, _):
            check_writable(folder)
            raise ValueError("a node cannot read the data")

    with pytest.raises(ValueError, match="a node cannot read the data"):
        refused()
    assert store.names() == []
    assert make_sweep(store).name == "first"


def test_of_a_launch_that_was_killed_nothing_is_left(store: PostgresStore) -> None:
    def die() -> None:
        Sweep.write = lambda sweep: os._exit(9)  # type: ignore[method-assign]
        make_sweep(store, defaults_first=True)

    assert in_child(die) == 9
    assert store.names() == []
    with pytest.raises(ValueError, match=r"no sweep 'first' in postgresql://.*; there are: none"):
        Sweep.find(store, "first")
    sweep = make_sweep(store, trials=2)
    play(Coordinator(Ledger(sweep), total=2, concurrent=2))
    assert len(stored_trials(sweep)) == 2


@pytest.mark.parametrize("asked", [True, False], ids=["while nodes were asked", "after it"])
def test_a_launch_on_a_cluster_that_was_killed_blocks_no_name(store: PostgresStore, asked: bool) -> None:
    def die() -> None:
        with store.create("first") as (folder, files):
            with Nodes(Sweep(folder, make_spec({}), {"id": "first-0123456789abcdef"}, files), make_spec({})) as nodes:
                nodes._probe()
                if asked:
                    os._exit(9)
            os._exit(9)

    assert in_child(die) == 9
    assert names(store.storage / "first") == [PROBE] * asked
    sweep = make_sweep(elsewhere(store), trials=2)
    play(Coordinator(Ledger(sweep), total=2, concurrent=2))
    assert len(stored_trials(sweep)) == 2


# -- a database that goes away ----------------------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


def check_whole(sweep: Sweep, trials: int, epochs: int) -> None:
    stored = stored_trials(sweep)
    assert [trial.state.name for trial in stored] == ["COMPLETE"] * trials
    ledger = Ledger(sweep, read_only=True)
    for trial in stored:
        values = {epoch: made_up(ledger.records[trial.number].values, epoch) for epoch in range(1, epochs + 1)}
        assert trial.intermediate_values == values
    told = sorted((record["trial"], record["epoch"]) for record in sweep.files.lines("metrics.jsonl").read())
    assert told == [(trial, epoch) for trial in range(trials) for epoch in range(1, epochs + 1)]


def play_while(disturb: Callable[[], None], pause: float, store: PostgresStore) -> None:
    """A whole sweep through a coordinator, under which the server is disturbed three times; then everything is there once."""
    sweep = make_sweep(store, trials=40, epochs=5, scheduler="none")
    num_times, over = 0, threading.Event()

    def go_on() -> None:
        nonlocal num_times
        while not over.wait(pause) and num_times < 3:
            disturb()
            num_times += 1

    disturber = threading.Thread(target=go_on)
    with sweep.files.lock("x"):
        coordinator = Coordinator(Ledger(sweep), total=40, concurrent=2)
        disturber.start()
        play(coordinator, lambda record, epoch: time.sleep(0.01) or made_up(record.values, epoch))  # type: ignore[func-returns-value]
        over.set()
        disturber.join()
        assert PostgresStore(store.url, None).files("first").running()
    assert coordinator.problem == ""
    assert num_times == 3
    check_whole(sweep, 40, 5)


def test_a_database_that_is_restarted_under_a_running_sweep(own_server: Postgres, tmp_path: Path) -> None:
    """Three times, as at a crash, at any point of the coordinator's work: it waits, takes its lock again, and goes on."""

    def restart() -> None:
        own_server.stop()
        time.sleep(0.7)
        own_server.start()

    play_while(restart, 0.4, PostgresStore(own_server.new_database(), tmp_path))


def test_a_database_that_stays_away_stops_the_sweep(
    own_server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 1.5)
    sweep = make_sweep(PostgresStore(own_server.new_database(), tmp_path), trials=3, epochs=3, scheduler="none")
    with sweep.files.lock("x"):
        coordinator = Coordinator(Ledger(sweep), total=3, concurrent=2)
        for key in "ab":
            assert coordinator.next(key) not in (None, FINISHED)
        coordinator.result("a", [epoch_record(1, made_up(coordinator.live["a"].values, 1))], failure=None, diverged=False)
        own_server.stop()
        began = time.monotonic()
        assert coordinator.result("a", [epoch_record(2, 0.5)], failure=None, diverged=False) is False
        assert 1 < time.monotonic() - began < 10
        began = time.monotonic()
        assert coordinator.result("b", [epoch_record(1, 0.5)], failure=None, diverged=False) is False
        assert time.monotonic() - began < 1, "it is not waited for twice"
        assert coordinator.problem.startswith(f"the ledger cannot be written: database {sweep.files.store.url}: ")
        assert coordinator.next("c") == FINISHED
    own_server.start()
    sweep = Sweep.find(PostgresStore(sweep.files.store.url, None), "first")
    with sweep.files.lock("x"):
        play(Coordinator(Ledger(sweep), total=3, concurrent=2))
    check_whole(sweep, 3, 3)


@pytest.mark.parametrize("verb", ["resume", "retrain"])
def test_the_command_that_goes_on_is_said_where_the_database_has_gone(
    own_server: Postgres,
    tmp_path: Path,
    migrated_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    """Neither the last file that is to be written nor the table that cannot be shown takes its place."""
    monkeypatch.setattr(database_module, "RETRY_SECONDS", 1.0)
    (tmp_path / "mlflow.db").write_bytes(migrated_store.read_bytes())
    store = PostgresStore(own_server.new_database(), tmp_path)
    sweep = make_sweep(store, trials=3, epochs=2, scheduler="none")
    if verb == "retrain":
        play(Coordinator(Ledger(sweep), total=3, concurrent=1))
    of_real_data(sweep)

    def run(coordinator: Coordinator, *rest: object) -> None:
        coordinator.concurrent = 1
        play_one(coordinator)
        own_server.stop()
        play_one(coordinator)

    def play_one(coordinator: Coordinator) -> None:
        record = coordinator.next("a")
        if record != FINISHED:
            coordinator.result("a", [epoch_record(epoch, 0.5) for epoch in (1, 2)], failure=None, diverged=False)
            coordinator.released("a")

    monkeypatch.setattr("tune.cluster.executor.run", run)
    assert search.main([verb, "first", "--ledger", store.url]) == 1
    own_server.start()
    said = capsys.readouterr()
    assert "warning: the table cannot be shown: database " in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith(f"error: the ledger cannot be written: database {store.url}: ")
    flags = " --top 3 --seeds 3" if verb == "retrain" else ""
    assert last.endswith(f"; go on with: python search.py {verb} first{flags} --ledger '{store.url}'")
    assert [trial.state.name for trial in stored_trials(sweep)] == ["COMPLETE"] * (3 if verb == "retrain" else 1)


@pytest.mark.parametrize("after", [False, True], ids=["not carried out", "answer lost"])
def test_away_for_good_at_each_single_write(store: PostgresStore, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """The sweep halts, and the next driver finds nothing lost or doubled, whether the last write was carried out or not."""
    for number in range(1, 60):
        sweep = make_sweep(elsewhere(store), f"away-{number}", trials=2, epochs=3, sampler="random", scheduler="none")
        coordinator = Coordinator(Ledger(sweep), total=2, concurrent=1)
        sweep.files.stop_waiting()
        with monkeypatch.context() as patch:
            failing = Failing(patch, lambda count, number=number: count >= number, after=after)  # type: ignore[misc]
            play(coordinator)
        if not failing.failed:
            assert number > 20
            return
        assert "server closed the connection unexpectedly" in coordinator.problem
        again = Sweep.find(elsewhere(store), sweep.name)
        play(Coordinator(Ledger(again), total=2, concurrent=1))
        check_whole(again, 2, 3)
    raise AssertionError("no end")


# -- the command line -------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = search.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert SECRET not in said.err + said.out
    return said.err


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"postgresql://me:{SECRET}@127.0.0.1:1/x", ["'postgresql://127.0.0.1:1/x'", "holds a password", "PGPASSWORD"]),
        (f"postgresql://127.0.0.1:1/x?user=me&password={SECRET}", ["holds a password", "PGPASSWORD"]),
        (f"postgresql://me@127.0.0.1:1/x?password=a@{SECRET}", ["'postgresql://...' holds a password", "PGPASSWORD"]),
        (f"postgresql://me:a/{SECRET}@127.0.0.1:1/x", ["holds a password", "PGPASSWORD"]),
        (f"postgresql://me:a?{SECRET}@127.0.0.1:1/x", ["'postgresql://...'"]),
        (
            f"postgresql://me:{SECRET}@127.0.0.1:1/x?colour=red",
            ["'postgresql://127.0.0.1:1/x' is not readable", "postgresql://USER@HOST"],
        ),
        ("mysql://me@127.0.0.1/x", ["'mysql://127.0.0.1/x' is not allowed", "postgresql://USER@HOST"]),
        ("postgresql://me@127.0.0.1:1/x", ["database postgresql://me@127.0.0.1:1/x: ", "refused"]),
    ],
)
def test_a_ledger_that_cannot_be_used(url: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("launch", "resume", "best", "retrain", "stop", "list"):
        name = [] if verb == "list" else ["x"]
        line = refused(capsys, verb, *name, "--ledger", url, "--storage", tmp_path / "runs")
        for word in words:
            assert word in line, line
    assert not (tmp_path / "runs").exists()


def test_the_password_comes_from_the_environment_and_stays_there(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name_of(postgres.new_database())
    postgres.query(f"create role keeper login password '{SECRET}'; alter database {name} owner to keeper")
    rules = postgres.folder / "pg_hba.conf"
    rules.write_text("local all keeper scram-sha-256\n" + rules.read_text())
    postgres.query("select pg_reload_conf()")
    url = postgres.url(name, user="keeper")
    line = refused(capsys, "list", "--ledger", url)
    assert "the password comes from PGPASSWORD or ~/.pgpass" in line
    monkeypatch.setenv("PGPASSWORD", "wrong")
    assert "the password comes from PGPASSWORD or ~/.pgpass" in refused(capsys, "best", "x", "--ledger", url)
    monkeypatch.setenv("PGPASSWORD", SECRET)
    sweep = make_sweep(PostgresStore(url, tmp_path / "runs"), trials=2)
    play(Coordinator(Ledger(sweep), total=2, concurrent=2))
    monkeypatch.setenv("NOISY_LABEL_LEDGER", url)
    assert search.main(["list"]) == 0
    assert "first" in capsys.readouterr().out
    assert SECRET not in str(everything(sweep))
    assert SECRET not in repr(vars(sweep.files.store.database)), "not even in memory: libpq reads it"  # type: ignore[attr-defined]


def test_commands_that_only_look_make_no_tables(url: str, postgres: Postgres, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["list", "--ledger", url]) == 0
    assert "no sweeps in postgresql://" in capsys.readouterr().out
    for verb in ("best", "resume", "retrain", "stop"):
        assert "no sweep 'x' in postgresql://" in refused(capsys, verb, "x", "--ledger", url)
    assert postgres.query("select count(*) from pg_tables where schemaname = 'public'", name_of(url)) == [(0,)]


def test_stop_and_best_find_it_by_the_ledger_alone(
    store: PostgresStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(store, trials=3)
    play(Coordinator(Ledger(sweep), total=3, concurrent=2), keep={1})
    assert search.main(["best", "first", "--ledger", url]) == 0
    assert "waiting" in capsys.readouterr().out
    with sweep.files.lock("x"):
        assert search.main(["best", "first", "--ledger", url]) == 0
        assert "running" in capsys.readouterr().out
        assert LOCK in {row[1] for row in sweep.files.store.database.select("select * from noisy_label_texts")}  # type: ignore[attr-defined]
    assert search.main(["stop", "first", "--ledger", url]) == 0
    assert "is not running" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_urls_that_are_good() -> None:
    for url in ("postgresql://me@host:5432/db", "postgres://host/db", "postgresql://a@h1:1,h2:2/db?sslmode=require"):
        assert check_url(url) == url
        assert Database(url).url == url


# -- from end to end --------------------------------------------------------------------------------------------------


def test_launched_killed_and_resumed_without_a_shared_file_system(
    url: str, s3: str, tmp_path: Path, ray_folder: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real Ray, a ledger in PostgreSQL and checkpoints in S3: kill -9 on the driver, resume, best; nothing lies in a folder,
    and no secret anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOISY_LABEL_LEDGER", url)
    (tmp_path / "mlflow.db").write_bytes(migrated_store.read_bytes())
    (tmp_path / "spec.yaml").write_text("{trials: 4, epochs: 24, checkpoint_seconds: 0, report_seconds: 0.2, scheduler: none}")
    store, log = PostgresStore(url, None), tmp_path / "log"
    flags = ["--storage", f"{s3}/runs", "--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}", "--concurrent", 2]
    launched = start(log, "launch", "far", "--spec", tmp_path / "spec.yaml", "--model", "mlp", *flags)
    wait_until(lambda: "far" in store.names(), launched, log)
    metrics = store.files("far").lines("metrics.jsonl")
    seen: list[dict[str, Any]] = []
    wait_until(lambda: seen.extend(metrics.read()) or len(seen) >= 4, launched, log)
    launched.send_signal(signal.SIGSTOP)  # it holds the sweep and does not get ahead meanwhile
    assert "is being run by process" in process("resume", "far", check=2).stderr
    launched.kill()
    launched.wait()
    sweep = Sweep.find(store, "far")
    assert str(sweep.folder) == "s3://bucket/runs/far"
    saved = {int(name) for name in names(sweep.folder / "checkpoints")}
    assert saved
    before = [record for record in Ledger(sweep, read_only=True).unfinished() if record.epochs]
    assert {record.number for record in before} <= saved
    for _ in range(4):
        resumed = process("resume", "far", check=None)
        if "Ray did not start" not in resumed.stderr:  # this machine may be busy; nothing is lost by that
            break
    assert resumed.returncode == 0, resumed.stderr
    for record in before:
        assert f"trial {record.number} alr goes on from epoch {record.epochs}" in resumed.stdout
    assert [trial.state.name for trial in stored_trials(sweep)] == ["COMPLETE"] * 4
    recorded = sorted((record["trial"], record["epoch"]) for record in store.files("far").lines("metrics.jsonl").read())
    assert recorded == [(trial, epoch) for trial in range(4) for epoch in range(1, 25)]
    board = json.loads(process("best", "far", "--json").stdout)
    assert [row["state"] for row in board] == ["complete"] * 4
    assert all(row["mlflow_run_id"] for row in board)
    assert process("resume", "far").stdout.splitlines()[-1].endswith(f"python search.py resume far --ledger '{url}' --trials N")
    assert set(names(sweep.folder / "checkpoints")) == {"0", "1", "2", "3"}
    assert not (tmp_path / "runs").exists()
    assert SECRET not in str(everything(sweep))
    objects = boto3.resource("s3").Bucket("bucket").objects.all()
    held = {item.key: item.get()["Body"].read() for item in objects}
    assert "runs/far/checkpoints/0/checkpoint.pt" in held
    assert [key for key, content in held.items() if SECRET.encode() in key.encode() + content] == []
    assert len(list(ray_folder.rglob("*.log"))) > 6, "two of Ray's sessions wrote here"
    assert files_with(SECRET, tmp_path, ray_folder) == []
