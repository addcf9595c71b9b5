"""One trial: statistics worked by hand, the objective, and checkpoints under kills, damage and other people's pickles."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import logging
import math
import os
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from data.dataset import Dataset, DataSpec, load
from data.table import Labelled, TrainData
from methods.base import Clock, Step
from tests.sweeps import in_child
from training import checkpoint
from training.checkpoint import UnreadableCheckpoint
from training.fit import Diverged, accuracy, fit
from training.locations import Away
from training.statistics import HARD, RefinementStatistics, area_under_roc
from training.trial_run import EpochRecord, Recipe, TrialRun, objective_window
from training.trial_run import tested_epochs as when_tested

CLOCK_METRICS = {"seconds", "samples_per_second"}


# -- refinement statistics, four samples of three classes -------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 0])
TRUTH = torch.tensor([0, 1, 0, 1])  # the last two labels are wrong
PROBABILITIES = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
TARGETS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.25, 0.0, 0.75]])
LN2 = math.log(2)


def seen(statistics: RefinementStatistics, probabilities: Tensor = PROBABILITIES) -> None:
    """An epoch in two batches, rows in another order."""
    statistics.start()
    for rows in (torch.tensor([3, 0]), torch.tensor([1, 2])):
        statistics.observe(Step(torch.tensor(0.0), rows, probabilities[rows]))


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-6)


def test_every_metric_by_hand() -> None:
    statistics = RefinementStatistics(LABELS, TRUTH, 3)
    seen(statistics)
    uncertain = 2**-1.5  # exp(-H) of (1/2, 1/4, 1/4), where H is 1.5 ln 2
    assert statistics.finish(TARGETS) == close(
        {
            # exp(-H) in ascending order: uncertain, uncertain, 1, 1; quantiles at positions 0.3, 1.5 and 2.7
            "refine/threshold_p10": uncertain,
            "refine/threshold_p50": (uncertain + 1) / 2,
            "refine/threshold_p90": 1.0,
            "train/memorised": 0.5,  # predictions 0 1 0 0: of the wrong labels 2 and 0 the second is predicted
            "refine/changed": 0.75,  # the targets say 0 0 0 2
            "refine/entropy": (1.5 * LN2 + 2 * LN2 - 0.75 * math.log(3)) / 4,
            "refine/given_mass": (1 + 0.25 + 0 + 0.25) / 4,
            "refine/hardened": 1 / 3,  # of the changed ones only the third is above 0.95
            "refine/accuracy": 0.5,  # right: the first and the third
            "refine/precision": 1 / 3,  # right of the three changed ones: the third
            "refine/recall": 0.5,  # of the two wrong labels the third sample's is put right
            "refine/hardened_wrong": 0.0,
            # 1 - given mass: 0, 3/4 for right labels and 1, 3/4 for wrong ones: three of four pairs, and a tie
            "refine/auroc": 3.5 / 4,
        }
    )


def test_what_needs_an_epoch_before() -> None:
    statistics = RefinementStatistics(LABELS, TRUTH, 3)
    seen(statistics)
    statistics.finish(TARGETS)
    seen(statistics, PROBABILITIES[[0, 0, 2, 2]])  # the second prediction changes from 1 to 0
    moved = TARGETS.clone()
    moved[0] = torch.tensor([0.5, 0.5, 0.0])
    moved[2] = torch.tensor([0.0, 0.0, 1.0])
    metrics = statistics.finish(moved)
    assert metrics["train/prediction_changes"] == 0.25
    assert metrics["refine/drift"] == close(0.5 * (1 + 2) / 4)  # type: ignore[arg-type]  # half the distance in the 1-norm
    assert metrics["refine/changed"] == 0.5  # the third is back at its label


def test_the_comparison_outlives_a_restart() -> None:
    first, second = (RefinementStatistics(LABELS, TRUTH, 3) for _ in range(2))
    seen(first)
    first.finish(TARGETS)
    second.load_state_dict(first.state_dict())
    for statistics in (first, second):
        seen(statistics, PROBABILITIES.flip(1))
    assert first.finish(TARGETS.flip(0)) == second.finish(TARGETS.flip(0))


def test_a_target_counts_as_hardened_above_the_threshold() -> None:
    """Of changed labels only, and never at the threshold itself."""
    rows = [[0.0, 0.97, 0.03], [0.0, 1.0, 0.0], [HARD, 0.0, 1 - HARD], [0.02, 0.98, 0.0]]
    metrics = RefinementStatistics(LABELS, TRUTH, 3).finish(torch.tensor(rows))
    assert metrics["refine/changed"] == 0.75
    assert metrics["refine/hardened"] == close(2 / 3)  # type: ignore[arg-type]  # the first and the last
    assert metrics["refine/hardened_wrong"] == 0.5  # the first: its label was right
    assert metrics["refine/precision"] == close(2 / 3)  # type: ignore[arg-type]
    assert metrics["refine/recall"] == 1.0


def test_without_truth_nothing_that_needs_it() -> None:
    statistics = RefinementStatistics(LABELS, None, 3)
    seen(statistics)
    names = ["threshold_p10", "threshold_p50", "threshold_p90", "changed", "entropy", "given_mass", "hardened"]
    assert set(statistics.finish(TARGETS)) == {f"refine/{name}" for name in names}


def test_a_truth_in_some_rows_is_as_if_there_were_no_others() -> None:
    """Rows without a truth change nothing of what needs one; a truth of no class is a wrong label that no refinement finds."""
    repeated = [0, 1, 2, 3, 0, 1, 2, 3]
    truth = torch.cat([TRUTH, torch.full((4,), -1)])
    some, alone = RefinementStatistics(LABELS.repeat(2), truth, 3), RefinementStatistics(LABELS, TRUTH, 3)
    other = RefinementStatistics(LABELS.repeat(2), None, 3)
    for statistics in (some, other):
        statistics.observe(Step(torch.tensor(0.0), torch.arange(8), PROBABILITIES[repeated]))
    seen(alone)
    found, expected = some.finish(TARGETS[repeated]), alone.finish(TARGETS)
    of_truth = (
        "train/memorised",
        "refine/accuracy",
        "refine/precision",
        "refine/recall",
        "refine/hardened_wrong",
        "refine/auroc",
    )
    assert {name: found[name] for name in of_truth} == {name: expected[name] for name in of_truth}
    assert {name: value for name, value in found.items() if name not in of_truth} == other.finish(TARGETS[repeated])
    of_no_class = RefinementStatistics(LABELS, torch.tensor([3, -1, -1, 2]), 3)
    seen(of_no_class)
    metrics = of_no_class.finish(TARGETS)  # the targets say 0 0 0 2, the labels 0 1 2 0
    assert (metrics["refine/accuracy"], metrics["refine/recall"], metrics["refine/precision"]) == (0.5, 0.5, 1.0)


def test_without_noise_nothing_divides_by_it() -> None:
    statistics = RefinementStatistics(LABELS, LABELS, 3)
    seen(statistics)
    metrics = statistics.finish(torch.nn.functional.one_hot(LABELS, 3).float())
    absent = {
        "train/memorised",
        "refine/recall",
        "refine/precision",
        "refine/hardened",
        "refine/hardened_wrong",
        "refine/auroc",
    }
    assert not absent & set(metrics)
    assert (metrics["refine/accuracy"], metrics["refine/changed"], metrics["refine/given_mass"]) == (1.0, 0.0, 1.0)


def test_a_method_without_targets_is_judged_by_its_loss() -> None:
    """Losses -ln p(label): 0, 0, ln 4, ln 2; both wrong labels lie above both right ones. With the last at 0: a tie twice."""
    statistics = RefinementStatistics(LABELS, TRUTH, 3)
    seen(statistics)
    metrics = statistics.finish(None)
    assert metrics["refine/auroc"] == 1.0
    assert not {"refine/changed", "refine/accuracy", "refine/drift"} & set(metrics)
    seen(statistics, PROBABILITIES[[0, 1, 2, 0]])
    assert statistics.finish(None)["refine/auroc"] == (2 + 0.5 + 0.5) / 4


def test_a_loss_without_bound_still_ranks() -> None:
    statistics = RefinementStatistics(LABELS, TRUTH, 3)
    seen(statistics, PROBABILITIES[[0, 1, 0, 1]])  # both wrong labels have probability 0
    assert statistics.finish(None)["refine/auroc"] == 1.0


def test_samples_that_were_not_seen_leave_no_figure() -> None:
    """Nor do those of the epoch before."""
    statistics = RefinementStatistics(LABELS, TRUTH, 3)
    seen(statistics)
    assert statistics.observed
    statistics.start()
    assert not statistics.observed
    statistics.observe(Step(torch.tensor(0.0), torch.tensor([0, 1, 2]), PROBABILITIES[:3]))
    statistics.observe(Step(torch.tensor(0.0), torch.tensor([3])))  # seen mixed
    assert not statistics.observed
    assert statistics.finish(None) == {}
    assert not {"train/memorised", "refine/threshold_p50"} & set(statistics.finish(TARGETS))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-math.inf, -1.5, 0.0, 0.1, 0.2, 0.25, 7.0]), st.booleans()), min_size=1, max_size=40)
)
def test_area_under_roc_is_that_of_scikit_learn(samples: list[tuple[float, bool]]) -> None:
    scores, positive = zip(*samples, strict=True)
    found = area_under_roc(torch.tensor(scores), torch.tensor(positive))
    if len(set(positive)) < 2:
        assert found == {}
        return
    expected = roc_auc_score(positive, np.maximum(scores, -1e6))  # it takes no infinite score
    assert float(found["refine/auroc"]) == pytest.approx(expected, abs=1e-12)


def test_area_under_roc_of_many_samples_is_exact() -> None:
    """Sums of ranks beyond what float32 holds."""
    num = 60_000
    score = torch.arange(num).float()
    found = area_under_roc(score, torch.arange(num) % 2 == 1)
    assert float(found["refine/auroc"]) == 0.5 + 0.5 / (num / 2)
    assert area_under_roc(torch.tensor([0.0, math.nan]), torch.tensor([True, False])) == {}


# -- the loop ---------------------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """A method whose losses and predictions are laid down: per epoch, batches of (rows, loss)."""

    def __init__(self, script: list[list[tuple[list[int], float]]], predicted: int = 0) -> None:
        super().__init__()
        self.script = script
        self.predicted = predicted

    def batches(self, data: TrainData, clock: Clock) -> Iterator[tuple[list[int], float]]:
        return iter(self.script[clock.epoch])

    def step(self, batch: tuple[list[int], float], clock: Clock) -> Step:
        rows, loss = batch
        return Step(torch.tensor(loss), torch.tensor(rows), scalars={"more/rows": torch.tensor(float(len(rows)))})

    def predict(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(images),), self.predicted), 10).float()

    def learning_rate(self, clock: Clock) -> float:
        return 0.5 - 0.1 * clock.epoch

    def refined_labels(self) -> None:
        return None


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(DataSpec(data="digits", noise="symmetric:0.4"))


def run(method: Any, digits: Dataset, **options: Any) -> list[dict[str, float]]:
    statistics = RefinementStatistics(digits.train.labels, digits.train_truth, digits.num_classes)
    return [epoch.metrics for epoch in fit(method, digits, statistics, seed=0, **options)]


def test_an_epoch_is_the_mean_over_its_samples(digits: Dataset) -> None:
    script = [[([0, 1, 2], 1.0), ([3], 5.0)], [([0, 1], 0.5), ([2, 3], 1.5)]]
    first, second = run(Scripted(script, predicted=3), digits, epochs=2, test_at={2})
    assert (first["train/loss"], second["train/loss"]) == (2.0, 1.0)
    assert (first["more/rows"], second["more/rows"]) == (2.5, 2.0)
    assert (first["lr"], second["lr"]) == (0.5, 0.4)
    assert first["val/accuracy"] == pytest.approx(float((digits.validation.labels == 3).float().mean()))
    assert digits.test is not None
    assert second["test/accuracy"] == pytest.approx(float((digits.test.labels == 3).float().mean()))
    assert "test/accuracy" not in first
    assert "refine/auroc" in second, "a pass of its own at the tested epochs for a method that saw no unmixed batch"
    assert "refine/auroc" not in first
    assert first["seconds"] > 0
    assert first["samples_per_second"] > 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_divergence(digits: Dataset, loss: float) -> None:
    with pytest.raises(Diverged, match=r"train/loss is (nan|inf) in epoch 2"):
        run(Scripted([[([0], 1.0)], [([0], 1.0), ([1], loss)]]), digits, epochs=2)


def test_predictions_that_are_no_numbers_are_a_divergence(digits: Dataset) -> None:
    class Broken(Scripted):
        def predict(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 10), math.nan)

    with pytest.raises(Diverged, match="a prediction is not a finite number"):
        run(Broken([[([0], 1.0)]]), digits, epochs=1)


def test_accuracy_is_measured_in_evaluation_mode_in_parts(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Watched(Scripted):
        def predict(self, images: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            sizes.append(len(images))
            return super().predict(images)

    monkeypatch.setattr("training.fit.EVALUATION_BATCH", 100)
    labels = torch.zeros(250, dtype=torch.int64)
    assert accuracy(Watched([]), Labelled(torch.zeros(250, 1, 8, 8, dtype=torch.uint8), labels)) == 1.0  # type: ignore[arg-type]
    assert sizes == [100, 100, 50]


def test_the_window_of_the_objective() -> None:
    assert {epochs: objective_window(epochs) for epochs in (1, 4, 10, 14, 16, 30, 200)} == {
        1: 1,
        4: 1,
        10: 1,
        14: 1,
        16: 2,
        30: 3,
        200: 20,
    }
    assert when_tested(30, [3, 9, 27]) == {3, 6, 9, 12, 15, 18, 21, 24, 27, 30}
    assert when_tested(4, [1]) == {1, 2, 3, 4}
    assert when_tested(25, [3, 9]) >= {3, 9, 25}


# -- an experiment ----------------------------------------------------------------------------------------------------


def make_recipe(method: str = "alr", epochs: int = 5, **fields: Any) -> Recipe:
    values = {"batch_size": 256, **fields.pop("values", {})}
    return Recipe(method, values, data="digits", noise="symmetric:0.4", model="mlp", epochs=epochs, **{"seed": 5, **fields})


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """A nested state as leaves by name."""
    if isinstance(state, dict):
        return {leaf: value for key, part in state.items() for leaf, value in flat(part, f"{name}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)), name)
    return {name: state}


def same(one: Any, other: Any) -> bool:
    one, other = flat(one), flat(other)
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name] for name, value in one.items()
    )


def outcome(experiment: TrialRun) -> Any:
    """All that must not depend on interruptions."""
    history = [
        (record.epoch, record.objective, {k: v for k, v in record.metrics.items() if k not in CLOCK_METRICS})
        for record in experiment.history
    ]
    return {"history": history, "method": experiment.method.state_dict(), "statistics": experiment.statistics.state_dict()}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What two methods come to in one go: one network with targets, and two networks."""
    found = {}
    for method in ("alr", "co-teaching"):
        experiment = TrialRun(make_recipe(method))
        assert [record.epoch for record in experiment] == [1, 2, 3, 4, 5]
        found[method] = outcome(experiment)
    return found


