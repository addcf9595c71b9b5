"""Losses against their closed forms: limits, gradients in the logits, bounds, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from losses import (
    clipped_probabilities,
    cross_entropy,
    early_learning_term,
    entropy,
    generalized_cross_entropy,
    soft_cross_entropy,
)
from tests.loss_cases import cases, few, gradient, one_hot


@few
@given(cases())
def test_cross_entropy_is_torchs_and_its_gradient_is_p_minus_onehot(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    losses = cross_entropy(logits, labels)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(gradient(losses, logits), (logits.softmax(1) - one_hot(labels, logits)).detach())


@few
@given(cases())
def test_soft_cross_entropy(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, targets = case
    logits.requires_grad_()
    losses = soft_cross_entropy(logits, targets)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(gradient(losses, logits), (logits.softmax(1) - targets).detach())
    assert torch.equal(soft_cross_entropy(logits, one_hot(labels, logits)), cross_entropy(logits, labels))


@few
@given(cases())
def test_entropy_is_the_cross_entropy_with_itself_and_is_bounded_by_log_k(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits = case[0].requires_grad_()
    losses, p = entropy(logits), logits.softmax(1).detach()
    torch.testing.assert_close(losses, soft_cross_entropy(logits, p))
    assert bool((losses >= 0).all())
    assert bool((losses <= math.log(logits.shape[1]) + 1e-12).all())
    expected = -p * (p.log() + losses.detach().unsqueeze(1))
    torch.testing.assert_close(gradient(losses, logits), expected)
    torch.testing.assert_close(expected.sum(1), torch.zeros(len(p), dtype=torch.float64))


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_of_a_uniform_prediction_everything_is_log_k(num_classes: int) -> None:
    logits = torch.full((3, num_classes), 7.0)
    labels = torch.zeros(3, dtype=torch.int64)
    log_k = torch.full((3,), math.log(num_classes))
    torch.testing.assert_close(cross_entropy(logits, labels), log_k)
    torch.testing.assert_close(entropy(logits), log_k)
    torch.testing.assert_close(soft_cross_entropy(logits, logits.softmax(1)), log_k)


@few
@given(cases(), st.floats(0.01, 1.0))
def test_generalized_cross_entropy_is_its_formula(case: tuple[Tensor, Tensor, Tensor], q: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    losses = generalized_cross_entropy(logits, labels, q)
    p = logits.softmax(1).detach()
    p_y = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(losses.detach(), (1 - p_y**q) / q)
    torch.testing.assert_close(gradient(losses, logits), (p_y**q).unsqueeze(1) * (p - one_hot(labels, logits)))


@few
@given(cases())
def test_generalized_cross_entropy_runs_from_cross_entropy_to_absolute_error(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = case
    absolute_error = (logits.softmax(1) - one_hot(labels, logits)).abs().sum(1)
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 1.0), absolute_error / 2)
    torch.testing.assert_close(generalized_cross_entropy(logits, labels, 1e-12), cross_entropy(logits, labels))
    # In float32 too, where the literal (1 - p^q) / q is off by a tenth and more.
    single = logits.float()
    torch.testing.assert_close(generalized_cross_entropy(single, labels, 1e-7), cross_entropy(single, labels))


@few
@given(cases(), st.floats(0.05, 1.0))
def test_generalized_cross_entropy_summed_over_the_labels_is_bounded(case: tuple[Tensor, Tensor, Tensor], q: float) -> None:
    logits = case[0]
    K = logits.shape[1]
    labels = torch.arange(K).repeat(len(logits))
    total = generalized_cross_entropy(logits.repeat_interleave(K, dim=0), labels, q).view(-1, K).sum(1)
    assert bool((total >= (K - K ** (1 - q)) / q - 1e-9).all())
    assert bool((total <= (K - 1) / q + 1e-9).all())
    whole = generalized_cross_entropy(logits.repeat_interleave(K, dim=0), labels, 1.0).view(-1, K).sum(1)
    torch.testing.assert_close(whole, torch.full_like(whole, K - 1))


@few
@given(cases())
def test_early_learning_term_has_the_papers_gradient(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, targets = case
    logits = (logits / logits.abs().amax()).requires_grad_()  # nothing is clipped
    losses = early_learning_term(logits, targets)
    p = logits.softmax(1).detach()
    inner = (targets * p).sum(1, keepdim=True)
    torch.testing.assert_close(losses.detach(), (1 - inner).log().squeeze(1))
    expected = p * (inner - targets) / (1 - inner)
    torch.testing.assert_close(gradient(losses, logits), expected)


@few
@given(cases(spread=30.0))
def test_early_learning_term_is_at_most_zero_and_zero_without_targets(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, targets = case
    assert bool((early_learning_term(logits, targets) <= 0).all())
    assert torch.equal(early_learning_term(logits, torch.zeros_like(targets)), torch.zeros(len(logits), dtype=torch.float64))


@pytest.mark.parametrize(
    ("num_classes", "floor"), [(2, -8.52), (10, -6.91), (14, -6.57), (50, -5.30), (100, -4.62), (1000, -2.40)]
)
def test_early_learning_term_has_the_floor_that_the_clip_sets(num_classes: int, floor: float) -> None:
    logits = torch.zeros(1, num_classes)
    logits[0, 0] = 1e4
    p = clipped_probabilities(logits)
    logits.requires_grad_()
    losses = early_learning_term(logits, p / p.sum())
    assert losses.item() == pytest.approx(floor, abs=0.005)
    assert torch.equal(gradient(losses, logits), torch.zeros_like(logits)), "every coordinate is clipped"


@settings(few, max_examples=6)
@given(cases())
def test_derivatives_agree_with_differences(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, targets = case
    logits = (logits / logits.abs().amax()).requires_grad_()
    assert gradcheck(lambda z: cross_entropy(z, labels), (logits,))
    assert gradcheck(lambda z: soft_cross_entropy(z, targets), (logits,))
    assert gradcheck(entropy, (logits,))
    assert gradcheck(lambda z: generalized_cross_entropy(z, labels, 0.7), (logits,))
    assert gradcheck(lambda z: early_learning_term(z, targets), (logits,))


@pytest.mark.parametrize("name", ["cross_entropy", "soft_cross_entropy", "entropy", "gce", "elr"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_of_any_precision_give_finite_float32_and_leave_their_input_alone(name: str, dtype: torch.dtype) -> None:
    logits = 1e4 * torch.tensor([[1.0, -1.0, 0.5], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    logits = logits.to(dtype).requires_grad_()
    labels, before = torch.tensor([1, 1, 0]), logits.detach().clone()
    targets = one_hot(labels, logits).float()
    losses = {
        "cross_entropy": lambda: cross_entropy(logits, labels),
        "soft_cross_entropy": lambda: soft_cross_entropy(logits, targets),
        "entropy": lambda: entropy(logits),
        "gce": lambda: generalized_cross_entropy(logits, labels, 0.05),
        "elr": lambda: early_learning_term(logits, targets),
    }[name]()
    assert losses.dtype == torch.float32
    assert losses.shape == (3,)
    assert bool(losses.isfinite().all())
    assert bool(gradient(losses, logits).isfinite().all())
    assert torch.equal(logits.detach(), before)


def test_a_prediction_that_has_underflowed_still_learns_from_generalized_cross_entropy_at_small_q() -> None:
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)  # p_y = e^-200 is 0 in float32
    losses = generalized_cross_entropy(logits, torch.tensor([0]), 0.05)
    assert gradient(losses, logits)[0].tolist() == pytest.approx([-math.exp(-10), math.exp(-10)], rel=1e-2)
