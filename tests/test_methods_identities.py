"""Each method against its own equations: limits in which it is another method, and updates worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from data.seeds import generator
from hparams import build
from losses import clipped_probabilities, cross_entropy, entropy, soft_cross_entropy
from methods.alr import ALR, ALRConfig
from methods.base import Clock, Config, Learner, first_epoch, half_cosine, memory_momentum
from methods.co_teaching import CoTeaching, CoTeachingConfig, small_losses
from methods.elr import EarlyLearningRegularization
from methods.selc import SELC
from tests.loss_cases import few
from tests.mutation import Mutation
from tests.tiny import (
    BATCH,
    EPOCHS,
    InOrder,
    K,
    N,
    differences,
    finish,
    given_one_hot,
    linear_net,
    make,
    net_state,
    nets_in_turn,
    one_step_gradient,
    plain,
    tiny_data,
    tiny_task,
    train,
    trained,
    without_dropout,
)
from training.trial_run import Recipe, TrialRun

# The optimiser


@pytest.mark.parametrize("values", [{}, {"momentum": 0.0}, {"weight_decay": 0.0, "lr": 0.3}])
def test_a_learner_steps_as_torchs_sgd_does(values: dict[str, float]) -> None:
    """Parameters that a loss does not depend on stay as they are, momentum and weight decay included."""
    config = build(Config, values)
    torch.manual_seed(0)
    net = nn.ModuleDict({"one": nn.Linear(5, K), "other": nn.Linear(5, K)})
    learner, twin = Learner(net, config), copy.deepcopy(net)
    theirs = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    start = copy.deepcopy(net.state_dict())
    for epoch in range(EPOCHS):
        rate, images, labels = half_cosine(config.lr, epoch / EPOCHS), torch.randn(BATCH, 5), torch.randint(K, (BATCH,))
        part = "one" if epoch % 2 else "other"
        learner.update(cross_entropy(net[part](images), labels).mean(), rate)
        theirs.param_groups[0]["lr"] = rate
        theirs.zero_grad()
        cross_entropy(twin[part](images), labels).mean().backward()
        theirs.step()
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value)
        if epoch == 0:
            assert differences(start, net.state_dict()) == ["/other.bias", "/other.weight"]


def test_a_gradient_in_another_memory_format_is_the_same_gradient() -> None:
    """Weights are stored channels last; a gradient that a method makes itself may not be."""
    stepped = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        net = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        gradient = torch.randn(6, 4, 3, 3).contiguous(memory_format=layout)
        learner = Learner(net, Config(lr=0.1))
        learner.descend([gradient], 0.1)
        learner.descend([gradient], 0.1)
        stepped.append(net.weight.detach())
    torch.testing.assert_close(*stepped, rtol=0, atol=0)


# SELC and ALR


def test_alr_without_entropy_is_selc_bit_for_bit() -> None:
    data = tiny_data()
    alr, selc = make("alr", tiny_task(data), entropy_weight=0.0), make("selc", tiny_task(data))
    for epoch in range(EPOCHS):
        ours = finish(alr, data, epoch, epoch + 1)
        theirs = finish(selc, data, epoch, epoch + 1)
        assert differences(alr.state_dict(), selc.state_dict()) == [], "weights, momenta and targets"
        assert [step.loss.item() for _, step in ours] == [step.loss.item() for _, step in theirs]
    assert not torch.equal(alr.targets, given_one_hot()), "the corrected labels were in play"
    assert differences(trained("alr").state_dict(), selc.state_dict()), "with entropy it is another method"


def test_selc_and_alr_are_cross_entropy_until_they_begin() -> None:
    data = tiny_data()
    warmup = 0.5
    begins = first_epoch(warmup, EPOCHS)
    methods = {
        "ce": make("ce", tiny_task(data)),
        "selc": make("selc", tiny_task(data), warmup=warmup),
        "alr": make("alr", tiny_task(data), warmup=warmup),
    }
    for method in methods.values():
        finish(method, data, 0, begins)
    for name in ("selc", "alr"):
        assert differences(net_state(methods["ce"]), net_state(methods[name])) == []
        assert torch.equal(methods[name].targets, given_one_hot()), "nothing is touched in the warm-up"
        finish(methods[name], data, begins, begins + 1)
        touched = (methods[name].targets != given_one_hot()).any(dim=1)
        assert bool(touched.all()), "every label is, in the epoch after it"


def test_selc_that_never_begins_is_cross_entropy_bit_for_bit() -> None:
    assert differences(net_state(trained("selc", warmup=0.999)), net_state(trained("ce"))) == []


def test_refinement_begins_at_once_without_warm_up() -> None:
    selc = make("selc", tiny_task(tiny_data()), warmup=0.0)
    next(train(selc, tiny_data()))
    assert not torch.equal(selc.targets, given_one_hot())


@pytest.mark.parametrize("name", ["selc", "alr"])
def test_targets_are_the_unrolled_running_mean_of_the_training_predictions(name: str) -> None:
    data = tiny_data()
    warmup, memory = 1 / EPOCHS, 0.5
    method = make(name, tiny_task(data), warmup=warmup, memory=memory)
    predictions: list[Tensor] = []
    for epoch in range(EPOCHS):
        seen = torch.zeros(N, K)
        for _, step in train(method, data, epoch, epoch + 1):
            seen[step.index] = step.probabilities
        predictions.append(seen)
    a = math.exp(-1 / (memory * EPOCHS))
    visits = EPOCHS - 1
    expected = a**visits * given_one_hot()
    for j, p in enumerate(predictions[1:], start=1):
        expected += (1 - a) * a ** (visits - j) * p
    torch.testing.assert_close(method.targets, expected)
    torch.testing.assert_close(method.targets.sum(1), torch.ones(N))
    assert 0.1 < a**visits < 0.9, "both parts matter"


def test_the_published_momentum_is_the_default_memory() -> None:
    assert memory_momentum(build(SELC.Config, {}).memory, 200) == pytest.approx(0.9, abs=1e-3)
    assert memory_momentum(build(EarlyLearningRegularization.Config, {}).memory, 120) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.2, 1.6])
def test_alr_steps_along_its_gradient_with_the_updated_targets(entropy_weight: float) -> None:
    alr = make("alr", tiny_task(tiny_data()), entropy_weight=entropy_weight, memory=0.1)
    grads, step, batch = one_step_gradient(alr, Clock(EPOCHS - 1, EPOCHS))
    p = step.probabilities
    t = alr.targets[batch.index]
    assert not torch.equal(t, given_one_hot()[batch.index])
    h = -(p * p.log()).sum(1, keepdim=True)
    torch.testing.assert_close(-BATCH * grads, (t - p) + entropy_weight * p * (p.log() + h), rtol=1e-4, atol=1e-6)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits and targets [B, K], float64."""
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 12)))
    logits = draw(st.floats(0.1, 5.0)) * torch.randn(shape, generator=stream, dtype=torch.float64)
    return logits, torch.randn(shape, generator=stream, dtype=torch.float64).mul(2).softmax(1)


