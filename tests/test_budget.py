"""What ends a sweep, what was spent and what was saved: worked by hand, whatever was killed in between."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.free_experiment import FreeExperiment
from tests.sweeps import CREATED, make_sweep, metric_lines
from training.trial_run import EpochRecord
from tune.report.closing import closing_words
from tune.report.leaderboard import cost_metrics, cost_text
from tune.search.budget import HOUR, Budget, Covered, Usage, short_number
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import RETRAIN, Ledger, Record
from tune.store.stored_sweep import Sweep
from tune.sweep import enqueue_retraining

SECONDS = 360.0  # of an epoch, a tenth of an hour


def open_coordinator(sweep: Sweep, concurrent: int = 1) -> Coordinator:
    """What a driver has after its start."""
    return Coordinator(Ledger(sweep), total=sweep.spec.trials, concurrent=concurrent)


def changed(sweep: Sweep, **fields: Any) -> Sweep:
    """The sweep as ``resume`` with these flags leaves it."""
    sweep = dataclasses.replace(sweep, spec=dataclasses.replace(sweep.spec, **fields))
    sweep.write()
    return sweep


def take(coordinator: Coordinator, key: str = "a") -> Record:
    record = coordinator.next(key)
    assert isinstance(record, Record)
    return record


def epoch_until(number: int, end: float, seconds: float, *, gpus: float = 0.0, value: float = 0.5) -> EpochRecord:
    """An epoch that ended ``end`` seconds into the sweep."""
    more = {"gpu_seconds": gpus * seconds} if gpus else {}
    return EpochRecord(number, CREATED + end, value, {"val/accuracy": value, "seconds": seconds, **more})


def run_one_after_the_other(coordinator: Coordinator, gpus: float = 0.5) -> None:
    """Trials until the budget is spent, each epoch right after the one before."""
    while coordinator.next("a") != FINISHED:
        record = coordinator.live["a"]
        going = True
        while going:
            num_before = coordinator.ledger.account.usage.epochs
            epoch = epoch_until(record.epochs + 1, (num_before + 1) * SECONDS, SECONDS, gpus=gpus)
            going = coordinator.result("a", [epoch], failure=None, diverged=False)
        coordinator.released("a")


# -- the union of intervals -------------------------------------------------------------------------------------------


def test_the_union_of_five_intervals_by_hand() -> None:
    """10 to 14 and 13 to 15 overlap, 15 to 16 touches them, 11 to 12 lies inside, 20 to 21 apart: 6 + 1, in any order."""
    for order in itertools.permutations([(10.0, 14.0), (13.0, 15.0), (15.0, 16.0), (11.0, 12.0), (20.0, 21.0)]):
        covered = Covered()
        for interval in order:
            covered.add(*interval)
        assert covered.length == 7.0


@pytest.mark.parametrize("seed", range(20))
def test_the_union_of_any_intervals_is_the_seconds_that_one_of_them_holds(seed: int) -> None:
    stream = random.Random(seed)
    covered, held = Covered(), set[int]()
    for _ in range(200):
        start = stream.randrange(3000)
        end = start + stream.randrange(30)
        covered.add(float(start), float(end))
        held |= set(range(start, end))
        assert covered.length == len(held)


# -- what was spent ---------------------------------------------------------------------------------------------------


def test_spent_by_hand(tmp_path: Path) -> None:
    """Two trials side by side, a pause, one alone, an hour per unit: 0 to 2 and 1 to 3, then 5 to 6."""
    sweep = make_sweep(tmp_path, gpus_per_trial=0.25, scheduler="none")
    coordinator = open_coordinator(sweep, concurrent=2)
    first, second = take(coordinator, "a"), take(coordinator, "b")
    coordinator.result("a", [epoch_until(1, 2 * HOUR, 2 * HOUR, gpus=0.25)], failure=None, diverged=False)
    assert first.usage == Usage(1, 2 * HOUR, 2 * HOUR, 0.5 * HOUR)
    coordinator.result("b", [epoch_until(1, 3 * HOUR, 2 * HOUR, gpus=0.25)], failure=None, diverged=False)
    coordinator.result("a", [epoch_until(2, 6 * HOUR, 1 * HOUR, gpus=0.25)], failure=None, diverged=False)
    assert coordinator.ledger.account.usage == Usage(3, 4 * HOUR, 5 * HOUR, 1.25 * HOUR)
    assert (first.usage, second.usage.epochs) == (coordinator.ledger.account.usage, 2)
    assert [str(budget) for budget in coordinator.ledger.budgets()] == ["0 of 4 trials", "4.00 hours", "1.25 GPU-hours"]
    assert cost_text(coordinator.ledger) == "spent: 0 of 4 trials, 4.00 hours, 1.25 GPU-hours, 3 epochs, 5.00 trial-hours"


def brute_force(lines: list[dict[str, Any]]) -> tuple[int, float, float]:
    """Epochs, covered seconds and trials' seconds of recorded lines, by walking along the clock."""
    intervals = sorted((line["time"] - line["metrics"]["seconds"], line["time"]) for line in lines)
    covered, reached = 0.0, 0.0
    for start, end in intervals:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return len(lines), covered, sum(line["metrics"]["seconds"] for line in lines)


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_in_between_changes_nothing_of_what_was_spent(tmp_path: Path, seed: int) -> None:
    """The same epochs twice, in any order, once with a new driver after every one of them or before its value was written."""
    stream = random.Random(seed)
    plan = [(stream.randrange(3), stream.uniform(0, 500), stream.uniform(1, 80)) for _ in range(60)]

    def played(name: str, killed: bool) -> tuple[Sweep, Ledger]:
        sweep = make_sweep(tmp_path, name, epochs=100, scheduler="none", gpus_per_trial=0.5)
        ledger = Ledger(sweep)
        for _ in range(3):
            ledger.ask()
        for number, end, seconds in plan:
            if killed:
                ledger = Ledger(sweep)
            record = ledger.records[number]
            epoch = epoch_until(record.epochs + 1, end, seconds, gpus=0.5)
            if killed and stream.random() < 0.5:
                ledger.metrics.append([{"trial": number, **dataclasses.asdict(epoch)}])
            else:
                ledger.report(record, [epoch])
        return sweep, Ledger(sweep, read_only=True) if killed else ledger

    (sweep, whole), (again, resumed) = played("whole", killed=False), played("killed", killed=True)
    assert metric_lines(again) == metric_lines(sweep)
    assert resumed.account.usage == whole.account.usage
    epochs, covered, seconds = brute_force(metric_lines(sweep))
    expected = Usage(epochs, pytest.approx(covered), pytest.approx(seconds), pytest.approx(0.5 * seconds))  # type: ignore[arg-type]
    assert whole.account.usage == expected
    assert [record.usage for record in Ledger(sweep).records.values()] == [record.usage for record in whole.records.values()]


