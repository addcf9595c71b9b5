"""Ranges of numbers as choices and steps, and spaces that hold fewer configurations than trials were asked for."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import search
from hparams import Hyperparameter, Interval, Range
from tests.sweeps import epoch_record, make_sweep, play, stored_trials
from tune.report.announcement import describe
from tune.report.closing import closing_words
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import Ledger, Record
from tune.search.sampler import Distinct, GroupedTPE
from tune.search.space import Space
from tune.search.warm_start import warm_start
from tune.spec import make_spec, read_yaml
from tune.store.stored_sweep import Sweep

BATCH_SIZE = Hyperparameter("batch_size", int, 64, "", Interval.parse("[1, inf)"), (), None, None)
DROPOUT = Hyperparameter("dropout", float, 0.0, "", Interval.parse("[0, 1)"), (), None, None)


@pytest.mark.parametrize(
    ("parameter", "text", "values"),
    [
        (BATCH_SIZE, "32,64, 128", [32, 64, 128]),
        (BATCH_SIZE, "64,32,64", [64, 32]),
        (BATCH_SIZE, "16:64:16", [16, 32, 48, 64]),
        (BATCH_SIZE, "16:60:16", [16, 32, 48]),  # the last step would leave the range
        (BATCH_SIZE, "3:5", [3, 4, 5]),
        (DROPOUT, "0.1,0.5", [0.1, 0.5]),
        (DROPOUT, "0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]),
        (DROPOUT, "0.1:0.3:0.2", [0.1, 0.3]),
    ],
)
def test_numbers_that_a_range_holds(parameter: Hyperparameter, text: str, values: list[float]) -> None:
    drawn, kind = parameter.parse_range(text), parameter.type
    assert [drawn.at(place, kind) for place in range(drawn.count(kind) or 0)] == values
    assert [drawn.place(value, kind) for value in values] == list(range(len(values)))
    assert all(type(drawn.at(place, kind)) is kind for place in range(len(values)))
    assert drawn.place(kind(max(values) + 0.01) if kind is float else 1000, kind) is None
    assert parameter.parse_range(str(drawn)) == drawn
    assert (drawn.low, drawn.high) == (min(values), max(values))


@pytest.mark.parametrize(
    ("parameter", "text", "words"),
    [
        (BATCH_SIZE, "32", ["'32' is not readable", "LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP or A,B,..."]),
        (BATCH_SIZE, "16:64:0", ["'0' must be log, or a step: an integer above 0 and at most HIGH - LOW"]),
        (BATCH_SIZE, "16:64:-8", ["'-8' must be"]),
        (BATCH_SIZE, "16:64:1.5", ["'1.5' must be log, or a step: an integer"]),
        (BATCH_SIZE, "16:64:49", ["'49' must be"]),
        (BATCH_SIZE, "16:64:log2", ["'log2' must be"]),
        (BATCH_SIZE, "16:64:8:log", ["is not readable"]),
        (BATCH_SIZE, "32,0", ["0 is not allowed; it must be an integer in [1, inf)"]),
        (BATCH_SIZE, "32,,64", ["'' is not allowed; it must be an integer in [1, inf)"]),
        (DROPOUT, "0:0.5:nan", ["'nan' must be log, or a step: a number"]),
        (DROPOUT, "0.5,1.0", ["1.0 is not allowed; it must be a number in [0, 1)"]),
    ],
)
def test_ranges_that_mean_nothing(parameter: Hyperparameter, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{parameter.name}: ") as raised:
        parameter.parse_range(text)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("drawn", "value", "nearest"),
    [
        (Range(32, 128, choices=(32, 64, 128)), 100, 128),
        (Range(32, 128, choices=(32, 64, 128)), 64, 64),
        (Range(32, 128, choices=(32, 64, 128)), 1, 32),
        (Range(16, 64, step=16), 41, 48),
        (Range(16, 64, step=16), 500, 64),
        (Range(0.0, 0.3, step=0.1), 0.1 + 0.1 + 0.1, 0.1 + 0.1 + 0.1),  # as Optuna may draw 0.3
        (Range(0.0, 0.3, step=0.1), 0.17, 0.2),
        (Range(choices=("a", "b")), "c", "a"),
        (Range(choices=(True, False)), False, False),
    ],
)
def test_the_nearest_value_of_a_range(drawn: Range, value: Any, nearest: Any) -> None:
    assert drawn.nearest(value) == nearest
    assert type(drawn.nearest(value)) is type(nearest)


SMALL = {"set": {"lr": "0.05"}, "range": {"weight_decay": "0.0001,0.001", "dropout": "0:0.2:0.1", "batch_size": "32:64:32"}}
BOTH = {"method": ("ce", "gce"), "set": {"lr": "0.05", "gce.q": "0.7"}, "range": {"weight_decay": "0.0001,0.001"}}


def test_what_optuna_draws_from() -> None:
    parameters = {p.field: p.distribution for p in Space(make_spec({"method": ("ce",), **SMALL})).parameters["ce"] if p.range}
    assert parameters == {
        "weight_decay": CategoricalDistribution((0.0001, 0.001)),
        "dropout": FloatDistribution(0.0, 0.2, step=0.1),
        "batch_size": IntDistribution(32, 64, step=32),
    }


@pytest.mark.parametrize("fields", [{"method": ("ce",), **SMALL}, BOTH])
def test_configurations_and_their_numbers(fields: dict[str, Any]) -> None:
    """Against Python's product."""
    space = Space(make_spec(fields))
    expected = []
    for method in space.methods:
        drawn = [p for p in space.parameters[method] if p.range]
        values = [[p.range.at(i, p.declared.type) for i in range(p.count or 0)] for p in drawn if p.range]
        named = {"method": method} if len(space.methods) > 1 else {}
        expected += [named | dict(zip([p.name for p in drawn], one, strict=True)) for one in itertools.product(*values)]
    assert space.size == len(expected)
    found = [space.configuration(number) for number in range(space.size)]
    assert sorted(map(repr, found)) == sorted(repr({k: one[k] for k in found[0] | one}) for one in expected)
    assert [space.number(*space.read(params)) for params in found] == list(range(space.size))


