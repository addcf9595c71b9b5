"""A sweep of free trials, killed after each single durable write and inside of it, in a loop: nothing is lost or doubled.

The coordinator, the ledger, both doors to Ray Tune and the trial's own shell are the real ones. What is free is the training,
and the executor is two slots in one process. Kills are ``os._exit`` in a forked process, so the loop runs in a fresh
interpreter that has no threads: ``python -m tests.test_kill_loop FOLDER LEDGER WAY...``, where LEDGER is empty or the URL of
a database.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.free_experiment import DIVERGES, EPOCHS, FAILS, FreeExperiment
from tests.postgres import Postgres

TRIALS = 4
ROOT = Path(__file__).resolve().parent.parent
WAYS = {"after": 50, "inside": 50, "lives": 100, "mixed": 30}  # and more kills than that


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return killed(tmp_path_factory.mktemp("killed"), "", WAYS)


@pytest.fixture(scope="module")
def in_database(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> subprocess.CompletedProcess[str]:
    return killed(tmp_path_factory.mktemp("killed"), postgres.new_database(), ["inside", "mixed"])


def killed(storage: Path, ledger: str, ways: Iterable[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.test_kill_loop", str(storage), ledger, *ways]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("way", WAYS)
def test_kills_lose_and_double_nothing(in_folder: subprocess.CompletedProcess[str], way: str) -> None:
    """``after`` and ``inside`` every single write; ``lives`` of one to three writes, one after the other; and ``mixed``."""
    enough(in_folder, way)


@pytest.mark.parametrize("way", ["inside", "mixed"])
def test_kills_with_a_ledger_in_a_database(in_database: subprocess.CompletedProcess[str], way: str) -> None:
    enough(in_database, way)


def enough(done: subprocess.CompletedProcess[str], way: str) -> None:
    kills = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert way in kills, done.stderr[-6000:]
    assert kills[way] > WAYS[way]


# -- free trials ------------------------------------------------------------------------------------------------------


def run(sweep: Any) -> list[tuple[str, int]]:
    """A driver from its start to the end of the sweep: two actors that take turns. What happened, as the display is told."""
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

    from tune.cluster.scheduler import LedgerScheduler
    from tune.cluster.searcher import LedgerSearcher
    from tune.cluster.trial import TrialActor
    from tune.search.coordinator import Coordinator
    from tune.search.ledger import Ledger

    class FreeActor(TrialActor):
        def __init__(self, config: dict[str, Any]) -> None:  # without Tune's own, which wants a cluster
            self.setup(config)

        def _build(self) -> Any:
            return FreeExperiment(self.trial)

    events: list[tuple[str, int]] = []
    ledger = Ledger(sweep)
    coordinator = Coordinator(
        ledger, total=TRIALS, concurrent=2, on_event=lambda event, record: events.append((event, record.number))
    )
    searcher, scheduler = LedgerSearcher(coordinator), LedgerScheduler(coordinator)
    actors: dict[str, FreeActor] = {}
    num_given = 0
    while True:
        while isinstance(config := searcher.suggest(f"id-{num_given}"), dict):
            actors[f"id-{num_given}"] = FreeActor(config)
            num_given += 1
        if config == Searcher.FINISHED and not actors:
            return events
        for key, actor in list(actors.items()):
            result = actor.step()
            if scheduler.on_trial_result(None, SimpleNamespace(trial_id=key), result) == TrialScheduler.STOP:  # type: ignore[arg-type]
                searcher.on_trial_complete(key, result)
                actors.pop(key).cleanup()  # as when Tune has no further trial for it


# -- kills ------------------------------------------------------------------------------------------------------------


def kill_at(number: int, inside: bool) -> None:
    """From now on the process dies with its ``number``-th durable write: right after it, or with half of it on the disk."""
    from training import checkpoint
    from tune.store.journal import LineFile
    from tune.store.postgresql.store import PostgresLines

    count, fsync = 0, os.fsync

    def counted(write: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            write(*arguments, **options)
            if count == number:
                os._exit(9)

        return wrapper

    def unanswered(write: Any) -> Any:
        """Into a database nothing is written in halves; ``inside`` a write is before its answer, come what may of it."""

        def wrapper(*arguments: Any) -> None:
            if inside and count == number - 1:
                threading.Thread(target=write, args=arguments, daemon=True).start()
                time.sleep(random.uniform(0, 0.002))
                os._exit(9)
            write(*arguments)

        return wrapper

    def torn(descriptor: int) -> None:
        if inside and count == number:
            end = os.fstat(descriptor).st_size
            lines = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
            start = os.pread(descriptor, end - 1, 0).rfind(b"\n") + 1 if lines else 0
            os.ftruncate(descriptor, start + (end - start) // 2)
            os._exit(9)
        fsync(descriptor)

    LineFile.append = counted(LineFile.append)  # type: ignore[method-assign]
    PostgresLines.append = unanswered(counted(PostgresLines.append))  # type: ignore[method-assign]
    checkpoint.save = counted(checkpoint.save)
    os.fsync = torn


def life(sweep: Any, writes: int, inside: bool) -> bool:
    """One driver that dies at its ``writes``-th durable write; True where it reached the end of the sweep before that."""
    from tests.sweeps import in_child

    def work() -> None:
        kill_at(writes, inside)
        run(sweep)

    code = in_child(work)
    assert code in (0, 9), f"the driver ended with {code}"
    return code == 0


def deaths(way: str) -> Iterator[Iterator[tuple[int, bool]]]:
    """Per sweep, when each of its drivers in turn dies; the last one, when no death is left, lives."""
    if way in ("after", "inside"):
        for number in range(1, 10**6):
            yield iter([(number, way == "inside")])
    elif way == "lives":
        for writes, inside in ((1, False), (2, False), (3, True)):
            yield iter([(writes, inside)] * 10**6)
    else:
        for seed in range(8):
            stream = random.Random(seed)
            yield ((stream.randint(2, 25), stream.random() < 0.5) for _ in range(10**6))


# -- what must hold ---------------------------------------------------------------------------------------------------


def check(sweep: Any, undisturbed: dict[str, Any]) -> None:
    """Everything that the kills could have broken."""
    from tests.sweeps import everything, kept_lines, made_up, stored_trials
    from training import checkpoint
    from tune.search.ledger import Ledger
    from tune.search.rungs import Rungs

    trials = stored_trials(sweep)
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") + states.count("PRUNED") == TRIALS, states
    assert len(states) == TRIALS + (states[FAILS] == "FAIL"), states  # a failed one is made up for
    assert states[FAILS] == "FAIL" or trials[FAILS].last_step == 1, states  # stopped before it could fail
    assert ("out of paper" in trials[FAILS].user_attrs["summary"].get("error", "")) == (states[FAILS] == "FAIL")
    assert trials[DIVERGES].user_attrs["summary"].get("diverged") or trials[DIVERGES].last_step < EPOCHS - 1
    recorded: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(trials))}
    for line in kept_lines(sweep, "metrics.jsonl"):
        recorded[json.loads(line)["trial"]].append(json.loads(line))
    ledger = Ledger(sweep, read_only=True)
    for trial in trials:
        lines, record = recorded[trial.number], ledger.records[trial.number]
        last = trial.last_step
        assert [line["epoch"] for line in lines] == list(range(1, last + 1)), (trial.number, lines)
        assert list(trial.intermediate_values) == [line["epoch"] for line in lines]
        assert trial.user_attrs["summary"]["epochs"] == last
        assert trial.user_attrs["summary"]["seconds"] == 0.25 * last
        for line in lines:
            value = made_up(record.values, line["epoch"])
            assert line["objective"] == line["metrics"]["val/accuracy"] == value
            assert trial.intermediate_values[line["epoch"]] == value
        if trial.state.name != "FAIL":
            assert trial.value == lines[-1]["objective"]
        assert (trial.state.name == "COMPLETE") == (last == EPOCHS)
        if trial.params == undisturbed["params"][trial.number]:
            theirs = undisturbed["values"][trial.number]
            assert all(theirs.get(epoch, value) == value for epoch, value in trial.intermediate_values.items())
        else:
            assert sweep.folder.name in undisturbed["cut_off"], "only a proposal that was cut off is drawn anew"
    assert trials[0].params == undisturbed["params"][0], "the published default comes first"
    assert len({json.dumps(trial.params) for trial in trials}) == len(trials)
    standing = {
        rung: {trial.number: trial.intermediate_values[rung] for trial in trials if rung in trial.intermediate_values}
        for rung in sweep.spec.rungs()
    }
    assert Rungs(ledger).values == standing
    held = {folder.name: folder for folder in (sweep.folder / "checkpoints").iterdir()}
    assert set(held) == {str(trial.number) for trial in trials if trial.state.name == "COMPLETE"}
    for name, folder in held.items():
        assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]
        history = checkpoint.load(folder / "checkpoint.pt")["history"]
        assert [{"trial": int(name), **record} for record in history] == recorded[int(name)]
    before = everything(sweep)
    assert run(sweep) == [], "nothing is left to do"
    assert everything(sweep) == before


def loop(store: Any, way: str) -> None:
    """Kills sweeps until one is not killed any more, and says how many kills that were."""
    from tests.sweeps import kept_lines, make_sweep, stored_trials

    fields: dict[str, Any] = {"method": ("elr", "ce"), "trials": TRIALS, "epochs": EPOCHS, "reduction_factor": 2}
    each_epoch = way in ("after", "lives")  # saved and reported; otherwise at rungs and at the end
    timing = {"checkpoint_seconds": 0.0 if each_epoch else 1e6, "report_seconds": 0.0 if each_epoch else 1e6}
    whole = make_sweep(store, f"{way}-undisturbed", defaults_first=True, **fields, **timing)
    run(whole)
    undisturbed: dict[str, Any] = {
        "params": [trial.params for trial in stored_trials(whole)],
        "values": [trial.intermediate_values for trial in stored_trials(whole)],
        "cut_off": set(),
    }
    assert len(undisturbed["params"]) == TRIALS + 1
    check(whole, undisturbed)
    gc.freeze()  # a collection in a forked process would copy every page
    num_kills = 0
    for number, own_deaths in enumerate(deaths(way)):
        sweep = make_sweep(store, f"{way}-{number}", defaults_first=True, **fields, **timing)
        num_before = num_kills
        for writes, inside in own_deaths:
            if life(sweep, writes, inside):
                break
            num_kills += 1
            journal, metrics = (kept_lines(sweep, name) for name in ("journal.log", "metrics.jsonl"))
            trials = stored_trials(sweep)
            finished = {trial.number for trial in trials if trial.state.is_finished()}
            running = {trial.number for trial in trials if trial.state.name == "RUNNING"}
            if any(0 < len(trials[n].params) < len(undisturbed["params"][n]) for n in running):
                undisturbed["cut_off"].add(sweep.folder.name)
            if way in ("after", "inside"):
                events = run(sweep)
                assert not finished & {trial for _, trial in events}, "a finished trial was run again"
                started = [trial for event, trial in events if event == "started"]
                ended = [trial for event, trial in events if event == "ended"]
                assert sorted(set(started)) == sorted(started)
                assert sorted(ended) == sorted({trial.number for trial in stored_trials(sweep)} - finished)
                assert kept_lines(sweep, "journal.log")[: len(journal)] == journal
                assert kept_lines(sweep, "metrics.jsonl")[: len(metrics)] == metrics
            assert num_kills - num_before < 500, "no progress"
        check(sweep, undisturbed)
        if num_kills == num_before:
            break
    print(way, num_kills, flush=True)


if __name__ == "__main__":
    from tune.store.locate import open_store

    for chosen in sys.argv[3:]:
        loop(open_store(sys.argv[1], sys.argv[2]), chosen)
