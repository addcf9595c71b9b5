"""Finds the studies in a sweep's journal by their names or, where a study was renamed, by their trials."""

from __future__ import annotations

import optuna
from optuna.storages import BaseStorage

SWEEP, RETRAIN = "sweep", "retrain"


def study_name(storage: BaseStorage, kind: str) -> str | None:
    """The name of a sweep's study, or of the study of its retraining; None where there is none.

    A study that was renamed, as optuna-dashboard allows, is found by its trials if it is the only one of its kind.
    """
    studies = storage.get_all_studies()
    if kind in (study.study_name for study in studies):
        return kind
    others = [study for study in studies if study.study_name not in (SWEEP, RETRAIN)]
    renamed = [study.study_name for study in others if _kind(_trials(storage, study.study_name)) == kind]
    return renamed[0] if len(renamed) == 1 else None


def _trials(storage: BaseStorage, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)


def _kind(trials: list[optuna.trial.FrozenTrial]) -> str:
    """The kind of a study with these trials; empty for a study without trials, which is none of ours."""
    return "" if not trials else RETRAIN if "source" in trials[0].user_attrs else SWEEP


def other_studies(storage: BaseStorage) -> str:
    """Says for a message which studies a journal holds where one is missing."""
    names = [repr(study.study_name) for study in storage.get_all_studies()]
    return f"its journal holds {', '.join(names)}: name the right one back" if names else "its journal is incomplete"