@pytest.mark.parametrize(
    ("fields", "size"), [({}, None), (SMALL, 12), ({**SMALL, "method": ("ce", "gce")}, None), ({"set": {"lr": "0.1"}}, None)]
)
def test_how_many_configurations_a_space_holds(fields: dict[str, Any], size: int | None) -> None:
    """A number in an interval has no end of values; gce's q is one."""
    assert Space(make_spec({"method": ("ce",), **fields})).size == size


def configurations(sweep: Sweep) -> Counter[str]:
    return Counter(repr(sorted((k, round(float(v), 6)) for k, v in t.params.items())) for t in stored_trials(sweep))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_each_configuration_is_run_once(sampler: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, sampler=sampler, trials=40, defaults_first=True, **SMALL)
    coordinator = Coordinator(Ledger(sweep), total=40, concurrent=3)
    play(coordinator)
    assert set(configurations(sweep).values()) == {1}
    assert len(configurations(sweep)) == 12
    assert coordinator.next("another") == FINISHED
    again = Ledger(sweep)
    assert again.is_finished
    assert [str(budget) for budget in again.budgets() if budget.over] == ["12 of 12 configurations"]
    (said,) = closing_words(again, "python search.py resume first", idle=True)
    wider = "wider ranges in a sweep of its own: launch NAME --from first --range ..."
    assert said == f"nothing was left to do: 12 of 12 configurations; for more: {wider}"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_resume_repeats_a_configuration(sampler: str, tmp_path: Path) -> None:
    """Also not where trials were running when a driver was killed, and one failed."""
    sweep = make_sweep(tmp_path, sampler=sampler, trials=40, **SMALL)
    for count in range(1, 5):
        coordinator = Coordinator(Ledger(sweep), total=40, concurrent=2)
        records = [coordinator.next(str(slot)) for slot in range(2)]
        assert all(isinstance(record, Record) for record in records)
        failure = "it failed" if count == 2 else None
        epochs = [epoch_record(epoch, 0.5) for epoch in range(1, 5)]
        assert not coordinator.result("0", [] if failure else epochs, failure=failure, diverged=False)
        coordinator.released("0")
    play(Coordinator(Ledger(sweep), total=40, concurrent=2))
    assert set(configurations(sweep).values()) == {1}
    assert len(configurations(sweep)) == 12
    assert Ledger(sweep).num_counted() == 11
    assert Ledger(sweep).is_finished


