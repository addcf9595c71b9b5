"""What a new sweep takes over from an earlier one: which configurations, in which order, and what the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hparams import Value, declared
from methods import find_method
from tests.sweeps import bytes_below, epoch_record, make_sweep
from tune import sweep as verbs
from tune.search.ledger import Ledger
from tune.search.recipes import from_flags
from tune.search.space import Space
from tune.search.warm_start import NUM_TAKEN, WarmStart, warm_start
from tune.spec import make_spec
from tune.store.stored_sweep import Sweep

LRS = [0.02, 0.03, 0.04, 0.05, 0.06, 0.07]


def finished(storage: Path, name: str, trials: list[tuple[dict[str, Value], float | None]], **fields: Any) -> Sweep:
    """A sweep whose trials have these parameters and values; None: stopped early, above all others."""
    sweep = make_sweep(storage, name, epochs=2, trials=20, **fields)
    ledger = Ledger(sweep)
    for params, _ in trials:
        ledger.enqueue(params)
    for _, value in trials:
        record = ledger.ask()
        ledger.report(record, [epoch_record(1, value or 0.99)])
        if value is None:
            ledger.prune(record)
        else:
            ledger.report(record, [epoch_record(2, value)])
            ledger.complete(record)
    return sweep


def ce(lr: float, weight_decay: float = 0.001, augmentation: str = "") -> dict[str, Value]:
    """Parameters of cross-entropy, which is searched over these two unless a range says more."""
    return {"lr": lr, "weight_decay": weight_decay} | ({"augmentation": augmentation} if augmentation else {})


def taken(storage: Path, old: str = "old", **fields: Any) -> WarmStart:
    spec = make_spec({"method": ("ce",), "model": "mlp", **fields})
    return warm_start(old, storage, spec, Space(spec))


def test_the_best_complete_trials_come_first_best_first(tmp_path: Path) -> None:
    """Six are complete, five are taken; the one that ASHA stopped at a higher value is not among them."""
    values = [0.5, 0.9, 0.7, 0.6, 0.8, 0.4]
    sweep = finished(tmp_path, "old", [(ce(0.09), None), *((ce(lr), v) for lr, v in zip(LRS, values, strict=True))])
    before = bytes_below(sweep.folder)
    warm = taken(tmp_path, epochs=200, noise="pair:0.2")
    assert NUM_TAKEN == 5
    assert warm.params == [ce(0.03), ce(0.06), ce(0.04), ce(0.05), ce(0.02)]
    assert warm.lines == ["from old: 5 of its best 5 configurations run first (trials 2, 5, 3, 4, 1)"]
    assert warm.provenance == {"from": {"sweep": "old", "id": "old-0123456789abcdef", "trials": [2, 5, 3, 4, 1]}}
    assert bytes_below(sweep.folder) == before
    assert taken(tmp_path / "elsewhere", str(sweep.folder)) == warm._replace(params=warm.params)


def test_what_does_not_fit_is_left_out_with_its_value(tmp_path: Path) -> None:
    """Outside a range, on either side; a word that is not offered; fixed by --set; fixed because it is not searched here."""
    ranges = {"lr": "0.05:0.5", "batch_size": "16:64", "augmentation": "none,weak,strong"}
    held: list[tuple[dict[str, Value], float | None]] = [
        (ce(0.3, augmentation="weak") | {"batch_size": 32}, 0.9),
        (ce(0.1, augmentation="strong") | {"batch_size": 32}, 0.8),
        (ce(0.1, augmentation="weak") | {"batch_size": 16}, 0.7),
        (ce(0.2, augmentation="none") | {"batch_size": 64}, 0.6),
    ]
    finished(tmp_path, "old", held, range=ranges)
    warm = taken(tmp_path, range={"lr": "0.1:0.2", "augmentation": "none,weak", "batch_size": "32:64"})
    assert warm.params == [ce(0.2, augmentation="none") | {"batch_size": 64}]  # on a bound is inside
    assert warm.lines == [
        "trial 0 of old is left out: its lr 0.3 is outside 0.1:0.2",
        "trial 1 of old is left out: its augmentation strong is outside none,weak",
        "trial 2 of old is left out: its batch_size 16 is outside 32:64",
        "from old: 1 of its best 4 configurations run first (trials 3)",
    ]
    warm = taken(tmp_path, set={"lr": "0.1"}, range={"batch_size": "32:64"})
    assert warm.params == []
    assert warm.lines == [
        "trial 0 of old is left out: its lr 0.3 is not the 0.1 that is fixed here",
        "trial 1 of old is left out: its augmentation strong is not the weak that is fixed here",
        "trial 2 of old is left out: its batch_size 16 is outside 32:64",
        "trial 3 of old is left out: its lr 0.2 is not the 0.1 that is fixed here",
        "from old: 0 of its best 4 configurations run first",
    ]
    assert warm.provenance["from"]["trials"] == []


def test_what_the_old_one_did_not_search_gets_the_new_ones_default(tmp_path: Path) -> None:
    """Also where the old one had fixed it; the new range moves a default to its bound."""
    finished(tmp_path, "old", [({"lr": 0.1}, 0.5)], set={"weight_decay": "0.5"})
    warm = taken(tmp_path, range={"momentum": "0.5:0.8", "batch_size": "16:32"})
    config = declared(find_method("ce").Config)
    assert config["momentum"].default == 0.9
    assert config["batch_size"].default > 32
    assert warm.params == [{"lr": 0.1, "weight_decay": config["weight_decay"].default, "momentum": 0.8, "batch_size": 32}]
    assert taken(tmp_path, set={"weight_decay": "0.2"}).params == [{"lr": 0.1}]


def test_configurations_that_are_the_same_here_run_once(tmp_path: Path) -> None:
    """They differ in what the new sweep fixes to a value that both had, or by nothing."""
    held = [(ce(0.1, 0.002), 0.9), (ce(0.05), 0.8), (ce(0.1, 0.002), 0.7)]
    finished(tmp_path, "old", list(held))
    warm = taken(tmp_path)
    assert warm.params == [ce(0.1, 0.002), ce(0.05)]
    assert warm.lines[0] == "trial 2 of old is left out: it is the same here as trial 0"


def test_other_methods_and_other_names(tmp_path: Path) -> None:
    """From one method to several, where ``method`` is a parameter; a method that is not searched; a range of ALR's own, under
    which the shared lr has another name."""
    alr: dict[str, Value] = {
        "method": "alr",
        "lr": 0.1,
        "weight_decay": 0.001,
        "alr.warmup": 0.2,
        "alr.memory": 0.05,
        "alr.entropy_weight": 0.3,
    }
    finished(tmp_path, "old", [(alr, 0.9), ({"method": "ce", **ce(0.1)}, 0.8)], method=("alr", "ce"))
    warm = taken(tmp_path, method=("gce", "alr"), range={"alr.lr": "0.05:0.2"})
    moved = {name: value for name, value in alr.items() if name != "lr"}
    assert warm.params == [moved | {"alr.lr": 0.1}]
    assert warm.lines == [
        "trial 1 of old is left out: ce is not searched",
        "from old: 1 of its best 2 configurations run first (trials 0)",
    ]
    alone = taken(tmp_path, method=("ce",))
    assert alone.params == [ce(0.1)]


@pytest.mark.parametrize("default_is_taken", [False, True])
def test_published_defaults_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_is_taken: bool) -> None:
    """In the journal of the new sweep, once each, before anything that the sampler draws."""
    spec = make_spec({"method": ("ce",), "model": "mlp", "sampler": "random", "trials": 6})
    default, _ = Space(spec).defaults("ce", spec)
    finished(tmp_path, "old", [(ce(0.1), 0.9), (default if default_is_taken else ce(0.02), 0.8)])
    monkeypatch.setattr(verbs, "execute", lambda *_: verbs.Outcome(0))
    verbs.launch("new", tmp_path, spec, old="old")
    sweep = Sweep.find(tmp_path, "new")
    assert sweep.provenance["from"] == {"sweep": "old", "id": "old-0123456789abcdef", "trials": [0, 1]}
    ledger = Ledger(sweep)
    ran = [ledger.ask().params for _ in range(5)]
    expected = [ce(0.1), default] if default_is_taken else [ce(0.1), ce(0.02), default]
    assert ran[: len(expected)] == expected
    assert all(params not in expected for params in ran[len(expected) :])


@pytest.fixture
def forty_classes(tmp_path: Path) -> str:
    """A folder of 40 classes with six images each."""
    random = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / "images" / f"{number:02}").mkdir(parents=True)
        for image in range(6):
            picture = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "images" / f"{number:02}" / f"{image}.png")
    return f"folder:{tmp_path / 'images'}"


def test_published_defaults_are_those_for_the_number_of_classes(
    tmp_path: Path, forty_classes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first trial of a sweep, in what a warm start lacks, and in ``train``."""
    monkeypatch.setattr(verbs, "execute", lambda *_: verbs.Outcome(0))
    old = {"lr": 0.01, "weight_decay": 0.001, "sce.alpha": 3.0}
    finished(tmp_path, "old", [(old, 0.9)], method=("sce",), set={"sce.beta": "1"})
    fields = {"method": ("sce",), "model": "mlp", "data": forty_classes, "noise": "none"}
    verbs.launch("new", tmp_path, make_spec({**fields, "trials": 4}), old="old")
    ledger = Ledger(Sweep.find(tmp_path, "new"))
    warm, first = ledger.ask().values, ledger.ask().values
    assert (warm["alpha"], warm["beta"]) == (3.0, 0.1)
    assert (first["alpha"], first["beta"]) == (6.0, 0.1)
    recipe = from_flags(fields)
    assert (recipe.values["alpha"], recipe.values["beta"]) == (6.0, 0.1)
    digits = from_flags({**fields, "data": "digits"})
    assert (digits.values["alpha"], digits.values["beta"]) == (0.1, 1.0)
