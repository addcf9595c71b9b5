"""ELR+, CDR and CTRR against their own equations."""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

from data.seeds import generator
from data.table import Batch
from losses import clipped_directions, contrastive_losses, pair_weights
from methods.base import Clock, Task, memory_momentum
from methods.cdr import CDRConfig, critical_gradients
from methods.ctrr import CTRR, ContrastiveNetwork, CTRRConfig
from methods.elr_plus import ELRPlus, ELRPlusConfig, ramp_up, weighed
from methods.parts.moving_average import MovingAverage
from models.network import Network
from tests.loss_cases import few
from tests.mutation import Mutation
from tests.tiny import (
    BATCH,
    EPOCHS,
    InOrder,
    K,
    N,
    assert_finite,
    differences,
    extreme_net,
    finish,
    given_one_hot,
    linear_net,
    make,
    net_state,
    nets_in_turn,
    plain,
    tiny_data,
    tiny_net,
    tiny_task,
    train,
    trained,
    weak,
    without_dropout,
)

BARE = {"momentum": 0.0, "weight_decay": 0.0, "augmentation": "none"}  # a step is rate times gradient


@pytest.fixture
def pair() -> tuple[Network, Network]:
    torch.manual_seed(3)
    return without_dropout(), without_dropout()


def first_batch() -> Batch:
    return tiny_data().gather(torch.arange(BATCH))