@pytest.mark.parametrize("method", ["alr", "co-teaching"])
def test_resumed_is_the_same_bit_for_bit(tmp_path: Path, undisturbed: dict[str, Any], method: str) -> None:
    """Saved after epochs 1 and 3, broken off after 2 and 3; the second process starts from what the first had saved."""
    first = TrialRun(make_recipe(method), tmp_path)
    first.advance()
    first.save()
    first.advance()
    second = TrialRun(make_recipe(method), tmp_path)
    assert (second.epochs_done, second.history) == (1, first.history[:1])
    second.advance()
    assert outcome(second)["history"] == outcome(first)["history"]
    second.advance()
    second.save()
    third = TrialRun(make_recipe(method), tmp_path)
    assert [record.epoch for record in third] == [4, 5]
    assert same(outcome(third), undisturbed[method])
    assert third.history[:3] == second.history


def test_what_is_compared_would_show_a_difference(undisturbed: dict[str, Any]) -> None:
    other = TrialRun(make_recipe(seed=6))
    list(other)
    assert not same(outcome(other), undisturbed["alr"])
    assert any(isinstance(leaf, Tensor) for leaf in flat(undisturbed["alr"]).values())
    assert {name.split("/")[1] for name in flat(undisturbed["alr"])} == {"history", "method", "statistics"}


