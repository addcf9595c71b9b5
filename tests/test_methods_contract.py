"""What every registered method must do, whatever it learns. No test here knows one method from another.

Run as a program it is the fresh process of the resume tests: ``python -m tests.test_methods_contract FOLDER``.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import methods
from data.seeds import generator
from data.table import Batch, TrainData
from hparams import build, declared
from methods import METHODS, base
from methods.base import Task
from tests.tiny import (
    BATCH,
    EPOCHS,
    InOrder,
    K,
    N,
    TenThousandfold,
    assert_finite,
    differences,
    extreme_net,
    finish,
    flat,
    flat_net,
    make,
    networks,
    per_sample,
    tiny_data,
    tiny_task,
    train,
    trusted_data,
)

RESUMED_AT = (1, 4)
ROOT = Path(__file__).parent.parent
every_method = pytest.mark.parametrize("name", METHODS)


# Resume


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every method at two epochs, and what a fresh process made of each."""
    folder = tmp_path_factory.mktemp("resumed")
    data = tiny_data()
    for name in METHODS:
        for epoch in RESUMED_AT:
            method = make(name, tiny_task(data))
            finish(method, data, 0, epoch)
            torch.save(method.state_dict(), folder / f"{name}.{epoch}.half")
        whole = make(name, tiny_task(data))
        finish(whole, data)
        torch.save(whole.state_dict(), folder / f"{name}.whole")
    subprocess.run([sys.executable, "-m", "tests.test_methods_contract", folder], cwd=ROOT, check=True, timeout=600)
    return folder


def resume_all(folder: Path) -> None:
    """The fresh process: goes on from every checkpoint to the end."""
    torch.set_num_threads(1)
    data = tiny_data()
    for path in sorted(folder.glob("*.half")):
        name, epoch, _ = path.name.split(".")
        method = make(name, tiny_task(data), seed=1)  # another initialisation: all must come from the checkpoint
        method.load_state_dict(torch.load(path, weights_only=True))
        finish(method, data, int(epoch))
        torch.save(method.state_dict(), path.with_suffix(".done"))


@every_method
@pytest.mark.parametrize("epoch", RESUMED_AT)
def test_a_fresh_process_resumes_bit_for_bit(name: str, epoch: int, resumed: Path) -> None:
    half, done, whole = (
        torch.load(resumed / f"{name}.{end}", weights_only=True) for end in (f"{epoch}.half", f"{epoch}.done", "whole")
    )
    assert differences(done, whole) == []
    assert any("momentum_" in key for key in differences(half, whole)), "the optimiser is part of the state"
    fresh = make(name, tiny_task(tiny_data()), seed=1)  # what the new process started with
    changed = differences(fresh.state_dict(), whole)
    assert all(any(key in path for path in changed) for key in per_sample(fresh))


@every_method
def test_the_keys_of_the_state_are_fixed_at_construction(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data))
    keys = list(method.state_dict())
    for epoch in range(EPOCHS):
        for _ in train(method, data, epoch, epoch + 1):
            assert list(method.state_dict()) == keys
    assert list(method.state_dict()) == keys


@every_method
def test_no_attribute_outside_the_state_changes_what_is_learnt(name: str) -> None:
    """Training on with one object, and with a new one per epoch that gets the state alone, is the same."""
    data = tiny_data()
    carried = make(name, tiny_task(data))
    state = carried.state_dict()
    for epoch in range(EPOCHS):
        fresh = make(name, tiny_task(data), seed=epoch + 1)
        fresh.load_state_dict(state)
        finish(fresh, data, epoch, epoch + 1)
        finish(carried, data, epoch, epoch + 1)
        state = fresh.state_dict()
        assert differences(state, carried.state_dict()) == []


# What a method may know


def test_a_task_holds_nothing_that_a_method_must_not_know() -> None:
    allowed = {"num_classes", "labels", "make_net", "plain", "weak", "strong", "trusted"}
    assert {field.name for field in dataclasses.fields(Task)} == allowed
    assert {field.name for field in dataclasses.fields(TrainData)} == {"images", "labels", "rows"}
    assert {field.name for field in dataclasses.fields(Batch)} == {"images", "labels", "index"}