def after(net: nn.Module, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """The parameters of ``net`` after one step of plain gradient descent on ``loss``."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    moved = (w.detach() if g is None else w.detach() - rate * g for w, g in zip(parameters, found, strict=True))
    return dict(zip(names, moved, strict=True))


def assert_parameters(net: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], **tolerance)


# The moving average of a network


def test_a_moving_average_of_a_fixed_network_in_closed_form() -> None:
    """After n steps m^n w_0 + (1 - m^n) w; buffers stay its own, and no gradient reaches it."""
    torch.manual_seed(0)
    start, net = tiny_net(), tiny_net()
    average = MovingAverage(start)
    buffers = {name: buffer.clone() for name, buffer in average.net.named_buffers()}
    net.train()(torch.randn(BATCH, 1, 8, 8))
    for n in range(1, 5):
        average.follow(net, 0.8)
        for mine, first, theirs in zip(average.net.parameters(), start.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(mine, 0.8**n * first.detach() + (1 - 0.8**n) * theirs.detach())
            assert not mine.requires_grad
    assert differences(buffers, dict(average.net.named_buffers())) == []
    assert not average(torch.randn(BATCH, 1, 8, 8)).requires_grad
    assert all(parameter.requires_grad for parameter in start.parameters()), "the copy leaves the original as it is"


def test_a_moving_average_uses_the_statistics_of_its_batch_and_drops_nothing() -> None:
    torch.manual_seed(0)
    net = tiny_net()
    net.dropout.p = 0.9
    images, undropped = torch.randn(BATCH, 1, 8, 8), copy.deepcopy(net).train()
    undropped.dropout.p = 0.0
    average = MovingAverage(net).train()
    torch.testing.assert_close(average(images), undropped(images).detach())
    assert differences(dict(average.net.named_buffers()), dict(undropped.named_buffers())) == []
    assert net.dropout.p == 0.9


# ELR+


def elr_plus(*nets: nn.Module, **values: Any) -> ELRPlus:
    method = make("elr-plus", tiny_task(tiny_data(), nets_in_turn(*nets)), **values)
    assert isinstance(method, ELRPlus)
    return method.train()


class FixedBeta:
    """Stands in for the beta distribution: every share is 0.3; ``given`` are the parameters that it was made with."""

    given: tuple[float, ...] = ()

    def __init__(self, *parameters: float) -> None:
        FixedBeta.given = parameters

    def sample(self) -> Tensor:
        return torch.tensor(0.3)


@pytest.mark.parametrize("weigh_labels", [False, True])
def test_elr_plus_steps_by_hand(weigh_labels: bool, pair: tuple[Network, Network], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions, "Beta", FixedBeta)
    clock, batch, lr = Clock(2, EPOCHS), first_batch(), 0.1
    values = {"lr": lr, "strength": 3.0, "ramp": 0.5, "mixup": 2.5, "label_smoothing": 0.2, "memory": 0.3}
    values |= {"averaging": 0.1, "averaging_ramp": 0.8, "weigh_labels": weigh_labels}
    method = elr_plus(*pair, **BARE, **values)
    method.targets += torch.rand(N, 2, K, generator=generator("targets")) / K
    old = method.targets.clone()
    torch.manual_seed(5)
    step = method.step(batch, clock)
    torch.manual_seed(5)
    partners = [torch.randperm(BATCH), torch.randperm(BATCH)]
    assert FixedBeta.given == (2.5, 2.5)

    x, m = plain(batch.images), 0.7  # the larger of 0.3 and 0.7
    beta = math.exp(-1 / (0.3 * EPOCHS))
    weight = 3.0 * math.exp(-5 * (1 - (2 / 6) / 0.5) ** 2)
    a = math.exp(-5 * (1 - (2 / 6) / 0.8) ** 2) * math.exp(-1 / (0.1 * EPOCHS * N / BATCH))
    rate = lr * 0.5 * (1 + math.cos(math.pi * 2 / 6))
    losses, seen = [], []
    for k, (learner, average) in enumerate(
        ((method.first, method.first_average), (method.second, method.second_average)),
    ):
        p = copy.deepcopy(pair[1 - k]).train()(x).softmax(1).detach()
        h = beta * old[:BATCH, k] + (1 - beta) * p
        torch.testing.assert_close(method.targets[:BATCH, k], h)
        y = 0.8 * functional.one_hot(batch.labels, K) + 0.2 / K
        j = partners[k]
        mixed_x, mixed_y, mixed_h = (m * part + (1 - m) * part[j] for part in (x, y, h))
        if weigh_labels:
            mixed_y = mixed_y * mixed_h / (mixed_y * mixed_h).sum(1, keepdim=True)
        net = copy.deepcopy(pair[k]).train()
        q = net(mixed_x).softmax(1)
        assert q.min() > 1e-4, "nothing is clipped"
        loss = (-(mixed_y * q.log()).sum(1) + weight * (1 - (mixed_h * q).sum(1)).log()).mean()
        expected = after(net, loss, rate)
        assert_parameters(learner.net, expected, rtol=1e-4, atol=1e-5)
        slower = {name: a * w.detach() + (1 - a) * expected[name] for name, w in pair[k].named_parameters()}
        assert_parameters(average.net, slower, rtol=1e-4, atol=1e-5)
        losses.append(loss.detach())
        seen.append(p)
    torch.testing.assert_close(step.loss, (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(step.probabilities, (seen[0] + seen[1]) / 2)
    assert torch.equal(method.targets[BATCH:], old[BATCH:]), "rows outside the batch stay"


@pytest.mark.parametrize("smallest", [1.0, 1e-10, 1e-12, 1e-20, 1e-30, 1e-38, 1.5e-45])
def test_weighed_labels_sum_to_one_however_small_the_weights(smallest: float) -> None:
    """Against exact fractions. The official code divides in float32, by a sum that may be 1e-30 or less."""
    labels = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.5, 0.2, 0.2, 0.1]])
    targets = smallest * torch.tensor([[1.0, 3.0, 1.0, 0.0], [1.0, 1.0, 2.0, 9.0]])
    found = weighed(labels, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    for row, given_row, target_row in zip(found.tolist(), labels.tolist(), targets.tolist(), strict=True):
        weights = [Fraction(y) * Fraction(h) for y, h in zip(given_row, target_row, strict=True)]
        assert row == pytest.approx([float(weight / sum(weights)) for weight in weights], rel=1e-6)


def test_a_row_whose_weights_are_all_zero_keeps_its_labels() -> None:
    """The targets have nothing on any class that is given, which the official code turns into nan."""
    labels, targets = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 1e-30, 1.0]])
    assert weighed(labels, targets).tolist() == [pytest.approx([0.6, 0.4, 0.0]), [0.0, 1.0, 0.0]]
    assert bool((labels * targets / (labels * targets).sum(1, keepdim=True)).isnan().any()), "so it would be there"


def test_weighed_labels_train_where_predictions_have_nothing_on_the_given_classes() -> None:
    data = tiny_data()
    method = make("elr-plus", tiny_task(data, extreme_net), lr=1e-6, mixup=0.01, weigh_labels=True)
    steps = finish(method, data)
    index = torch.arange(N)
    ruled_out = method.targets[index, :, data.labels] == 0
    assert bool(ruled_out.any()), "what the test is about happens: a target of exactly 0 on the given class"
    assert_finite(method, steps)


def test_mixing_shares_come_from_the_beta_distribution_and_favour_the_sample() -> None:
    """m = max(m, 1 - m) of Beta(1, 1) is uniform on [0.5, 1]: a mixed one-hot image shows its share."""
    images = torch.eye(64).mul(64).view(64, 1, 8, 8).to(torch.uint8)
    data = dataclasses.replace(tiny_data(), images=images[:N])
    shares: list[float] = []

    def record(_module: nn.Module, arguments: tuple[Tensor]) -> None:
        shares.append(arguments[0].flatten(1).amax(1).min().item() + 2)

    method = make("elr-plus", tiny_task(data, linear_net), augmentation="none")
    method.first.net.register_forward_pre_hook(record)
    for seed in range(40):
        list(train(method, data, 0, 1, seed))
    found = torch.tensor(shares)
    assert len(found) == 200
    assert found.min() >= 0.5
    assert found.max() <= 1.0
    assert found.mean().item() == pytest.approx(0.75, abs=0.03)
    assert found.std().item() == pytest.approx(1 / math.sqrt(48), abs=0.02)


def test_elr_plus_without_strength_and_mixing_is_two_cross_entropies(
    pair: tuple[Network, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FixedBeta, "sample", lambda _: torch.tensor(0.0))
    monkeypatch.setattr(torch.distributions, "Beta", FixedBeta)
    data = tiny_data()
    both = elr_plus(*pair, strength=0.0, augmentation="none")
    finish(both, data)
    for learner, net in zip((both.first, both.second), pair, strict=True):
        alone = make("ce", tiny_task(data, nets_in_turn(net)), augmentation="none")
        finish(alone, data)
        assert differences(learner.state_dict(), net_state(alone)) == []


def test_elr_plus_targets_after_n_visits_of_one_prediction() -> None:
    """Each network's rows follow the other's average, unclipped: after n visits their sum is 1 - beta^n."""
    data = tiny_data()
    method = make("elr-plus", tiny_task(data, linear_net), lr=1e-30, augmentation="none")
    for learner, average in ((method.first, method.first_average), (method.second, method.second_average)):
        with torch.no_grad():
            learner.net.head.weight *= 20
        average.follow(learner.net, 0.0)
    x = plain(data.images)
    p = torch.stack([method.second(x).softmax(1), method.first(x).softmax(1)], dim=1).detach()
    assert p[:16].min() < 1e-5, "a clip would show"
    beta = memory_momentum(method.config.memory, EPOCHS)
    for n in range(1, 4):
        finish(method, InOrder.of(data, [torch.arange(8), torch.arange(8, 16)]), n - 1, n)
        torch.testing.assert_close(method.targets[:16], (1 - beta**n) * p[:16])
        torch.testing.assert_close(method.targets[:16].sum(2), torch.full((16, 2), 1 - beta**n))
        assert torch.equal(method.targets[16:], torch.zeros(N - 16, 2, K)), "rows never visited stay 0"
    refined = method.refined_labels()
    torch.testing.assert_close(refined[:16], p[:16].mean(1))
    assert torch.equal(refined[16:], given_one_hot()[16:])


def test_the_ramp_is_its_formula() -> None:
    assert [ramp_up(fraction, 0.5) for fraction in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.00673795, 0.28650480, 1.0, 1.0])
    assert ramp_up(0.0, 0.0) == ramp_up(0.7, 0.0) == 1.0


def test_elr_plus_predicts_with_the_networks_mean_logits_and_not_with_the_averages() -> None:
    data = tiny_data()
    method = make("elr-plus", tiny_task(data))
    finish(method, data, 0, 2)
    for average in (method.first_average, method.second_average):
        for value in (*average.net.parameters(), *average.net.buffers()):
            value.data.zero_()
    method.eval()
    with torch.no_grad():
        x = plain(data.images)
        torch.testing.assert_close(method.predict(data.images), ((method.first(x) + method.second(x)) / 2).softmax(1))


def test_published_defaults_of_elr_plus() -> None:
    """CIFAR-10, symmetric: 200 epochs of 45,000 images in batches of 128."""
    config = ELRPlusConfig()
    steps = 200 * 45_000 / 128
    assert memory_momentum(config.memory, 200) == pytest.approx(0.7, abs=1e-3)
    assert math.exp(-1 / (config.averaging * steps)) == pytest.approx(0.997, abs=1e-5)
    assert config.averaging_ramp * steps == pytest.approx(40_000, rel=1e-3)
    assert (config.strength, config.ramp, config.mixup, config.weigh_labels) == (3.0, 0.0, 1.0, False)


# CDR


def case(seed: int, noncritical: float) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Parameters, gradients, and what CDR makes of them; two weights, two vectors and one weight without a gradient."""
    stream = torch.Generator().manual_seed(seed)
    shapes = [(6, 3, 2, 2), (6,), (5, 7), (5,), (3, 3)]
    parameters = [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in shapes]
    given: list[Tensor | None] = [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in shapes[:-1]]
    gradients = [*given, None]
    return parameters, gradients, critical_gradients(parameters, gradients, noncritical)


@few
@given(st.integers(0, 2**32), st.floats(0, 0.99))
def test_critical_weights_are_the_highest_scores_of_all_layers_together(seed: int, noncritical: float) -> None:
    parameters, gradients, found = case(seed, noncritical)
    scores, kept = [], []
    for number in (0, 2):
        w, g, new = parameters[number], gradients[number], found[number]
        scores.append((w * g).abs().flatten())
        kept.append((new != 0).flatten())
        torch.testing.assert_close(new[new != 0], (1 - noncritical) * g[new != 0])
    score, mask = torch.cat(scores), torch.cat(kept)
    assert len(score) == 72 + 35
    assert mask.sum() == math.floor((1 - noncritical) * 107 + 1e-6)
    if mask.any() and not mask.all():
        assert score[mask].min() > score[~mask].max()
    for number in (1, 3):
        assert torch.equal(found[number], gradients[number]), "biases keep their full gradient"
    assert found[4] is None


@few
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.7]), st.floats(0.01, 100))
def test_the_scale_of_the_loss_does_not_change_what_is_critical(seed: int, noncritical: float, scale: float) -> None:
    parameters, gradients, found = case(seed, noncritical)
    scaled = critical_gradients(parameters, [None if g is None else scale * g for g in gradients], noncritical)
    for one, other in zip(found, scaled, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one == 0, other == 0)


