"""The first losses of every method, so that a change to numbers is a change to ``goldens.json`` in the same commit.

``make goldens`` writes the file anew; the commit that changes it names the equation.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.seeds import derive
from methods import METHODS
from methods.base import Clock
from training.trial_run import Recipe, TrialRun

GOLDENS = Path(__file__).with_name("goldens.json")
NUM_STEPS = 3


def first_losses(method: str) -> dict[str, list[float]]:
    """Losses of the first steps on digits, at the start of the budget and at its middle, where each method proper runs."""
    found = {}
    for name, epoch in (("start", 0), ("middle", 15)):
        trusted = 50 if METHODS[method].needs_trusted else 0
        recipe = Recipe(
            method,
            {"batch_size": 64},
            data="digits",
            noise="symmetric:0.4",
            model="small-cnn",
            epochs=30,
            seed=0,
            trusted=trusted,
        )
        experiment = TrialRun(recipe)
        learner, clock = experiment.method, Clock(epoch, 30)
        torch.manual_seed(derive("epoch", 0, epoch))
        learner.train()
        batches = islice(learner.batches(experiment.recipe.dataset().train, clock), NUM_STEPS)
        found[name] = [float(learner.step(batch, clock).loss) for batch in batches]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_first_losses(method: str) -> None:
    recorded = json.loads(GOLDENS.read_text())[method]
    for name, losses in first_losses(method).items():
        assert losses == pytest.approx(recorded[name], rel=1e-5), name


def test_no_golden_without_a_method() -> None:
    assert set(json.loads(GOLDENS.read_text())) == set(METHODS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDENS.write_text(json.dumps({name: first_losses(name) for name in METHODS}, indent=1) + "\n")
