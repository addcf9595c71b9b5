"""Methods that are a loss, or a cross-entropy with one thing added: their losses against closed forms, their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

from data.seeds import generator
from hparams import declared
from losses import (
    absolute_error,
    cross_entropy,
    dynamics_aware_loss,
    generalized_cross_entropy,
    normalized_cross_entropy,
    reverse_cross_entropy,
    sharpened_logits,
    soft_cross_entropy,
    sparse_norm,
    truncated_generalized_cross_entropy,
)
from methods import METHODS
from methods.base import Clock, first_epoch, half_cosine
from models.network import Network
from tests.loss_cases import cases, few, gradient, one_hot
from tests.mutation import Mutation
from tests.tiny import (
    BATCH,
    EPOCHS,
    K,
    N,
    differences,
    finish,
    losses_of,
    make,
    plain,
    tiny_data,
    tiny_task,
    trained_in_order,
    without_chance,
)

Case = tuple[Tensor, Tensor, Tensor]


def label_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.detach().softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def summed_over_labels(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
    """sum_j loss(logits, j), [B]."""
    return torch.stack([loss(logits, torch.full((len(logits),), j)) for j in range(logits.shape[1])]).sum(0)


# Defaults


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mae", {"scale": 2.0}),
        ("truncated-gce", {"q": 0.7, "threshold": 0.5, "warmup": 40 / 120, "interval": 10 / 120}),
        ("sce", {"alpha": 0.1, "beta": 1.0, "log_zero": math.log(1e-4)}),
        ("nce-rce", {"alpha": 1.0, "beta": 1.0, "log_zero": math.log(1e-4)}),
        ("dal", {"q_start": 0.6, "q_end": 1.5, "bootstrap": "soft"}),
        ("label-smoothing", {"label_smoothing": 0.1}),
        ("mixup", {"alpha": 1.0, "label_smoothing": 0.0}),
        ("sr", {"temperature": 0.5, "exponent": 0.1, "strength": 1.2, "growth": 1.03**120, "normalized": True}),
    ],
)
def test_published_defaults(name: str, published: dict[str, Any]) -> None:
    config = METHODS[name].Config()
    for field, value in published.items():
        assert getattr(config, field) == (value if isinstance(value, str) else pytest.approx(value, rel=0.005))
    assert config.begins() == (config.warmup if name == "truncated-gce" else 0)


def test_defaults_of_every_method_and_those_that_no_equation_pins() -> None:
    ce, gce, elr, alr, co_teaching = (METHODS[name].Config() for name in ("ce", "gce", "elr", "alr", "co-teaching"))
    assert (ce.lr, ce.weight_decay, ce.momentum, ce.batch_size, ce.dropout) == (0.05, 1e-3, 0.9, 128, 0)
    assert (ce.label_smoothing, gce.q, elr.strength, alr.entropy_weight, co_teaching.forget_rate) == (0, 0.7, 3, 0.2, 0.2)


# Mean absolute error


@few
@given(cases())
def test_absolute_error_is_half_the_l1_distance_and_symmetric(case: Case) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    losses, p, p_y = absolute_error(logits, labels), logits.detach().softmax(1), label_probability(logits, labels)
    torch.testing.assert_close(losses.detach(), (p - one_hot(labels, logits)).abs().sum(1) / 2)
    torch.testing.assert_close(gradient(losses, logits), p_y.unsqueeze(1) * (p - one_hot(labels, logits)))
    assert bool(((losses >= 0) & (losses <= 1)).all())
    total = summed_over_labels(absolute_error, logits)
    torch.testing.assert_close(total, torch.full_like(total, logits.shape[1] - 1))


@few
@given(cases())
def test_mae_at_the_papers_scale_is_the_l1_distance(case: Case) -> None:
    logits, labels, _ = case
    losses = losses_of("mae", logits, labels)
    torch.testing.assert_close(losses, (logits.softmax(1) - one_hot(labels, logits)).abs().sum(1))
    torch.testing.assert_close(losses, 2 * generalized_cross_entropy(logits, labels, 1.0))
    total = summed_over_labels(lambda z, y: losses_of("mae", z, y), logits)
    torch.testing.assert_close(total, torch.full_like(total, 2 * (logits.shape[1] - 1)))


def test_mae_at_scale_one_is_gce_at_q_one_bit_for_bit() -> None:
    assert differences(trained_in_order("mae", scale=1.0).state_dict(), trained_in_order("gce", q=1.0).state_dict()) == []
    assert differences(trained_in_order("mae", scale=1.1).state_dict(), trained_in_order("gce", q=1.0).state_dict()) != []


# Truncated generalised cross-entropy


@few
@given(cases(), st.floats(0.05, 1.0), st.floats(0.05, 0.9))
def test_truncation_caps_the_loss_and_stops_its_gradient(case: Case, q: float, threshold: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    p, p_y = logits.detach().softmax(1), label_probability(logits, labels)
    kept = p_y > threshold
    losses = truncated_generalized_cross_entropy(logits, labels, q, threshold, kept)
    torch.testing.assert_close(losses.detach(), (1 - p_y.clamp(min=threshold) ** q) / q)
    expected = kept.unsqueeze(1) * (p_y**q).unsqueeze(1) * (p - one_hot(labels, logits))
    torch.testing.assert_close(gradient(losses, logits), expected)
    order = p_y.argsort()
    assert bool((losses[order].diff() <= 1e-12).all()), "it falls with p_y"


def test_a_pruned_sample_costs_what_the_sheet_says() -> None:
    """L_q(0.5) at q = 0.7 is 0.5492, whatever the prediction."""
    method = make("truncated-gce", tiny_task(tiny_data()))
    method.given_probability.copy_(torch.linspace(0, 1, N))
    logits = torch.randn(N, K, generator=generator("logits"), requires_grad=True)
    losses = method.losses(logits, tiny_data().gather(torch.arange(N)), Clock(5, EPOCHS))
    pruned = torch.linspace(0, 1, N) <= 0.5
    assert losses[pruned].tolist() == pytest.approx([0.5492] * 21, abs=5e-5)
    torch.testing.assert_close(losses[~pruned], generalized_cross_entropy(logits, tiny_data().labels, 0.7)[~pruned])
    moved = (gradient(losses, logits) != 0).any(1)
    assert torch.equal(moved, ~pruned)


def pruning_epochs(epochs: int, **values: Any) -> list[int]:
    method = make("truncated-gce", tiny_task(tiny_data()), **values)
    return [epoch for epoch in range(epochs) if method.prunes(Clock(epoch, epochs))]


def test_pruning_epochs_are_the_published_ones_and_stretch_with_the_budget() -> None:
    assert pruning_epochs(120) == [40, 50, 60, 70, 80, 90, 100, 110]
    assert pruning_epochs(12) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert pruning_epochs(30, warmup=0.2, interval=0.2) == [6, 12, 18, 24]
    assert pruning_epochs(30, warmup=0.5, interval=1.0) == [15]
    assert pruning_epochs(5, warmup=0.0, interval=0.01) == [0, 1, 2, 3, 4], "at most once per epoch"
    for epochs in (3, 7, 30, 200):
        assert pruning_epochs(epochs)[0] == first_epoch(METHODS["truncated-gce"].Config().begins(), epochs)


def test_truncated_gce_is_gce_bit_for_bit_until_it_prunes() -> None:
    truncated, plain_gce = trained_in_order("truncated-gce", warmup=0.9), trained_in_order("gce")
    assert differences(truncated.learner.state_dict(), plain_gce.learner.state_dict()) == []
    assert torch.equal(truncated.given_probability, torch.ones(N))
    assert (
        differences(trained_in_order("truncated-gce", threshold=0.0).learner.state_dict(), plain_gce.learner.state_dict()) == []
    )
    assert (
        differences(trained_in_order("truncated-gce", threshold=0.6).learner.state_dict(), plain_gce.learner.state_dict()) != []
    )


def test_what_is_pruned_follows_from_predictions_in_evaluation_mode() -> None:
    method = make("truncated-gce", tiny_task(tiny_data()))  # with dropout and a random view
    data = tiny_data()
    finish(method, data, 0, 2)
    method.eval()
    with torch.no_grad():
        expected = method.predict(data.images).gather(1, data.labels.unsqueeze(1)).squeeze(1)
    assert 0 < (expected > 0.5).sum() < N
    method.train()
    batches = iter(method.batches(data, Clock(2, EPOCHS)))
    first = next(batches)
    torch.testing.assert_close(method.given_probability, expected)
    assert all(module.training for module in method.modules())
    step = method.step(first, Clock(2, EPOCHS))
    assert step.scalars["select/kept"] == (expected[first.index] > 0.5).float().mean()
    noted = method.given_probability.clone()
    for batch in batches:
        method.step(batch, Clock(2, EPOCHS))
    assert torch.equal(method.given_probability, noted), "until the next pruning"


# Symmetric cross-entropy, and normalised with reverse


@few
@given(cases(), st.floats(-12.0, -0.1))
def test_reverse_cross_entropy_is_its_definition(case: Case, log_zero: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    p, p_y, hot = logits.detach().softmax(1), label_probability(logits, labels), one_hot(labels, logits)
    losses = reverse_cross_entropy(logits, labels, log_zero)
    log_labels = torch.where(hot == 1, torch.zeros_like(hot), torch.full_like(hot, log_zero))
    torch.testing.assert_close(losses.detach(), -(p * log_labels).sum(1))
    torch.testing.assert_close(gradient(losses, logits), -log_zero * p_y.unsqueeze(1) * (p - hot))
    assert bool(((losses >= 0) & (losses <= -log_zero)).all())
    total = summed_over_labels(lambda z, y: reverse_cross_entropy(z, y, log_zero), logits)
    torch.testing.assert_close(total, torch.full_like(total, -log_zero * (logits.shape[1] - 1)))


def test_reverse_cross_entropy_with_the_codes_clip() -> None:
    """|A| (K - 1) = 55.262 for K = 7 and A = log 1e-4."""
    logits = torch.randn(3, 7, generator=generator("logits"), dtype=torch.float64)
    total = summed_over_labels(lambda z, y: reverse_cross_entropy(z, y, math.log(1e-4)), logits)
    assert total.tolist() == pytest.approx([55.262] * 3, abs=5e-4)


@few
@given(cases())
def test_sce_between_cross_entropy_and_absolute_error(case: Case) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    assert torch.equal(losses_of("sce", logits, labels, alpha=1.0, beta=0.0), cross_entropy(logits, labels))
    l1 = losses_of("sce", logits, labels, alpha=0.0, beta=2 / 9.21, log_zero=-9.21)
    torch.testing.assert_close(l1, 2 * absolute_error(logits, labels))
    p, p_y, hot = logits.detach().softmax(1), label_probability(logits, labels), one_hot(labels, logits)
    both = losses_of("sce", logits, labels, alpha=0.3, beta=0.7, log_zero=-5.0)
    torch.testing.assert_close(both.detach(), -0.3 * p_y.log() + 0.7 * 5 * (1 - p_y))
    torch.testing.assert_close(gradient(both, logits), (0.3 + 0.7 * 5 * p_y).unsqueeze(1) * (p - hot))


def test_sce_without_the_reverse_is_cross_entropy_bit_for_bit() -> None:
    ce = trained_in_order("ce")
    assert differences(trained_in_order("sce", alpha=1.0, beta=0.0).state_dict(), ce.state_dict()) == []
    assert differences(trained_in_order("sce", alpha=1.0, beta=0.1).state_dict(), ce.state_dict()) != []


@few
@given(cases())
def test_normalized_cross_entropy_is_a_share_of_the_sum_over_the_labels(case: Case) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    losses = normalized_cross_entropy(logits, labels)
    log_p, K = functional.log_softmax(logits.detach(), 1), logits.shape[1]
    P, S = functional.nll_loss(log_p, labels, reduction="none"), -log_p.sum(1)
    torch.testing.assert_close(losses.detach(), P / summed_over_labels(cross_entropy, logits.detach()))
    expected = (log_p.exp() - one_hot(labels, logits)) / S.unsqueeze(1) - (P / S**2).unsqueeze(1) * (K * log_p.exp() - 1)
    torch.testing.assert_close(gradient(losses, logits), expected)
    assert bool(((losses >= 0) & (losses <= 1)).all())
    total = summed_over_labels(normalized_cross_entropy, logits)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_normalized_cross_entropy_of_a_uniform_prediction(num_classes: int) -> None:
    losses = normalized_cross_entropy(torch.full((2, num_classes), 3.0), torch.tensor([0, 1]))
    assert losses.tolist() == pytest.approx([1 / num_classes] * 2)


@few
@given(cases(), st.floats(0.0, 0.9), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_symmetric_noise_only_scales_and_shifts_nce_rce(case: Case, rate: float, alpha: float, beta: float) -> None:
    """E[loss] under noise = loss (1 - rate K / (K - 1)) + rate C / (K - 1), C = alpha + beta |A| (K - 1) the sum of all."""
    logits, labels, _ = case
    K = logits.shape[1]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return losses_of("nce-rce", z, y, alpha=alpha, beta=beta, log_zero=-3.0)

    total = summed_over_labels(loss, logits)
    torch.testing.assert_close(total, torch.full_like(total, alpha + beta * 3 * (K - 1)))
    clean = loss(logits, labels)
    noisy = (1 - rate) * clean + rate * (total - clean) / (K - 1)
    expected = clean * (1 - rate * K / (K - 1)) + rate / (K - 1) * (alpha + beta * 3 * (K - 1))
    torch.testing.assert_close(noisy, expected)
    parts = alpha * normalized_cross_entropy(logits, labels) + beta * 3 * (1 - label_probability(logits, labels))
    torch.testing.assert_close(clean, parts)


# Dynamics-aware loss


@few
@given(cases(), st.floats(0.1, 2.0), st.floats(0.0, 1.0), st.booleans())
def test_dynamics_aware_loss_is_its_formula(case: Case, q: float, weight: float, hard: bool) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    p, p_y, K = logits.detach().softmax(1), label_probability(logits, labels), logits.shape[1]
    losses = dynamics_aware_loss(logits, labels, q, weight, hard=hard)
    own = -p.amax(1).log() if hard else -(p * p.log()).sum(1)
    torch.testing.assert_close(losses.detach(), (1 - p_y**q) / q + weight * own / (q * math.log(K)))
    pull = p - one_hot(p.argmax(1), p) if hard else -p * (p.log() + own.unsqueeze(1))
    expected = (p_y**q).unsqueeze(1) * (p - one_hot(labels, p)) + weight * pull / (q * math.log(K))
    torch.testing.assert_close(gradient(losses, logits), expected)
    assert bool(((losses >= 0) & (losses <= (1 + weight) / q + 1e-12)).all())


def dal(**values: Any) -> Any:
    return make("dal", tiny_task(tiny_data()), **values)


def test_dal_schedule_of_150_epochs() -> None:
    """q from 0.6 by (1.5 - 0.6) / 150 per epoch to 1.494; the bootstrap starts after t0 = 66.67 and ends at 0.988."""
    method, clocks = dal(), [Clock(epoch, 150) for epoch in range(150)]
    exponents = [method.exponent(clock) for clock in clocks]
    weights = [method.bootstrap_weight(clock) for clock in clocks]
    assert exponents == pytest.approx([0.6 + 0.9 * i / 150 for i in range(150)])
    t0 = 150 * (1 - 0.6) / (1.5 - 0.6)
    assert weights == pytest.approx([max(0.0, (i - t0) / (150 - t0)) for i in range(150)])
    assert sorted(set(exponents)) == exponents
    assert sorted(weights) == weights
    assert (weights[66], exponents[149], weights[149]) == (0.0, pytest.approx(1.494), pytest.approx(0.988))


def test_dal_stretches_with_the_budget() -> None:
    method = dal()
    assert method.exponent(Clock(3, 6)) == method.exponent(Clock(75, 150))
    assert method.bootstrap_weight(Clock(4, 6)) == method.bootstrap_weight(Clock(100, 150))


@pytest.mark.parametrize(
    ("q_start", "q_end", "weights"),
    [
        (0.6, 1.0, [0.0, 0.0, 0.0]),
        (0.6, 0.9, [0.0, 0.0, 0.0]),
        (0.7, 0.7, [0.0, 0.0, 0.0]),
        (1.2, 1.2, [0.0, 0.0, 0.0]),
        (1.5, 1.2, [0.0, 0.0, 0.0]),
        (1.2, 2.0, [0.2, 0.6, pytest.approx(0.92)]),  # (i - t0) / (T - t0) with t0 = -T / 4
        (0.95, 1.05, [0.0, 0.0, pytest.approx(0.8)]),
    ],
)
def test_dal_where_q_does_not_rise_through_one(q_start: float, q_end: float, weights: list[float]) -> None:
    method = dal(q_start=q_start, q_end=q_end)
    assert [method.bootstrap_weight(Clock(epoch, 10)) for epoch in (0, 5, 9)] == pytest.approx(weights)


@few
@given(cases())
def test_dal_is_gce_then_absolute_error_then_bootstraps(case: Case) -> None:
    logits, labels, _ = case
    early = losses_of("dal", logits, labels, Clock(2, 9))
    torch.testing.assert_close(early, generalized_cross_entropy(logits, labels, 0.8))  # no bootstrap before q = 1
    torch.testing.assert_close(losses_of("dal", logits, labels, Clock(4, 9)), absolute_error(logits, labels))  # t0 = 4
    late = losses_of("dal", logits, labels, Clock(8, 9))
    torch.testing.assert_close(late, dynamics_aware_loss(logits, labels, 1.4, 0.8))
    hard = losses_of("dal", logits, labels, Clock(8, 9), bootstrap="hard")
    torch.testing.assert_close(hard, dynamics_aware_loss(logits, labels, 1.4, 0.8, hard=True))
    fitting = losses_of("dal", logits, labels, Clock(0, 9), q_start=1e-9)
    torch.testing.assert_close(fitting, cross_entropy(logits, labels))


# Label smoothing


@few
@given(cases(), st.floats(0.0, 1.0))
def test_label_smoothing_is_torchs_and_pulls_towards_its_targets(case: Case, smoothing: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    K = logits.shape[1]
    losses = losses_of("label-smoothing", logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing))
    targets = (1 - smoothing) * one_hot(labels, logits) + smoothing / K
    pull = gradient(losses, logits)
    torch.testing.assert_close(pull, logits.softmax(1).detach() - targets.detach())
    torch.testing.assert_close(pull.sum(1), torch.zeros_like(losses))
    if 1e-6 < smoothing < 1:  # below, the other targets have no logarithm
        rest = targets.detach().log().requires_grad_()
        least = losses_of("label-smoothing", rest, labels, label_smoothing=smoothing)
        torch.testing.assert_close(gradient(least, rest), torch.zeros_like(rest))  # least at p = t
        assert bool((losses >= least - 1e-9).all())


@pytest.mark.parametrize(("num_classes", "floor"), [(10, 0.5003), (100, 0.7778)])
def test_label_smoothing_has_a_floor(num_classes: int, floor: float) -> None:
    labels = torch.tensor([3])
    targets = 0.9 * functional.one_hot(labels, num_classes) + 0.1 / num_classes
    losses = losses_of("label-smoothing", targets.log(), labels)
    assert losses.item() == pytest.approx(floor, abs=5e-5)


def test_label_smoothing_at_its_ends() -> None:
    assert (
        differences(trained_in_order("label-smoothing", label_smoothing=0.0).state_dict(), trained_in_order("ce").state_dict())
        == []
    )
    assert (
        differences(trained_in_order("label-smoothing").state_dict(), trained_in_order("ce", label_smoothing=0.1).state_dict())
        == []
    )
    logits = torch.randn(1, K, generator=generator("logits"))
    of_each = [losses_of("label-smoothing", logits, torch.tensor([j]), label_smoothing=1.0).item() for j in range(K)]
    assert of_each == pytest.approx([of_each[0]] * K), "all mass spread: the label does not matter"


# mixup


def mixup(**values: Any) -> Any:
    return make("mixup", tiny_task(tiny_data(), without_chance), augmentation="none", **values)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_steps_on_mixed_images_with_mixed_labels(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step by hand: cross-entropy with labels mixed as the images are, and the batch mean of the images preserved."""
    share, batch = 0.3, tiny_data().gather(torch.arange(BATCH))
    order = torch.randperm(BATCH, generator=generator("order"))
    method = mixup(label_smoothing=smoothing, momentum=0.0, weight_decay=0.0)
    monkeypatch.setattr(method, "share", lambda: share)
    monkeypatch.setattr(torch, "randperm", lambda *_args, **_options: order)
    seen: list[Tensor] = []
    method.learner.net.register_forward_pre_hook(lambda _net, images: seen.append(images[0].clone()))
    before = [parameter.detach().clone() for parameter in method.learner.net.parameters()]
    twin = make("mixup", tiny_task(tiny_data(), without_chance)).learner.net
    twin.load_state_dict(method.learner.net.state_dict())
    step = method.step(batch, Clock(1, EPOCHS))
    x = plain(batch.images)
    torch.testing.assert_close(seen[0], share * x + (1 - share) * x[order])
    torch.testing.assert_close(seen[0].mean(0), x.mean(0))
    t = (1 - smoothing) * functional.one_hot(batch.labels, K).float() + smoothing / K
    loss = functional.cross_entropy(twin(seen[0]), share * t + (1 - share) * t[order])
    torch.testing.assert_close(step.loss, loss.detach())
    assert step.probabilities is None, "no unmixed image was seen"
    assert torch.equal(step.index, batch.index)
    loss.backward()
    rate = half_cosine(method.config.lr, 1 / EPOCHS)
    for old, new, parameter in zip(before, method.learner.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(new, old - rate * parameter.grad)


def test_the_loss_of_mixup_is_linear_in_the_share() -> None:
    """Seen through a network that does not look at the image, so that only the loss is mixed."""

    def blind(num_classes: int | None = None) -> Network:
        net = Network(nn.Flatten(), 64, num_classes or K, 0.0)
        nn.init.zeros_(net.head.weight)
        return net

    batch = tiny_data().gather(torch.arange(BATCH))

    def loss(share: float) -> float:
        method: Any = make("mixup", tiny_task(tiny_data(), blind), augmentation="none")
        method.share = lambda: share
        torch.manual_seed(5)
        return float(method.step(batch, Clock(0, EPOCHS)).loss)

    values = [loss(share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert values[0] == pytest.approx(values[3]), "the mean over a batch and over its permutation"
    assert values == pytest.approx([values[0]] * 4)


def test_mixup_of_whole_images_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    ce = trained_in_order("ce")
    monkeypatch.setattr(METHODS["mixup"], "share", lambda self: 1.0)
    assert differences(trained_in_order("mixup").state_dict(), ce.state_dict()) == [], "bit for bit"
    monkeypatch.setattr(METHODS["mixup"], "share", lambda self: 0.0)
    partners = trained_in_order("mixup", lr=1e-3).learner.state_dict()  # a permuted batch is the same batch, but for rounding
    for key, value in trained_in_order("ce", lr=1e-3).learner.state_dict().items():
        torch.testing.assert_close(partners[key], value, rtol=1e-3, atol=1e-4)
    monkeypatch.undo()
    assert differences(trained_in_order("mixup").state_dict(), ce.state_dict()) != []


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 8.0])
def test_the_share_has_the_moments_of_the_beta_distribution(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), one draw per batch from torch's own generator."""
    method = mixup(alpha=alpha)
    torch.manual_seed(0)
    shares = torch.tensor([method.share() for _ in range(10000)], dtype=torch.float64)
    assert 0 <= shares.min() <= shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    torch.manual_seed(0)
    assert method.share() == shares[0].item()
    assert declared(METHODS["mixup"].Config)["alpha"].check(0.01) == 0.01, "the least; draws underflow below"
    with pytest.raises(ValueError, match="alpha"):
        mixup(alpha=0.009)


# Sparse regularisation


@few
@given(cases(spread=30.0), st.floats(0.01, 1.0))
def test_sparse_norm_lies_between_one_hot_and_uniform(case: Case, exponent: float) -> None:
    logits = case[0].requires_grad_()
    norm, p, uniform = sparse_norm(logits, exponent), logits.detach().softmax(1), logits.shape[1] ** (1 - exponent)
    torch.testing.assert_close(norm.detach(), (p**exponent).sum(1))
    assert bool((norm >= 1 - 1e-9).all())
    assert bool((norm <= uniform + 1e-9).all())
    expected = exponent * (p**exponent - p * norm.detach().unsqueeze(1))
    torch.testing.assert_close(gradient(norm, logits), expected)


def test_sparse_norm_at_its_ends() -> None:
    uniform, certain = torch.zeros(1, 100), torch.tensor([[0.0, 1e5, 0.0]])
    assert sparse_norm(uniform, 0.01).item() == pytest.approx(95.5, abs=0.01)  # 100^0.99
    assert sparse_norm(certain, 0.01).item() == 1
    nearly = torch.tensor([[0.0, 20.0, 0.0]])
    assert sparse_norm(nearly, 0.01).item() > 2.6, "a probability of 2e-9 counts for 0.82"
    logits = torch.randn(4, 9, generator=generator("logits"), dtype=torch.float64, requires_grad=True)
    ones = sparse_norm(logits, 1.0)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    torch.testing.assert_close(gradient(ones, logits), torch.zeros_like(logits))
    underflown = torch.tensor([[0.0, 200.0]], requires_grad=True)  # p = e^-200 is 0 in float32, p^0.01 is e^-2
    pull = 0.01 * math.exp(-2)
    assert gradient(sparse_norm(underflown, 0.01), underflown)[0].tolist() == pytest.approx([pull, -pull], rel=1e-4)


@pytest.mark.parametrize(
    ("num_classes", "temperature", "most", "floor"),
    [(10, 0.5, 0.478, 0.739), (100, 0.5, 0.0701, 2.658), (10, 0.1, 0.9998, 2.4e-4)],
)
def test_normalised_logits_bound_the_prediction(num_classes: int, temperature: float, most: float, floor: float) -> None:
    """p_max = 1 / (1 + (K - 1) exp(-sqrt(K / (K - 1)) / tau)), reached where the logits are centred and one stands out."""
    best = functional.one_hot(torch.tensor([0]), num_classes).double() - 1 / num_classes
    sharpened = sharpened_logits(best, temperature, normalized=True)
    formula = 1 / (1 + (num_classes - 1) * math.exp(-math.sqrt(num_classes / (num_classes - 1)) / temperature))
    assert sharpened.softmax(1).max().item() == pytest.approx(formula)
    assert formula == pytest.approx(most, rel=1e-3)
    assert cross_entropy(sharpened, torch.tensor([0])).item() == pytest.approx(floor, rel=0.02)
    others = torch.randn(1000, num_classes, generator=generator("logits"), dtype=torch.float64) * 5
    assert sharpened_logits(others, temperature, normalized=True).softmax(1).max() <= formula


def test_logits_of_length_zero_are_left_alone() -> None:
    logits = torch.zeros(1, K, requires_grad=True)
    sharpened = sharpened_logits(logits, 0.5, normalized=True)
    assert torch.equal(sharpened, torch.zeros(1, K))
    assert bool(gradient(cross_entropy(sharpened, torch.tensor([0])), logits).isfinite().all())


@few
@given(cases(), st.floats(0.1, 100.0))
def test_sr_does_not_see_how_long_the_logits_are(case: Case, factor: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    losses = losses_of("sr", logits, labels)
    torch.testing.assert_close(losses_of("sr", factor * logits, labels), losses)
    along = (gradient(losses, logits) * logits).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-9, rtol=0)


@few
@given(cases(), st.floats(0.1, 1.0), st.floats(0.05, 1.0), st.floats(0.0, 5.0))
def test_sr_is_its_formula(case: Case, temperature: float, exponent: float, strength: float) -> None:
    logits, labels, _ = case
    values = {"temperature": temperature, "exponent": exponent, "strength": strength, "growth": 16.0}
    p = (logits / logits.norm(dim=1, keepdim=True) / temperature).softmax(1)
    norm = 4 * strength * (p**exponent).sum(1)  # half the budget: the square root of the growth
    given_label = functional.nll_loss(p.log(), labels, reduction="none")
    torch.testing.assert_close(losses_of("sr", logits, labels, Clock(3, 6), **values), given_label + norm)
    targets = 0.8 * one_hot(labels, logits) + 0.2 / logits.shape[1]
    smoothed = losses_of("sr", logits, labels, Clock(3, 6), label_smoothing=0.2, **values)
    torch.testing.assert_close(smoothed, soft_cross_entropy(p.log(), targets) + norm)


def test_sr_without_the_norm_and_the_sharpening_is_cross_entropy_bit_for_bit() -> None:
    values: dict[str, Any] = {"strength": 0.0, "temperature": 1.0, "normalized": False}
    ce = trained_in_order("ce")
    assert differences(trained_in_order("sr", **values).state_dict(), ce.state_dict()) == []
    for changed in ({"strength": 0.1}, {"temperature": 0.9}, {"normalized": True}):
        assert differences(trained_in_order("sr", **(values | changed)).state_dict(), ce.state_dict()) != []


@pytest.mark.parametrize(
    ("strength", "per_epoch", "epochs", "last"), [(1.2, 1.03, 120, 40.4), (4.0, 1.02, 200, 206), (10.0, 1.02, 200, 515)]
)
def test_the_weight_of_the_norm_grows_as_published(strength: float, per_epoch: float, epochs: int, last: float) -> None:
    """lambda_0 rho^epoch; over another budget rho becomes rho^(T / T')."""
    method: Any = make("sr", tiny_task(tiny_data()), strength=strength, growth=per_epoch**epochs)
    weights = [method.norm_weight(Clock(epoch, epochs)) for epoch in range(epochs)]
    assert weights == pytest.approx([strength * per_epoch**epoch for epoch in range(epochs)])
    assert weights[-1] == pytest.approx(last, rel=2e-3)
    short = [method.norm_weight(Clock(epoch, 30)) for epoch in range(30)]
    assert short == pytest.approx([strength * (per_epoch ** (epochs / 30)) ** epoch for epoch in range(30)])


def test_sr_predicts_with_the_logits_as_they_are() -> None:
    method = trained_in_order("sr").eval()
    images = tiny_data().images
    torch.testing.assert_close(method.predict(images), method.learner.net(plain(images)).softmax(1))


# All


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("mae", {}, 2 * 0.75),
        ("sce", {}, 0.1 * math.log(4) + math.log(10_000) * 0.75),
        ("sce", {"alpha": 2.0, "beta": 0.5, "log_zero": -9.0}, 2 * math.log(4) + 0.5 * 9 * 0.75),
        ("nce-rce", {}, 2 / (1 + 2 + 3 + 3) + math.log(10_000) * 0.75),
        ("dal", {}, (1 - 2**-2.8) / 1.4 + 0.8 * 0.875 / 1.4),  # q = 1.4, w = 0.8, H = 1.75 bits of 2
        ("dal", {"bootstrap": "hard"}, (1 - 2**-2.8) / 1.4 + 0.8 * 0.5 / 1.4),
        ("label-smoothing", {}, 0.9 * 2 * math.log(2) + 0.025 * (1 + 2 + 3 + 3) * math.log(2)),
        ("truncated-gce", {"q": 0.5}, (1 - 0.5) / 0.5),
        # p = (16, 4, 1, 1) / 22 and w = 4^(9/4 8/9) = 16
        ("sr", {"normalized": False, "exponent": 0.5, "strength": 1.0, "growth": 4.0**2.25}, math.log(5.5) + 16 * 8 / 22**0.5),
    ],
)
def test_a_prediction_worked_by_hand(name: str, values: dict[str, Any], expected: float) -> None:
    """p = (1/2, 1/4, 1/8, 1/8) and the second class given, at 8/9 of the budget."""
    logits = -math.log(2) * torch.tensor([[1.0, 2.0, 3.0, 3.0]])
    assert losses_of(name, logits, torch.tensor([1]), Clock(8, 9), **values).item() == pytest.approx(expected, rel=1e-5)