def test_gpu_hours_across_a_resume_with_another_share_of_a_gpu(tmp_path: Path) -> None:
    """Four epochs of a quarter second. The first three at half a GPU, the third of them known to the checkpoint alone when the
    driver is killed; the fourth at two GPUs: 3 x 0.25 x 0.5 + 0.25 x 2 GPU-seconds."""
    from tune.cluster.trial import TrialActor

    class FreeActor(TrialActor):
        def __init__(self, config: dict[str, Any]) -> None:  # without Tune's own, which wants a cluster
            self.setup({"trial": json.dumps(config)})

        def _build(self) -> Any:
            return FreeExperiment(self.trial)

    def step(coordinator: Coordinator, actor: FreeActor, *, told: bool = True) -> bool:
        result = actor.step()
        epochs = [EpochRecord(**epoch) for epoch in result["epochs"]]
        return not told or coordinator.result("a", epochs, failure=result["failure"], diverged=result["diverged"])

    sweep = make_sweep(
        tmp_path, gpus_per_trial=0.5, gpu_hours=1.0, scheduler="none", checkpoint_seconds=0.0, report_seconds=0.0
    )
    coordinator = open_coordinator(sweep)
    actor = FreeActor(coordinator.config(take(coordinator)))
    assert step(coordinator, actor)
    assert step(coordinator, actor)
    before = coordinator.ledger.account.usage
    assert before.gpu_seconds == 2 * 0.25 * 0.5
    step(coordinator, actor, told=False)
    sweep = changed(sweep, gpus_per_trial=2.0)
    coordinator = open_coordinator(sweep)
    assert coordinator.ledger.account.usage == before
    actor = FreeActor(coordinator.config(take(coordinator)))
    while step(coordinator, actor):
        pass
    coordinator.released("a")
    record = coordinator.ledger.records[0]
    assert record.state is TrialState.COMPLETE
    assert [line["metrics"]["gpu_seconds"] for line in metric_lines(sweep)] == [0.125, 0.125, 0.125, 0.5]
    assert record.gpu_seconds == Ledger(sweep).account.usage.gpu_seconds == 0.875