def test_the_objective_is_the_mean_over_the_window() -> None:
    experiment = TrialRun(make_recipe("ce", epochs=20))
    list(experiment)
    values = [record.metrics["val/accuracy"] for record in experiment.history]
    assert len(set(values)) > 5
    assert experiment.history[0].objective == values[0]
    for epoch in range(2, 21):
        assert experiment.history[epoch - 1].objective == (values[epoch - 2] + values[epoch - 1]) / 2


def test_building_one_touches_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    experiment = TrialRun(make_recipe(), folder)
    assert not folder.parent.exists()
    experiment.save()
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


def test_nothing_new_is_not_saved_again(tmp_path: Path) -> None:
    experiment = TrialRun(make_recipe(), tmp_path)
    experiment.advance()
    experiment.save()
    before = (tmp_path / "checkpoint.pt").stat()
    experiment.save()
    TrialRun(make_recipe(), tmp_path).save()
    after = (tmp_path / "checkpoint.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def starts_over(folder: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        experiment = TrialRun(make_recipe(), folder)
    assert experiment.epochs_done == 0
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert "the trial starts over" in caplog.messages[0]
    assert experiment.advance().epoch == 1


def test_a_checkpoint_that_cannot_be_read_costs_its_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint.pt"
    experiment = TrialRun(make_recipe(), tmp_path)
    experiment.advance()
    experiment.save()
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"nonsense" * 20):
        path.write_bytes(content)
        starts_over(tmp_path, caplog, f"checkpoint {path} is damaged")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1  # inside a weight, which torch's reader would take for good
    path.write_bytes(flipped)
    starts_over(tmp_path, caplog, f"checkpoint {path} is damaged")
    checkpoint.save(path, {"other": 1})
    starts_over(tmp_path, caplog, "belongs to another configuration")


