"""Stopping decisions beside Ray's own ASHAScheduler, on recorded traces."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from methods.base import first_epoch
from tests.sweeps import epoch_record, make_sweep, play
from tune.report.leaderboard import rungs
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger, Record
from tune.search.rungs import Rungs, below_cut
from tune.spec import SweepSpec, make_spec

Arrival = tuple[int, int, float]  # trial, epoch, value


@dataclass
class TuneTrial:
    """All that Ray's scheduler looks at."""

    trial_id: str


def recorded(seed: int, num_trials: int, epochs: int) -> list[Arrival]:
    """Every epoch of every trial, in order within a trial and at random between them; half of the traces hold equal values."""
    stream = random.Random(seed)
    digits = stream.choice([1, 6])
    level = [stream.random() for _ in range(num_trials)]
    arrivals, done = [], [0] * num_trials
    while unfinished := [trial for trial in range(num_trials) if done[trial] < epochs]:
        trial = stream.choice(unfinished[: stream.randint(1, 4)])  # a few at a time, later ones after earlier ones
        done[trial] += 1
        arrivals.append((trial, done[trial], round(level[trial] + 0.3 * stream.random(), digits)))
    return arrivals


def as_ray_decides(trace: list[Arrival], spec: SweepSpec, *, stopped_go_on: bool = False) -> list[bool | None]:
    """For each arrival whether ASHAScheduler stops the trial there; None for one that it had stopped before."""
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric="value",
        mode="max",
        max_t=spec.epochs,
        grace_period=spec.rungs()[0],
        reduction_factor=spec.reduction_factor,
    )
    decisions: list[bool | None] = []
    trials: dict[int, TuneTrial] = {}
    stopped = set()
    for number, epoch, value in trace:
        if number not in trials:
            trials[number] = TuneTrial(str(number))
            scheduler.on_trial_add(None, trials[number])
        if number in stopped and not stopped_go_on:
            decisions.append(None)
            continue
        decision = scheduler.on_trial_result(None, trials[number], {"epoch": epoch, "value": value})
        decisions.append(decision == TrialScheduler.STOP and epoch < spec.epochs)
        if decisions[-1]:
            stopped.add(number)
    return decisions


class Judge:
    """Our rungs over a ledger that takes what a trace says."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.ledger = Ledger(make_sweep(folder, **fields))
        self.rungs = Rungs(self.ledger)
        self.records: dict[int, Record] = {}

    def stops(self, trial: int, epoch: int, value: float) -> bool:
        """Whether the ``trial``-th to arrive is stopped at ``epoch``. The value stands in memory only: thousands arrive."""
        if trial not in self.records:
            self.records[trial] = self.ledger.ask()
        record = self.records[trial]
        self.ledger._note(record, epoch_record(epoch, value))
        record.objectives[epoch] = value
        record.epochs = epoch
        return self.rungs.stops(record, epoch)


def as_we_decide(judge: Judge, trace: list[Arrival], *, stopped_go_on: bool = False) -> list[bool | None]:
    decisions: list[bool | None] = []
    stopped = set()
    for number, epoch, value in trace:
        if number in stopped and not stopped_go_on:
            decisions.append(None)
            continue
        decisions.append(judge.stops(number, epoch, value))
        if decisions[-1]:
            stopped.add(number)
    return decisions


BUDGETS = [
    {"epochs": 30, "reduction_factor": 3},
    {"epochs": 27, "reduction_factor": 3, "grace_epochs": 3},
    {"epochs": 16, "reduction_factor": 2, "grace_epochs": 1},
    {"epochs": 20, "reduction_factor": 4},
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_decides_as_ray_does_on_a_recorded_trace(tmp_path: Path, budget: dict[str, int], seed: int) -> None:
    """Identical at every arrival when a cut needs one result, as Ray's does; a stopped trial says no more."""
    spec = make_spec(budget)
    trace = recorded(seed, num_trials=24, epochs=spec.epochs)
    judge = Judge(tmp_path, **budget)
    judge.rungs.min_results = 1
    ours, theirs = as_we_decide(judge, trace), as_ray_decides(trace, spec)
    assert ours == theirs
    assert sum(decision is True for decision in ours) >= 8  # the trace puts it to the test


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_by_default_the_first_at_a_rung_go_on(tmp_path: Path, budget: dict[str, int]) -> None:
    """Only the first ``reduction_factor`` arrivals at a rung may differ from Ray, and only towards going on."""
    spec = make_spec(budget)
    num_spared = 0
    for seed in range(6):
        trace = recorded(seed, num_trials=24, epochs=spec.epochs)
        ours = as_we_decide(Judge(tmp_path / str(seed), **budget), trace, stopped_go_on=True)
        theirs = as_ray_decides(trace, spec, stopped_go_on=True)
        arrived = dict.fromkeys(spec.rungs(), 0)
        for (_, epoch, _), our, their in zip(trace, ours, theirs, strict=True):
            if epoch in arrived and arrived[epoch] < spec.reduction_factor:
                assert our is False
                num_spared += their is True
            else:
                assert our == their
            if epoch in arrived:
                arrived[epoch] += 1
    assert num_spared >= 6  # the difference is there