# -- what ends a sweep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", list(itertools.permutations([2, 3, 4])))
def test_whichever_ends_first(tmp_path: Path, after: tuple[int, int, int]) -> None:
    """A trial of two epochs takes 0.2 hours and 0.1 GPU-hours; the budgets end after 2, 3 and 4 of them. The one that ended it
    is raised, and the next ends it."""
    trials, in_hours, in_gpu_hours = after
    limits: dict[str, Any] = {"trials": trials, "hours": 0.2 * in_hours - 0.1, "gpu_hours": 0.1 * in_gpu_hours - 0.05}
    sweep = make_sweep(tmp_path, epochs=2, gpus_per_trial=0.5, scheduler="none", **limits)
    names = sorted(limits, key=lambda name: dict(zip(limits, after, strict=True))[name])
    for number, name in enumerate(names, 2):
        coordinator = open_coordinator(sweep)
        run_one_after_the_other(coordinator)
        assert len(coordinator.ledger.records) == number
        assert [budget.name for budget in coordinator.ledger.budgets() if budget.over] == [name]
        assert Ledger(sweep).is_finished
        assert open_coordinator(sweep).next("a") == FINISHED
        sweep = changed(sweep, **{name: 100})
    assert not Ledger(sweep).is_finished


@pytest.mark.parametrize("limits", [{"hours": 0.35}, {"gpu_hours": 0.35}])
def test_trials_that_have_begun_are_finished_and_no_new_one_begins(tmp_path: Path, limits: dict[str, float]) -> None:
    """Three at a time when the budget ends, one of them left unfinished by a kill."""
    sweep = make_sweep(tmp_path, trials=9, gpus_per_trial=1.0, scheduler="none", **limits)
    coordinator = open_coordinator(sweep, concurrent=3)
    for key in "abc":
        take(coordinator, key)
        end = 0.5 * SECONDS * (1 + "abc".index(key))
        coordinator.result(key, [epoch_until(1, end, SECONDS, gpus=1.0)], failure=None, diverged=False)
    assert not any(budget.over for budget in coordinator.ledger.budgets())
    coordinator.result(
        "a", [epoch_until(epoch, epoch * SECONDS, SECONDS, gpus=1.0) for epoch in (2, 3, 4)], failure=None, diverged=False
    )
    coordinator.released("a")
    assert any(budget.over for budget in coordinator.ledger.budgets())
    assert coordinator.next("d") is None
    coordinator.lost("b")  # its worker died
    assert take(coordinator, "e").number == 1
    assert not Ledger(sweep, read_only=True).is_finished
    coordinator = open_coordinator(sweep, concurrent=3)  # and now the driver
    assert [take(coordinator, key).number for key in "bc"] == [1, 2]
    for key in "bc":
        assert coordinator.next("d") is None
        coordinator.result(
            key, [epoch_until(epoch, epoch * SECONDS, SECONDS, gpus=1.0) for epoch in (2, 3, 4)], failure=None, diverged=False
        )
        coordinator.released(key)
    assert coordinator.next("d") == FINISHED
    assert Ledger(sweep).is_finished
    assert [record.status for record in Ledger(sweep).records.values()] == ["complete"] * 3


