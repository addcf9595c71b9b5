"""The one private name of Optuna that the project needs: whoever takes another version of Optuna reads this file.

``test_sampler.py::test_optuna_has_what_the_quirk_needs`` fails where it no longer holds.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler

VERSION = "5.0.0"  # of Optuna, for which this was tried


def sample_without_note(
    sampler: TPESampler, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: dict[str, BaseDistribution]
) -> dict[str, Any]:
    """Samples parameters as ``TPESampler.sample_relative`` does, which with ``constant_liar`` also writes every proposal into
    the study, for other processes that propose. A sweep has one driver, and each note is a write to the disk.

    Calls ``TPESampler._sample_relative``.
    """
    assert hasattr(sampler, "_sample_relative"), f"Optuna {optuna.__version__} is not the {VERSION} that this was written for"
    return sampler._sample_relative(study, trial, space)