def alr_loss(logits: Tensor, targets: Tensor, entropy_weight: float) -> Tensor:
    alr = ALR(ALRConfig(entropy_weight=entropy_weight), tiny_task(tiny_data(), lambda: nn.Linear(1, 1)))
    return alr.refinement_loss(logits, targets)


@few
@given(predictions(), st.floats(0, 2))
def test_alr_gradient_in_closed_form(case: tuple[Tensor, Tensor], weight: float) -> None:
    z, t = case
    z.requires_grad_()
    (grads,) = torch.autograd.grad(alr_loss(z, t, weight).sum(), z)
    p = z.detach().softmax(1)
    h = -(p * p.log()).sum(1, keepdim=True)
    torch.testing.assert_close(-grads, (t - p) + weight * p * (p.log() + h))


@few
@given(predictions(), st.floats(0, 2))
def test_alr_is_soft_bootstrapping_on_top_of_selc(case: tuple[Tensor, Tensor], weight: float) -> None:
    z, t = case
    p = z.softmax(1)
    mixed = (t + weight * p) / (1 + weight)
    torch.testing.assert_close(alr_loss(z, t, weight), (1 + weight) * soft_cross_entropy(z, mixed))


@few
@given(predictions())
def test_the_entropy_term_raises_the_classes_above_its_threshold_and_no_others(case: tuple[Tensor, Tensor]) -> None:
    z = case[0].requires_grad_()
    h = entropy(z)
    (grads,) = torch.autograd.grad(h.sum(), z)
    p, threshold = z.detach().softmax(1), (-h.detach()).exp().unsqueeze(1)
    clear = (p / threshold).log().abs() > 1e-6
    assert torch.equal((grads < 0)[clear], (p > threshold)[clear])
    top = p.argmax(1, keepdim=True)
    assert bool((grads.gather(1, top) <= 1e-12).all()), "the most probable class is never lowered"


