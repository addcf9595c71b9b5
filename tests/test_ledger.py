"""What happened to trials beside what the study says: states, numbers, budgets, and what a kill leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from hparams import Value, declared
from methods import METHODS, find_method
from tests.sweeps import bytes_below, epoch_record, make_sweep, metric_lines, play
from tune.report.leaderboard import leaderboard_text, retrain_rows, rows
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import RETRAIN, Ledger, Record
from tune.search.recipes import dataset, of_trial
from tune.search.space import Space
from tune.spec import KEPT_CHECKPOINTS, MAX_FAILURES, MAX_LOST, make_spec
from tune.store.journal import DamagedFile, LineFile
from tune.store.stored_sweep import Sweep

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: out of paper\n'


def stored(sweep: Sweep, name: str = "sweep") -> list[FrozenTrial]:
    """The study as Optuna's own backend reads it."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep.folder / "journal.log")))
    return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)


def open_coordinator(sweep: Sweep, *, concurrent: int = 2, total: int | None = None) -> Coordinator:
    """What a driver has after its start."""
    return Coordinator(Ledger(sweep), total=total or sweep.spec.trials, concurrent=concurrent)


def take(coordinator: Coordinator, key: str = "a") -> Record:
    record = coordinator.next(key)
    assert isinstance(record, Record)
    return record


def run_to(coordinator: Coordinator, key: str, last: int, value: float = 0.5) -> bool:
    """Reports a live trial's epochs up to ``last``, one by one; the answer to the last of them."""
    keep = True
    for epoch in range(coordinator.live[key].epochs + 1, last + 1):
        keep = coordinator.result(key, [epoch_record(epoch, value)], failure=None, diverged=False)
    return keep


# -- how a trial ends -------------------------------------------------------------------------------------------------


def test_each_end_is_told_as_it_happened(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, epochs=4, trials=9, scheduler="none")
    coordinator = open_coordinator(sweep, concurrent=4)
    complete, diverged, failed, running = (take(coordinator, key) for key in "abcd")
    assert run_to(coordinator, "a", 4, 0.625) is False
    coordinator.released("a")
    run_to(coordinator, "b", 2, 0.25)
    assert coordinator.result("b", [], failure=None, diverged=True) is False
    coordinator.released("b")
    run_to(coordinator, "c", 1, 0.125)
    assert coordinator.result("c", [], failure=TRACEBACK, diverged=False) is False
    coordinator.released("c")
    run_to(coordinator, "d", 3, 0.75)
    trials = stored(sweep)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.value for trial in trials] == [0.625, 0.25, None, None]
    assert [trial.last_step for trial in trials] == [4, 2, 1, 3]
    assert [record.status for record in (complete, diverged, failed, running)] == ["complete", "diverged", "failed", "running"]
    assert trials[0].user_attrs["summary"] == {"epochs": 4, "seconds": 2.0, "test_accuracy": None}
    assert trials[1].user_attrs["summary"]["diverged"] is True
    assert trials[2].user_attrs["summary"]["error"] == TRACEBACK
    assert "summary" not in trials[3].user_attrs
    assert [row["error"] for row in rows(coordinator.ledger, {}) if row["state"] == "failed"] == [TRACEBACK]


def test_a_trial_that_asha_stops_is_pruned_at_its_last_step(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, epochs=9, trials=9, reduction_factor=3)  # rungs at 1 and 3
    coordinator = open_coordinator(sweep, concurrent=5)
    for key, value in zip("abcd", (0.5, 0.6, 0.7, 0.8), strict=True):
        take(coordinator, key)
        assert run_to(coordinator, key, 3, value)
    take(coordinator, "e")
    assert run_to(coordinator, "e", 1, 0.75)
    assert run_to(coordinator, "e", 3, 0.55) is False
    coordinator.released("e")
    last = stored(sweep)[4]
    assert (last.state, last.value, last.last_step) == (TrialState.PRUNED, 0.55, 3)
    assert coordinator.ledger.records[4].status == "stopped"
    assert [trial.state for trial in stored(sweep)[:4]] == [TrialState.RUNNING] * 4