@every_method
def test_a_label_acts_through_the_batches_that_it_is_in(name: str) -> None:
    data = tiny_data()
    parts = list(torch.arange(N).split(BATCH))

    def first_step(row: int) -> dict[str, Any]:
        labels = data.labels.clone()
        labels[row] = (labels[row] + 1) % K
        other = TrainData(data.images, labels)
        method = make(name, tiny_task(other))
        steps = train(method, InOrder.of(other, parts))
        next(steps)
        return networks(method)

    assert differences(first_step(20), first_step(30)) == [], "rows 20 and 30 are not in the first batch"
    assert differences(first_step(0), first_step(30)) != [], "row 0 is"


@every_method
def test_renumbering_the_samples_renumbers_their_state_and_nothing_else(name: str) -> None:
    data = tiny_data()
    parts = list(torch.randperm(N, generator=generator("order")).split(BATCH))[:-1]  # one row is never visited
    order = torch.randperm(N, generator=generator("renumbering"))  # row i of the second set is row order[i] of the first
    renumbered = TrainData(data.images[order], data.labels[order])
    first, second = make(name, tiny_task(data)), make(name, tiny_task(renumbered))
    second.load_state_dict(first.state_dict() | {key[1:]: value[order] for key, value in per_sample(first).items()})
    steps = finish(first, InOrder.of(data, parts))
    finish(second, InOrder.of(renumbered, [order.argsort()[part] for part in parts]))
    assert steps
    assert differences(networks(first), networks(second)) == []
    assert differences({key: value[order] for key, value in per_sample(first).items()}, per_sample(second)) == []
    refined, moved = first.refined_labels(), second.refined_labels()
    assert (refined is None) == (moved is None)
    if refined is not None and moved is not None:
        assert torch.equal(refined[order], moved)
        assert not torch.equal(refined, moved)


# Steps and predictions


@every_method
def test_the_first_epoch_visits_every_sample_and_steps_are_detached(name: str) -> None:
    """Later a method may leave samples out."""
    data = tiny_data()
    for epoch in (0, EPOCHS - 1):
        steps = finish(make(name, tiny_task(data)), data, epoch, epoch + 1)
        visited = torch.cat([step.index for _, step in steps]).unique().tolist()
        assert visited == list(range(N)) if epoch == 0 else set(visited) <= set(range(N))
        for _, step in steps:
            assert step.loss.shape == ()
            assert not step.loss.requires_grad
            assert step.index.dtype == torch.int64
            if step.probabilities is not None:
                assert not step.probabilities.requires_grad
                assert step.probabilities.dtype == torch.float32
                assert step.probabilities.shape == (len(step.index), K)
                torch.testing.assert_close(step.probabilities.sum(1), torch.ones(len(step.index)))


@every_method
def test_predictions_are_probabilities_and_leave_no_trace(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data))
    finish(method, data, 0, 2)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in flat(method.state_dict()).items()}
    random_state = torch.get_rng_state()
    method.eval()
    with torch.no_grad():
        probabilities = method.predict(data.images)
        alone = method.predict(data.images[3:4])
    assert probabilities.dtype == torch.float32
    assert probabilities.shape == (N, K)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(N))
    torch.testing.assert_close(alone, probabilities[3:4])
    assert differences(before, flat(method.state_dict())) == []
    assert torch.equal(torch.get_rng_state(), random_state)


@every_method
def test_refined_labels_are_distributions_that_start_at_the_given_labels(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data))
    start = method.refined_labels()
    finish(method, data)
    refined = method.refined_labels()
    assert (start is None) == (refined is None)
    if start is None or refined is None:
        return
    assert torch.equal(start.argmax(1), data.labels)
    assert refined.shape == (N, K)
    assert bool((refined >= 0).all())
    torch.testing.assert_close(refined.sum(1), torch.ones(N))
    assert not torch.equal(start, refined), "they move, and what was handed out before stays as it was"


@every_method
def test_clean_labels_are_learnt(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data))
    finish(method, data)
    method.eval()
    with torch.no_grad():
        accuracy = (method.predict(data.images).argmax(1) == data.labels).float().mean().item()
    assert accuracy > 0.75  # a guess is right in a quarter; six epochs are few for ELR