@pytest.mark.parametrize("change", [{"seed": 6}, {"values": {"lr": 0.01}}, {"epochs": 6}, {"noise_seed": 1}])
def test_a_checkpoint_of_another_configuration_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    experiment = TrialRun(make_recipe(**change), tmp_path)
    experiment.advance()
    experiment.save()
    starts_over(tmp_path, caplog, "belongs to another configuration")


def test_a_recipe_survives_the_way_to_a_worker() -> None:
    recipe = make_recipe(values={"lr": 0.1 + 0.2, "weight_decay": 1e-05})
    again = Recipe(**pickle.loads(pickle.dumps(vars(recipe))))
    assert (again, again.fingerprint) == (recipe, recipe.fingerprint)
    assert dataclasses.replace(recipe, seed=6).fingerprint != recipe.fingerprint


def test_the_fingerprint_is_that_of_checkpoints_of_the_first_version() -> None:
    """The number was printed by version f27d56c, whose recipes had no fields that are newer."""
    recipe = Recipe("ce", {"lr": 0.05}, "mlp", 3, 1, data="digits", noise="symmetric:0.4", noise_seed=2, table="ab")
    assert recipe.fingerprint == "bd0021618d37b447ff7d82d32d2bc9ea029b1ae0bd898af536f1f272f1d02128"