def test_equal_scores_at_the_edge_are_critical_together_and_none_may_be() -> None:
    weights, grads = [torch.tensor([[4.0, 1.0, 2.0, 2.0]])], [torch.tensor([[1.0, 1.0, -1.0, 1.0]])]
    assert critical_gradients(weights, grads, 0.5)[0].tolist() == [[0.5, 0.0, -0.5, 0.5]]
    assert critical_gradients(weights, grads, 0.9)[0].tolist() == [[0.0, 0.0, 0.0, 0.0]]
    ten = [torch.arange(1.0, 11.0).view(2, 5)]
    assert (critical_gradients(ten, [torch.ones(2, 5)], 0.9)[0] > 0).sum() == 1, "0.1 * 10 is 1, not 0.99"
    assert (critical_gradients(ten, [torch.ones(2, 5)], 0.7)[0] > 0).sum() == 3


def test_cdr_with_only_critical_weights_is_cross_entropy_bit_for_bit() -> None:
    ce = trained("ce", label_smoothing=0.1)
    assert differences(net_state(trained("cdr", noncritical=0.0, sparsity=0.0, label_smoothing=0.1)), net_state(ce)) == []
    assert differences(net_state(trained("cdr", noncritical=0.1, sparsity=0.0, label_smoothing=0.1)), net_state(ce)) != []


