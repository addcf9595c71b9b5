"""PENCIL against its equations: the label gradient, the stages, and what each of them leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from data.seeds import generator
from losses import reverse_divergence
from methods.base import Clock, first_epoch
from methods.pencil import CURVATURE, PENCIL, PENCILConfig, label_gradient
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
    make,
    net_state,
    one_step_gradient,
    tiny_data,
    tiny_task,
    train,
)

STAGE_2, STAGE_3 = 2, 4  # the first epochs of these stages, of 6
WEIGHTS = {"alpha": 0.3, "beta": 0.7, "label_steps": 0.9}


def pencil(**values: float | str) -> PENCIL:
    return make("pencil", tiny_task(tiny_data()), **values)


def randomised(method: PENCIL) -> PENCIL:
    """With label logits that differ from row to row."""
    method.label_logits.copy_(3 * torch.randn(N, K, generator=generator("label logits")))
    return method


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Label logits and logits [B, K], float64, and labels [B]."""
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 12)))
    rows, logits = (draw(st.floats(0.1, 5.0)) * torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(2))
    return rows, logits, torch.randint(shape[1], shape[:1], generator=stream)


# The loss


@few
@given(cases())
def test_reverse_divergence_is_torchs_divergence_with_the_prediction_as_target(case: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, logits, _ = case
    expected = functional.kl_div(rows.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(reverse_divergence(logits, rows), expected)
    torch.testing.assert_close(reverse_divergence(rows + 2, rows), torch.zeros(len(rows), dtype=torch.float64))


@few
@given(cases())
def test_gradient_of_the_reverse_divergence_in_closed_form(case: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, logits, _ = case
    logits.requires_grad_()
    (found,) = torch.autograd.grad(reverse_divergence(logits, rows).sum(), logits)
    p, log_ratio = logits.detach().softmax(1), logits.detach().log_softmax(1) - rows.log_softmax(1)
    torch.testing.assert_close(found, p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)))


def test_reverse_divergence_is_finite_at_extreme_logits() -> None:
    logits = torch.tensor([[500.0, -500.0], [-500.0, 500.0]], requires_grad=True)
    loss = reverse_divergence(logits, torch.tensor([[-500.0, 500.0], [0.0, 1.0]]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1000.0, 0.313262]))
    assert bool(logits.grad.isfinite().all())


# The label gradient


