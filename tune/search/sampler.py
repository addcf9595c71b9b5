"""TPE over a sweep's space, and no configuration twice where there are few, for one proposal.

Optuna's sampler infers the space from the study: it walks through every trial, and with several methods it fits a density to
every method's parameters, also to those of methods that it does not propose. The space is known here, so nothing is inferred,
and only the groups that the drawn method has are fitted. A sampler has no memory: a resumed search needs none.
"""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from tune.search.quirks import sample_without_note
from tune.search.space import Space


class GroupedTPE(optuna.samplers.TPESampler):
    """Multivariate TPE in groups of parameters that the same methods have, each from the trials that have them.

    First comes the group of all methods, with the method itself; then those that the drawn method takes part in. For one
    method this is Optuna's own multivariate sampler, value for value.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed=seed, multivariate=True, constant_liar=True)
        self.space = space

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: drawn for _, group in self.space.groups for name, drawn in group.items()}

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Samples the group of all methods, then the groups of the method that was drawn."""
        params: dict[str, Any] = {}
        for methods, group in self.space.groups:
            method = trial.params.get("method", params.get("method", self.space.methods[0]))
            if method in methods:
                params |= sample_without_note(self, study, trial, group)
        return params


class Distinct(optuna.samplers.BaseSampler):
    """Another sampler's proposals where the space holds a number of configurations: for one that is ``taken`` already, a
    random one that is not. The rest of a proposal that a kill cut off is left as the other sampler has it."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, space: Space, taken: Set[int], seed: int) -> None:
        self.sampler = sampler
        self.space = space
        self.taken = taken
        self.random = random.Random(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: drawn for _, group in self.space.groups for name, drawn in group.items()}

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inferred = self.sampler.infer_relative_search_space(study, trial)
        params = self.sampler.sample_relative(study, trial, inferred)
        if trial.params:
            return params
        proposal = params | self._independent(study, trial, search_space, params)
        if self.space.number(*self.space.read(proposal)) not in self.taken:
            return proposal
        return self.space.configuration(self._not_taken())

    def _independent(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: dict[str, BaseDistribution], params: dict[str, Any]
    ) -> dict[str, Any]:
        """What is still to be drawn, in the order in which it would be suggested."""
        values: dict[str, Any] = {}
        if len(self.space.methods) > 1 and "method" not in params:
            values["method"] = self.sample_independent(study, trial, "method", space["method"])
        method = (params | values).get("method", self.space.methods[0])
        for parameter in self.space.parameters[method]:
            if parameter.range and parameter.name not in params:
                distribution = parameter.distribution
                values[parameter.name] = (
                    self.sample_independent(study, trial, parameter.name, distribution)
                    if distribution
                    else parameter.range.at(0, parameter.declared.type)
                )
        return values

    def _not_taken(self) -> int:
        """The number of a configuration that is not taken; all of them are equally likely. Where none is left, any."""
        assert self.space.size is not None
        num_left = self.space.size - len(self.taken)
        number = self.random.randrange(num_left or self.space.size)
        for taken in sorted(self.taken) if num_left else ():
            number += taken <= number
        return number

    def sample_independent(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, name, distribution)