def test_rungs_worked_by_hand() -> None:
    assert make_spec({"epochs": 30}).rungs() == [3, 9, 27]
    assert make_spec({"epochs": 27, "grace_epochs": 3}).rungs() == [3, 9]
    assert make_spec({"epochs": 25}).rungs() == [3, 9]  # a tenth of the budget, rounded up
    assert make_spec({"epochs": 1}).rungs() == []
    assert make_spec({"epochs": 2}).rungs() == [1]
    assert make_spec({"epochs": 10, "reduction_factor": 2}).rungs() == [1, 2, 4, 8]
    assert make_spec({"epochs": 200}).rungs() == [20, 60, 180]
    assert make_spec({"epochs": 30, "grace_epochs": 40}).rungs() == []
    assert make_spec({"epochs": 30, "scheduler": "none"}).rungs() == []


def test_cuts_worked_by_hand() -> None:
    """Factor 2: the median of those who came before. Factor 4: what three in four stay below."""
    assert not below_cut(0.0, [], 2, 1)
    assert below_cut(0.49, [0.4, 0.6], 2, 2)
    assert not below_cut(0.5, [0.4, 0.6], 2, 2)  # on the cut is not below it
    assert not below_cut(0.49, [0.4, 0.6], 2, 3)
    assert below_cut(0.29, [0.0, 0.1, 0.2, 0.3, 0.4], 4, 4)
    assert not below_cut(0.3, [0.0, 0.1, 0.2, 0.3, 0.4], 4, 4)
    assert not below_cut(0.5, [0.5, 0.5, 0.5], 3, 3)