# -- checkpoints ------------------------------------------------------------------------------------------------------

OLD: dict[str, Any] = {"weights": torch.arange(5000.0), "history": [{"epoch": 1, "value": 0.1}], "none": None}
NEW: dict[str, Any] = {**OLD, "weights": torch.arange(5000.0) + 1, "history": [{"epoch": 2, "value": 0.2}]}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.pt"
    checkpoint.save(path, OLD, read_back=True)
    assert same(checkpoint.load(path), OLD)
    assert same(torch.load(path, weights_only=True), OLD), "torch opens it too"
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize("when", ["first half", "all but the name", "renamed"])
def test_a_kill_leaves_the_old_state_or_the_new(tmp_path: Path, when: str) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, OLD)

    def killed() -> None:
        syncs = []

        def fsync(descriptor: int) -> None:
            syncs.append(descriptor)
            if len(syncs) == 1 and when == "first half":
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            if len(syncs) == (2 if when == "renamed" else 1):
                os._exit(9)

        os.fsync = fsync
        checkpoint.save(path, NEW)

    assert in_child(killed) == 9
    assert same(checkpoint.load(path), NEW if when == "renamed" else OLD)
    checkpoint.save(path, NEW)
    assert same(checkpoint.load(path), NEW)


@pytest.mark.parametrize("room", [0, 300, 8192, 20_000])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_state(tmp_path: Path, room: int) -> None:
    """At every size; torch's own writer would say RuntimeError, which a trial takes for its failure."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, OLD)
    assert path.stat().st_size > 20_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            checkpoint.save(path, NEW)
        except OSError:
            os._exit(7)

    assert in_child(limited) == 7
    assert same(checkpoint.load(path), OLD)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_any_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, OLD)
    whole = path.read_bytes()
    stream = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole[: stream.choice([len(whole), stream.randrange(len(whole))])])
        for _ in range(stream.choice([1, 1, 5])):
            if damaged:
                damaged[stream.randrange(len(damaged))] ^= stream.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(UnreadableCheckpoint, match="is damaged"):
            checkpoint.load(path)


class Disturbed:
    """Reads of files fail, the next ``times`` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, error: OSError) -> None:
        self.times = times
        read = Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            self.times -= 1
            if self.times >= 0:
                raise error
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        monkeypatch.setattr(checkpoint, "PAUSE", 0.01)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EISDIR])
def test_a_storage_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A trial that took it for damage would start over, and then write over what it could not read."""
    experiment = TrialRun(make_recipe(), tmp_path)
    experiment.advance()
    experiment.save()
    path = tmp_path / "checkpoint.pt"
    saved = path.read_bytes()
    disturbed = Disturbed(monkeypatch, checkpoint.ATTEMPTS, OSError(number, os.strerror(number)))
    with pytest.raises(Away, match=f"^checkpoint {path} cannot be read: {os.strerror(number)}$"):
        TrialRun(make_recipe(), tmp_path)
    assert disturbed.times == 0
    assert path.read_bytes() == saved
    disturbed.times = checkpoint.ATTEMPTS - 1
    assert TrialRun(make_recipe(), tmp_path).epochs_done == 1


def test_a_first_save_that_cannot_be_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disturbed(monkeypatch, checkpoint.ATTEMPTS, OSError(errno.EIO, "x"))
    with pytest.raises(OSError, match="cannot be read: x"):
        checkpoint.save(tmp_path / "checkpoint.pt", OLD, read_back=True)
    assert list(tmp_path.iterdir()) == []


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_checkpoint_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pickle with code in it, with the right checksum and all: refused, and the trial starts over."""
    path, sprung = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    in_zip = io.BytesIO()
    torch.save({"recipe": make_recipe().fingerprint, "method": Trap(sprung)}, in_zip)
    for payload in (
        in_zip.getvalue(),
        pickle.dumps({"recipe": Trap(sprung)}, protocol=2),
        pickle.dumps(Trap(sprung), protocol=2),
    ):
        path.write_bytes(payload + hashlib.sha256(payload).digest())
        with pytest.raises(UnreadableCheckpoint, match="cannot be read"):
            checkpoint.load(path)
        starts_over(tmp_path, caplog, "cannot be read")
        assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung))).close()
    assert sprung.exists(), "the trap works"