def play_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets a test say what the driver's clock shows."""
    now = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("tune.search.coordinator.time", now)
    return lambda seconds: setattr(now, "monotonic", lambda: seconds)


def test_the_clock_counts_where_epochs_are_not_recorded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an hour was spent by an earlier driver; this one's clock starts at 1000 with its first trial."""
    sweep = make_sweep(tmp_path, trials=9, hours=1.0, scheduler="none", epochs=1)
    coordinator = open_coordinator(sweep)
    take(coordinator)
    coordinator.result("a", [epoch_until(1, 1800, 1800)], failure=None, diverged=False)
    coordinator.released("a")
    set_clock = play_clock(monkeypatch)
    set_clock(500)
    coordinator = open_coordinator(sweep, concurrent=9)
    set_clock(1000)
    take(coordinator, "a")
    set_clock(1000 + 1799)
    take(coordinator, "b")
    set_clock(1000 + 1800)
    assert coordinator.next("c") is None
    coordinator.result("b", [epoch_until(1, 7200, 1750)], failure=None, diverged=False)
    coordinator.released("b")
    set_clock(1000 + 1850)
    assert coordinator.next("c") is None  # 3550 seconds are recorded, and a trial has been in progress for 50 since then
    coordinator.result("a", [epoch_until(1, 7200 - 1750, 50)], failure=None, diverged=False)
    coordinator.released("a")
    assert coordinator.next("c") == FINISHED
    assert Ledger(sweep).is_finished
    assert Ledger(sweep).account.usage.seconds == 3600