def test_diverged_before_its_first_epoch(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    coordinator = open_coordinator(sweep)
    take(coordinator)
    coordinator.result("a", [], failure=None, diverged=True)
    coordinator.released("a")
    (trial,) = stored(sweep)
    assert (trial.state, trial.value, trial.last_step) == (TrialState.PRUNED, None, None)
    (row,) = rows(Ledger(sweep, read_only=True), {})
    assert (row["state"], row["value"], row["epochs"]) == ("diverged", None, 0)
    assert "diverged" in leaderboard_text(coordinator.ledger, {}, 10)


def test_a_trial_that_gets_ahead_may_lose_any_number_of_processes(tmp_path: Path) -> None:
    """As on machines that are preempted now and then."""
    sweep = make_sweep(tmp_path, scheduler="none", epochs=2 * MAX_LOST)
    events: list[tuple[str, int]] = []
    coordinator = Coordinator(
        Ledger(sweep), total=4, concurrent=1, on_event=lambda event, record: events.append((event, record.number))
    )
    record = take(coordinator)
    for process in range(1, 2 * MAX_LOST):
        run_to(coordinator, "a", process)
        coordinator.lost("a")
        assert take(coordinator) is record, "first in line, before any new trial"
        assert coordinator.config(record)["reported"] == process
    run_to(coordinator, "a", 2 * MAX_LOST)
    coordinator.released("a")
    (trial,) = stored(sweep)
    assert (trial.state, trial.user_attrs["lost"]) == (TrialState.COMPLETE, [1, 2 * MAX_LOST - 1])
    assert [line["epoch"] for line in metric_lines(sweep)] == list(range(1, 2 * MAX_LOST + 1))
    assert events == [("started", 0), *[("lost", 0), ("started", 0)] * (2 * MAX_LOST - 1), ("ended", 0)]


def test_a_trial_that_loses_three_processes_has_failed(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    coordinator = open_coordinator(sweep, concurrent=1)
    take(coordinator)
    run_to(coordinator, "a", 2)
    for _ in range(MAX_LOST - 1):
        coordinator.lost("a")
        take(coordinator)
    coordinator = open_coordinator(sweep, concurrent=1)  # the count outlives the driver
    take(coordinator)
    coordinator.lost("a")
    (trial,) = stored(sweep)
    assert trial.state is TrialState.FAIL
    assert trial.user_attrs["summary"]["error"] == "lost its process 3 times in a row; the last epoch reported was 2"
    assert take(coordinator).number == 1


def test_losing_or_ending_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    coordinator = open_coordinator(sweep)
    before = bytes_below(sweep.folder)
    coordinator.lost("nobody")
    coordinator.released("nobody")
    assert bytes_below(sweep.folder) == before


def test_an_interrupted_trial_stays_running(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    coordinator = open_coordinator(sweep)
    take(coordinator)
    run_to(coordinator, "a", 1)
    coordinator.halted.set()
    assert coordinator.next("b") == FINISHED
    assert coordinator.result("a", [epoch_record(2, 0.5)], failure=None, diverged=False) is False
    coordinator.released("a")
    (trial,) = stored(sweep)
    assert trial.state is TrialState.RUNNING
    assert trial.last_step == 2


def test_a_kill_between_summary_and_state_leaves_a_running_trial(tmp_path: Path) -> None:
    """Its summary is written, its state is not: it runs on, and is shown so."""
    sweep = make_sweep(tmp_path)
    coordinator = open_coordinator(sweep)
    record = take(coordinator)
    run_to(coordinator, "a", 2)
    coordinator.ledger._set_attr(record, "summary", {"epochs": 2, "seconds": 1.0, "diverged": True, "error": TRACEBACK})
    for ledger in (Ledger(sweep), Ledger(sweep, read_only=True)):
        (row,) = rows(ledger, {})
        assert (row["state"], row["error"]) == ("running", None)
    coordinator = open_coordinator(sweep)
    take(coordinator)
    run_to(coordinator, "a", 4)
    coordinator.released("a")
    (row,) = rows(Ledger(sweep), {})
    assert (row["state"], row["error"]) == ("complete", None)


# -- budget -----------------------------------------------------------------------------------------------------------


def test_none_means_not_now_and_finished_that_the_budget_is_spent(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=3, scheduler="none")
    coordinator = open_coordinator(sweep, concurrent=2)
    take(coordinator, "a")
    take(coordinator, "b")
    assert coordinator.next("c") is None  # two at a time
    run_to(coordinator, "a", 4)
    assert coordinator.next("c") is None  # until the executor lets go of it
    coordinator.released("a")
    assert take(coordinator, "c").number == 2
    run_to(coordinator, "b", 4)
    coordinator.released("b")
    assert coordinator.next("d") is None  # the third may yet fail
    coordinator.result("c", [], failure=TRACEBACK, diverged=False)
    coordinator.released("c")
    assert take(coordinator, "d").number == 3, "a failed trial is made up for"
    run_to(coordinator, "d", 4)
    coordinator.released("d")
    assert coordinator.next("e") == FINISHED
    assert coordinator.ledger.num_counted() == 3
    assert [trial.state.name for trial in stored(sweep)] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_five_failures_in_a_row_stop_the_sweep_with_the_last_message(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=20, scheduler="none")
    coordinator = open_coordinator(sweep, concurrent=1)
    for number in range(2 * MAX_FAILURES - 1):
        take(coordinator)
        if number == MAX_FAILURES - 2:  # one that ends well starts the count anew
            run_to(coordinator, "a", 4)
        else:
            coordinator.result("a", [], failure=TRACEBACK.replace("paper", f"paper {number}"), diverged=False)
        coordinator.released("a")
        assert coordinator.halted.is_set() == (number == 2 * MAX_FAILURES - 2)
    assert coordinator.problem == "5 trials in a row failed; the last one: RuntimeError: out of paper 8"
    assert coordinator.next("a") == FINISHED
    assert take(open_coordinator(sweep)).number == 9, "a resume tries again"


def test_a_full_disk_halts_and_a_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every single write: the sweep halts with that reason, and nothing is lost or doubled after a resume."""

    class Full:
        left = 0

        def __call__(self, file: LineFile, descriptor: int, data: bytes) -> None:
            if not self.left:
                raise OSError(28, "No space left on device")
            self.left -= 1
            real(file, descriptor, data)

    real, full = LineFile._write, Full()
    halts = 0
    for writes in range(60):
        sweep = make_sweep(tmp_path, f"full-{writes}", trials=2, epochs=3, sampler="random")
        coordinator = open_coordinator(sweep, concurrent=1)
        with monkeypatch.context() as patch:
            full.left = writes
            patch.setattr(LineFile, "_write", lambda file, descriptor, data: full(file, descriptor, data))
            play(coordinator)
        if not coordinator.halted.is_set():
            break
        halts += 1
        assert coordinator.problem == "the ledger cannot be written: [Errno 28] No space left on device"
        coordinator = open_coordinator(sweep, concurrent=1)
        play(coordinator)
        assert [trial.state.name for trial in stored(sweep)] == ["COMPLETE"] * 2
        assert [(line["trial"], line["epoch"]) for line in metric_lines(sweep)] == [(t, e) for t in (0, 1) for e in (1, 2, 3)]
    assert halts > 20
    assert writes == halts


# -- kills: what the next driver finds --------------------------------------------------------------------------------


def test_a_running_trial_is_adopted_under_its_number(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=3)
    coordinator = open_coordinator(sweep)
    first, second = take(coordinator, "a"), take(coordinator, "b")
    run_to(coordinator, "b", 2, 0.25)
    coordinator = open_coordinator(sweep)
    again = [take(coordinator, key) for key in "cd"]
    assert [record.number for record in again] == [0, 1]
    for record, before in zip(again, (first, second), strict=True):
        assert (record.params, record.values, record.method) == (before.params, before.values, before.method)
        assert coordinator.ledger.seed(record) == coordinator.ledger.seed(before)
        assert of_trial(coordinator.ledger, record) == of_trial(coordinator.ledger, before)
    assert (again[1].epochs, again[1].objectives, again[1].seconds) == (2, {1: 0.25, 2: 0.25}, 1.0)
    assert coordinator.config(again[1])["reported"] == 2


def test_a_proposal_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    """A kill after each single write of it: the same number, and the parameters that were there stay."""
    fields: dict[str, Any] = {"method": ("alr", "elr"), "trials": 3, "range": {"batch_size": "16:64"}}
    sweep = make_sweep(tmp_path, "whole", **fields)
    head = (sweep.folder / "journal.log").read_bytes()
    whole = Ledger(sweep).ask()
    written = (sweep.folder / "journal.log").read_bytes()[len(head) :].splitlines(keepends=True)
    assert len(written) > 6
    for number in range(1, len(written) + 1):
        cut = make_sweep(tmp_path, f"cut-{number}", **fields)
        (cut.folder / "journal.log").write_bytes(head + b"".join(written[:number]))
        shown = Ledger(cut, read_only=True).records[0]  # a reader completes nothing
        there = stored(cut)[0].params
        assert (shown.status, shown.params) == ("running", there)
        record = take(open_coordinator(cut))
        assert record.number == 0
        assert there.items() <= record.params.items()
        assert record.params == stored(cut)[0].params
        if number in (1, len(written)):  # nothing of it was there, or all
            assert record.params == whole.params
        assert record.values == Space(cut.spec).read(record.params)[1]
        assert set(record.values) == set(declared(find_method(record.method).Config))


@pytest.mark.parametrize(("methods", "sampler"), [("alr", "random"), ("alr", "tpe"), ("ce,alr,elr", "tpe")])
def test_a_search_that_is_resumed_goes_on_where_it_was(tmp_path: Path, methods: str, sampler: str) -> None:
    """One trial at a time, a new driver for each, one of them killed before a first parameter: the very same search."""
    fields: dict[str, Any] = {"method": tuple(methods.split(",")), "trials": 14, "epochs": 1, "sampler": sampler}
    undisturbed = make_sweep(tmp_path, "undisturbed", **fields)
    play(open_coordinator(undisturbed, concurrent=1))
    resumed = make_sweep(tmp_path, "resumed", **fields)
    for total in range(1, 15):
        if total == 12:
            journal = resumed.folder / "journal.log"
            before = journal.read_bytes()
            Ledger(resumed).ask()
            created = journal.read_bytes()[len(before) :].splitlines(keepends=True)[0]
            journal.write_bytes(before + created)
        play(open_coordinator(resumed, concurrent=1, total=total))
    params = [trial.params for trial in stored(resumed)]
    assert params == [trial.params for trial in stored(undisturbed)]
    assert len({json.dumps(one) for one in params}) == 14


def test_no_configuration_comes_twice_however_often_a_proposal_is_cut_off(tmp_path: Path) -> None:
    """Two kills: one in the middle of a proposal, one after the next driver completed it."""
    sweep = make_sweep(tmp_path, method=("alr",), trials=20)
    journal = sweep.folder / "journal.log"
    for trial in range(8):
        before = journal.read_bytes()
        Ledger(sweep).ask()
        written = journal.read_bytes()[len(before) :].splitlines(keepends=True)
        journal.write_bytes(before + b"".join(written[: 1 + trial % len(written)]))
        Ledger(sweep)
    drawn = []
    for trial in stored(sweep):
        for name, value in trial.params.items():
            drawn_from: Any = trial.distributions[name]
            scale = math.log if drawn_from.log else float
            low, high = scale(drawn_from.low), scale(drawn_from.high)
            drawn.append(round((scale(value) - low) / (high - low), 9))  # the random number behind it
    assert len(drawn) == len(set(drawn)) == 8 * 5


def test_another_seed_is_another_search(tmp_path: Path) -> None:
    one, other = (make_sweep(tmp_path, f"seed-{seed}", seed=seed) for seed in (0, 1))
    first, second = Ledger(one), Ledger(other)
    assert first.ask().params != second.ask().params
    assert first.seed(first.records[0]) != second.seed(second.records[0])


def test_an_epoch_that_stands_in_the_metrics_alone_is_put_into_the_study(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    ledger = Ledger(sweep)
    record = ledger.ask()
    ledger.report(record, [epoch_record(1, 0.25)])
    journal = (sweep.folder / "journal.log").read_bytes()
    ledger.report(record, [epoch_record(2, 0.375, **{"test/accuracy": 0.5})])
    (sweep.folder / "journal.log").write_bytes(journal)
    before = bytes_below(sweep.folder)
    shown = Ledger(sweep, read_only=True).records[0]
    assert (shown.epochs, bytes_below(sweep.folder)) == (1, before)
    again = Ledger(sweep)
    healed = again.records[0]
    assert (healed.epochs, healed.value, healed.seconds, healed.metrics["test/accuracy"]) == (2, 0.375, 1.0, 0.5)
    assert stored(sweep)[0].intermediate_values == {1: 0.25, 2: 0.375}
    assert again.report(healed, [epoch_record(epoch, 0.5) for epoch in (1, 2)]) == []
    assert len(metric_lines(sweep)) == 2


def test_a_trial_whose_last_epoch_decides_it_is_not_run_again(tmp_path: Path) -> None:
    """The driver was killed between an epoch's value and the end of its trial."""
    sweep = make_sweep(tmp_path, trials=5, epochs=9, reduction_factor=3)
    coordinator = open_coordinator(sweep, concurrent=5)
    for key in "abcde":
        take(coordinator, key)
    for key in "abc":
        run_to(coordinator, key, 3, 0.75)
    run_to(coordinator, "d", 9, 0.875)
    run_to(coordinator, "e", 3, 0.25)
    assert [trial.state.name for trial in stored(sweep)] == ["RUNNING"] * 5
    coordinator = open_coordinator(sweep, concurrent=5)
    assert [trial.state.name for trial in stored(sweep)] == ["RUNNING"] * 3 + ["COMPLETE", "PRUNED"]
    assert [take(coordinator, key).number for key in "abc"] == [0, 1, 2]
    assert coordinator.next("d") is None


def test_epochs_that_the_ledger_has_are_dropped(tmp_path: Path) -> None:
    """A worker that was restored from an older checkpoint says them again, with a time of its own."""
    sweep = make_sweep(tmp_path, scheduler="none")
    coordinator = open_coordinator(sweep)
    record = take(coordinator)
    coordinator.result("a", [epoch_record(epoch, 0.5) for epoch in (1, 2)], failure=None, diverged=False)
    said_again = [epoch_record(epoch, 0.75) for epoch in (1, 2, 3)]
    assert coordinator.result("a", said_again, failure=None, diverged=False)
    assert record.objectives == {1: 0.5, 2: 0.5, 3: 0.75} == stored(sweep)[0].intermediate_values
    assert [(line["epoch"], line["objective"]) for line in metric_lines(sweep)] == [(1, 0.5), (2, 0.5), (3, 0.75)]
    assert record.seconds == 1.5


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    """Whatever it finds: running trials, a torn line, an epoch that stands in the metrics alone."""
    sweep = make_sweep(tmp_path, trials=6, epochs=9, scheduler="none")
    play(open_coordinator(sweep), keep={3})
    with (sweep.folder / "journal.log").open("ab") as torn:
        torn.write(b'{"op_code":7,"trial')
    with (sweep.folder / "metrics.jsonl").open("ab") as torn:
        torn.write(json.dumps({"trial": 3, "epoch": 2, "time": 0.0, "objective": 0.5, "metrics": {"seconds": 1.0}}).encode())
        torn.write(b'\n{"trial"')
    before = bytes_below(sweep.folder)
    times = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*")}
    ledger = Ledger(sweep, read_only=True)
    board = rows(ledger, {})
    leaderboard_text(ledger, {}, 3)
    assert [row["state"] for row in board if row["trial"] == 3] == ["running"]
    assert len(board) == 6
    assert bytes_below(sweep.folder) == before
    assert {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*")} == times


def test_a_sweep_without_its_study_is_named(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    (sweep.folder / "journal.log").unlink()
    with pytest.raises(ValueError, match="sweep 'first' has no study named 'sweep'; its journal is incomplete"):
        Ledger(sweep, read_only=True)
    assert not (sweep.folder / "journal.log").exists()


def refusal(sweep: Sweep) -> str:
    """What a user is told who asks for the leaderboard; empty where it is shown."""
    try:
        rows(Ledger(sweep, read_only=True), {})
    except ValueError as error:
        return str(error)
    return ""


def test_any_damage_is_one_clear_line_and_the_file_is_left(tmp_path: Path) -> None:
    """Each line of the journal and of the metrics in turn: cut short, left out, given another key, another trial, nonsense."""
    sweep = make_sweep(tmp_path, trials=3, epochs=2)
    play(open_coordinator(sweep))
    num_refused = 0
    for name in ("journal.log", "metrics.jsonl"):
        path = sweep.folder / name
        whole = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(whole):
            damaged = [
                line[: len(line) // 2] + b"\n",
                b"",
                line.replace(b'"op_code"', b'"op_kode"').replace(b'"epoch"', b'"epok"'),
                line.replace(b'"trial_id":', b'"trial_id":9').replace(b'"objective":', b'"objective":"x","y":'),
                line.replace(b'"op_code":', b'"op_code":7'),
                line.replace(b'"state":', b'"state":9').replace(b'"metrics":{', b'"metrics":{},"n":{'),
                line.replace(b'"distribution":"', b'"distribution":"-').replace(b'"seconds"', b'"saconds"'),
                line.replace(b"T", b"?").replace(b'"trial":', b'"trial":"a","y":'),
            ]
            for bad in damaged:
                content = b"".join([*whole[:number], bad, *whole[number + 1 :]])
                path.write_bytes(content)
                message = refusal(sweep)
                if message:
                    num_refused += 1
                    assert "\n" not in message
                    assert str(path) in message or "journal is incomplete" in message, message
                assert path.read_bytes() == content
        path.write_bytes(b"".join(whole))
    assert num_refused > 100


def test_damage_names_the_line(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    play(open_coordinator(sweep))
    path = sweep.folder / "journal.log"
    path.write_bytes(path.read_bytes().replace(b'"op_code":8', b'"op_code":99', 1))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if '"op_code":99' in text)
    with pytest.raises(DamagedFile, match=f"journal.log: line {line} is damaged; the file was left as it is"):
        Ledger(sweep)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_the_leaderboard_is_complete_then_stopped_then_running_then_failed(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=20, epochs=4, scheduler="none")
    ledger = Ledger(sweep)
    plan = [
        ("complete", 4, 0.5),
        ("failed", 3, 0.99),
        ("stopped", 1, 0.95),
        ("complete", 4, 0.75),
        ("stopped", 3, 0.25),
        ("running", 2, 0.9),
        ("stopped", 3, 0.5),
        ("complete", 4, 0.5),
        ("running", 0, 0.0),
        ("diverged", 0, 0.0),
    ]
    for state, epochs, value in plan:
        record = ledger.ask()
        ledger.report(record, [epoch_record(epoch, value) for epoch in range(1, epochs + 1)])
        if state == "complete":
            ledger.complete(record)
        elif state in ("stopped", "diverged"):
            ledger.prune(record, diverged=state == "diverged")
        elif state == "failed":
            ledger.fail(record, TRACEBACK)
    expected = [3, 0, 7, 6, 4, 2, 9, 5, 8, 1]
    for reader in (ledger, Ledger(sweep), Ledger(sweep, read_only=True)):
        assert [record.number for record in reader.leaderboard()] == expected
        best = reader.best()
        assert best is not None
        assert best.number == 3
    board = rows(ledger, {3: "run-of-three"})
    assert [row["state"] for row in board] == [plan[number][0] for number in expected]
    assert board[0]["mlflow_run_id"] == "run-of-three"
    keys = "trial method state value epochs seconds params mlflow_run_id test_accuracy error"
    assert list(board[0]) == keys.split()


def test_the_leaderboard_that_grew_with_the_sweep_is_the_sorted_one(tmp_path: Path) -> None:
    """Kept in order as trials end, in whatever order that is: the same as in a ledger that is opened afterwards."""
    sweep = make_sweep(tmp_path, trials=40, epochs=9)
    coordinator = open_coordinator(sweep, concurrent=5)
    play(coordinator, keep={7, 21})
    board = coordinator.ledger.leaderboard()
    words = ["complete", "stopped", "running"]
    assert {record.status for record in board} == set(words)

    def key(record: Record) -> tuple[int, int, float, int]:
        epochs = record.epochs if record.status == "stopped" else 0
        value = record.objectives[record.epochs] if record.status != "running" else 0.0
        return words.index(record.status), -epochs, -value, record.number

    assert [record.number for record in board if record.status != "running"] == [
        record.number for record in sorted(board, key=key) if record.status != "running"
    ]
    assert [record.number for record in board] == [record.number for record in Ledger(sweep, read_only=True).leaderboard()]
    assert coordinator.ledger.best() is board[0]


def test_only_a_complete_trial_is_best(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    ledger = Ledger(sweep)
    assert ledger.best() is None
    record = ledger.ask()
    ledger.report(record, [epoch_record(1, 0.9)])
    ledger.prune(record)
    assert ledger.best() is None


def test_checkpoints_are_kept_for_running_trials_and_the_best_few(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=12, epochs=3, scheduler="none")
    order = [0.1, 0.9, 0.2, 0.8, 0.85, 0.3, 0.7, 0.75, 0.4, 0.5, 0.95, 0.6]
    coordinator = open_coordinator(sweep)
    play(coordinator, lambda record, epoch: order[record.number], keep={9})
    best = sorted(set(range(12)) - {9}, key=lambda number: -order[number])[:KEPT_CHECKPOINTS]
    held = {int(folder.name) for folder in (sweep.folder / "checkpoints").iterdir()}
    assert held == {*best, 9}
    for stray in ("0", "2", "77"):  # as if a kill had come before they were removed
        (sweep.folder / "checkpoints" / stray).mkdir()
    open_coordinator(sweep)
    assert {int(folder.name) for folder in (sweep.folder / "checkpoints").iterdir()} == {*best, 9}


def test_failed_and_stopped_trials_leave_no_checkpoint(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=30, epochs=9)
    coordinator = open_coordinator(sweep, concurrent=3)
    play(coordinator)
    states = {record.number: record.status for record in coordinator.ledger.records.values()}
    held = {int(folder.name) for folder in (sweep.folder / "checkpoints").iterdir()}
    assert "stopped" in states.values()
    assert len(held) == KEPT_CHECKPOINTS
    assert {states[number] for number in held} == {"complete"}


# -- what is proposed -------------------------------------------------------------------------------------------------


def test_the_published_defaults_run_first(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, method=("alr", "ce"), trials=3, defaults_first=True)
    ledger = Ledger(sweep)
    first, second, third = (ledger.ask() for _ in range(3))
    for record, method in ((first, "alr"), (second, "ce")):
        assert record.method == method
        source = sweep.spec.source_defaults()
        config = declared(find_method(method).Config)
        assert record.values == {name: source.get(name, declared_.default) for name, declared_ in config.items()}
    assert third.values not in (first.values, second.values)
    assert third.params["lr"] != first.params["lr"]


def test_a_default_that_the_range_excludes_is_moved_to_the_nearest_bound(tmp_path: Path) -> None:
    spec = make_spec({"method": ("alr",), "range": {"lr": "0.1:0.2:log", "memory": "0.01:0.02", "augmentation": "none,strong"}})
    params, moved = Space(spec).defaults("alr", spec)
    assert params == {
        "lr": 0.1,
        "weight_decay": 0.001,
        "augmentation": "none",
        "alr.warmup": 0.15,
        "alr.memory": 0.02,
        "alr.entropy_weight": 0.2,
    }
    assert moved == [
        "alr: the default lr 0.05 is outside 0.1:0.2:log; the first trial takes 0.1",
        "alr: the default augmentation weak is outside none,strong; the first trial takes none",
        "alr: the default memory 0.047 is outside 0.01:0.02; the first trial takes 0.02",
    ]
    sweep = make_sweep(tmp_path, defaults_first=True, method=spec.method, range=spec.range)
    record = Ledger(sweep).ask()
    assert record.params == params
    assert (record.values["lr"], record.values["memory"], record.values["batch_size"]) == (0.1, 0.02, 64)


def test_a_parameter_that_methods_share_has_the_plain_name() -> None:
    space = Space(make_spec({"method": ("alr", "elr"), "trials": 1}))
    names = {method: {p.field: p.name for p in space.parameters[method] if p.range} for method in ("alr", "elr")}
    assert names == {
        "alr": {
            "lr": "lr",
            "weight_decay": "weight_decay",
            "warmup": "alr.warmup",
            "memory": "alr.memory",
            "entropy_weight": "alr.entropy_weight",
        },
        "elr": {"lr": "lr", "weight_decay": "weight_decay", "memory": "elr.memory", "strength": "elr.strength"},
    }


def test_what_names_the_method_wins_over_what_does_not(tmp_path: Path) -> None:
    """``--set lr`` for both, ``--range alr.lr`` for one; ``--range memory`` for both, ``--set elr.memory`` for one."""
    fields: dict[str, Any] = {
        "method": ("alr", "elr"),
        "set": {"lr": "0.07", "elr.memory": "0.5", "batch_size": "32"},
        "range": {"alr.lr": "0.2:0.3", "memory": "0.03:0.04", "alr.batch_size": "8:9"},
        "trials": 30,
    }
    ledger = Ledger(make_sweep(tmp_path, **fields))
    records = [ledger.ask() for _ in range(30)]
    assert {record.method for record in records} == {"alr", "elr"}
    for record in records:
        if record.method == "alr":
            assert 0.2 <= float(record.values["lr"]) <= 0.3
            assert record.params["alr.lr"] == record.values["lr"]
            assert 0.03 <= float(record.values["memory"]) <= 0.04
            assert record.values["batch_size"] in (8, 9)
        else:
            assert (record.values["lr"], record.values["memory"], record.values["batch_size"]) == (0.07, 0.5, 32)
            assert not {"lr", "elr.lr", "elr.memory"} & set(record.params)
        assert Space(ledger.sweep.spec).read(record.params) == (record.method, record.values)


def test_a_single_method_may_be_named_or_not() -> None:
    plain, named = (Space(make_spec({"method": ("alr",), "range": {name: "0.2:0.3"}})) for name in ("lr", "alr.lr"))
    assert plain.parameters == named.parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set": {"learning_rate": "1"}}, "--set: unknown hyperparameter 'learning_rate'; known are .*alr.memory"),
        ({"range": {"elr.lr": "0.1:0.2"}}, "--range: unknown hyperparameter 'elr.lr'"),
        ({"set": {"lr": "-1"}}, r"lr: -1.0 is not allowed; it must be a number in \(0, inf\)"),
        ({"set": {"lr": "fast"}}, "lr: 'fast' is not allowed"),
        ({"set": {"batch_size": "2.5"}}, "batch_size: '2.5' is not allowed; it must be an integer"),
        ({"range": {"lr": "0.2:0.1"}}, "range '0.2:0.1' is empty"),
        ({"range": {"lr": "0.2"}}, "range '0.2' is not readable"),
        ({"range": {"weight_decay": "0:0.1:log"}}, "cannot be logarithmic"),
        ({"range": {"augmentation": "weak,wild"}}, "augmentation: 'wild' is not allowed"),
        ({"set": {"lr": "0.1"}, "range": {"lr": "0.1:0.2"}}, "lr has both a value and a range"),
    ],
)
def test_a_value_or_range_that_means_nothing_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(make_spec({"method": ("alr",), **fields}))


@pytest.mark.parametrize("method", METHODS)
def test_every_proposal_is_a_legal_configuration(tmp_path: Path, method: str) -> None:
    trusted = 50 if find_method(method).needs_trusted else 0
    ledger = Ledger(make_sweep(tmp_path, method=(method,), trials=5, trusted=trusted))
    for _ in range(5):
        record = ledger.ask()
        for name, hyperparameter in declared(find_method(method).Config).items():
            value: Value = record.values[name]
            hyperparameter.check(value)
            assert type(value) is hyperparameter.type
            drawn = hyperparameter.search
            if drawn and not drawn.choices:
                assert drawn.low <= float(value) <= drawn.high


def test_a_spec_comes_back_from_its_file(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path,
        method=("alr", "ce"),
        set={"lr": "0.1"},
        range={"alr.memory": "0.01:0.1:log"},
        checkpoint_seconds=0.0,
        noise="none",
    )
    assert Sweep.find(tmp_path, "first") == sweep
    assert Sweep.read(sweep.folder).spec.to_dict() == sweep.spec.to_dict()


# -- retraining -------------------------------------------------------------------------------------------------------


def test_a_retraining_is_a_study_of_its_own_in_the_same_journal(tmp_path: Path) -> None:
    """Each pair once, a failed one not made up for, no rungs, seeds and noise of its own."""
    sweep = make_sweep(tmp_path, trials=4, epochs=9)
    play(open_coordinator(sweep))
    best = Ledger(sweep).best()
    assert best is not None
    (sweep.folder / RETRAIN).mkdir()
    ledger = Ledger(sweep, RETRAIN, create=True)
    for seed in range(3):
        ledger.enqueue(best.params, {"source": best.number, "seed": seed, "noise_draw": seed + 1})
    ledger = Ledger(sweep, RETRAIN)
    coordinator = Coordinator(ledger, total=3, concurrent=1)
    recipes = []
    for number in range(3):
        record = take(coordinator)
        assert record.params == best.params
        recipes.append(of_trial(ledger, record))
        if number == 1:
            coordinator.result("a", [], failure=TRACEBACK, diverged=False)
        else:
            run_to(coordinator, "a", 9, 0.01)
        coordinator.released("a")
    assert coordinator.next("a") == FINISHED
    assert [trial.state.name for trial in stored(sweep, RETRAIN)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert len({recipe.seed for recipe in recipes}) == 3
    assert [recipe.noise_seed for recipe in recipes] == [1, 2, 3]
    assert of_trial(Ledger(sweep), best).noise_seed == 0
    assert len(stored(sweep)) == 4
    first = Ledger(sweep)
    assert {recipe.seed for recipe in recipes}.isdisjoint({first.seed(record) for record in first.records.values()})


def test_retrained_configurations_by_hand(tmp_path: Path) -> None:
    """Three seeds at 0.5, 0.7 and 0.9: mean 0.7, deviation 0.2, standard error 0.2 / sqrt(3). In the order of the sweep."""
    sweep = make_sweep(tmp_path, epochs=2)
    source = Ledger(sweep)
    params = []
    for value in (0.3, 0.6):  # the second trial is the better one
        record = source.ask()
        params.append(record.params)
        source.report(record, [epoch_record(1, value), epoch_record(2, value)])
        source.complete(record)
    (sweep.folder / RETRAIN).mkdir()
    ledger = Ledger(sweep, RETRAIN, create=True)
    tests = {(1, 0): 0.25, (0, 0): 0.5, (0, 1): 0.7, (0, 2): 0.9}
    for trial, seed in tests:
        ledger.enqueue(params[trial], {"source": trial, "seed": seed, "noise_draw": seed + 1})
    for (_, seed), value in tests.items():
        record = ledger.ask()
        assert record.attrs["seed"] == seed
        ledger.report(record, [epoch_record(1, 0.1), epoch_record(2, 0.1, **{"test/accuracy": value})])
        ledger.complete(record)
    best, second = retrain_rows(Ledger(sweep, RETRAIN, read_only=True))
    assert (best["rank"], best["source"], best["seeds"], best["test_accuracy"]) == (1, 1, 1, 0.25)
    assert best["standard_error"] is None
    assert (second["rank"], second["source"], second["seeds"]) == (2, 0, 3)
    assert second["test_accuracy"] == pytest.approx(0.7)
    assert second["standard_error"] == pytest.approx(0.2 / math.sqrt(3))
    assert second["by_seed"] == {"0": 0.5, "1": 0.7, "2": 0.9}
    assert second["params"] == params[0]


# -- sweeps of an earlier version -------------------------------------------------------------------------------------


def without_lines(path: Path, *words: str) -> None:
    """Drops the lines that hold all of the words."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not all(word in line for word in words)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_hyperparameter_that_is_newer_than_the_sweep(tmp_path: Path, sampler: str) -> None:
    """Finished trials have its default; one in progress gets a value, as new ones do; and nothing is called damaged."""
    sweep = make_sweep(tmp_path, method=("cdr", "ce"), trials=6, epochs=2, sampler=sampler, scheduler="none")
    play(open_coordinator(sweep, total=6), keep=[5])
    journal = sweep.folder / "journal.log"
    before = Ledger(sweep, read_only=True)
    finished = [record.number for record in before.records.values() if record.finished and record.method == "cdr"]
    assert finished
    without_lines(journal, '"param_name":"cdr.sparsity"')
    for ledger in (Ledger(sweep, read_only=True), Ledger(sweep)):
        for number in finished:
            expected = {**before.records[number].values, "sparsity": declared(find_method("cdr").Config)["sparsity"].default}
            assert ledger.records[number].values == expected
        assert [record.number for record in ledger.leaderboard()] == [record.number for record in before.leaderboard()]
    coordinator = open_coordinator(sweep, total=12)
    play(coordinator)
    later = [r for r in coordinator.ledger.records.values() if r.method == "cdr" and r.number not in finished]
    assert later
    assert all(record.values["sparsity"] == record.params["cdr.sparsity"] for record in later)
    again = Ledger(sweep, read_only=True)  # now that later trials have it
    assert {number: again.records[number].values for number in finished} == {
        number: ledger.records[number].values for number in finished
    }


def test_a_parameter_that_only_one_trial_lacks_is_damage(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, method=("cdr",), trials=3, epochs=2)
    play(open_coordinator(sweep))
    without_lines(sweep.folder / "journal.log", '"param_name":"cdr.sparsity"', '"trial_id":1,')
    with pytest.raises(DamagedFile, match="what it says of trial 1 is damaged"):
        Ledger(sweep, read_only=True)


@pytest.mark.filterwarnings("error")
def test_values_outside_of_todays_range_stay(tmp_path: Path) -> None:
    """A range that was changed in between, in either direction: finished trials and those in progress keep what they have."""
    sweep = make_sweep(tmp_path, trials=4, epochs=2, range={"lr": "0.5:0.9:log"}, scheduler="none")
    play(open_coordinator(sweep, total=4), keep=[3])
    before = {number: record.values for number, record in Ledger(sweep, read_only=True).records.items()}
    assert min(float(values["lr"]) for values in before.values()) >= 0.5
    record = sweep.folder / "sweep.yaml"
    record.write_text(record.read_text().replace("  range:\n    lr: 0.5:0.9:log\n", "  range: {}\n"))
    changed = Sweep.read(sweep.folder)
    assert changed.spec.range == {}
    coordinator = open_coordinator(changed, total=6)
    assert {number: record.values for number, record in coordinator.ledger.records.items()} == before
    play(coordinator)
    new = [record.values["lr"] for number, record in coordinator.ledger.records.items() if number not in before]
    assert len(new) == 2
    assert max(map(float, new)) <= 0.1


@pytest.mark.filterwarnings("error")
def test_a_sweep_of_symmetric_cross_entropy_from_before_beta_was_searched(tmp_path: Path) -> None:
    """Its trials have beta 1, the new ones too, and an alpha that is out of today's range stays; it opens again afterwards."""
    old_spec = {"set": {"sce.beta": "1.0"}, "range": {"sce.alpha": "20:90:log"}}
    sweep = make_sweep(tmp_path, method=("sce",), trials=6, epochs=2, scheduler="none", **old_spec)
    play(open_coordinator(sweep, total=6))
    record = sweep.folder / "sweep.yaml"
    record.write_text(record.read_text().replace("  range:\n    sce.alpha: 20:90:log\n", "  range: {}\n"))
    record.write_text(record.read_text().replace("  set:\n    sce.beta: '1.0'\n", "  set: {}\n"))
    without_lines(record, "  split: stratified")
    coordinator = open_coordinator(Sweep.read(sweep.folder), total=9)
    old = {number: r.values for number, r in coordinator.ledger.records.items()}
    assert len(old) == 6
    assert all(values["beta"] == 1.0 and float(values["alpha"]) >= 20 for values in old.values())
    play(coordinator)
    again = {number: r.values for number, r in Ledger(Sweep.read(sweep.folder), read_only=True).records.items()}
    assert {number: again[number] for number in old} == old
    new = [values for number, values in again.items() if number not in old]
    assert len(new) == 3
    assert all(0.01 <= float(values["alpha"]) <= 10 and values["beta"] == 1.0 for values in new)
    assert {values["log_zero"] for values in again.values()} == {-4.0}


@pytest.mark.parametrize("given", [{}, {"sce.log_zero": "-5.0"}])
def test_a_sweep_of_symmetric_cross_entropy_from_before_keeps_its_log_zero(given: dict[str, str], tmp_path: Path) -> None:
    """It was -4 in version f27d56c, was not searched, and so stands in no trial."""
    sweep = make_sweep(tmp_path, method=("sce", "nce-rce", "ce"), set=given)
    fixed = {p.name: p.fixed for ps in Ledger(sweep, create=True).space.parameters.values() for p in ps}
    assert fixed["nce-rce.log_zero"] == pytest.approx(-9.21034, abs=1e-5)
    without_lines(sweep.folder / "sweep.yaml", "  split: stratified")
    before = Sweep.read(sweep.folder)
    fixed = {p.name: p.fixed for ps in Ledger(before, read_only=True).space.parameters.values() for p in ps}
    assert (fixed["sce.log_zero"], fixed["nce-rce.log_zero"]) == (float(given.get("sce.log_zero", -4)), -4.0)
    assert (fixed["sce.beta"], fixed["nce-rce.beta"]) == (1.0, 1.0)
    before.write()
    assert Sweep.read(sweep.folder).spec == before.spec, "what is written again says the same"


def test_a_sweep_with_one_clean_sample_from_before_it_was_refused(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, method=("mw-net",), trials=2, epochs=2, trusted=1)
    play(open_coordinator(Sweep.read(sweep.folder)))
    assert len(Ledger(Sweep.read(sweep.folder), read_only=True).leaderboard()) == 2


def test_a_record_is_not_held_to_todays_limits(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, report_seconds=60.0, gpus_per_trial=2.0, epochs=2_000_000)
    assert Sweep.read(sweep.folder).spec == sweep.spec


def test_a_sweep_from_before_stratified_splits_keeps_its_split(tmp_path: Path) -> None:
    """The number was printed by version f27d56c, whose records do not say how a set is split."""
    sweep = make_sweep(tmp_path)
    record = sweep.folder / "sweep.yaml"
    assert "  split: stratified\n" in record.read_text()
    assert Sweep.read(sweep.folder).spec.split == "stratified"
    without_lines(record, "  split: stratified")
    without_lines(record, "  labels_are_clean: false")
    before = Sweep.read(sweep.folder)
    assert (before.spec.split, before.spec.labels_are_clean) == ("", False)
    assert dataset(before.spec).fingerprint == "3cad930aec9d1ace29271e434e293b73b31af29ccca589206540004695d59f2a"
    assert dataset(sweep.spec).fingerprint != dataset(before.spec).fingerprint
    before.write()
    assert Sweep.read(sweep.folder).spec == before.spec, "what is written again says the same"


def test_every_trial_of_a_sweep_and_every_seed_of_a_retraining_has_one_split(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, noise="symmetric:0.2")
    play(open_coordinator(sweep))
    ledger = Ledger(sweep)
    recipe = of_trial(ledger, ledger.records[0])
    assert (recipe.split, recipe.labels_are_clean) == ("stratified", False)
    first, again = recipe.dataset(), dataclasses.replace(recipe, noise_seed=recipe.noise_seed + 1, seed=5).dataset()
    assert torch.equal(first.split.train, again.split.train)
    assert torch.equal(first.split.validation, again.split.validation)
    assert not torch.equal(first.train.labels, again.train.labels)