def test_a_state_that_could_not_be_loaded_again_is_found_at_the_first_save(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UnreadableCheckpoint):
        checkpoint.save(path, {"lr": np.float64(0.1), "more": np.array([1.0])}, read_back=True)
    assert list(tmp_path.iterdir()) == []


def test_an_epoch_record_survives_json_and_checkpoint(tmp_path: Path) -> None:
    record = EpochRecord(3, 1.7e9 + 0.123456, 1 / 3, {"val/accuracy": 0.1 + 0.2, "train/loss": 1e-17})
    checkpoint.save(tmp_path / "c.pt", {"history": [dataclasses.asdict(record)]})
    (held,) = checkpoint.load(tmp_path / "c.pt")["history"]
    assert EpochRecord(**held) == record


@pytest.mark.parametrize(("size", "images"), [(32, 1024), (64, 1024), (128, 512), (256, 128), (4096, 1)])
def test_images_per_batch_of_an_evaluation_on_a_gpu(size: int, images: int) -> None:
    labelled = Labelled(torch.empty(2, 3, size, size, device="meta"), torch.empty(2, device="meta"))
    assert labelled.fitting(1024) == images


@pytest.mark.parametrize(("size", "images"), [(8, 1024), (32, 64), (64, 16), (256, 1), (512, 1)])
def test_images_per_batch_of_an_evaluation_on_a_cpu(size: int, images: int) -> None:
    assert Labelled(torch.empty(1, 1, 1, 1).expand(2, 3, size, size), torch.empty(2)).fitting(1024) == images


@pytest.mark.parametrize("total", [10**9, 10**5])
def test_data_move_to_a_device_once_or_stay_where_they_do_not_fit(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """115,008 bytes of digits: a table larger than a quarter of the trial's share of the device stays, and batches move."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (total, total))
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda: 0.5)
    monkeypatch.setattr("data.memory._IMAGES", {})
    moved, again = (make_recipe("ce", noise_seed=total + more).dataset("meta") for more in (0, 1))
    assert moved.train.images is again.train.images or total != 10**9, "one table for all noise seeds"
    parts = [moved.train, moved.validation, moved.test]
    assert moved.train_truth is not None
    assert moved.train_truth.is_meta
    assert all(part is not None and part.labels.is_meta for part in parts)
    assert {part.images.device.type for part in parts if part} == {"meta" if total == 10**9 else "cpu"}
    assert len({id(part.images) for part in parts if part}) == 1, "one table for all"
    batch = next(moved.train.in_order(10)) if total == 10**9 else moved.validation.gather(torch.arange(10))
    assert batch.images.is_meta
    assert batch.images.shape == (10, 1, 8, 8)
