"""Bootstrapping against its formula, its limits, and the entropy term of ALR that it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losses import cross_entropy, entropy, soft_cross_entropy
from methods.bootstrapping import BootstrappingConfig
from tests.loss_cases import cases, few, gradient, one_hot
from tests.mutation import Mutation
from tests.tiny import differences, losses_of, trained_in_order

Case = tuple[Tensor, Tensor, Tensor]


def test_without_a_share_of_its_own_it_is_cross_entropy_bit_for_bit() -> None:
    ce = trained_in_order("ce")
    for target in ("soft", "hard"):
        assert (
            differences(trained_in_order("bootstrapping", given_share=1.0, target=target).state_dict(), ce.state_dict()) == []
        )
        assert (
            differences(trained_in_order("bootstrapping", given_share=0.9, target=target).state_dict(), ce.state_dict()) != []
        )


@few
@given(cases(), st.floats(0.0, 1.0))
def test_soft_is_its_formula(case: Case, share: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    p, hot = logits.detach().softmax(1), one_hot(labels, logits)
    losses = losses_of("bootstrapping", logits, labels, given_share=share)
    torch.testing.assert_close(losses.detach(), -((share * hot + (1 - share) * p) * p.log()).sum(1))
    expected = share * (p - hot) - (1 - share) * p * (p.log() + entropy(logits.detach()).unsqueeze(1))
    torch.testing.assert_close(gradient(losses, logits), expected)


@few
@given(cases(), st.floats(0.0, 1.0))
def test_hard_is_cross_entropy_against_both_labels(case: Case, share: float) -> None:
    logits, labels, _ = case
    logits.requires_grad_()
    p, hot = logits.detach().softmax(1), one_hot(labels, logits)
    own = one_hot(p.argmax(1), logits)
    losses = losses_of("bootstrapping", logits, labels, given_share=share, target="hard")
    torch.testing.assert_close(losses.detach(), -((share * hot + (1 - share) * own) * p.log()).sum(1))
    torch.testing.assert_close(gradient(losses, logits), p - share * hot - (1 - share) * own)


@few
@given(cases(), st.floats(0.0, 2.0))
def test_soft_is_alrs_loss_where_targets_are_the_given_labels(case: Case, weight: float) -> None:
    logits, labels, _ = case
    alr = soft_cross_entropy(logits, one_hot(labels, logits)) + weight * entropy(logits)
    ours = losses_of("bootstrapping", logits, labels, given_share=1 / (1 + weight))
    torch.testing.assert_close(alr, (1 + weight) * ours)


def test_a_prediction_worked_by_hand() -> None:
    """p = (0.7, 0.2, 0.1), label 1: CE 1.6094, H 0.8018, -log 0.7 = 0.3567; at the published shares 0.95 and 0.8."""
    logits, labels = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([1])
    assert cross_entropy(logits, labels).item() == pytest.approx(1.6094, abs=5e-5)
    assert losses_of("bootstrapping", logits, labels).item() == pytest.approx(1.5691, abs=5e-5)
    hard = losses_of("bootstrapping", logits, labels, given_share=0.8, target="hard")
    assert hard.item() == pytest.approx(1.3589, abs=5e-5)
    assert BootstrappingConfig().begins() == 0


HERE = "tests/test_methods_bootstrapping.py::"
BY_HAND = HERE + "test_a_prediction_worked_by_hand"

MUTATIONS = [
    Mutation("methods/bootstrapping.py", "        0.95,", "        0.855,", BY_HAND),
    Mutation("methods/bootstrapping.py", "return self.config.given_share", "return 1.1 * self.config.given_share", BY_HAND),
    Mutation("methods/bootstrapping.py", "(1 - self.config", "(1.1 - self.config", BY_HAND),
]