# Awkward data


@every_method
@pytest.mark.parametrize("epoch", [0, EPOCHS - 1])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, epoch: int) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data, extreme_net), lr=1e-6)
    largest = []
    for module in method.modules():
        if isinstance(module, TenThousandfold):
            module.register_forward_hook(lambda _module, _images, logits: largest.append(logits.abs().amax().item()))
    assert_finite(method, finish(method, data, epoch, epoch + 1))
    assert max(largest) > 1e3


@every_method
def test_a_class_without_samples(name: str) -> None:
    data = tiny_data(num_classes=K - 1)
    assert data.labels.max() == K - 2
    method = make(name, tiny_task(data))
    assert_finite(method, finish(method, data))


@every_method
def test_a_last_batch_of_one_image_joins_the_one_before(name: str) -> None:
    data = tiny_data()
    assert N % BATCH == 1
    method = make(name, tiny_task(data))
    steps = finish(method, data, 0, 1)
    assert min(len(step.index) for _, step in steps) > 1
    assert_finite(method, steps)


@every_method
def test_a_training_set_smaller_than_a_batch(name: str) -> None:
    data = tiny_data()
    method = make(name, tiny_task(data), batch_size=1000)
    assert_finite(method, finish(method, data))


@every_method
def test_two_clean_samples_are_enough_where_any_are_needed(name: str) -> None:
    """As few as a launch takes: one is refused there, as batch normalisation cannot train on one image."""
    data, trusted = tiny_data(), trusted_data()
    two = TrainData(trusted.images[:2], trusted.labels[:2])
    method = make(name, dataclasses.replace(tiny_task(data, flat_net), trusted=two))
    assert_finite(method, finish(method, data))


# Declarations


@every_method
def test_declarations_are_consistent(name: str) -> None:
    for parameter in methods.parameters(name).values():
        assert parameter.check(parameter.default) == parameter.default
        assert parameter.meaning
        drawn = parameter.search
        if drawn is None:
            continue
        assert parameter.legal is not None
        assert drawn.low in parameter.legal
        assert drawn.high in parameter.legal
        assert drawn.low < drawn.high
        assert not drawn.log or drawn.low > 0
        assert drawn.nearest(parameter.default) == parameter.default, "the default is the first trial"


@every_method
def test_what_a_method_says_about_itself(name: str) -> None:
    method = METHODS[name]
    assert method.summary
    assert "\n" not in method.summary
    module = sys.modules[method.__module__].__doc__ or ""
    for part in ("Differs from the paper:", "Differs from the official code:", "State:"):
        assert part in module, f"{method.__module__} does not say: {part}"
    assert method.Config.__doc__
    assert name == name.lower()


@every_method
def test_begins_is_a_fraction_of_the_budget(name: str) -> None:
    config = METHODS[name].Config
    assert 0 <= config().begins() < 1
    if "warmup" in declared(config):
        assert build(config, {"warmup": 0.125}).begins() == 0.125


def test_begins_of_the_first_six() -> None:
    begins = {name: METHODS[name].Config().begins() for name in ("ce", "gce", "elr", "selc", "alr", "co-teaching")}
    assert begins == {"ce": 0, "gce": 0, "elr": 0, "selc": 0.15, "alr": 0.15, "co-teaching": 0}


@every_method
def test_names_in_the_ledger_are_shared_where_the_field_is(name: str) -> None:
    names = list(methods.parameters(name))
    shared = [field for field in names if "." not in field]
    assert shared == list(declared(base.Config)), "no method redeclares a shared field"
    own = [field for field in declared(METHODS[name].Config) if field not in shared]
    assert names == shared + [f"{name}.{field}" for field in own]


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'dividemax'; known are alr, "):
        methods.find_method("dividemax")
    with pytest.raises(ValueError, match=r"unknown method 'coteaching'; .*did you mean 'co-teaching'\?"):
        methods.find_method("coteaching")
    with pytest.raises(ValueError, match=r"unknown method 'zzz'; known are [a-z, -]*$"):
        methods.parameters("zzz")
    assert methods.find_method("alr") is METHODS["alr"]


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