@pytest.mark.parametrize("sparsity", [0.0, 0.02])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_cdr_steps_by_hand(sparsity: float, weight_decay: float) -> None:
    """What is not critical moves by its decay alone, exactly; biases and normalisation learn in full."""
    torch.manual_seed(3)
    net, clock, batch, lr = without_dropout(), Clock(1, EPOCHS), first_batch(), 0.1
    values = BARE | {"weight_decay": weight_decay, "lr": lr, "noncritical": 0.6, "sparsity": sparsity}
    method = make("cdr", tiny_task(tiny_data(), nets_in_turn(net)), **values).train()
    step = method.step(batch, clock)
    twin = copy.deepcopy(net).train()
    loss = functional.cross_entropy(twin(plain(batch.images)), batch.labels)
    loss.backward()
    torch.testing.assert_close(step.loss, loss.detach())
    rate = lr * 0.5 * (1 + math.cos(math.pi / 6))
    everything = {name: w for name, w in twin.named_parameters() if w.dim() >= 2}
    scores = torch.cat([(w * w.grad).abs().flatten() for w in everything.values()])
    edge = scores.sort(descending=True).values[int(0.4 * len(scores)) - 1]
    num_left = 0
    for name, new in method.learner.net.named_parameters():
        w = dict(twin.named_parameters())[name]
        decayed = sparsity * w.sign() + weight_decay * w
        pull = w.grad
        if name in everything:
            left = (w * w.grad).abs() < edge
            pull = torch.where(left, 0.0, 0.4 * w.grad)
            num_left += int(left.sum())
            if weight_decay == sparsity == 0:
                assert torch.equal(new[left], w[left])
        torch.testing.assert_close(new, w - rate * (pull + decayed), rtol=1e-5, atol=1e-7)
    assert num_left == len(scores) - int(0.4 * len(scores))
    assert len(everything) == 2