NEW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absolute error": absolute_error,
    "truncated": lambda z, y: truncated_generalized_cross_entropy(z, y, 0.7, 0.5, torch.ones_like(y, dtype=torch.bool)),
    "reverse": lambda z, y: reverse_cross_entropy(z, y, -4.0),
    "normalized": normalized_cross_entropy,
    "dynamics-aware, soft": lambda z, y: dynamics_aware_loss(z, y, 1.4, 0.8),
    "dynamics-aware, hard": lambda z, y: dynamics_aware_loss(z, y, 1.4, 0.8, hard=True),
    "sparse norm": lambda z, y: sparse_norm(z, 0.1),
    "sharpened": lambda z, y: cross_entropy(sharpened_logits(z, 0.5, normalized=True), y),
}


@pytest.mark.parametrize("name", NEW)
@settings(few, max_examples=6)
@given(cases())
def test_derivatives_agree_with_differences(name: str, case: Case) -> None:
    logits, labels, _ = case
    logits = (logits / logits.abs().amax()).requires_grad_()
    assert gradcheck(lambda z: NEW[name](z, labels), (logits,))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_of_any_precision_give_finite_float32_and_leave_their_input_alone(name: str, dtype: torch.dtype) -> None:
    logits = 1e4 * torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    logits = logits.to(dtype).requires_grad_()
    labels, before = torch.tensor([1, 1, 0]), logits.detach().clone()
    losses = NEW[name](logits, labels)
    assert losses.dtype == torch.float32
    assert losses.shape == (3,)
    assert bool(losses.isfinite().all())
    assert bool(gradient(losses, logits).isfinite().all())
    assert torch.equal(logits.detach(), before)


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_losses.py::"
BY_HAND = HERE + "test_a_prediction_worked_by_hand"
FLOOR = HERE + "test_label_smoothing_has_a_floor"
PRUNING = HERE + "test_pruning_epochs_are_the_published_ones_and_stretch_with_the_budget"
SHEET = HERE + "test_a_pruned_sample_costs_what_the_sheet_says"
REVERSE = HERE + "test_reverse_cross_entropy_with_the_codes_clip"
DAL_SCHEDULE = HERE + "test_dal_schedule_of_150_epochs"
DAL_GUARDS = HERE + "test_dal_where_q_does_not_rise_through_one"
MIXED = HERE + "test_mixup_steps_on_mixed_images_with_mixed_labels[0.0]"
SHARE = HERE + "test_the_share_has_the_moments_of_the_beta_distribution[1.0]"
GROWTH = HERE + "test_the_weight_of_the_norm_grows_as_published"
UNIFORM = HERE + "test_normalized_cross_entropy_of_a_uniform_prediction[10]"


