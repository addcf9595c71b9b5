"""Mixtures of losses, the turning point that SELC and ALR can find with them, and M-DYR-H, against independent truths."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from data.seeds import generator
from data.table import TrainData
from losses import balance_penalty, soft_cross_entropy, squared_error
from methods import m_dyr_h
from methods.base import Clock, Learner, first_epoch
from methods.m_dyr_h import MDYRH, MDYRHConfig
from methods.parts import mixture, turning_point
from methods.parts.mixing import mix, mixing_weight
from methods.parts.mixture import BetaMixture, GaussianMixture, min_max, two_means
from methods.parts.training_pass import pass_over_training_set
from methods.parts.turning_point import TurningPoint
from methods.selc import SELC, SELCConfig
from models.network import Network
from tests.loss_cases import few
from tests.mutation import Mutation
from tests.tiny import BATCH, EPOCHS, InOrder, K, N, differences, finish, make, plain, tiny_data, tiny_net, tiny_task, train


def linear_net(num_classes: int | None = None) -> Network:
    """No batch normalisation and no dropout: a forward pass leaves no trace."""
    return Network(nn.Flatten(), 64, num_classes or K, 0.0)


def one_hot(labels: Tensor) -> Tensor:
    return functional.one_hot(labels, K).float()


def losses_of_noise(seed: int, size: int = 2000, noisy: float = 0.4) -> Tensor:
    """Losses as a network leaves them: most small, those of wrong labels large and spread."""
    stream = np.random.default_rng(seed)
    num_noisy = int(noisy * size)
    parts = stream.exponential(0.2, size - num_noisy), stream.normal(3.0, 1.0, num_noisy).clip(0.05)
    return torch.from_numpy(stream.permutation(np.concatenate(parts))).float()


# Losses


def test_balance_penalty_is_its_formula_and_zero_for_a_uniform_mean_only() -> None:
    logits = torch.randn(7, 5, generator=generator("balance"), dtype=torch.float64)
    mean = logits.softmax(1).mean(0)
    expected = (0.2 * (0.2 / mean).log()).sum()
    torch.testing.assert_close(balance_penalty(logits), expected)
    torch.testing.assert_close(balance_penalty(logits), -mean.log().mean() - math.log(5))
    assert balance_penalty(logits) > 0
    certain = 20 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(balance_penalty(certain), torch.zeros((), dtype=torch.float64))


def test_balance_penalty_of_a_class_that_underflows_has_a_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -500.0], [1.0, 0.0, -600.0]], requires_grad=True)
    assert logits.softmax(1)[:, 2].sum() == 0
    penalty = balance_penalty(logits)
    penalty.backward()
    assert penalty.isfinite()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 2], torch.tensor(-1 / 3), atol=1e-4, rtol=0)


@few
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_cross_entropy_on_mixed_targets_is_the_mixed_cross_entropy(seed: int, weight: float) -> None:
    """The four terms of M-DYR-H's loss are one: given and predicted labels of both images."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, K, generator=stream, dtype=torch.float64)
    given, predicted = torch.randint(K, (2, 6), generator=stream)
    noisy, partners = torch.rand(6, generator=stream, dtype=torch.float64), torch.randperm(6, generator=stream)
    targets = (1 - noisy)[:, None] * functional.one_hot(given, K) + noisy[:, None] * functional.one_hot(predicted, K)

    def term(labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")

    expected = weight * ((1 - noisy) * term(given) + noisy * term(predicted)) + (1 - weight) * (
        (1 - noisy[partners]) * term(given[partners]) + noisy[partners] * term(predicted[partners])
    )
    torch.testing.assert_close(soft_cross_entropy(logits, mix(targets, weight, partners)), expected)


def test_squared_error_is_its_formula() -> None:
    stream = generator("squared")
    logits, targets = torch.randn(5, K, generator=stream), torch.randn(5, K, generator=stream).softmax(1)
    torch.testing.assert_close(squared_error(logits, targets), (logits.softmax(1) - targets).pow(2).sum(1))


def test_mixing_weights_are_drawn_from_their_beta_distribution() -> None:
    torch.manual_seed(0)
    for alpha in (0.3, 4.0, 32.0):
        draws = torch.tensor([mixing_weight(alpha) for _ in range(2000)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert draws.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 2000))
        assert draws.var().item() == pytest.approx(variance, rel=0.1)


# Gaussian mixtures


def published(values: Tensor, **values_of: Any) -> Any:
    """scikit-learn's fit with the settings of the official code of DivideMix."""
    from sklearn import mixture as sklearn_mixture  # here, as the import takes long and few tests need it

    settings_of = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4, "random_state": 0} | values_of
    return sklearn_mixture.GaussianMixture(2, **settings_of).fit(values.double().numpy()[:, None])