def test_defaults_of_cdr() -> None:
    assert (CDRConfig().noncritical, CDRConfig().sparsity) == (0.2, 1e-5)


# CTRR


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Of the clipped unit vectors, one pair at a time."""
    q, k = (torch.stack([v / v.norm() for v in vectors]).clip(1e-4, 1 - 1e-4) for vectors in (queries, keys))
    return torch.stack([torch.stack([torch.dot(a, b) for b in k]) for a in q])


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, D] with coordinates of both signs, probabilities [B, K]; float64."""
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_images, num_dimensions = draw(st.integers(1, 6)), draw(st.integers(2, 8))
    queries, keys = (torch.randn(num_images, num_dimensions, generator=stream, dtype=torch.float64) for _ in range(2))
    return queries, keys, torch.randn(num_images, K, generator=stream, dtype=torch.float64).mul(2).softmax(1)


@few
@given(embeddings(), st.floats(0.1, 0.9))
def test_contrastive_losses_are_their_formula(vectors: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
    queries, keys, p = vectors
    similarity = similarities(queries, keys)
    weights = pair_weights(p, threshold)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(p), dtype=p.dtype))
    expected = []
    for i in range(len(p)):
        agreement = [float(p[i] @ p[j]) for j in range(len(p))]
        row = [1.0 if i == j else (s if s >= threshold else 0.0) for j, s in enumerate(agreement)]
        torch.testing.assert_close(weights[i], torch.tensor(row, dtype=p.dtype) / sum(row))
        assert weights[i, i].item() == pytest.approx(1 / (1 + sum(row) - row[i]))
        terms = [-similarity[i, j] if i == j else (1 - similarity[i, j]).log() for j in range(len(p))]
        expected.append(sum(w / sum(row) * (2 + c) for w, c in zip(row, terms, strict=True)))
    torch.testing.assert_close(contrastive_losses(queries, keys, p, threshold), torch.stack(expected))