def test_when_nothing_runs_the_ledger_alone_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers took a while to start, or no node was there: what the clock says is not what was trained. A resume would go
    on, so this driver does, as many trials at a time as before, and what it leaves is what a resume finds."""
    sweep = make_sweep(tmp_path, trials=9, hours=1.0, scheduler="none", epochs=1)
    set_clock = play_clock(monkeypatch)
    set_clock(0)
    coordinator = open_coordinator(sweep, concurrent=9)
    take(coordinator)
    set_clock(3700)
    assert coordinator.next("b") is None
    coordinator.result("a", [epoch_until(1, 3700, 3500)], failure=None, diverged=False)
    coordinator.released("a")
    assert not Ledger(sweep).is_finished
    take(coordinator)
    take(coordinator, "b")
    set_clock(3800)
    assert coordinator.next("c") is None
    for key in "ab":
        coordinator.result(key, [epoch_until(1, 3900, 150)], failure=None, diverged=False)
        coordinator.released(key)
    assert coordinator.next("c") == FINISHED
    assert Ledger(sweep).is_finished


def test_a_failed_trial_spends_hours_too(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=9, hours=0.1, scheduler="none")
    coordinator = open_coordinator(sweep)
    take(coordinator)
    coordinator.result("a", [epoch_until(1, SECONDS, SECONDS)], failure="Traceback\nRuntimeError: out of paper", diverged=False)
    coordinator.released("a")
    assert coordinator.next("a") == FINISHED
    (words, more) = closing_words(coordinator.ledger, "resume first", idle=False)
    assert words == "no trial is complete: every one was stopped, diverged or failed"
    assert more == "the budget is spent: 0.1 of 0.1 hours; for more: resume first --hours N"


def test_what_is_said_at_the_end(tmp_path: Path) -> None:
    """A sweep that has run all its trials ends without a word; a resume names all that must be raised."""
    sweep = make_sweep(tmp_path, trials=2, epochs=2, gpus_per_trial=0.5, scheduler="none")
    coordinator = open_coordinator(sweep)
    run_one_after_the_other(coordinator)
    assert closing_words(coordinator.ledger, "resume first", idle=False) == []
    assert closing_words(coordinator.ledger, "resume first", idle=True) == [
        "nothing was left to do: 2 of 2 trials; for more: resume first --trials N"
    ]
    ledger = Ledger(changed(sweep, hours=0.25, gpu_hours=0.125))
    assert closing_words(ledger, "resume first", idle=True) == [
        "nothing was left to do: 2 of 2 trials, 0.4 of 0.25 hours, 0.2 of 0.125 GPU-hours; "
        "for more: resume first --trials N --hours N --gpu-hours N"
    ]


def test_a_retraining_is_not_limited(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, trials=2, epochs=2, hours=0.1, gpu_hours=0.1, gpus_per_trial=0.5, scheduler="none")
    run_one_after_the_other(open_coordinator(sweep))
    best = Ledger(sweep).best()
    assert best is not None
    (sweep.folder / RETRAIN).mkdir()
    ledger = Ledger(sweep, RETRAIN, create=True)
    enqueue_retraining(ledger, [best], 4)
    run_one_after_the_other(Coordinator(ledger, total=ledger.total, concurrent=1))
    assert ledger.count(TrialState.COMPLETE) == 4
    assert ledger.is_finished
    assert ledger.budgets() == [Budget("trials", 4, 4)]
    assert cost_text(ledger) == "spent: 4 of 4 trials, 8 epochs, 0.8 trial-hours"


# -- what was saved ---------------------------------------------------------------------------------------------------


def test_saved_by_hand(tmp_path: Path) -> None:
    """Nine epochs each. One trial is complete; one is stopped after 3 epochs of 0.1 hours, 6 such are saved; one after 1 epoch
    of 0.2 hours, 8 such are saved: 14 epochs, 0.6 + 1.6 hours. What diverged, failed or runs saved nothing."""
    sweep = make_sweep(tmp_path, epochs=9, trials=9, gpus_per_trial=0.5)
    ledger = Ledger(sweep)
    ended = []
    for state, epochs, seconds in (
        ("complete", 9, 1),
        ("stopped", 3, 1),
        ("stopped", 1, 2),
        ("diverged", 2, 1),
        ("failed", 1, 1),
    ):
        record = ledger.ask()
        for epoch in range(1, epochs + 1):
            end = ledger.account.usage.seconds + seconds * SECONDS
            ledger.report(record, [epoch_until(epoch, end, seconds * SECONDS, gpus=0.5)])
        if state == "complete":
            ledger.complete(record)
        elif state == "failed":
            ledger.fail(record, "RuntimeError: out of paper")
        else:
            ledger.prune(record, diverged=state == "diverged")
        ended.append(record)
    ledger.report(ledger.ask(), [epoch_until(1, ledger.account.usage.seconds + SECONDS, SECONDS, gpus=0.5)])
    assert cost_text(ledger) == (
        "spent: 4 of 9 trials, 1.80 hours, 0.9 GPU-hours, 17 epochs, 1.80 trial-hours; "
        "saved by ASHA: 14 epochs, 2.20 trial-hours, 1.10 GPU-hours"
    )
    assert cost_text(Ledger(sweep, read_only=True)) == cost_text(ledger)
    curve = list(cost_metrics(ended, 9))
    first = {"spent/hours": 0.9, "spent/epochs": 9, "spent/trial_hours": 0.9, "spent/gpu_hours": 0.45}
    assert curve[0] == pytest.approx(first)
    assert [step.get("saved/epochs", 0) for step in curve] == [0, 6, 14, 14, 14]
    last = {"spent/hours": 1.7, "spent/epochs": 16, "spent/trial_hours": 1.7, "spent/gpu_hours": 0.85}
    assert curve[-1] == pytest.approx(last | {"saved/epochs": 14, "saved/trial_hours": 2.2, "saved/gpu_hours": 1.1})


def test_numbers_have_no_exponent() -> None:
    assert [short_number(value) for value in (7, 0.0, 2.32e-5, 0.25, 12.5)] == ["7", "0", "0.0000232", "0.25", "12.50"]
