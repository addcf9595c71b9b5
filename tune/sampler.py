"""TPE over a sweep's space, for one proposal.

Optuna's sampler infers the space from the study: it walks through every trial, and with several methods it fits a density to
every method's parameters, also to those of methods that it does not propose. The space is known here, so nothing is inferred,
and only the groups that the drawn method has are fitted. A sampler has no memory: a resumed search needs none.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from tune.space import Space


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
        """Without Optuna's note of the whole proposal for other processes: there is one driver, and the note is a write."""
        params: dict[str, Any] = {}
        for methods, group in self.space.groups:
            method = trial.params.get("method", params.get("method", self.space.methods[0]))
            if method in methods:
                params |= self._sample_relative(study, trial, group)
        return params