@few
@given(embeddings())
def test_contrastive_losses_at_the_ends_of_the_threshold(vectors: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, p = vectors
    own = similarities(queries, keys).diagonal()
    torch.testing.assert_close(contrastive_losses(queries, keys, p, 1.1), 2 - own)
    torch.testing.assert_close(contrastive_losses(queries[:1], keys[:1], p[:1], 0.0), 2 - own[:1])
    assert bool((pair_weights(p, 0.0) > 0).all()), "every pair counts"


@few
@given(embeddings(), st.randoms(use_true_random=False))
def test_contrastive_losses_follow_the_order_of_the_batch(vectors: tuple[Tensor, Tensor, Tensor], random: Any) -> None:
    queries, keys, p = vectors
    order = torch.tensor(random.sample(range(len(p)), len(p)))
    losses = contrastive_losses(queries, keys, p, 0.3)
    torch.testing.assert_close(contrastive_losses(queries[order], keys[order], p[order], 0.3), losses[order])


def positive_embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is clipped: coordinates of unit vectors are well within (0, 1)."""
    stream = generator("embeddings")
    queries, keys = (torch.rand(5, 4, generator=stream, dtype=torch.float64) + 0.2 for _ in range(2))
    return queries, keys, torch.rand(5, K, generator=stream, dtype=torch.float64).softmax(1)


def test_contrastive_gradients_against_finite_differences() -> None:
    queries, keys, p = positive_embeddings()
    assert gradcheck(lambda q, k: contrastive_losses(q, k, p, 0.2), (queries.requires_grad_(), keys.requires_grad_()))


def test_the_gradient_of_a_pair_in_closed_form() -> None:
    """Of log(1 - <u / |u|, v>) in u: -(v - c u / |u|) / (|u| (1 - c)); of -c on the diagonal: -(v - c u / |u|) / |u|."""
    queries, keys, p = positive_embeddings()
    queries.requires_grad_()
    (found,) = torch.autograd.grad(contrastive_losses(queries, keys, p, 0.2).sum(), queries)
    weights = pair_weights(p, 0.2)
    units = keys / keys.norm(dim=1, keepdim=True)
    for i, u in enumerate(queries.detach()):
        n = u / u.norm()
        expected = torch.zeros_like(u)
        for j, v in enumerate(units):
            c = torch.dot(n, v)
            expected -= weights[i, j] * (v - c * n) / (u.norm() * (1.0 if i == j else 1 - c))
        torch.testing.assert_close(found[i], expected)
    assert weights.count_nonzero() == 25


def test_no_gradient_through_the_weights_of_pairs() -> None:
    queries, keys, p = positive_embeddings()
    queries.requires_grad_()
    p.requires_grad_()
    contrastive_losses(queries, keys, p, 0.2).sum().backward()
    assert p.grad is None


def test_negative_coordinates_count_nothing() -> None:
    directions = clipped_directions(torch.tensor([[-3.0, 4.0], [0.0, -2.0], [5.0, 0.0]]))
    torch.testing.assert_close(directions, torch.tensor([[1e-4, 0.8], [1e-4, 1e-4], [1 - 1e-4, 1e-4]]), rtol=1e-6, atol=0)


def test_equal_directions_are_finite_in_float32() -> None:
    """Zeros that were clipped take the product above 1."""
    same = (torch.arange(64) < 2).float().expand(3, 64).clone().requires_grad_()
    assert (clipped_directions(same) @ clipped_directions(same).T).max() > 1
    losses = contrastive_losses(same, same.detach(), torch.full((3, K), 1 / K), 0.0)
    assert bool(torch.autograd.grad(losses.sum(), same)[0].isfinite().all())
    row = torch.tensor([1.0, 1 / K, 1 / K])
    expected = (row / row.sum() * (2 + torch.tensor([-1.0, math.log(1e-6), math.log(1e-6)]))).sum()
    torch.testing.assert_close(losses.detach(), expected.expand(3), rtol=1e-5, atol=1e-5)


def ctrr(net: nn.Module, task: Task | None = None, **values: Any) -> CTRR:
    task = task or tiny_task(tiny_data())
    method = make("ctrr", dataclasses.replace(task, make_net=nets_in_turn(net)), **values)
    assert isinstance(method, CTRR)
    return method.train()


@pytest.mark.parametrize(("q", "twin"), [(0.0, "ce"), (0.6, "gce")])
def test_ctrr_without_strength_is_the_loss_of_the_given_labels(q: float, twin: str) -> None:
    """Bit for bit in the parameters; statistics of batch normalisation see the strong views as well."""
    torch.manual_seed(3)
    net, data = without_dropout(), tiny_data()
    ours = ctrr(net, strength=0.0, q=q, augmentation="none")
    theirs = make(twin, tiny_task(data, nets_in_turn(net)), augmentation="none", **({"q": q} if q else {}))
    finish(ours, data)
    finish(theirs, data)
    assert differences(dict(ours.learner.net.network.named_parameters()), dict(theirs.learner.net.named_parameters())) == []


def test_ctrr_steps_by_hand() -> None:
    torch.manual_seed(3)
    net, clock, batch, lr = without_dropout(), Clock(2, EPOCHS), first_batch(), 0.01
    method = ctrr(
        net, **BARE | {"augmentation": "weak"}, lr=lr, strength=7.0, agreement=0.4, averaging=0.05, label_smoothing=0.2
    )
    start = copy.deepcopy(method)
    torch.manual_seed(5)
    step = method.step(batch, clock)
    torch.manual_seed(5)
    one, other, third = (weak(batch.images) for _ in range(3))
    twin = start.learner.net
    head, features = twin.network.head, twin.network.features
    keys = copy.deepcopy(nn.Sequential(features, twin.projector))(other).detach()
    queries = twin.predictor(twin.projector(features(one)))
    logits = head(features(third))
    p = logits.detach().softmax(1)
    contrast = contrastive_losses(queries, keys, p, 4.0**-0.6)
    given = functional.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    loss = given + 7.0 * contrast.mean()
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.probabilities, p)
    assert 0 < pair_weights(p, 4.0**-0.6).count_nonzero() < BATCH**2
    expected = after(twin, loss, lr * 0.75)
    assert_parameters(method.learner.net, expected, rtol=1e-4, atol=1e-6)
    a = math.exp(-1 / (0.05 * EPOCHS * N / BATCH))
    assert 0.1 < a < 0.9
    averaged = dict(method.average.net.named_parameters())
    assert len(averaged) == 10, "convolution, normalisation, projector"
    for name, before in start.average.net.named_parameters():
        folder, rest = name.split(".", 1)
        now = expected[("network.features." if folder == "0" else "projector.") + rest]
        torch.testing.assert_close(averaged[name], a * before.detach() + (1 - a) * now, rtol=1e-4, atol=1e-6)


def test_projector_and_predictor_have_the_papers_sizes() -> None:
    net = ContrastiveNetwork(Network(nn.Flatten(), 512, 10, 0.0))
    sizes = [(layer.in_features, layer.out_features) for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [(512, 10), (512, 2048), (2048, 128), (128, 512), (512, 128)]
    assert net.encoder(torch.randn(3, 512, 1, 1)).shape == (3, 128)


def threshold_of(agreement: float, num_classes: int, monkeypatch: pytest.MonkeyPatch) -> float:
    found: list[float] = []

    def record(queries: Tensor, keys: Tensor, probabilities: Tensor, threshold: float) -> Tensor:
        found.append(threshold)
        return contrastive_losses(queries, keys, probabilities, threshold)

    monkeypatch.setattr("methods.ctrr.contrastive_losses", record)
    task = dataclasses.replace(tiny_task(tiny_data()), num_classes=num_classes)
    ctrr(tiny_net(num_classes), task, agreement=agreement).step(first_batch(), Clock(0, EPOCHS))
    return found[0]


@pytest.mark.parametrize(
    ("agreement", "num_classes", "threshold"),
    [(0.6, 10, 0.4), (0.9, 10, 0.8), (0.35, 100, 0.05), (0.0, 10, 0.1), (0.0, 100, 0.01), (1.0, 7, 1.0)],
)
def test_the_threshold_of_an_agreement(
    agreement: float, num_classes: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threshold_of(agreement, num_classes, monkeypatch) == pytest.approx(threshold, rel=0.01)


def test_published_defaults_of_ctrr() -> None:
    """CIFAR-10, symmetric, 20 %: 550 epochs of 50,000 images in batches of 256, tau 0.4, a 0.99."""
    config = CTRRConfig()
    assert (config.strength, config.q) == (50.0, 0.0)
    assert 10 ** (config.agreement - 1) == pytest.approx(0.4, rel=0.01)
    assert math.exp(-1 / (config.averaging * 550 * 50_000 / 256)) == pytest.approx(0.99, abs=1e-4)


def test_ctrr_predicts_with_the_network_alone() -> None:
    data = tiny_data()
    method = make("ctrr", tiny_task(data))
    finish(method, data, 0, 1)
    net = copy.deepcopy(method.learner.net.network).eval()
    with torch.no_grad():
        torch.testing.assert_close(method.eval().predict(data.images), net(plain(data.images)).softmax(1))


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_regularisers.py::"
AVERAGE = HERE + "test_a_moving_average_of_a_fixed_network_in_closed_form"
ELR_HAND = HERE + "test_elr_plus_steps_by_hand[False]"
RAMP = HERE + "test_the_ramp_is_its_formula"
CRITICAL = HERE + "test_critical_weights_are_the_highest_scores_of_all_layers_together"
CDR_HAND = HERE + "test_cdr_steps_by_hand"
CONTRAST = HERE + "test_contrastive_losses_are_their_formula"
ENDS = HERE + "test_contrastive_losses_at_the_ends_of_the_threshold"
DIRECTIONS = HERE + "test_negative_coordinates_count_nothing"
CTRR_HAND = HERE + "test_ctrr_steps_by_hand"
SIZES = HERE + "test_projector_and_predictor_have_the_papers_sizes"
ELR_PLUS = "methods/elr_plus.py"
CTRR_FILE = "methods/ctrr.py"
PAIRS = "losses/contrastive.py"

MUTATIONS = [
    Mutation("methods/parts/moving_average.py", "theirs, 1 - momentum)", "theirs, 1.1 - momentum)", AVERAGE),
    Mutation(
        "methods/parts/moving_average.py",
        "module.p = 0.0",
        "module.p = 0.1",
        HERE + "test_a_moving_average_uses_the_statistics_of_its_batch_and_drops_nothing",
    ),
    Mutation(ELR_PLUS, "second_loss.detach()) / 2", "second_loss.detach()) / 2.2", ELR_HAND),
    Mutation(ELR_PLUS, "second_seen) / 2", "second_seen) / 2.2", ELR_HAND),
    Mutation(ELR_PLUS, "(1 - smoothing)", "(1.1 - smoothing)", ELR_HAND),
    Mutation(ELR_PLUS, "+ smoothing /", "+ 1.1 * smoothing /", ELR_HAND),
    Mutation(ELR_PLUS, "max(share, 1 - share)", "max(share, 1.1 - share)", ELR_HAND),
    Mutation(ELR_PLUS, "weights / total", "weights / 1.1 / total", HERE + "test_elr_plus_steps_by_hand[True]"),
    Mutation(ELR_PLUS, "self.config.strength * ramp", "1.1 * self.config.strength * ramp", ELR_HAND),
    Mutation(ELR_PLUS, "= beta * self", "= 1.1 * beta * self", ELR_HAND),
    Mutation(ELR_PLUS, "] + (1 - beta)", "] + (1.1 - beta)", ELR_HAND),
    Mutation("methods/parts/moving_average.py", "math.exp(-1 / (", "math.exp(-1.1 / (", ELR_HAND),
    Mutation(
        ELR_PLUS,
        "self.second(plain)) / 2",
        "self.second(plain)) / 2.2",
        HERE + "test_elr_plus_predicts_with_the_networks_mean_logits_and_not_with_the_averages",
    ),
    Mutation(ELR_PLUS, "fraction / length, 1.0)", "fraction / length, 1.1)", RAMP),
    Mutation(ELR_PLUS, "else 1.0", "else 1.1", RAMP),
    Mutation(ELR_PLUS, "math.exp(-5 *", "math.exp(-5.5 *", RAMP),
    Mutation(ELR_PLUS, "(1 - done)", "(1.1 - done)", RAMP),
    Mutation(ELR_PLUS, "done) ** 2", "done) ** 2.2", RAMP),
    Mutation("methods/cdr.py", "alpha=self.config.sparsity", "alpha=1.1 * self.config.sparsity", CDR_HAND),
    Mutation("methods/cdr.py", "not None and w.dim() >= 2", "not None and w.dim() >= 3", CRITICAL),
    Mutation("methods/cdr.py", "or w.dim() < 2", "or w.dim() < 3", CRITICAL),
    Mutation("methods/cdr.py", "round((1 - noncritical)", "round((1.1 - noncritical)", CRITICAL),
    Mutation("methods/cdr.py", "num_critical + 1)", "num_critical + 2)", CRITICAL),
    Mutation("methods/cdr.py", "(1 - noncritical) * g, 0.0", "(1.1 - noncritical) * g, 0.0", CRITICAL),
    Mutation("methods/cdr.py", "* g, 0.0)", "* g, 0.1)", CRITICAL),
    Mutation(CTRR_FILE, "num_features // 4)", "num_features // 5)", SIZES),
    Mutation(CTRR_FILE, "num_features, 4 * num", "num_features, 5 * num", SIZES),
    Mutation(
        CTRR_FILE, "self.config.agreement - 1)", "self.config.agreement - 1.1)", HERE + "test_the_threshold_of_an_agreement"
    ),
    Mutation(CTRR_FILE, "self.config.strength * contrast", "1.1 * self.config.strength * contrast", CTRR_HAND),
    Mutation("methods/parts/moving_average.py", "math.exp(-1 / (", "math.exp(-1.1 / (", CTRR_HAND),
    Mutation(PAIRS, "EDGE = 1e-4", "EDGE = 1.1e-4", DIRECTIONS),
    Mutation(PAIRS, "clamp(EDGE, 1 - EDGE)", "clamp(EDGE, 1.1 - EDGE)", DIRECTIONS),
    Mutation(PAIRS, "SMALLEST = 1e-6", "SMALLEST = 1.1e-6", HERE + "test_equal_directions_are_finite_in_float32"),
    Mutation(PAIRS, "(1 - similarity).clamp", "(1.1 - similarity).clamp", CONTRAST),
    Mutation(PAIRS, "* (2 + pairs)", "* (2.2 + pairs)", ENDS),
    Mutation(PAIRS, "agreement, 0.0)", "agreement, 0.1)", CONTRAST),
    Mutation(PAIRS, "fill_diagonal_(1.0)", "fill_diagonal_(1.1)", CONTRAST),
]