MUTATIONS = [
    Mutation("methods/ce.py", "        0.1,", "        0.11,", FLOOR),
    Mutation("losses/cross_entropy.py", "(1 - smoothing) *", "(1.1 - smoothing) *", FLOOR),
    Mutation("losses/cross_entropy.py", "given - smoothing", "given - 1.1 * smoothing", FLOOR),
    Mutation("methods/mae.py", "        2.0,", "        2.2,", BY_HAND),
    Mutation("methods/mae.py", "return self.config.scale", "return 1.1 * self.config.scale", BY_HAND),
    Mutation("losses/reverse_cross_entropy.py", "labels, 1.0)", "labels, 1.1)", REVERSE),
    Mutation("losses/reverse_cross_entropy.py", "return -log_zero", "return -1.1 * log_zero", REVERSE),
    Mutation("losses/generalized_cross_entropy.py", "(1 - threshold**q)", "(1.1 - threshold**q)", SHEET),
    Mutation("losses/generalized_cross_entropy.py", "threshold**q)", "threshold**(1.1 * q))", SHEET),
    Mutation("losses/generalized_cross_entropy.py", "threshold**q) / q", "threshold**q) / (1.1 * q)", SHEET),
    Mutation("methods/truncated_gce.py", "        0.333,", "        0.3663,", PRUNING),
    Mutation("methods/truncated_gce.py", "        0.083,", "        0.0913,", PRUNING),
    Mutation("methods/truncated_gce.py", "max(-1,", "max(-1.1,", PRUNING),
    Mutation("methods/truncated_gce.py", "clock.epoch - 1,", "clock.epoch - 1.1,", PRUNING),
    Mutation("methods/truncated_gce.py", "> self.config.threshold", "> 1.1 * self.config.threshold", SHEET),
    Mutation("methods/sce.py", "return self.config.alpha", "return 1.1 * self.config.alpha", BY_HAND),
    Mutation("methods/sce.py", "+ self.config.beta", "+ 1.1 * self.config.beta", BY_HAND),
    Mutation("losses/normalized_cross_entropy.py", "/ log_p.sum", "/ 1.1 / log_p.sum", UNIFORM),
    Mutation("methods/dal.py", "        0.6,", "        0.66,", DAL_SCHEDULE),
    Mutation("methods/dal.py", "        1.5,", "        1.65,", DAL_SCHEDULE),
    Mutation("methods/dal.py", "* clock.fraction", "* 1.1 * clock.fraction", DAL_SCHEDULE),
    Mutation("methods/dal.py", "max(1.0, self", "max(1.1, self", DAL_GUARDS),
    Mutation("methods/dal.py", "return 0.0", "return 0.1", DAL_GUARDS),
    Mutation("methods/dal.py", "max(0.0, (", "max(0.1, (", DAL_SCHEDULE),
    Mutation("methods/dal.py", "(clock) - 1)", "(clock) - 1.1)", DAL_SCHEDULE),
    Mutation("methods/dal.py", "q_end - 1))", "q_end - 1.1))", DAL_SCHEDULE),
    Mutation("losses/dynamics_aware.py", "+ bootstrap_weight * own", "+ 1.1 * bootstrap_weight * own", BY_HAND),
    Mutation("losses/dynamics_aware.py", "(q * math.log", "(1.1 * q * math.log", BY_HAND),
    Mutation("methods/mixup.py", "first + (1 - share)", "first + (1.1 - share)", MIXED),
    Mutation("methods/mixup.py", "(share * first", "(1.1 * share * first", MIXED),
    Mutation("methods/mixup.py", "mixing_weight(self", "mixing_weight(1.1 * self", SHARE),
    Mutation("methods/sr.py", "return self.config.strength", "return 1.1 * self.config.strength", GROWTH),
    Mutation("methods/sr.py", "pow(self.config.growth,", "pow(1.1 * self.config.growth,", GROWTH),
    Mutation("methods/sr.py", "clock.fraction)", "1.1 * clock.fraction)", GROWTH),
    Mutation("methods/sr.py", "given + self", "given + 1.1 * self", BY_HAND),
    Mutation("losses/sparse.py", "else logits) / temperature", "else logits) / (1.1 * temperature)", BY_HAND),
    Mutation("losses/sparse.py", "exp(exponent *", "exp(1.1 * exponent *", BY_HAND),
]