def test_with_labels_at_the_prediction_selc_rests_and_alr_hardens() -> None:
    z = torch.tensor([[1.0, 0.8, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    p = z.detach().softmax(1)
    (rest,) = torch.autograd.grad(alr_loss(z, p, 0.0).sum(), z)
    torch.testing.assert_close(rest, torch.zeros_like(rest))
    (pull,) = torch.autograd.grad(alr_loss(z, p, 0.2).sum(), z)
    assert [value < 0 for value in pull[0].tolist()] == [value > math.exp(-entropy(z).item()) for value in p[0].tolist()]
    assert pull[0, 0] < 0 < pull[0, 2]


@pytest.mark.parametrize("name", ["selc", "alr"])
def test_labels_that_never_forget_are_the_given_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum of 1: cross-entropy bit for bit, where nothing hardens."""
    monkeypatch.setattr("methods.selc.memory_momentum", lambda memory, epochs: 1.0)
    values = {"warmup": 0.0} | ({"entropy_weight": 0.0} if name == "alr" else {})
    method = trained(name, **values)
    assert torch.equal(method.targets, given_one_hot())
    assert differences(net_state(method), net_state(trained("ce"))) == []


def test_labels_that_remember_nothing_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum of 0: labels are the prediction itself, whose cross-entropy has no gradient there."""
    monkeypatch.setattr("methods.selc.memory_momentum", lambda memory, epochs: 0.0)
    method = make("selc", tiny_task(tiny_data()), warmup=0.0, weight_decay=0.0, momentum=0.0, lr=0.5)
    before = {name: w.detach().clone() for name, w in method.named_parameters()}
    finish(method, tiny_data())
    for name, w in method.named_parameters():
        torch.testing.assert_close(w.detach(), before[name], rtol=0, atol=1e-6)
    assert not torch.equal(method.targets, given_one_hot())


def test_labels_harden_gradually_and_the_hard_ones_are_the_right_ones() -> None:
    """Digits with 40 % wrong labels: of the changed labels ever more are hard with the entropy term and none without, and the
    threshold that nobody set tells right from wrong."""
    values: dict[str, Any] = {"batch_size": 64, "warmup": 0.3, "memory": 0.1}

    def history(method: str, **more: float) -> list[dict[str, float]]:
        recipe = Recipe(method, values | more, data="digits", noise="symmetric:0.4", model="small-cnn", epochs=20, seed=0)
        return [record.metrics for record in TrialRun(recipe)]

    alr, selc = history("alr", entropy_weight=0.6), history("selc")
    hard = [epoch["refine/hardened"] for epoch in alr[9::5]]  # after 10, 15 and 20 epochs
    assert hard[0] + 0.1 < hard[1] < hard[2] - 0.1
    assert 1 - alr[-1]["refine/hardened_wrong"] > alr[-1]["refine/precision"] > 0.8
    assert max(epoch.get("refine/hardened", 0.0) for epoch in selc) < 0.05


# ELR


def test_elr_targets_after_n_visits_of_one_prediction() -> None:
    data = tiny_data()
    elr = make("elr", tiny_task(data, linear_net), lr=1e-30, augmentation="none")
    visited = [torch.arange(8), torch.arange(8, 16)]
    p = clipped_probabilities(elr.learner(plain(data.images)).detach())
    p /= p.sum(1, keepdim=True)
    beta = memory_momentum(elr.config.memory, EPOCHS)
    for n in range(1, EPOCHS + 1):
        finish(elr, InOrder.of(data, visited), n - 1, n)
        torch.testing.assert_close(elr.targets[:16], (1 - beta**n) * p[:16])
        assert torch.equal(elr.targets[16:], torch.zeros(N - 16, K)), "rows never visited stay 0"
    refined = elr.refined_labels()
    torch.testing.assert_close(refined[:16], p[:16])
    assert torch.equal(refined[16:], given_one_hot()[16:])


def test_elr_without_strength_is_cross_entropy_bit_for_bit() -> None:
    assert differences(net_state(trained("elr", strength=0.0)), net_state(trained("ce"))) == []
    assert differences(net_state(trained("elr", strength=1e-3)), net_state(trained("ce"))) != []


def test_elr_whose_targets_stay_zero_is_cross_entropy_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum of 1: log(1 - 0) is 0, and so is its gradient."""
    monkeypatch.setattr("methods.elr.memory_momentum", lambda memory, epochs: 1.0)
    elr = trained("elr", strength=3.0)
    assert torch.equal(elr.targets, torch.zeros(N, K))
    assert differences(net_state(elr), net_state(trained("ce"))) == []


def test_elr_steps_along_its_gradient_with_the_updated_targets() -> None:
    elr = make("elr", tiny_task(tiny_data()), strength=3.0, memory=1.0)
    elr.targets += torch.rand(N, K, generator=generator("targets")) / K
    grads, step, batch = one_step_gradient(elr, Clock(1, EPOCHS))
    p, t = step.probabilities, elr.targets[batch.index]
    assert p.min() > 1e-4
    assert p.max() < 1 - 1e-4, "nothing is clipped"
    inner = (t * p).sum(1, keepdim=True)
    expected = (p - given_one_hot()[batch.index]) + 3.0 * p * (inner - t) / (1 - inner)
    torch.testing.assert_close(BATCH * grads, expected, rtol=1e-4, atol=1e-6)
    loss = cross_entropy(p.log(), batch.labels) + 3.0 * (1 - inner).log().squeeze(1)
    torch.testing.assert_close(step.loss, loss.mean())


# GCE


def test_gce_at_a_tiny_exponent_is_cross_entropy() -> None:
    ce, gce = net_state(trained("ce")), net_state(trained("gce", q=1e-6))
    for key, value in ce.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(gce[key], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(net_state(trained("gce"))["net.head.weight"], ce["net.head.weight"], rtol=1e-3, atol=1e-4)


# Co-teaching


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return without_dropout(), without_dropout()


def co_teaching(*nets: nn.Module, **values: Any) -> CoTeaching:
    return make("co-teaching", tiny_task(tiny_data(), nets_in_turn(*nets)), **values)


def test_co_teaching_that_forgets_nothing_is_two_cross_entropies_bit_for_bit(pair: tuple[nn.Module, nn.Module]) -> None:
    data = tiny_data()
    both = co_teaching(*pair, forget_rate=0.0)
    finish(both, data)
    for learner, net in zip((both.first, both.second), pair, strict=True):
        alone = make("ce", tiny_task(data, nets_in_turn(net)))
        finish(alone, data)
        assert differences(learner.state_dict(), net_state(alone)) == []
    selective = co_teaching(*pair)
    finish(selective, data)
    assert differences(selective.first.state_dict(), both.first.state_dict()) != []


def test_identical_networks_stay_identical(pair: tuple[nn.Module, nn.Module]) -> None:
    twins = co_teaching(pair[0], pair[0], forget_rate=0.5)
    finish(twins, tiny_data())
    assert differences(twins.first.state_dict(), twins.second.state_dict()) == []
    strangers = co_teaching(*pair, forget_rate=0.5)
    finish(strangers, tiny_data())
    assert differences(strangers.first.state_dict(), strangers.second.state_dict()) != []


def test_swapping_the_networks_swaps_the_results(pair: tuple[nn.Module, nn.Module]) -> None:
    one, other = co_teaching(*pair, forget_rate=0.5), co_teaching(*pair[::-1], forget_rate=0.5)
    finish(one, tiny_data())
    finish(other, tiny_data())
    assert differences(one.first.state_dict(), other.second.state_dict()) == []
    assert differences(one.second.state_dict(), other.first.state_dict()) == []


def test_each_network_learns_from_what_the_other_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    """One step by hand: plain SGD on the mean loss of the peer's selection."""
    lr, clock = 0.1, Clock(EPOCHS - 1, EPOCHS)
    batch = tiny_data().gather(torch.arange(BATCH))
    method = co_teaching(*pair, forget_rate=0.5, lr=lr, momentum=0.0, weight_decay=0.0, augmentation="none")
    method.train()
    step = method.step(batch, clock)
    nets = [copy.deepcopy(net).train() for net in pair]
    losses = [functional.cross_entropy(net(plain(batch.images)), batch.labels, reduction="none") for net in nets]
    kept = [loss.detach().argsort()[: BATCH // 2] for loss in losses]
    assert set(kept[0].tolist()) != set(kept[1].tolist()), "the networks disagree, so that crossing matters"
    rate = lr * 0.5 * (1 + math.cos(math.pi * clock.fraction))
    taken = [loss[chosen].mean() for loss, chosen in zip(losses, kept[::-1], strict=True)]
    torch.testing.assert_close(step.loss, (taken[0] + taken[1]).detach() / 2)
    for net, loss, learner in zip(nets, taken, (method.first, method.second), strict=True):
        loss.backward()
        for before, after in zip(net.parameters(), learner.net.parameters(), strict=True):
            torch.testing.assert_close(after, before - rate * before.grad)


@few
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0, 9.0]), min_size=1, max_size=20), st.data())
def test_kept_losses_are_the_smallest(values: list[float], data: st.DataObject) -> None:
    losses = torch.tensor(values, requires_grad=True)
    num_kept = data.draw(st.integers(1, len(values)))
    mask = small_losses(losses, num_kept)
    assert not mask.requires_grad
    assert mask.sum() == num_kept
    kept, dropped = losses[mask == 1], losses[mask == 0]
    assert len(kept) + len(dropped) == len(values)
    if len(dropped):
        assert kept.max() <= dropped.min()
        tied = (losses == kept.max()).nonzero().flatten()
        chosen = mask[tied].tolist()
        assert chosen == sorted(chosen, reverse=True), "of equal losses the earlier is kept"


def kept_in(epoch: int, num_images: int, **values: Any) -> int:
    method = CoTeaching(CoTeachingConfig(**values), tiny_task(tiny_data()))
    return method.num_kept(num_images, Clock(epoch, 200))


def test_the_share_left_out_rises_as_in_the_paper() -> None:
    """R(T) = tau min(T / T_k, 1) with T_k = 10 of 200 epochs, T counted from 1."""
    kept = [kept_in(epoch, 1000, forget_rate=0.5) for epoch in (0, 1, 4, 8, 9, 10, 199)]
    assert kept == [950, 900, 750, 550, 500, 500, 500]


@pytest.mark.parametrize(
    ("num_images", "forget_rate", "kept"),
    [(10, 0.8, 2), (100, 0.9, 10), (10, 0.7, 3), (3, 0.5, 1), (1, 0.99, 1), (8, 0.99, 1), (8, 0.0, 8), (7, 0.2, 5)],
)
def test_the_number_kept_is_rounded_down_but_never_to_nothing(num_images: int, forget_rate: float, kept: int) -> None:
    assert kept_in(199, num_images, forget_rate=forget_rate) == kept


def test_a_ramp_shorter_than_an_epoch_is_over_in_the_first() -> None:
    assert kept_in(0, 10, forget_rate=0.5, ramp=0.001) == 5


def test_co_teaching_predicts_with_the_first_network_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    images = tiny_data().images
    method = co_teaching(*pair).eval()
    expected = copy.deepcopy(pair[0]).eval()(plain(images)).softmax(1)
    torch.testing.assert_close(method.predict(images), expected)


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_identities.py::"
LOSSES = "tests/test_losses.py::"
RUNNING_MEAN = HERE + "test_targets_are_the_unrolled_running_mean_of_the_training_predictions"
PUBLISHED = HERE + "test_the_published_momentum_is_the_default_memory"
ELR_VISITS = HERE + "test_elr_targets_after_n_visits_of_one_prediction"
CROSSED = HERE + "test_each_network_learns_from_what_the_other_kept"
RAMP = HERE + "test_the_share_left_out_rises_as_in_the_paper"
BEGINS = "tests/test_methods_contract.py::test_begins_of_the_first_six"
GCE = LOSSES + "test_generalized_cross_entropy_is_its_formula"

MUTATIONS = [
    Mutation("methods/base.py", "math.exp(-1.0 / (memory", "math.exp(-1.1 / (memory", PUBLISHED),
    Mutation("methods/base.py", "start * 0.5 * (1 +", "start * 0.55 * (1 +", CROSSED),
    Mutation("methods/base.py", "start * 0.5 * (1 +", "start * 0.5 * (1.1 +", CROSSED),
    Mutation("methods/base.py", "math.cos(math.pi * fraction)", "math.cos(1.1 * math.pi * fraction)", CROSSED),
    Mutation("methods/selc.py", "momentum * self", "1.1 * momentum * self", RUNNING_MEAN),
    Mutation("methods/selc.py", "(1 - momentum)", "(1.1 - momentum)", RUNNING_MEAN),
    Mutation(
        "methods/alr.py",
        "self.config.entropy_weight * entropy",
        "1.1 * self.config.entropy_weight * entropy",
        HERE + "test_alr_steps_along_its_gradient_with_the_updated_targets",
    ),
    Mutation("methods/elr.py", "= beta * self", "= 1.1 * beta * self", ELR_VISITS),
    Mutation("methods/elr.py", "] + (1 - beta)", "] + (1.1 - beta)", ELR_VISITS),
    Mutation(
        "methods/elr.py",
        "self.config.strength * early",
        "1.1 * self.config.strength * early",
        HERE + "test_elr_steps_along_its_gradient_with_the_updated_targets",
    ),
    Mutation(
        "losses/early_learning.py",
        "FLOOR = 1e-4",
        "FLOOR = 1.1e-4",
        LOSSES + "test_early_learning_term_has_the_floor_that_the_clip_sets",
    ),
    Mutation(
        "losses/early_learning.py",
        "clamp(FLOOR, 1 - FLOOR)",
        "clamp(FLOOR, 1 - 1.1 * FLOOR)",
        LOSSES + "test_early_learning_term_has_the_floor_that_the_clip_sets",
    ),
    Mutation("losses/generalized_cross_entropy.py", "torch.expm1(q", "torch.expm1(1.1 * q", GCE),
    Mutation("losses/generalized_cross_entropy.py", "labels)) / q", "labels)) / (1.1 * q)", GCE),
    Mutation("methods/co_teaching.py", "(clock.epoch + 1)", "(clock.epoch + 1.1)", RAMP),
    Mutation("methods/co_teaching.py", "min(1.0,", "min(1.1,", RAMP),
    Mutation("methods/co_teaching.py", "(1 - forgotten)", "(1.1 - forgotten)", RAMP),
    Mutation("methods/co_teaching.py", "        0.05,", "        0.055,", RAMP),
    Mutation("methods/co_teaching.py", "* first_losses).sum()", "* first_losses).sum() / 1.1", CROSSED),
    Mutation("methods/co_teaching.py", "* second_losses).sum()", "* second_losses).sum() / 1.1", CROSSED),
    Mutation("methods/co_teaching.py", "second_loss.detach()) / 2", "second_loss.detach()) / 2.2", CROSSED),
]