def test_as_many_trials_as_configurations(tmp_path: Path) -> None:
    """The trials end the sweep, and nothing is said of configurations, unless one fails for which none is left."""
    sweep = make_sweep(tmp_path, trials=12, **SMALL)
    play(Coordinator(Ledger(sweep), total=12, concurrent=2))
    assert [budget.name for budget in Ledger(sweep).budgets()] == ["trials", "hours", "gpu_hours"]
    assert set(configurations(sweep).values()) == {1}
    other = make_sweep(tmp_path, "other", trials=12, **SMALL)
    coordinator = Coordinator(Ledger(other), total=12, concurrent=1)
    coordinator.next("slot")
    coordinator.result("slot", [], failure="it failed", diverged=False)
    coordinator.released("slot")
    play(coordinator)
    assert Ledger(other).num_counted() == 11
    assert [str(budget) for budget in Ledger(other).budgets() if budget.over] == ["12 of 12 configurations"]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_is_new_is_proposed_as_ever(sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the space is large enough, proposals are those of the plain samplers."""
    large = {"set": {"lr": "0.05"}, "range": {"weight_decay": "0:0.1:0.000001", "batch_size": "2:100000"}, "trials": 25}
    sweep = make_sweep(tmp_path, sampler=sampler, **large)
    play(Coordinator(Ledger(sweep), total=25, concurrent=2))
    plain = make_sweep(tmp_path, "plain", sampler=sampler, **large)
    monkeypatch.setattr("tune.search.ledger.Distinct", lambda sampler, space, taken, seed: sampler)
    play(Coordinator(Ledger(plain), total=25, concurrent=2))
    assert [trial.params for trial in stored_trials(sweep)] == [trial.params for trial in stored_trials(plain)]


def test_every_configuration_that_is_left_is_as_likely() -> None:
    space = Space(make_spec({"method": ("ce",), **SMALL}))
    taken = {0, 1, 5, 11}
    sampler = Distinct(optuna.samplers.RandomSampler(seed=0), space, taken, seed=0)
    drawn = Counter(sampler._not_taken() for _ in range(8000))
    assert set(drawn) == set(range(12)) - taken
    assert all(850 < count < 1150 for count in drawn.values()), "1000 each, give or take five standard deviations"
    assert isinstance(GroupedTPE(space, 0), optuna.samplers.TPESampler)


def test_a_small_space_is_said_at_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "ce", "--set", "lr=0.05", "--range", "weight_decay=0.001,0.01", "--range", "batch_size=32:96:32"]
    assert search.main(["launch", "small", "--storage", str(tmp_path), "--dry-run", *flags, "--trials", "7"]) == 0
    said = capsys.readouterr().out
    assert "the ranges hold 6 configurations: the sweep ends when each has been run, before 7 trials\n" in said
    assert "searches weight_decay 0.001,0.01, batch_size 32:96:32; fixed" in said
    assert search.main(["launch", "small", "--storage", str(tmp_path), "--dry-run", *flags, "--trials", "6"]) == 0
    assert "the ranges hold" not in capsys.readouterr().out


def test_a_method_that_may_begin_late_by_a_choice(tmp_path: Path) -> None:
    from tune.search.recipes import dataset

    spec = make_spec({"method": ("alr",), "range": {"warmup": "0.1,0.4"}, "epochs": 30})
    lines = describe(spec, Space(spec), dataset(spec))
    late = make_spec({"method": ("alr",), "set": {"warmup": "0.4"}, "epochs": 30})
    assert [line for line in lines if "as late as" in line]
    assert [line for line in lines if "as late as" in line] == [
        line for line in describe(late, Space(late), dataset(late)) if "as late as" in line
    ]


def test_a_warm_start_from_numbers_that_are_not_among_the_choices(tmp_path: Path) -> None:
    old = make_sweep(tmp_path, "old", trials=3, set={"lr": "0.05"}, range={"weight_decay": "0.001,0.01,0.1"}, scheduler="none")
    play(Coordinator(Ledger(old), total=3, concurrent=1))
    spec = make_spec({"method": ("ce",), "set": {"lr": "0.05"}, "range": {"weight_decay": "0.001,0.1,0.5"}})
    found = warm_start("old", old.files.store, spec, Space(spec))
    assert sorted(params["weight_decay"] for params in found.params) == [0.001, 0.1]
    assert sum("its weight_decay 0.01 is outside 0.001,0.1,0.5" in line for line in found.lines) == 1


# -- the record of a sweep as a spec file -----------------------------------------------------------------------------


def test_an_old_sweeps_record_is_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path, method=("ce", "gce"), epochs=7, trials=5, **SMALL)
    path = sweep.folder / "sweep.yaml"  # type: ignore[operator]
    assert make_spec(read_yaml(path)) == sweep.spec
    flags = ["--spec", str(path), "--epochs", "9", "--set", "batch_size=32"]
    assert search.main(["launch", "again", "--storage", str(tmp_path / "new"), "--dry-run", *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{path} is the record of a sweep: what was asked for is taken over, its provenance is not\n")
    assert "5 trials of 9 epochs" in said
    path.write_text(path.read_text() + "other: 1\n")
    with pytest.raises(ValueError, match="unknown key 'spec'"):
        read_yaml(path)


def test_choices_as_a_list_in_a_spec_file(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("range:\n  batch_size: [32, 64]\n  weight_decay: 0.1,0.2\n")
    assert read_yaml(tmp_path / "spec.yaml") == {"range": {"batch_size": "32,64", "weight_decay": "0.1,0.2"}}
