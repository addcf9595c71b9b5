"""SOP and SOP+ against their own equations."""

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

from data.seeds import derive, generator
from data.table import Batch, TrainData
from losses import corrected_probabilities, cross_entropy, divergence_from, imbalance, unexplained
from methods.base import Clock, half_cosine
from methods.sop import SOP, SOPConfig, modelled_noise
from methods.sop_plus import SOPPlusConfig
from models.network import Network
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
    plain,
    tiny_data,
    tiny_task,
    trained,
    without_dropout,
)
from training.statistics import area_under_roc

NEVER = {"given_rate": 0.0, "other_rate": 0.0}


@st.composite
def cases(draw: st.DrawFn, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [B, K], labels [B], and u [B], v [B, K] of moderate size, in float64."""
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_images, num_classes = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    logits = draw(st.floats(0.1, spread)) * torch.randn(num_images, num_classes, generator=stream, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_images,), generator=stream)
    u = torch.randn(num_images, generator=stream, dtype=torch.float64).clamp(-1, 1)
    return logits, labels, u, torch.randn(num_images, num_classes, generator=stream, dtype=torch.float64).clamp(-1, 1)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def sop(name: str = "sop", **values: Any) -> SOP:
    """With a network whose prediction depends on the image alone; with this learning rate it never changes."""
    values = {"lr": 1e-30, "augmentation": "none"} | values
    method = make(name, tiny_task(tiny_data(), linear_net), **values)
    assert isinstance(method, SOP)
    return method.train()


def rows(first: int, last: int) -> Batch:
    return tiny_data().gather(torch.arange(first, last))


# Pure functions


@few
@given(cases())
def test_corrected_probabilities_are_their_formula(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, labels, u, v = case
    added, removed = modelled_noise(u, v, labels)
    q = corrected_probabilities(logits, added, removed, 0.01)
    for i, row in enumerate(logits.softmax(1)):
        y = int(labels[i])
        terms = [float(p) + (float(u[i]) ** 2 if k == y else -(float(v[i, k]) ** 2)) for k, p in enumerate(row)]
        raised = [max(term, 0.01) for term in terms]
        expected = [min(max(r / sum(raised), 0.01), 1.0) for r in raised]
        assert q[i].tolist() == pytest.approx(expected, rel=1e-9)
    assert bool((q >= 0.01).all())


def test_rows_sum_to_one_before_the_last_clip() -> None:
    logits = torch.tensor([[3.0, 0.0, -1.0]], dtype=torch.float64)
    added, removed = torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([[0.3, 0.0, 0.0]])
    q = corrected_probabilities(logits, added, removed, 1e-4)
    assert q.min() > 1e-4, "the last clip does nothing"
    torch.testing.assert_close(q.sum(1), torch.ones(1, dtype=torch.float64))
    certain = corrected_probabilities(torch.tensor([[50.0, 0.0]]), torch.zeros(1, 2), torch.zeros(1, 2), 1e-7)
    assert certain[0, 0].item() == pytest.approx(1.0, abs=1e-6)


@few
@given(cases())
def test_what_is_unexplained_is_the_squared_distance_to_the_label(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, labels, u, v = case
    logits.requires_grad_()
    found = unexplained(logits, labels, *modelled_noise(u, v, labels))
    assert not found.requires_grad
    for i, row in enumerate(logits):
        y, top = int(labels[i]), int(row.argmax())
        expected = 0.0
        for k in range(len(row)):
            modelled = float(u[i]) ** 2 if k == y else -(float(v[i, k]) ** 2)
            expected += ((k == top) + modelled - (k == y)) ** 2
        assert found[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@few
@given(cases())
def test_divergence_is_torchs_and_its_gradient_is_p_minus_t(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, _, _, v = case
    logits.requires_grad_()
    targets = v.softmax(1)
    found = divergence_from(targets, logits)
    torch.testing.assert_close(found, functional.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1))
    torch.testing.assert_close(gradient(found, logits), (logits.softmax(1) - targets).detach())
    assert bool((found >= -1e-12).all())
    certain = functional.one_hot(targets.argmax(1), targets.shape[1]).double()
    torch.testing.assert_close(divergence_from(certain, logits), cross_entropy(logits, targets.argmax(1)))


def test_imbalance_is_the_divergence_of_the_uniform_from_the_mean() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]], dtype=torch.float64)
    m = [0.5, 0.3, 0.2]
    assert imbalance(p, 1e-4).item() == pytest.approx(sum(math.log(1 / 3 / x) / 3 for x in m) + math.log(3))
    assert imbalance(torch.tensor([[1.0, 0.0]]), 1e-4).item() == pytest.approx(-math.log(1e-4) / 2)
    assert imbalance(torch.full((2, 7), 1 / 7), 1e-4).item() == pytest.approx(math.log(7))


# Limits


def test_without_noise_and_floor_the_gradient_is_that_of_cross_entropy() -> None:
    logits = 20 * torch.randn(9, 10, generator=generator("peaked"), dtype=torch.float64)
    labels = torch.arange(9)
    logits.requires_grad_()
    nothing = torch.zeros_like(logits).detach()
    expected = gradient(cross_entropy(logits, labels), logits)

    def found(floor: float) -> Tensor:
        q = corrected_probabilities(logits, nothing, nothing, floor)
        return gradient(-q.gather(1, labels[:, None]).log(), logits)

    torch.testing.assert_close(found(1e-300), expected)
    assert (found(1e-4) - expected).norm() > 0.1 * expected.norm(), "the floor matters for peaked predictions"
    mild = (logits / 20).detach().requires_grad_()
    assert mild.softmax(1).min() > 1e-4
    q = corrected_probabilities(mild, nothing, nothing, 1e-4)
    torch.testing.assert_close(
        gradient(-q.gather(1, labels[:, None]).log(), mild), gradient(cross_entropy(mild, labels), mild), rtol=1e-9, atol=1e-9
    )


def test_sop_without_rates_and_floor_is_cross_entropy() -> None:
    ce, ours = trained("ce"), trained("sop", floor=1e-30, **NEVER)
    for key, value in net_state(ce).items():
        torch.testing.assert_close(net_state(ours)[key], value, rtol=1e-3, atol=1e-4)
    learning = trained("sop", floor=1e-30, initial=0.1)
    assert not torch.allclose(net_state(learning)["net.head.weight"], net_state(ce)["net.head.weight"], rtol=1e-3, atol=1e-4)


def test_the_rows_start_small_not_at_zero_and_in_float32() -> None:
    """Normal, after the network, so that it starts as any other method's."""
    method = sop()
    torch.manual_seed(derive("init", 0))
    net = linear_net()
    assert differences(method.learner.net.state_dict(), net.state_dict()) == []
    torch.testing.assert_close(method.given, 1e-8 * torch.randn(N), rtol=1e-6, atol=0)
    torch.testing.assert_close(method.others, 1e-8 * torch.randn(N, K), rtol=1e-6, atol=0)
    for value in (method.given, method.others):
        assert value.dtype == torch.float32
        assert bool((value != 0).all())


def test_published_defaults_of_sop() -> None:
    config, plus = SOPConfig(), SOPPlusConfig()
    assert (config.given_rate, config.other_rate, config.initial, config.floor) == (10.0, 10.0, 1e-8, 1e-4)
    assert config.given_learns_from == "cross-entropy"
    assert [plus.given_rate * 120 / 300, plus.other_rate * 120 / 300] == [10.0, 10.0], "for 300 epochs"
    assert (plus.consistency, plus.balance) == (0.9, 0.1)


# The rows of a batch


def test_a_batch_moves_its_own_rows_and_never_the_given_entry_of_v() -> None:
    method = sop(initial=1e-2, given_rate=5.0, other_rate=5.0)
    method.others += 0.2
    u, v = method.given.clone(), method.others.clone()
    finish(method, InOrder.of(tiny_data(), [torch.arange(8), torch.arange(8, 30)]))
    assert torch.equal(method.given[30:], u[30:])
    assert torch.equal(method.others[30:], v[30:])
    assert bool((method.given[:30] != u[:30]).all())
    on_label = given_one_hot().bool()
    assert torch.equal(method.others[on_label], v[on_label])
    assert bool((method.others[:30] != v[:30])[~on_label[:30]].all())


@pytest.mark.parametrize("form", ["cross-entropy", "both"])
@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("epochs", [120, 30])
def test_rows_grow_geometrically_by_their_closed_forms(form: str, batch_size: int, epochs: int) -> None:
    """A visit multiplies u by 1 + 2 r ((1 - p_y) / p_y [+ 2 where argmax p is not y]) and v_argmax, where it is wrong, by
    1 + 4 r, with r = rate / 128 at 120 epochs, whatever the batch, and four times as much at 30."""
    method = sop(given_rate=2.0, other_rate=30.0, given_learns_from=form, batch_size=batch_size)
    u, v, batch = method.given.clone(), method.others.clone(), rows(0, batch_size)
    p = method.learner(plain(batch.images)).softmax(1).detach()
    p_y, wrong = p.gather(1, batch.labels[:, None]).squeeze(1), p.argmax(1) != batch.labels
    assert wrong.any()
    assert not wrong.all()
    step = 120 / epochs / 128
    pull = (1 - p_y) / p_y + (2 * wrong if form == "both" else 0)
    towards = functional.one_hot(p.argmax(1), K) * wrong[:, None]
    for n in range(1, 4):
        method.step(batch, Clock(n, epochs))
        torch.testing.assert_close(
            method.given[:batch_size], u[:batch_size] * (1 + 2 * 2.0 * step * pull) ** n, rtol=1e-4, atol=0
        )
        expected = v[:batch_size] * (1 + 4 * 30.0 * step * towards) ** n
        torch.testing.assert_close(method.others[:batch_size], expected, rtol=1e-4, atol=0)


def test_where_the_prediction_is_the_label_v_has_only_a_cubic_pull() -> None:
    """dMSE/dv_k = 4 v_k^3, and dMSE/du = 4 u^3 in the code's form."""
    labels = torch.tensor([2, 0])
    logits = 3 * functional.one_hot(labels, K).double()
    u, v = torch.full((2,), 0.1, dtype=torch.float64), torch.full((2, K), 0.2, dtype=torch.float64)
    u.requires_grad_()
    v.requires_grad_()
    added, removed = modelled_noise(u, v, labels)
    left = unexplained(logits, labels, added, removed)
    pull_u, pull_v = torch.autograd.grad(left.sum(), (u, v))
    torch.testing.assert_close(pull_u, torch.full((2,), 4 * 0.1**3, dtype=torch.float64))
    torch.testing.assert_close(pull_v, 4 * 0.2**3 * (1 - functional.one_hot(labels, K).double()))


def test_below_the_floor_u_does_not_stir_in_the_papers_form() -> None:
    labels = rows(0, 8).labels
    logits = -30.0 * functional.one_hot(labels, K)
    for form, moves in (("cross-entropy", False), ("both", True)):
        method = sop(given_learns_from=form)
        before = method.given.clone()
        method.fit(logits.requires_grad_(), rows(0, 8), Clock(0, 120))
        assert torch.equal(method.given, before) is not moves
        growth = method.given[:8] / before[:8]
        torch.testing.assert_close(growth, torch.full((8,), 1 + 4 * 10.0 / 128 if moves else 1.0))


def test_rows_stay_within_one() -> None:
    method = sop(initial=0.1, given_rate=1000.0, other_rate=1000.0, given_learns_from="both")
    finish(method, tiny_data(), 0, 3)
    for value in (method.given, method.others):
        assert value.abs().max() == 1.0


@few
@given(cases(spread=1.5))
def test_the_network_learns_along_the_corrected_predictions_alone(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """In r = p + U - V > eps of sum S: dCE/dr = 1 / S - onehot(y) / r_y, and p's own Jacobian after it."""
    logits, labels, u, v = case
    added, removed = modelled_noise(u, v / 100, labels)
    logits.requires_grad_()
    q = corrected_probabilities(logits, added, removed, 1e-9)
    found = gradient(-q.gather(1, labels[:, None]).log(), logits)
    p = logits.detach().softmax(1)
    r = p + added - removed
    if r.min() < 1e-6 or q.min() < 1e-6:
        return
    pull = 1 / r.sum(1, keepdim=True) - functional.one_hot(labels, p.shape[1]) / r
    torch.testing.assert_close(found, p * (pull - (p * pull).sum(1, keepdim=True)))


@pytest.mark.parametrize("form", ["cross-entropy", "both"])
def test_sop_is_a_dense_gradient_descent_on_all_its_parameters(form: str) -> None:
    """The same training with u and v as whole parameters of torch's own SGD, over batches with their mean losses."""
    torch.manual_seed(3)
    net, data, floor = without_dropout(), tiny_data(), 1e-3
    values = {"given_rate": 40.0, "other_rate": 70.0, "initial": 0.05, "floor": floor, "given_learns_from": form, "lr": 0.02}
    method = make("sop", tiny_task(data, nets_in_turn(net)), augmentation="none", **values)
    u, v = nn.Parameter(method.given.clone()), nn.Parameter(method.others.clone())
    start = method.others.clone()
    twin = copy.deepcopy(net).train()
    config = method.config
    sgd = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    parts = list(torch.randperm(N, generator=generator("order")).split(BATCH))[:-1]
    for epoch in range(EPOCHS):
        finish(method, InOrder.of(data, parts), epoch, epoch + 1)
        for index in parts:
            y = functional.one_hot(data.labels[index], K)
            p = twin(plain(data.images[index])).softmax(1)
            s_u, s_v = u[index, None] ** 2 * y, v[index] ** 2 * (1 - y)
            q = functional.normalize((p + s_u - s_v.detach()).clamp(min=floor), p=1, dim=1).clamp(floor, 1)
            hard = functional.one_hot(p.argmax(1), K)
            loss = -(y * q.log()).sum(1).mean()
            loss += ((hard + (s_u if form == "both" else s_u.detach()) - s_v - y) ** 2).sum(1).mean()
            sgd.param_groups[0]["lr"] = half_cosine(0.02, epoch / EPOCHS)
            sgd.zero_grad()
            u.grad = v.grad = None
            loss.backward()
            sgd.step()
            scale = BATCH / 128 * 120 / EPOCHS  # the gradients carry 1 / BATCH
            u.data = (u - 40.0 * scale * u.grad).data.clamp(-1, 1)
            v.data = (v - 70.0 * scale * v.grad).data.clamp(-1, 1)
    torch.testing.assert_close(method.given, u.data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.others, v.data, rtol=1e-3, atol=1e-4)
    assert (method.others - start).abs().max() > 0.3
    for mine, theirs in zip(method.learner.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_refined_labels_are_the_given_ones_without_the_modelled_noise() -> None:
    method = sop()
    method.given.zero_()
    method.others.zero_()
    y = tiny_data().labels[:4]
    other = (y + 1) % K
    at = torch.arange(4)
    method.given[:4] = torch.tensor([0.0, 0.6, 1.0, 0.5]).sqrt()
    method.others[at, other] = torch.tensor([0.0, 0.3, 0.0, 0.75]).sqrt()
    method.others[at, y] = 9.0  # plays no part
    refined = method.refined_labels()
    # by hand: the rest of row 1 is 0.6 - 0.3, a third of it for each other class; row 3 has a sum of 0.5 + 0.75
    assert refined[at, y].tolist() == pytest.approx([1.0, 0.4, 0.0, 0.4])
    assert refined[at, other].tolist() == pytest.approx([0.0, 0.4, 1 / 3, 0.6])
    assert refined[at, (y + 2) % K].tolist() == pytest.approx([0.0, 0.1, 1 / 3, 0.0], abs=1e-7)
    torch.testing.assert_close(refined.sum(1), torch.ones(N))
    assert torch.equal(refined[4:], given_one_hot()[4:])


def test_wrong_labels_are_doubted_more_than_right_ones() -> None:
    """Eight of 41 labels are wrong."""
    truth = tiny_data()
    labels = truth.labels.clone()
    labels[:8] = (labels[:8] + 1) % K
    data = TrainData(truth.images, labels)
    method = make("sop", tiny_task(data), lr=0.02)
    finish(method, data)
    mass = method.refined_labels().gather(1, labels[:, None]).squeeze(1)
    assert area_under_roc(1 - mass, torch.arange(N) < 8)["refine/auroc"] > 0.8


# SOP+


def test_sop_plus_without_its_terms_is_sop_where_no_statistics_are_shared() -> None:
    values: dict[str, Any] = {"given_rate": 20.0, "other_rate": 20.0, "initial": 0.05, "lr": 0.02}
    one, other = sop("sop", **values), sop("sop-plus", consistency=0.0, balance=0.0, **values)
    parts = InOrder.of(tiny_data(), list(torch.arange(N).split(BATCH)))
    finish(one, parts)
    finish(other, parts)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    terms = sop("sop-plus", **values)
    finish(terms, parts)
    assert differences(terms.learner.state_dict(), other.learner.state_dict()) != []


def test_sop_plus_steps_by_hand() -> None:
    torch.manual_seed(3)
    net, batch, clock, lr = without_dropout(), rows(0, BATCH), Clock(2, EPOCHS), 0.1
    task = tiny_task(tiny_data(), nets_in_turn(net))
    values = {"consistency": 0.7, "balance": 0.3, "initial": 0.1, "lr": lr, "momentum": 0.0, "weight_decay": 0.0}
    method = make("sop-plus", task, augmentation="none", **values).train()
    u, v = method.given[:BATCH].clone(), method.others[:BATCH].clone()
    torch.manual_seed(5)
    step = method.step(batch, clock)
    torch.manual_seed(5)
    strong = task.strong(batch.images)
    twin: Network = copy.deepcopy(net).train()
    logits = twin(torch.cat([plain(batch.images), strong]))
    p, other = logits[:BATCH].softmax(1), logits[BATCH:].softmax(1)
    y = functional.one_hot(batch.labels, K)
    u.requires_grad_()
    q = functional.normalize((p + u[:, None] ** 2 * y - v**2 * (1 - y)).clamp(min=1e-4), p=1, dim=1)
    fit = -(y * q.log()).sum(1).mean()
    loss = fit + 0.7 * (p.detach() * (p.detach() / other).log()).sum(1).mean() - 0.3 * q.mean(0).log().sum() / K
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.probabilities, p.detach())
    (pull,) = torch.autograd.grad(BATCH * fit, u, retain_graph=True)
    moved = (u - 25.0 / 128 * 120 / EPOCHS * pull).detach().clamp(-1, 1)
    torch.testing.assert_close(method.given[:BATCH], moved, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(loss, tuple(twin.parameters()))
    for before, grad, now in zip(net.parameters(), grads, method.learner.net.parameters(), strict=True):
        torch.testing.assert_close(now, before - lr * 0.75 * grad, rtol=1e-4, atol=1e-6)


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_sop.py::"
GROWTH = HERE + "test_rows_grow_geometrically_by_their_closed_forms[120-8-both]"
WITHIN = HERE + "test_rows_stay_within_one"
REFINED = HERE + "test_refined_labels_are_the_given_ones_without_the_modelled_noise"
OWN_ROWS = HERE + "test_a_batch_moves_its_own_rows_and_never_the_given_entry_of_v"
BY_HAND = HERE + "test_sop_plus_steps_by_hand"
ONE = HERE + "test_rows_sum_to_one_before_the_last_clip"

MUTATIONS = [
    Mutation("methods/sop.py", "REFERENCE_EPOCHS = 120", "REFERENCE_EPOCHS = 132", GROWTH),
    Mutation("methods/sop.py", "REFERENCE_BATCH = 128", "REFERENCE_BATCH = 141", GROWTH),
    Mutation(
        "methods/sop.py",
        "(config.initial * torch.randn(task.num_samples))",
        "(1.1 * config.initial * torch.randn(task.num_samples))",
        HERE + "test_the_rows_start_small_not_at_zero_and_in_float32",
    ),
    Mutation(
        "methods/sop.py",
        "(config.initial * torch.randn(task.num_samples, task",
        "(1.1 * config.initial * torch.randn(task.num_samples, task",
        HERE + "test_the_rows_start_small_not_at_zero_and_in_float32",
    ),
    Mutation("methods/sop.py", "pulls[0]).detach().clamp(-1, 1)", "pulls[0]).detach().clamp(-1.1, 1.1)", WITHIN),
    Mutation("methods/sop.py", "pulls[1]).detach().clamp(-1, 1)", "pulls[1]).detach().clamp(-1.1, 1.1)", WITHIN),
    Mutation("methods/sop.py", "others.square() * (1 - onehot)", "others.square() * (1.1 - onehot)", OWN_ROWS),
    Mutation("methods/sop.py", "(1 - given) * missing", "(1.1 - given) * missing", REFINED),
    Mutation("methods/sop.py", "num_classes - 1)", "num_classes - 1.1)", REFINED),
    Mutation("losses/overparameterization.py", "clamp(floor, 1.0)", "clamp(floor, 0.9)", ONE),
    Mutation(
        "losses/overparameterization.py",
        "clamp(floor, 1.0)",
        "clamp(1.1 * floor, 1.0)",
        HERE + "test_corrected_probabilities_are_their_formula",
    ),
    Mutation(
        "losses/overparameterization.py",
        "removed).clamp_min(floor)",
        "removed).clamp_min(1.1 * floor)",
        HERE + "test_corrected_probabilities_are_their_formula",
    ),
    Mutation("methods/sop_plus.py", "self.config.consistency * div", "1.1 * self.config.consistency * div", BY_HAND),
    Mutation("methods/sop_plus.py", "self.config.balance * imb", "1.1 * self.config.balance * imb", BY_HAND),
    Mutation("methods/sop_plus.py", "chunk(2)", "chunk(3)", BY_HAND),
    Mutation(
        "losses/overparameterization.py",
        "clamp_min(floor).log().mean()",
        "clamp_min(1.1 * floor).log().mean()",
        HERE + "test_imbalance_is_the_divergence_of_the_uniform_from_the_mean",
    ),
]