@few
@given(cases(), st.floats(0, 2), st.sampled_from(["paper", "official"]))
def test_label_gradient_in_closed_form(case: tuple[Tensor, Tensor, Tensor], alpha: float, compatibility: str) -> None:
    rows, logits, labels = case
    rows.requires_grad_()
    num_classes = rows.shape[1]
    held = rows.log_softmax(1) if compatibility == "paper" else rows.softmax(1).log_softmax(1)
    hold = functional.nll_loss(held, labels, reduction="sum")
    weight = alpha * 10 / num_classes  # with ten classes the paper's
    loss = reverse_divergence(logits, rows).sum() / num_classes + weight * hold
    (expected,) = torch.autograd.grad(loss, rows)
    found = label_gradient(rows.detach(), logits, labels, alpha, compatibility)
    torch.testing.assert_close(found / num_classes, expected)
    torch.testing.assert_close(found.sum(1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_official_form_holds_labels_far_less() -> None:
    rows, labels = 10 * functional.one_hot(torch.tensor([0]), 10).double(), torch.tensor([3])
    logits = rows.clone()
    paper, official = (label_gradient(rows, logits, labels, 0.1, form) for form in ("paper", "official"))
    assert paper.norm() > 100 * official.norm()


@few
@given(cases(), st.floats(0.001, 1e4), st.floats(0, 2), st.sampled_from(["paper", "official"]))
def test_with_a_fixed_prediction_labels_descend_step_by_step(
    case: tuple[Tensor, Tensor, Tensor], label_steps: float, alpha: float, compatibility: str
) -> None:
    """However far they could move, and however short the stage."""
    rows, logits, labels = case
    method = pencil(label_steps=label_steps, alpha=alpha, compatibility=compatibility)
    rate = method.label_rate(Clock(STAGE_2, EPOCHS))

    def height(rows: Tensor) -> Tensor:
        held = rows.log_softmax(1) if compatibility == "paper" else rows.softmax(1).log_softmax(1)
        return reverse_divergence(logits, rows) - 10 * alpha * held.gather(1, labels.unsqueeze(1)).squeeze(1)

    before = height(rows)
    for _ in range(20):
        rows = rows - rate * label_gradient(rows, logits, labels, alpha, compatibility)
        after = height(rows)
        assert bool((after <= before + 1e-9).all())
        before = after


def test_the_official_form_is_curved_most_with_two_classes_and_as_much_as_its_bound_says() -> None:
    """Along (1, -1) / sqrt 2, the only direction in which t changes, by second differences over all t_y."""
    t = torch.linspace(0.001, 0.999, 99_801, dtype=torch.float64)
    logit, h = torch.logit(t), 1e-3

    def held(difference: Tensor) -> Tensor:  # L_o where the label logits differ by that much
        t = torch.sigmoid(difference)
        return torch.log1p(torch.exp(1 - 2 * t))

    step = h * math.sqrt(2)  # of the difference, for a step of h along the unit vector
    curvature = (held(logit + step) - 2 * held(logit) + held(logit - step)) / h**2
    assert curvature.max().item() == pytest.approx(CURVATURE / 2, rel=1e-3)
    assert curvature.max().item() <= CURVATURE / 2
    assert t[curvature.argmax()].item() == pytest.approx(0.68, abs=0.005)


@few
@given(cases())
def test_more_classes_do_not_curve_the_official_form_more(case: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, _, labels = case

    def held(row: Tensor) -> Tensor:
        loss: Tensor = -row.softmax(0).log_softmax(0)[labels[0]]
        return loss

    hessian = torch.autograd.functional.hessian(held, rows[0])
    assert torch.linalg.eigvalsh(hessian).max().item() <= CURVATURE / 2


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_a_label_can_change_however_many_classes_there_are(num_classes: int) -> None:
    """A prediction of 0.9 on another class, at the published steps and the default weight."""
    labels, config = torch.tensor([0]), PENCILConfig()
    p = torch.full((1, num_classes), 0.1 / (num_classes - 1), dtype=torch.float64)
    p[0, 1] = 0.9
    rows = 10 * functional.one_hot(labels, num_classes).double()
    for _ in range(130):
        rows = rows - config.label_steps / 130 * label_gradient(rows, p.log(), labels, config.alpha, "paper")
    assert rows.softmax(1)[0, 1] > 0.8


def test_at_the_prediction_and_without_weights_nothing_moves() -> None:
    logits = torch.randn(5, K, dtype=torch.float64, generator=generator("rest"), requires_grad=True)
    (found,) = torch.autograd.grad(reverse_divergence(logits, logits.detach() + 3).sum(), logits)
    torch.testing.assert_close(found, torch.zeros_like(found))
    labels = torch.zeros(5, dtype=torch.int64)
    rest = label_gradient(logits.detach() + 3, logits.detach(), labels, 0.0, "paper")
    torch.testing.assert_close(rest, torch.zeros_like(rest))


# The stages


def test_published_defaults() -> None:
    """70, 130 and 120 of 320 epochs, lambda 600 at batch 128 and 10 classes, and the weights for the form of the paper."""
    config = PENCILConfig()
    method = PENCIL(config, tiny_task(tiny_data()))
    assert config.begins() * 320 == 70
    assert method.labels_final() * 320 == 200
    assert method.label_rate(Clock(70, 320)) == pytest.approx(600 / 1280, rel=0.002)
    assert (config.alpha, config.beta, config.final_lr, config.compatibility) == (0.01, 0.1, 0.2, "paper")
    ten_classes = functional.one_hot(torch.tensor([3]), 10).float() * method.label_logits.max()
    assert ten_classes.softmax(1)[0, 3].item() == pytest.approx(0.9996, abs=5e-5)


def test_the_learning_rate_is_constant_and_then_falls_by_ten_in_thirds() -> None:
    method = pencil(lr=0.06)
    rates = {epoch: method.learning_rate(Clock(epoch, 320)) for epoch in (0, 69, 70, 199, 200, 239, 240, 279, 280, 319)}
    assert rates == pytest.approx(
        {0: 0.06, 69: 0.06, 70: 0.06, 199: 0.06, 200: 0.2, 239: 0.2, 240: 0.02, 279: 0.02, 280: 0.002, 319: 0.002}
    )
    short = [method.learning_rate(Clock(epoch, 30)) for epoch in range(18, 30)]
    assert short == pytest.approx([0.06] + 4 * [0.2] + 4 * [0.02] + 3 * [0.002])


@pytest.mark.parametrize("values", [{}, {"warmup": 0.0}, {"refinement": 0.9}, {"warmup": 0.33, "refinement": 0.37}])
@pytest.mark.parametrize("epochs", [5, 30, 320])
def test_labels_can_move_as_far_at_every_budget(values: dict[str, float], epochs: int) -> None:
    method = pencil(label_steps=1.5, **values)
    clocks = [Clock(epoch, epochs) for epoch in range(epochs)]
    stage = [
        clock for clock in clocks if clock.has_begun(method.config.begins()) and not clock.has_begun(method.labels_final())
    ]
    assert sum(method.label_rate(clock) for clock in stage) == pytest.approx(1.5)


def test_labels_move_no_faster_than_is_steady() -> None:
    """Twelve epochs of thirty are too few for the published steps."""
    assert pencil().label_rate(Clock(10, 30)) == pytest.approx(2 / 1.1)
    assert pencil(alpha=0.1).label_rate(Clock(10, 30)) == pytest.approx(1.0)
    assert pencil(label_steps=12.0).label_rate(Clock(10, 30)) == pytest.approx(1.0)
    assert pencil(alpha=0.0, compatibility="official").label_rate(Clock(10, 30)) == pytest.approx(4.0)
    assert pencil(alpha=0.1, compatibility="official").label_rate(Clock(10, 30)) == pytest.approx(4 / 1.441)


def test_stage_1_is_cross_entropy_at_a_constant_rate_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data()
    ours, ce = pencil(), make("ce", tiny_task(data))
    monkeypatch.setattr(type(ce), "learning_rate", lambda self, clock: self.config.lr)
    for method in (ours, ce):
        finish(method, data, 0, STAGE_2)
    assert differences(net_state(ours), net_state(ce)) == []
    assert torch.equal(ours.label_logits, 10 * given_one_hot())
    for method in (ours, ce):
        finish(method, data, STAGE_2, STAGE_2 + 1)
    assert differences(net_state(ours), net_state(ce)) != []


def test_labels_move_in_stage_2_alone_and_their_sums_never() -> None:
    data, method = tiny_data(), pencil()
    for epoch in range(EPOCHS):
        before = method.label_logits.clone()
        finish(method, data, epoch, epoch + 1)
        moved = (method.label_logits != before).any(dim=1)
        assert bool(moved.all()) if STAGE_2 <= epoch < STAGE_3 else not bool(moved.any())
        torch.testing.assert_close(method.label_logits.sum(1), torch.full((N,), 10.0), rtol=0, atol=1e-4)


def test_labels_without_steps_never_move() -> None:
    method = pencil(label_steps=0.0)
    finish(method, tiny_data())
    assert torch.equal(method.label_logits, 10 * given_one_hot())


def test_labels_that_are_held_without_limit_stay_the_given_ones() -> None:
    data = tiny_data()
    wrong = data.labels.roll(1)
    long = {"lr": 0.1, "refinement": 1.0}  # enough visits for a label to change
    held, free = (make("pencil", tiny_task(type(data)(data.images, wrong)), alpha=alpha, **long) for alpha in (1e4, 0.0))
    for method in (held, free):
        finish(method, type(data)(data.images, wrong))
    assert torch.equal(held.refined_labels().argmax(1), wrong)
    assert not torch.equal(free.refined_labels().argmax(1), wrong)


@pytest.mark.parametrize("compatibility", ["paper", "official"])
def test_stage_2_steps_labels_along_their_gradient_with_the_same_prediction(compatibility: str) -> None:
    method = randomised(pencil(compatibility=compatibility, **WEIGHTS))
    before = method.label_logits.clone()
    _, step, batch = one_step_gradient(method, Clock(STAGE_2, EPOCHS))
    rows = before[batch.index].requires_grad_()
    t, p = rows.softmax(1), step.probabilities
    held = t.log() if compatibility == "paper" else t.log_softmax(1)
    hold = -held.gather(1, batch.labels.unsqueeze(1)).sum()
    loss = (p * (p.log() - t.log())).sum() / (BATCH * K) + WEIGHTS["alpha"] * 10 / K * hold / BATCH
    (gradient,) = torch.autograd.grad(loss, rows)
    step_length = WEIGHTS["label_steps"] / (STAGE_3 - STAGE_2) * BATCH * K  # lambda
    torch.testing.assert_close(method.label_logits[batch.index], (rows - step_length * gradient).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(method.label_logits[BATCH:], before[BATCH:]), "rows outside the batch stay"


@pytest.mark.parametrize(("epoch", "beta"), [(STAGE_2, 0.7), (STAGE_3, 0.0)])
def test_the_network_steps_along_its_gradient_with_the_labels_from_before(epoch: int, beta: float) -> None:
    """(1 / B K) [p (log p - log t - KL) - beta p (log p + H)] in the logits; in stage 3 without the entropy."""
    method = randomised(pencil(**WEIGHTS))
    t = method.label_logits.softmax(1)
    found, step, batch = one_step_gradient(method, Clock(epoch, EPOCHS))
    p, t = step.probabilities, t[batch.index]
    log_ratio, h = p.log() - t.log(), -(p * p.log()).sum(1, keepdim=True)
    divergence = (p * log_ratio).sum(1, keepdim=True)
    expected = p * (log_ratio - divergence) - beta * p * (p.log() + h)
    torch.testing.assert_close(BATCH * K * found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step.loss, (divergence + beta * h).mean() / K)


def test_refined_labels_are_the_softmax_of_the_label_logits() -> None:
    method = randomised(pencil())
    expected = method.label_logits.exp() / method.label_logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(method.refined_labels(), expected)


def test_a_sample_that_is_not_visited_keeps_its_label() -> None:
    method = pencil()
    finish(method, InOrder.of(tiny_data(), [torch.arange(8), torch.arange(8, 16)]))
    assert bool((method.label_logits[:16] != 10 * given_one_hot()[:16]).any(dim=1).all())
    assert torch.equal(method.label_logits[16:], 10 * given_one_hot()[16:])


def test_without_a_third_stage_labels_are_learnt_to_the_end() -> None:
    method = pencil(warmup=0.5, refinement=1.0)
    before = None
    for clock, _ in train(method, tiny_data()):
        assert method.learning_rate(clock) == method.config.lr
        if clock.epoch == EPOCHS - 2:
            before = method.label_logits.clone()
    assert before is not None
    assert bool((method.label_logits != before).any(dim=1).all())
    assert first_epoch(method.labels_final(), EPOCHS) > EPOCHS


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_pencil.py::"
LABEL_STEP = HERE + "test_stage_2_steps_labels_along_their_gradient_with_the_same_prediction[paper]"
NETWORK_STEP = HERE + "test_the_network_steps_along_its_gradient_with_the_labels_from_before"
STEADY = HERE + "test_labels_move_no_faster_than_is_steady"
RATES = HERE + "test_the_learning_rate_is_constant_and_then_falls_by_ten_in_thirds"

MUTATIONS = [
    Mutation("methods/pencil.py", "DROP = 10.0", "DROP = 11.0", RATES),
    Mutation("methods/pencil.py", "THIRDS = 3", "THIRDS = 3.3", RATES),
    Mutation("methods/pencil.py", "rows) / K", "rows) / (1.1 * K)", NETWORK_STEP + "[4-0.0]"),
    Mutation("methods/pencil.py", "entropy(logits) / K", "entropy(logits) / (1.1 * K)", NETWORK_STEP + "[2-0.7]"),
    Mutation("methods/pencil.py", "rows - self.label_rate", "rows - 1.1 * self.label_rate", LABEL_STEP),
    Mutation("methods/pencil.py", "+ CLASSES * alpha * hold", "+ 1.1 * CLASSES * alpha * hold", LABEL_STEP),
    Mutation("methods/pencil.py", "CLASSES = 10", "CLASSES = 11", LABEL_STEP),
    Mutation("methods/pencil.py", "STEADY / (1 +", "STEADY / (1.1 +", STEADY),
    Mutation("methods/pencil.py", "STEADY = 2.0", "STEADY = 2.2", STEADY),
    Mutation("methods/pencil.py", "STEADY_OFFICIAL / (1 +", "STEADY_OFFICIAL / (1.1 +", STEADY),
    Mutation("methods/pencil.py", "STEADY_OFFICIAL = 4.0", "STEADY_OFFICIAL = 4.4", STEADY),
    Mutation("methods/pencil.py", "CURVATURE = 0.441", "CURVATURE = 0.4851", STEADY),
    Mutation("methods/pencil.py", "return (t - logits", "return (1.1 * t - logits", LABEL_STEP),
    Mutation("methods/pencil.py", "hold = t - given", "hold = 1.1 * t - given", LABEL_STEP),
    Mutation(
        "methods/pencil.py", "softmax(dim=1) - given", "softmax(dim=1) - 1.1 * given", LABEL_STEP.replace("paper", "official")
    ),
    Mutation("methods/pencil.py", "hold = t * (twice", "hold = 1.1 * t * (twice", LABEL_STEP.replace("paper", "official")),
    Mutation(
        "losses/reverse_divergence.py",
        "(log_p - log",
        "(1.1 * log_p - log",
        HERE + "test_reverse_divergence_is_torchs_divergence_with_the_prediction_as_target",
    ),
]