def test_the_cut_is_numpys_percentile_bit_for_bit() -> None:
    """Between two values, on one, among equal ones: on the cut a trial goes on, just below it it ends."""
    stream = random.Random(0)
    for _ in range(2000):
        factor, num_others = stream.randint(2, 9), stream.randint(1, 40)
        others = [stream.choice([stream.random(), stream.randint(0, 3) / 3]) for _ in range(num_others)]
        cut = float(np.percentile(others, (1 - 1 / factor) * 100))
        assert not below_cut(cut, others, factor, 1)
        assert below_cut(math.nextafter(cut, -1), others, factor, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_stopped_and_cuts_no_other(value: float) -> None:
    assert below_cut(value, [0.1, 0.2, 0.3], 3, 3)
    assert below_cut(value, [], 3, 3)
    assert not below_cut(0.3, [0.1, 0.2, 0.3, value], 3, 3)
    assert below_cut(0.1, [0.2, 0.2, 0.3, value], 3, 3)
    assert not below_cut(0.1, [0.2, value, value], 3, 3)  # one result is not three


def test_a_trial_passes_unjudged_until_its_method_begins(tmp_path: Path) -> None:
    """ALR with warm-up over half of the budget: the rungs at 1 and 3 neither stop it nor hold it; the one at 9 does both."""
    judge = Judge(tmp_path, method=("alr",), epochs=10, range={"warmup": "0.3:0.9"}, grace_epochs=1)
    assert list(judge.rungs.values) == [1, 3, 9]
    for _ in range(30):  # until both kinds are there
        trial = len(judge.records)
        judge.stops(trial, 1, 0.5)
    begins = {trial: judge.rungs.begins(record) for trial, record in judge.records.items()}
    assert begins == {trial: first_epoch(float(record.values["warmup"]), 10) for trial, record in judge.records.items()}
    early, late = ([trial for trial in begins if (begins[trial] < 9) is kind] for kind in (True, False))
    assert len(early) > 5
    assert late
    assert judge.rungs.values[1] == {}
    assert not judge.stops(early[0], 3, 0.0)  # at epoch 3 no warm-up of 0.3 or more has ended
    assert judge.rungs.values[3] == {}
    for trial in early[:4]:
        assert not judge.stops(trial, 9, 0.8)
    assert not judge.stops(late[0], 9, 0.0)
    assert set(judge.rungs.values[9]) == {judge.records[trial].number for trial in early[:4]}
    assert judge.stops(early[4], 9, 0.0)


def test_a_method_that_begins_after_epoch_three_is_judged_from_four_on(tmp_path: Path) -> None:
    """The rung at epoch e judges trials of which at least one epoch of the method proper is done."""
    judge = Judge(tmp_path, method=("alr",), epochs=20, set={"warmup": "0.1"}, grace_epochs=1)
    assert list(judge.rungs.values) == [1, 3, 9]
    judge.stops(0, 1, 0.5)
    assert judge.rungs.begins(judge.records[0]) == 2
    judge.stops(0, 3, 0.5)
    assert judge.rungs.values == {1: {}, 3: {0: 0.5}, 9: {}}


def test_rungs_of_a_reopened_ledger_are_those_before(tmp_path: Path) -> None:
    """After finished, stopped and interrupted trials alike, for the driver and for ``best --rungs``."""
    sweep = make_sweep(tmp_path, method=("ce", "alr"), trials=20, epochs=9, reduction_factor=2, set={"alr.warmup": "0.2"})
    ledger = Ledger(sweep)
    coordinator = Coordinator(ledger, total=20, concurrent=4)
    play(coordinator, keep={5, 9})
    assert sum(map(len, coordinator.rungs.values.values())) > 20
    assert {len(standing) for standing in coordinator.rungs.values.values()} != {20}
    again = Ledger(sweep)
    assert Rungs(again).values == coordinator.rungs.values
    shown = rungs(Ledger(sweep, read_only=True))
    assert {int(rung): {int(n): v for n, v in s.items()} for rung, s in shown.items()} == coordinator.rungs.values
    for record in again.records.values():
        for rung in coordinator.rungs.values:
            enters = record.epochs >= rung > (2 if record.method == "alr" else 0)
            assert (record.number in coordinator.rungs.values[rung]) == enters


def test_a_decision_is_the_same_after_a_restart(tmp_path: Path) -> None:
    """Each trial at each rung asked again by a new driver, when the others, the later and better ones, are there too."""
    fields: dict[str, Any] = {"trials": 40, "epochs": 9, "reduction_factor": 2, "grace_epochs": 1}
    sweep = make_sweep(tmp_path, **fields)
    ledger = Ledger(sweep)
    before, decisions = Rungs(ledger), {}
    stream = random.Random(0)
    live = [ledger.ask() for _ in range(20)]
    while live:
        record = stream.choice(live)
        epoch = record.epochs + 1
        ledger.report(record, [epoch_record(epoch, 0.5 * stream.random() + 0.02 * record.number)])
        if epoch in before.values:
            decisions[record.number, epoch] = before.stops(record, epoch)
        if decisions.get((record.number, epoch)) or epoch == 9:
            live.remove(record)
    again = Ledger(sweep)
    after = Rungs(again)
    assert {key: after.stops(again.records[key[0]], key[1]) for key in decisions} == decisions
    assert sum(decisions.values()) >= 8
    assert list(decisions.values()).count(False) >= 8


def test_a_reader_knows_when_the_method_of_a_running_trial_begins(tmp_path: Path) -> None:
    """A trial in progress has its own warm-up, not the default one."""
    sweep = make_sweep(tmp_path, method=("alr",), epochs=10, range={"warmup": "0.5:0.9"}, grace_epochs=1)
    ledger = Ledger(sweep)
    record = ledger.ask()
    ledger.report(record, [epoch_record(epoch, 0.5) for epoch in range(1, 4)])
    assert Rungs(ledger).values == {1: {}, 3: {}, 9: {}}
    assert rungs(Ledger(sweep, read_only=True)) == {"1": {}, "3": {}, "9": {}}


def test_ray_itself_lets_what_is_not_a_number_pass() -> None:
    """Why ours does not follow it there."""
    scheduler = ASHAScheduler(time_attr="epoch", metric="value", mode="max", max_t=9, grace_period=1)
    for number, value in enumerate([0.5, 0.6, float("nan")]):
        trial = TuneTrial(str(number))
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {"epoch": 1, "value": value})
    assert np.isnan(value)
    assert decision == TrialScheduler.CONTINUE
