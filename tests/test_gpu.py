"""What only a GPU can show: ``NOISY_LABEL_TEST_GPU=1 pytest -m gpu``. Its trials run in processes of their own, as Ray's do."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.methods
from training.trial_run import TrialRun

pytestmark = pytest.mark.gpu
SHARE = 0.4
GREEDY = "greedy"  # the folder's name of a trial that wants more than its share


def configuration(folder: Path, epochs: int) -> dict[str, str]:
    recipe = {"method": "alr", "values": {}, "data": "digits", "noise": "symmetric:0.4", "model": "small-cnn"}
    timing = {"checkpoint_seconds": 1e6, "report_seconds": 0.0, "hang_seconds": 0.0}
    place = {"number": 0, "folder": str(folder), "rungs": [], "reported": 0, "cpus": 1, "gpus": SHARE}
    return {"trial": json.dumps({**timing, **place, "recipe": {**recipe, "epochs": epochs, "seed": 0}})}


def serve(pipe: Connection) -> None:
    """One actor, whose trial takes more memory where its folder says so."""
    advance = TrialRun.advance

    def take_more(experiment: TrialRun) -> Any:
        if experiment.path is not None and experiment.path.parent.name == GREEDY:
            total = torch.cuda.mem_get_info()[1]
            torch.empty(int(0.5 * total), dtype=torch.uint8, device="cuda")
        return advance(experiment)

    TrialRun.advance = take_more  # type: ignore[method-assign]
    benchmarks.methods.serve(pipe)


class Slot:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()

    def step(self, config: dict[str, str] | None = None) -> dict[str, Any]:
        self.pipe.send(config)
        answer: dict[str, Any] = self.pipe.recv()
        return answer


def test_a_trial_that_takes_more_than_its_share_fails_alone(tmp_path: Path) -> None:
    """There is room for it on the GPU, but not in its share. The neighbour goes on, and so does the next trial of the actor."""
    assert torch.cuda.is_available(), "no GPU"
    one, other = Slot(), Slot()
    first = one.step(configuration(tmp_path / "modest", 4))
    assert (first["failure"], len(first["epochs"])) == (None, 1)
    greedy = other.step(configuration(tmp_path / GREEDY, 4))
    assert "OutOfMemoryError" in greedy["failure"]
    assert greedy["epochs"] == []
    for number in (2, 3, 4):
        assert [epoch["epoch"] for epoch in one.step()["epochs"]] == [number]
    again = other.step(configuration(tmp_path / "next", 2))
    assert (again["failure"], [epoch["epoch"] for epoch in again["epochs"]]) == (None, [1])
    assert again["epochs"][0]["metrics"]["gpu_seconds"] == pytest.approx(SHARE * again["epochs"][0]["metrics"]["seconds"])
    for slot in (one, other):
        slot.pipe.send("end")
        slot.process.join(60)
        assert slot.process.exitcode == 0