@pytest.mark.parametrize("noisy", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_posterior_is_scikit_learns(seed: int, noisy: float) -> None:
    """Its k-means starts at random and may end short of the best two means: its own answers differ by 0.011 for one set."""
    values = min_max(losses_of_noise(seed, noisy=noisy))
    posterior = GaussianMixture.fit(values).posterior(values)
    distances = []
    for random_state in range(6):
        theirs = published(values, random_state=random_state)
        expected = torch.from_numpy(theirs.predict_proba(values.numpy()[:, None])[:, int(theirs.means_.argmin())])
        distances.append((posterior - expected).abs().max().item())
    assert min(distances) < 1e-6
    assert max(distances) < 1.2e-2
    assert 0 < (posterior > 0.5).double().mean() < 1


def test_each_constant_of_the_fit_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tolerance (none) both take the same ten steps to the same parameters."""
    monkeypatch.setattr(mixture, "GAUSSIAN_TOLERANCE", 0.0)
    values = min_max(losses_of_noise(2, noisy=0.3))
    with pytest.warns(UserWarning, match="did not converge"):
        theirs = published(values, tol=0.0)
    ours, order = GaussianMixture.fit(values), theirs.means_.ravel().argsort()
    for found, expected in (
        (ours.weights, theirs.weights_),
        (ours.means, theirs.means_),
        (ours.variances, theirs.covariances_),
    ):
        torch.testing.assert_close(found, torch.from_numpy(expected.ravel()[order].copy()), rtol=1e-7, atol=0)
    torch.testing.assert_close(ours.separation, ours.means[1] - ours.means[0])


def test_the_fit_stops_where_scikit_learn_does() -> None:
    """For these losses a tenth more of tolerance is a step less."""
    values = min_max(losses_of_noise(10, size=200, noisy=0.3))
    loose, theirs = published(values, tol=1.1e-2), published(values)
    assert loose.n_iter_ < theirs.n_iter_
    means = torch.from_numpy(np.sort(theirs.means_.ravel()))
    torch.testing.assert_close(GaussianMixture.fit(values).means, means, rtol=1e-7, atol=0)


@few
@given(st.lists(st.sampled_from([0.0, 0.1, 0.15, 0.5, 0.8, 1.0]) | st.floats(0, 1), min_size=1, max_size=30))
def test_two_means_is_the_best_of_all_cuts(values: list[float]) -> None:
    distinct, counts = torch.unique(torch.tensor(values, dtype=torch.float64), return_counts=True)
    found = two_means(distinct, counts)
    if len(distinct) == 1:
        assert torch.equal(found, torch.ones(1, 2, dtype=torch.float64))
        return
    whole = np.repeat(distinct.numpy(), counts.numpy())

    def cost(num_below: int) -> float:
        parts = distinct[:num_below], distinct[num_below:]
        both = whole[whole <= parts[0][-1].item()], whole[whole > parts[0][-1].item()]
        return float(sum(((part - part.mean()) ** 2).sum() for part in both))

    num_below = int(found[:, 0].sum())
    assert found.tolist() == [[1, 0]] * num_below + [[0, 1]] * (len(distinct) - num_below)
    assert cost(num_below) <= min(cost(i) for i in range(1, len(distinct))) + 1e-12


def test_two_means_is_scikit_learns_clustering() -> None:
    from sklearn.cluster import KMeans

    values, counts = torch.unique(losses_of_noise(3).double(), return_counts=True)
    theirs = KMeans(2, n_init=3, random_state=0).fit(values.numpy()[:, None], sample_weight=counts.numpy())
    smaller = int(theirs.cluster_centers_.argmin())
    assert (two_means(values, counts)[:, 0].numpy() == (theirs.labels_ == smaller)).mean() > 0.999


@pytest.mark.parametrize("family", [GaussianMixture, BetaMixture])
def test_the_order_of_the_values_changes_no_bit(family: Any) -> None:
    values = min_max(losses_of_noise(4)).clamp(0.001, 0.999)
    values[5:9] = values[3]
    order = torch.randperm(len(values), generator=generator("order"))
    one, other = family.fit(values), family.fit(values[order])
    for name in vars(one):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    if family is GaussianMixture:
        assert torch.equal(one.posterior(values)[order], one.posterior(values[order]))


def test_scaled_losses_make_the_fit_independent_of_their_scale() -> None:
    losses = losses_of_noise(5).double()
    one, other = min_max(losses), min_max(3 * losses + 2)
    assert one.min() == 0
    assert one.max() == 1
    torch.testing.assert_close(GaussianMixture.fit(one).posterior(one), GaussianMixture.fit(other).posterior(other))
    assert torch.equal(min_max(torch.full((4,), 7.0)), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3], [0.0, 1.0], [0.0] * 50 + [1.0], [0.2, 0.2, 0.2000001]])
def test_awkward_values_give_probabilities(values: list[float]) -> None:
    given_values = torch.tensor(values)
    found = GaussianMixture.fit(given_values)
    posterior = found.posterior(given_values)
    assert bool(((posterior >= 0) & (posterior <= 1)).all())
    torch.testing.assert_close(found.weights.sum(), torch.ones((), dtype=torch.float64))
    if len(set(values)) == 1:
        torch.testing.assert_close(posterior, torch.full_like(posterior, 0.5))
    if values[-1] == 1.0:
        assert posterior[0] > 0.99
        assert posterior[-1] < 0.01
    table = BetaMixture.fit(given_values.clamp(0.001, 0.999)).table(100)
    assert bool(((table >= 0) & (table <= 1)).all())


def test_an_empty_component_stays_finite() -> None:
    values, shares = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    found = GaussianMixture.of_shares(values, shares)
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 5 * 2.0**-52], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variances, torch.tensor([0.2505, 5e-4], dtype=torch.float64))


# Beta mixtures


def density(values: np.ndarray[Any, Any], alpha: float, beta: float) -> np.ndarray[Any, Any]:
    """Of a beta distribution, as torch has it."""
    family = torch.distributions.Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64))
    found: np.ndarray[Any, Any] = family.log_prob(torch.from_numpy(values)).exp().numpy()
    return found


def reference_beta_fit(values: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """Ten steps as the paper's code has them, with torch's density."""
    weights, alphas, betas = np.array([0.5, 0.5]), np.array([1.0, 2.0]), np.array([2.0, 1.0])
    for _ in range(10):
        shares = np.stack([weights[k] * density(values, alphas[k], betas[k]) for k in range(2)])
        shares /= shares.sum(0)
        mean = np.array([np.average(values, weights=share) for share in shares])
        spread = np.array([np.average((values - mean[k]) ** 2, weights=shares[k]) for k in range(2)])
        alphas = mean * (mean * (1 - mean) / spread - 1)
        betas = alphas * (1 - mean) / mean
        weights = shares.sum(1) / shares.sum()
    return weights, alphas, betas


def two_betas(seed: int = 0, size: int = 4000) -> tuple[Tensor, Any]:
    stream = np.random.default_rng(seed)
    from_second = stream.random(size) < 0.4
    values = np.where(from_second, stream.beta(12, 2, size), stream.beta(1, 20, size))
    return torch.from_numpy(values.clip(0.001, 0.999)), from_second


def test_ten_steps_of_the_beta_fit_are_the_reference() -> None:
    values, _ = two_betas()
    found = BetaMixture.fit(values)
    for ours, expected in zip((found.weights, found.alphas, found.betas), reference_beta_fit(values.numpy()), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-9, atol=0)


def test_the_beta_fit_recovers_a_synthetic_mixture() -> None:
    values, from_second = two_betas()
    found = BetaMixture.fit(values)
    torch.testing.assert_close(found.means, torch.tensor([1 / 21, 12 / 14], dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(found.weights, torch.tensor([0.6, 0.4], dtype=torch.float64), atol=0.03, rtol=0)
    called = found.table(100)[(100 * values).long()].numpy() > 0.5
    assert (called == from_second).mean() > 0.99
    assert found.means[1] > found.means[0]


@pytest.mark.parametrize(
    ("value", "alpha", "beta"),
    [
        (0.5, 124999.5, 124999.5),  # the variance is at its floor
        (1e-5, 1e-3, 1e-3 * (1 - 1e-5) / 1e-5),  # and so is alpha
        (1 - 1e-5, 8.9998, 1e-3),  # and so is beta
    ],
)
def test_the_floors_of_the_beta_fit(value: float, alpha: float, beta: float) -> None:
    found = BetaMixture.fit(torch.full((5,), value, dtype=torch.float64))
    torch.testing.assert_close(found.alphas, torch.full((2,), alpha, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.betas, torch.full((2,), beta, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_joint_density_is_that_of_two_weighted_beta_distributions() -> None:
    found = BetaMixture(*torch.tensor([[0.6, 0.4], [1.5, 8.0], [3.0, 0.7]], dtype=torch.float64))
    values = torch.tensor([0.001, 0.3, 0.9], dtype=torch.float64)
    expected = np.stack([0.6 * density(values.numpy(), 1.5, 3.0), 0.4 * density(values.numpy(), 8.0, 0.7)], axis=1)
    torch.testing.assert_close(found.joint(values), torch.from_numpy(expected))


def test_the_table_is_the_posterior_and_does_not_fall_to_the_right_of_its_largest_entry() -> None:
    found = BetaMixture(*torch.tensor([[0.6, 0.4], [1.0, 8.0], [3.0, 9.0]], dtype=torch.float64))
    table = found.table(100)
    middles = (np.arange(100) + 0.5) / 100
    small, large = 0.6 * density(middles, 1, 3), 0.4 * density(middles, 8, 9)
    expected = large / (small + large)
    top = expected.argmax()
    assert 0 < top < 80
    assert expected[-1] < 0.5, "without repair the largest losses would be called clean"
    expected[top:] = expected[top]
    torch.testing.assert_close(table, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_a_component_without_density_shares_at_the_floor() -> None:
    """Both densities are 0 in the middle: neither component claims the value, and nothing is divided by 0."""
    far = BetaMixture(*torch.tensor([[0.5, 0.5], [1.0, 1e5], [1e5, 1.0]], dtype=torch.float64))
    assert far.joint(torch.tensor([0.5], dtype=torch.float64)).sum() == 0
    assert bool(far.table(100).isfinite().all())
    assert mixture.JOINT_FLOOR == 1e-12, "the official code's"


# The sweep


def test_a_sweep_sees_every_sample_in_evaluation_mode_and_leaves_no_trace() -> None:
    data = tiny_data()
    torch.manual_seed(0)
    learner = Learner(tiny_net(), SELCConfig()).train()
    before = copy.deepcopy(learner.state_dict())
    index, logits = pass_over_training_set(learner, data, plain)
    assert learner.training
    assert differences(learner.state_dict(), before) == []
    assert not logits.requires_grad
    learner.eval()
    assert index.sort().values.tolist() == list(range(N))
    torch.testing.assert_close(logits, learner(plain(data.images))[index].detach())


# The turning point


def test_the_turning_point_is_the_largest_smoothed_separation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of three: 0.1, 0.25, 0.4, 0.667, 0.8, 0.733, 0.533, so the peak is in epoch 4 and is known two epochs later."""
    separations = [0.1, 0.4, 0.7, 0.9, 0.8, 0.5, 0.3]
    point = TurningPoint(0.1, torch.device("cpu"))
    for epoch, separation in enumerate(separations):
        fitted = SimpleNamespace(separation=torch.tensor(separation, dtype=torch.float64))
        monkeypatch.setattr(turning_point, "GaussianMixture", SimpleNamespace(fit=lambda _, fitted=fitted: fitted))
        assert not any(point.passed(Clock(later, 20)) for later in range(20)), "not before it is known"
        point.observe(torch.rand(4), Clock(epoch, 20))
        peak = [0.1, 0.25, 0.4, 2 / 3, 0.8, 0.8, 0.8][epoch]
        torch.testing.assert_close(point.peak, torch.tensor([peak, min(epoch, 4)]))
    assert [point.passed(Clock(epoch, 20)) for epoch in (4, 6, 7, 8, 19)] == [False, False, True, True, True]


def test_the_separation_is_that_of_scaled_losses() -> None:
    losses = losses_of_noise(6)
    means = published(min_max(losses)).means_.ravel()
    for seen in (losses, 5 * losses + 1):
        point = TurningPoint(0.1, torch.device("cpu"))
        point.observe(seen, Clock(0, 20))
        assert point.peak[0].item() == pytest.approx(abs(means[0] - means[1]), rel=1e-3)


def net_state(method: Any) -> dict[str, Any]:
    state: dict[str, Any] = method.learner.state_dict()
    return state


def test_a_turning_point_that_is_never_found_changes_nothing() -> None:
    data = tiny_data()
    for name in ("selc", "alr"):
        watched = make(name, tiny_task(data), warmup=0.5, turning_point=True, patience=0.99)
        alone = make(name, tiny_task(data), warmup=0.5)
        finish(watched, data)
        finish(alone, data)
        assert differences(net_state(watched), net_state(alone)) == []
        assert torch.equal(watched.targets, alone.targets)
        keys = set(flat_keys(watched)) - set(flat_keys(alone))
        assert keys == {"turning_point.separations", "turning_point.peak", "turning_point.start"}


def flat_keys(method: nn.Module) -> list[str]:
    return list(method.state_dict())


def test_labels_are_corrected_from_the_turning_point_on_and_the_state_says_so() -> None:
    """Also: a method that gets nothing but the state goes on bit for bit, and ALR without entropy is SELC here, too."""
    data = tiny_data()
    values = {"warmup": 0.99, "turning_point": True, "patience": 0.0}
    selc, alr = make("selc", tiny_task(data), **values), make("alr", tiny_task(data), entropy_weight=0.0, **values)
    state = selc.state_dict()
    for epoch in range(EPOCHS):
        start = int(selc.turning_point.start)
        fresh = make("selc", tiny_task(data), seed=epoch + 1, **values)
        fresh.load_state_dict(state)
        for method in (selc, alr, fresh):
            finish(method, data, epoch, epoch + 1)
        state = fresh.state_dict()
        assert differences(state, selc.state_dict()) == []
        assert differences(alr.state_dict(), selc.state_dict()) == []
        begun = 0 < start <= epoch
        assert torch.equal(selc.targets, one_hot(data.labels)) != begun
    assert 0 < int(selc.turning_point.start) < EPOCHS - 1, "it was found before the end"
    assert selc.config.begins() == 0.99


def test_a_turning_point_does_not_put_the_latest_start_off() -> None:
    data = tiny_data()
    watched = make("selc", tiny_task(data), warmup=0.5, turning_point=True, patience=0.99)
    finish(watched, data, 0, 3)
    assert torch.equal(watched.targets, one_hot(data.labels))
    seen = watched.turning_point.separations.clone()
    assert bool((seen > 0).all()), "one separation for each epoch of the warm-up"
    finish(watched, data, 3, 4)
    assert not torch.equal(watched.targets, one_hot(data.labels))
    assert torch.equal(watched.turning_point.separations, seen), "no further sweep"


def test_the_published_distance_is_the_default_patience() -> None:
    assert SELCConfig().patience * 200 == pytest.approx(10)
    assert not SELCConfig().turning_point


# M-DYR-H


def m_dyr(data: TrainData | None = None, make_net: Any = linear_net, **values: Any) -> MDYRH:
    method = make("m-dyr-h", tiny_task(data or tiny_data(), make_net), **values)
    assert isinstance(method, MDYRH)
    return method


def test_the_published_defaults_of_m_dyr_h() -> None:
    config = MDYRHConfig()
    assert first_epoch(config.begins(), 300) == 105
    assert config.begins() * 300 == pytest.approx(105)
    assert (config.mixing, config.balance_weight) == (32, 1)
    assert m_dyr_h.PERCENTILES == (0.05, 0.95)
    assert m_dyr_h.BINS == 100


def test_with_no_loss_called_noisy_m_dyr_h_is_mixup_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data()
    mixup = m_dyr(warmup=0.999)
    finish(mixup, data)
    monkeypatch.setattr(MDYRH, "fit", lambda self, losses: None)
    bootstrapped, unbalanced = m_dyr(warmup=0.0), m_dyr(warmup=0.0, balance_weight=0.0)
    finish(unbalanced, data)
    assert differences(unbalanced.state_dict(), mixup.state_dict()) == []
    finish(bootstrapped, data)
    assert differences(bootstrapped.state_dict(), mixup.state_dict()) != []


def test_with_every_loss_called_noisy_the_given_labels_do_not_matter() -> None:
    data = tiny_data()
    other = TrainData(data.images, (data.labels + 1) % K)
    states = []
    for seen in (data, other):
        method = m_dyr(seen, warmup=0.0)
        method.posteriors.fill_(1.0)
        next(train(method, InOrder.of(seen, [torch.arange(BATCH)])))
        states.append(method.learner.state_dict())
    assert differences(*states) == []


def test_unmixed_and_with_nothing_noisy_m_dyr_h_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m_dyr_h, "mixing_weight", lambda alpha: 1.0)
    batch = tiny_data().gather(torch.arange(BATCH))
    for clock in (Clock(0, EPOCHS), Clock(EPOCHS - 1, EPOCHS)):
        method = m_dyr(balance_weight=0.0, augmentation="none")
        logits = method.learner(plain(batch.images))
        torch.testing.assert_close(method.step(batch, clock).loss, functional.cross_entropy(logits, batch.labels).detach())


