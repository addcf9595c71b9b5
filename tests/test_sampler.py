"""TPE over the known space, against Optuna's own sampler, which infers the space from the trials."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hparams import Value
from methods import METHODS
from tests.sweeps import made_up
from tune.search import quirks
from tune.search.sampler import GroupedTPE
from tune.search.space import Space
from tune.spec import make_spec

Sampler = Callable[[int], optuna.samplers.BaseSampler]


def test_optuna_has_what_the_quirk_needs() -> None:
    """At the next upgrade: does ``TPESampler._sample_relative`` still sample as the public method, which leaves a note?"""
    assert optuna.__version__ == quirks.VERSION
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=12)
    number, space = study.ask().number, {"x": optuna.distributions.FloatDistribution(0, 1)}
    trial = study.get_trials()[number]
    sampled = quirks.sample_without_note(optunas(1), study, trial, space)
    assert study.get_trials()[number].system_attrs == trial.system_attrs
    assert sampled == optunas(1).sample_relative(study, trial, space)
    assert list(sampled) == ["x"]
    assert study.get_trials()[number].system_attrs != trial.system_attrs, "the note"


def optunas(seed: int) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def proposals(space: Space, study: optuna.Study, sampler: Sampler, trials: int) -> list[tuple[str, dict[str, Value]]]:
    """A search with a new sampler for each trial. Trials end complete, stopped early or failed, and some run on."""
    stream, found = random.Random(0), []
    for number in range(trials):
        study.sampler = sampler(number)
        trial = study.ask()
        found.append(space.suggest(trial))
        values, end = found[-1][1], stream.random()
        for epoch in (1, 2):
            trial.report(made_up(values, epoch), epoch)
        if end < 0.5:
            study.tell(trial, made_up(values, 2))
        elif end < 0.9:
            study.tell(trial, state=TrialState.PRUNED)
        elif end < 0.95:
            study.tell(trial, state=TrialState.FAIL)
    return found


def test_for_one_method_it_is_optunas_own_value_for_value() -> None:
    """With an integer, names and a fixed value in the space."""
    ranges = {"batch_size": "32:256:log", "augmentation": "none,weak", "alr.warmup": "0.1:0.3"}
    space = Space(make_spec({"method": ("alr",), "range": ranges, "set": {"momentum": "0.5"}}))
    ours = proposals(space, optuna.create_study(direction="maximize"), lambda seed: GroupedTPE(space, seed), 60)
    theirs = proposals(space, optuna.create_study(direction="maximize"), optunas, 60)
    assert ours == theirs
    assert {type(value) for value in ours[-1][1].values()} >= {float, int, str}


def test_of_several_methods_what_all_share_is_drawn_as_optuna_does() -> None:
    """Optuna's sampler without groups knows the parameters that all trials have: method, lr, weight decay. Those are ours."""
    space = Space(make_spec({"method": ("ce", "elr", "alr")}))
    study = optuna.create_study(direction="maximize")
    proposals(space, study, lambda seed: GroupedTPE(space, seed), 40)
    for seed in range(20):
        trial = study._storage.get_trial(study.ask()._trial_id)
        theirs = optunas(seed)
        expected = theirs.sample_relative(study, trial, theirs.infer_relative_search_space(study, trial))
        ours = GroupedTPE(space, seed)
        drawn = ours.sample_relative(study, trial, ours.infer_relative_search_space(study, trial))
        assert set(expected) == {"method", "lr", "weight_decay"}
        assert expected.items() <= drawn.items()
        own = {parameter.name for parameter in space.parameters[drawn["method"]] if parameter.distribution}
        assert set(drawn) == own | {"method"}, "all that the drawn method has, and nothing of another"


def test_a_methods_own_parameters_are_learnt_from_its_trials() -> None:
    """The best trials of ELR have a strong regulariser, those of ALR say nothing about that: ELR's next ones have it, too."""
    space = Space(make_spec({"method": ("elr", "alr"), "range": {"elr.strength": "0:1"}}))
    study = optuna.create_study(direction="maximize")
    stream = random.Random(0)
    for _ in range(60):
        study.sampler = optuna.samplers.RandomSampler(seed=stream.randrange(2**32))
        trial = study.ask()
        method, values = space.suggest(trial)
        study.tell(trial, 1 - abs(float(values["strength"]) - 0.9) if method == "elr" else 0.0)
    drawn = []
    for seed in range(40):
        study.sampler = GroupedTPE(space, seed)
        trial = study.ask()
        drawn.append(space.suggest(trial))
        study.tell(trial, state=TrialState.FAIL)
    strengths = [float(values["strength"]) for method, values in drawn if method == "elr"]
    assert len(strengths) > 30, "and ELR is proposed more often than by chance"
    assert sum(strength > 0.7 for strength in strengths) > 0.8 * len(strengths)


def test_a_proposal_that_was_cut_off_keeps_its_method() -> None:
    """Its method is stored, its other parameters are not: they are drawn for that method, from the densities."""
    space = Space(make_spec({"method": ("elr", "alr")}))
    study = optuna.create_study(direction="maximize")
    proposals(space, study, lambda seed: GroupedTPE(space, seed), 40)
    for method in ("elr", "alr"):
        stored = study._storage.get_trial(study.ask()._trial_id)
        stored.params["method"] = method
        sampler = GroupedTPE(space, 0)
        drawn = sampler.sample_relative(study, stored, sampler.infer_relative_search_space(study, stored))
        assert {name for name in drawn if "." in name} == {
            parameter.name for parameter in space.parameters[method] if "." in parameter.name and parameter.distribution
        }


@pytest.mark.parametrize("methods", [("ce",), ("ce", "alr"), tuple(METHODS)])
def test_every_parameter_is_in_one_group(methods: tuple[str, ...]) -> None:
    space = Space(make_spec({"method": methods, "trusted": 20}))
    names = [name for _, group in space.groups for name in group]
    assert len(names) == len(set(names))
    for method in methods:
        own = [name for users, group in space.groups if method in users for name in group if name != "method"]
        assert sorted(own) == sorted({parameter.name for parameter in space.parameters[method] if parameter.range})
    assert ("method" in names) == (len(methods) > 1)
    assert "method" not in names or "method" in space.groups[0][1]


def test_a_distribution_is_what_the_suggestion_draws_from() -> None:
    """What the sampler is told about a parameter is what the study stores with its value, for every method."""
    space = Space(
        make_spec({"method": ("all",), "trusted": 20, "range": {"batch_size": "32:256", "augmentation": "none,weak"}})
    )
    known: dict[str, Any] = {name: drawn for _, group in space.groups for name, drawn in group.items()}
    study = optuna.create_study(direction="maximize")
    for method in space.methods:
        study.enqueue_trial({"method": method})
        trial = study.ask()
        space.suggest(trial)
        assert trial.distributions.items() <= known.items()
