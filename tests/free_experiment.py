"""A trial that costs nothing, for sweeps that are killed or interrupted hundreds of times."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

EPOCHS = 4
DIVERGES, FAILS = 1, 2  # numbers of trials


class FreeExperiment:
    """An experiment that trains nothing: its state is its history, its values follow from parameters and epoch."""

    def __init__(self, trial: dict[str, Any]) -> None:
        from training import checkpoint
        from training.trial_run import EpochRecord

        self.number, self.values = trial["number"], trial["recipe"]["values"]
        self.path = Path(trial["folder"]) / "checkpoint.pt"
        self.history: list[EpochRecord] = []
        self.saved_epochs = None
        if self.path.exists():
            state = checkpoint.load(self.path)
            assert state["values"] == self.values, "another trial's checkpoint"
            self.history = [EpochRecord(**record) for record in state["history"]]
            self.saved_epochs = len(self.history)

    def advance(self) -> Any:
        from tests.sweeps import made_up
        from training.fit import Diverged
        from training.trial_run import EpochRecord

        epoch = len(self.history) + 1
        assert epoch <= EPOCHS
        if self.number == DIVERGES and epoch == EPOCHS:
            raise Diverged("train/loss is nan")
        if self.number == FAILS and epoch == 2:
            raise RuntimeError("out of paper")
        value = made_up(self.values, epoch)
        self.history.append(EpochRecord(epoch, time.time(), value, {"val/accuracy": value, "seconds": 0.25}))
        return self.history[-1]

    def save(self) -> None:
        from training import checkpoint

        if self.saved_epochs == len(self.history):
            return
        state = {"values": self.values, "history": [dataclasses.asdict(record) for record in self.history]}
        checkpoint.save(self.path, state, read_back=self.saved_epochs is None)
        self.saved_epochs = len(self.history)