def test_one_step_of_m_dyr_h_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forward passes, four terms of cross-entropy, the penalty, and plain SGD."""
    monkeypatch.setattr(m_dyr_h, "mixing_weight", lambda alpha: 0.3 if alpha == 7.0 else 1.0)
    batch, clock = tiny_data().gather(torch.arange(BATCH)), Clock(EPOCHS - 1, EPOCHS)

    def without_dropout(num_classes: int | None = None) -> Network:
        net = tiny_net(num_classes)
        net.dropout.p = 0.0
        return net

    values: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "augmentation": "none"}
    method = m_dyr(make_net=without_dropout, mixing=7.0, balance_weight=0.6, **values)
    method.posteriors.copy_(torch.rand(100, generator=generator("posteriors")))
    method.percentiles.copy_(torch.tensor([0.5, 3.0]))
    net = copy.deepcopy(method.learner.net).train()
    torch.manual_seed(1)
    step = method.train().step(batch, clock)

    torch.manual_seed(1)
    partners = torch.randperm(BATCH)
    images, labels = plain(batch.images), batch.labels
    guesses = net(images).detach()
    z = guesses.argmax(1)
    logits = net(0.3 * images + 0.7 * images[partners])
    losses = functional.cross_entropy(copy.deepcopy(net).eval()(images), labels, reduction="none").detach()
    bins = (100 * ((losses - 0.5) / 2.5)).clamp(0, 99).long()
    b = method.posteriors[bins]

    def term(target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target, reduction="none")

    own = (1 - b) * term(labels) + b * term(z)
    other = (1 - b)[partners] * term(labels[partners]) + b[partners] * term(z[partners])
    mean = logits.softmax(1).mean(0)
    loss = (0.3 * own + 0.7 * other).mean() + 0.6 * (1 / K * ((1 / K) / mean).log()).sum()
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.probabilities, guesses.softmax(1))
    beliefs = (1 - b)[:, None] * one_hot(labels) + b[:, None] * one_hot(z)
    torch.testing.assert_close(method.refined_labels()[batch.index], beliefs)
    assert bool((z != labels).any())
    loss.backward()
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * clock.fraction))
    for before, after in zip(net.parameters(), method.learner.net.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - rate * before.grad)
    assert method.learner.training


def test_losses_are_scaled_by_their_percentiles() -> None:
    losses = losses_of_noise(7)
    method = m_dyr()
    assert torch.equal(method.noisy(losses), torch.zeros_like(losses)), "0 before the first fit"
    method.fit(losses)
    low, high = np.percentile(losses.double().numpy(), [5, 95])
    assert method.percentiles.tolist() == pytest.approx([low, high], rel=1e-6)
    method.percentiles.copy_(torch.tensor([1.0, 3.0]))
    scaled = method.scaled(torch.tensor([0.5, 1.0, 1.468, 3.0, 9.0]))
    torch.testing.assert_close(scaled, torch.tensor([0.001, 0.001, 0.234, 0.999, 0.999]), rtol=1e-5, atol=0)
    method.posteriors.copy_(torch.arange(100) / 100)
    losses = torch.tensor([0.0, 1.0, 1.468, 2.999, 9.0])
    torch.testing.assert_close(method.noisy(losses), torch.tensor([0.0, 0.0, 0.23, 0.99, 0.99]))
    method.percentiles.copy_(torch.tensor([0.0, 1e-6]))
    torch.testing.assert_close(method.scaled(torch.tensor([5e-7])), torch.tensor([0.25]), rtol=1e-5, atol=0)


def test_the_fit_is_the_beta_mixture_of_the_losses_between_the_percentiles() -> None:
    losses = losses_of_noise(8).double()
    method = m_dyr()
    method.fit(losses)
    low, high = np.percentile(losses.numpy(), [5, 95])
    inside = losses[(losses >= low) & (losses <= high)].numpy()
    assert len(inside) == 1800
    expected = BetaMixture(
        *(torch.from_numpy(v) for v in reference_beta_fit(((inside - low) / (high - low)).clip(1e-3, 0.999)))
    )
    torch.testing.assert_close(method.posteriors.double(), expected.table(100), rtol=0, atol=1e-3)
    assert method.noisy(losses.quantile(0.99)[None]) > 0.95
    assert method.noisy(losses.quantile(0.3)[None]) < 0.05


def test_the_mixture_is_fitted_before_each_epoch_that_needs_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[Tensor] = []
    monkeypatch.setattr(MDYRH, "fit", lambda self, losses: fitted.append(losses))
    data = tiny_data()
    method = m_dyr(warmup=0.5, augmentation="none")
    counts = []
    for epoch in range(EPOCHS):
        finish(method, data, epoch, epoch + 1)
        counts.append(len(fitted))
    assert counts == [0, 0, 1, 2, 3, 3], "at the ends of epochs 2 to 4: epochs 3 to 5 are the method proper"
    assert len(fitted[-1]) == N
    assert torch.equal(method.refined_labels(), one_hot(data.labels)), "nothing was called noisy"


def test_a_sweep_of_m_dyr_h_uses_the_view_that_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[Tensor] = []
    monkeypatch.setattr(MDYRH, "fit", lambda self, losses: fitted.append(losses))
    data = tiny_data()
    for augmentation in ("none", "weak"):
        method = m_dyr(warmup=0.3, lr=1e-30, augmentation=augmentation)
        finish(method, data, 1, 2)
        logits = method.learner(plain(data.images)).detach()
        fitted.append(functional.cross_entropy(logits, data.labels, reduction="none"))
    swept, still, augmented, unmoved = (losses.sort().values for losses in fitted)
    torch.testing.assert_close(swept, still)
    assert not torch.allclose(augmented, unmoved)


def test_wrong_labels_are_found_and_replaced() -> None:
    """Ten times the tiny set with 30 % of its labels wrong: the predictions put most of them right."""
    stream = generator("wrong labels")
    truth = torch.randint(K, (400,), generator=stream)
    patterns = torch.randint(40, 216, (K, 1, 8, 8), generator=generator("prototypes"))
    images = (patterns[truth] + torch.randint(-40, 40, (400, 1, 8, 8), generator=stream)).to(torch.uint8)
    wrong = torch.rand(400, generator=stream) < 0.3
    data = TrainData(images, torch.where(wrong, (truth + 1 + torch.randint(K - 1, (400,), generator=stream)) % K, truth))
    method = m_dyr(data, tiny_net, warmup=0.3)
    finish(method, data)
    found = method.refined_labels().argmax(1)
    assert (found == truth)[wrong].float().mean() > 0.8
    assert (found == truth)[~wrong].float().mean() > 0.95


# SELC without the option


def test_the_option_is_off_by_default_and_leaves_the_state_alone() -> None:
    method = make("selc", tiny_task(tiny_data()))
    assert isinstance(method, SELC)
    assert [key for key in method.state_dict() if not key.startswith("learner.")] == ["targets"]


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_mixtures.py::"
BALANCE = HERE + "test_balance_penalty_is_its_formula_and_zero_for_a_uniform_mean_only"
GAUSSIAN = HERE + "test_each_constant_of_the_fit_is_scikit_learns"
STOP = HERE + "test_the_fit_stops_where_scikit_learn_does"
POSTERIOR = HERE + "test_the_posterior_is_scikit_learns[0-0.4]"
EMPTY = HERE + "test_an_empty_component_stays_finite"
BETA = HERE + "test_ten_steps_of_the_beta_fit_are_the_reference"
BETA_FLOORS = HERE + "test_the_floors_of_the_beta_fit"
TABLE = HERE + "test_the_table_is_the_posterior_and_does_not_fall_to_the_right_of_its_largest_entry"
JOINT = HERE + "test_the_joint_density_is_that_of_two_weighted_beta_distributions"
NO_DENSITY = HERE + "test_a_component_without_density_shares_at_the_floor"
TURNING = HERE + "test_the_turning_point_is_the_largest_smoothed_separation"
BY_HAND = HERE + "test_one_step_of_m_dyr_h_by_hand"
SCALED = HERE + "test_losses_are_scaled_by_their_percentiles"
MIXTURE, M_DYR_H, POINT = "methods/parts/mixture.py", "methods/m_dyr_h.py", "methods/parts/turning_point.py"

MUTATIONS = [
    Mutation("losses/balance.py", "- math.log(num_rows)", "- 1.1 * math.log(num_rows)", BALANCE),
    Mutation("losses/balance.py", "- math.log(num_classes)", "- 1.1 * math.log(num_classes)", BALANCE),
    Mutation("losses/balance.py", "-log_mean.mean()", "-1.1 * log_mean.mean()", BALANCE),
    Mutation("methods/parts/mixing.py", "return weight * rows", "return 1.1 * weight * rows", BY_HAND),
    Mutation("methods/parts/mixing.py", "(1 - weight)", "(1.1 - weight)", BY_HAND),
    Mutation(
        "methods/parts/mixing.py",
        "Beta(alpha, alpha)",
        "Beta(alpha, 1.1 * alpha)",
        HERE + "test_mixing_weights_are_drawn_from_their_beta_distribution",
    ),
    Mutation(MIXTURE, "GAUSSIAN_ITERATIONS = 10", "GAUSSIAN_ITERATIONS = 11", GAUSSIAN),
    Mutation(MIXTURE, "GAUSSIAN_TOLERANCE = 1e-2", "GAUSSIAN_TOLERANCE = 1.1e-2", STOP),
    Mutation(MIXTURE, "\nVARIANCE_FLOOR = 5e-4", "\nVARIANCE_FLOOR = 5.5e-4", GAUSSIAN),
    Mutation(MIXTURE, "+ 10 * torch.finfo", "+ 11 * torch.finfo", EMPTY),
    Mutation(MIXTURE, "- 0.5 * (squares", "- 0.55 * (squares", POSTERIOR),
    Mutation(MIXTURE, "BETA_ITERATIONS = 10", "BETA_ITERATIONS = 11", BETA),
    Mutation(MIXTURE, "BETA_VARIANCE_FLOOR = 1e-6", "BETA_VARIANCE_FLOOR = 1.1e-6", BETA_FLOORS + "[0.5-124999.5-124999.5]"),
    Mutation(MIXTURE, "BETA_PARAMETER_FLOOR = 1e-3", "BETA_PARAMETER_FLOOR = 1.1e-3", BETA_FLOORS),
    Mutation(MIXTURE, "JOINT_FLOOR = 1e-12", "JOINT_FLOOR = 1.1e-12", NO_DENSITY),
    Mutation(MIXTURE, "cls(pair(0.5, 0.5),", "cls(pair(0.55, 0.5),", BETA),
    Mutation(MIXTURE, "cls(pair(0.5, 0.5),", "cls(pair(0.5, 0.55),", BETA),
    Mutation(MIXTURE, "pair(1, 2), pair(2, 1)", "pair(1.1, 2), pair(2, 1)", BETA),
    Mutation(MIXTURE, "pair(1, 2), pair(2, 1)", "pair(1, 2.2), pair(2, 1)", BETA),
    Mutation(MIXTURE, "pair(1, 2), pair(2, 1)", "pair(1, 2), pair(2.2, 1)", BETA),
    Mutation(MIXTURE, "pair(1, 2), pair(2, 1)", "pair(1, 2), pair(2, 1.1)", BETA),
    Mutation(MIXTURE, "/ variances - 1))", "/ variances - 1.1))", BETA),
    Mutation(MIXTURE, "means * (1 - means) / variances", "means * (1.1 - means) / variances", BETA),
    Mutation(MIXTURE, "alphas * (1 - means)", "alphas * (1.1 - means)", BETA),
    Mutation(
        MIXTURE,
        "(values - means).square()).sum(dim=0) / totals).clamp",
        "(values - means).square()).sum(dim=0) / totals * 1.1).clamp",
        BETA,
    ),
    Mutation(MIXTURE, "(self.alphas - 1) *", "(self.alphas - 1.1) *", JOINT),
    Mutation(MIXTURE, "(self.betas - 1) *", "(self.betas - 1.1) *", JOINT),
    Mutation(MIXTURE, ") + 0.5) / num_bins", ") + 0.55) / num_bins", TABLE),
    Mutation(MIXTURE, "0.5) / num_bins", "0.5) / (1.1 * num_bins)", TABLE),
    Mutation(POINT, "WINDOW = 3", "WINDOW = 4", TURNING),
    Mutation(POINT, "min(WINDOW, clock.epoch + 1)", "min(WINDOW, clock.epoch + 2)", TURNING),
    Mutation(POINT, "self.patience * clock", "1.1 * self.patience * clock", TURNING),
    Mutation(POINT, "fill_(clock.epoch + 1)", "fill_(clock.epoch + 2)", TURNING),
    Mutation(M_DYR_H, "PERCENTILES = (0.05,", "PERCENTILES = (0.055,", SCALED),
    Mutation(M_DYR_H, "0.95)", "0.945)", SCALED),
    Mutation(M_DYR_H, "EDGE = 1e-3", "EDGE = 1.1e-3", SCALED),
    Mutation(M_DYR_H, "clamp(EDGE, 1 - EDGE)", "clamp(EDGE, 1 - 1.1 * EDGE)", SCALED),
    Mutation(M_DYR_H, "SMALLEST_SPAN = 1e-6", "SMALLEST_SPAN = 1.1e-6", SCALED),
    Mutation(M_DYR_H, "(BINS * self.scaled", "(1.1 * BINS * self.scaled", SCALED),
    Mutation(M_DYR_H, "(1 - noisy) * targets", "(1.1 - noisy) * targets", BY_HAND),
    Mutation(M_DYR_H, "+ noisy * one_hot", "+ 1.1 * noisy * one_hot", BY_HAND),
    Mutation(M_DYR_H, "loss + self.config.balance_weight", "loss + 1.1 * self.config.balance_weight", BY_HAND),
    Mutation(
        M_DYR_H,
        "Clock(clock.epoch + 1,",
        "Clock(clock.epoch + 2,",
        HERE + "test_the_mixture_is_fitted_before_each_epoch_that_needs_it_and_no_other",
    ),
]
