"""Noise: exact counts against examples worked by hand, and what is read off them."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from torch import Tensor

from data.noise import Noise, corrupt, parse_noise, report
from data.seeds import generator


def stream(seed: int = 0) -> torch.Generator:
    return generator("test", seed)


@pytest.mark.parametrize(
    ("text", "noise"),
    [
        ("none", Noise("none")),
        ("symmetric:0.4", Noise("symmetric", 0.4)),
        ("symmetric:0", Noise("symmetric", 0.0)),
        ("symmetric:0.123456789", Noise("symmetric", 0.123456789)),
        ("symmetric:0.4:include-true", Noise("symmetric", 0.4, include_true=True)),
        ("asymmetric:0.4", Noise("asymmetric", 0.4)),
        ("asymmetric:0.4:7>1,2>7", Noise("asymmetric", 0.4, mapping=((7, 1), (2, 7)))),
    ],
)
def test_noise_is_read_and_written_back(text: str, noise: Noise) -> None:
    assert parse_noise(text) == noise
    assert str(noise) == text
    hash(noise)


@pytest.mark.parametrize(
    ("text", "offending", "allowed"),
    [
        ("pair:0.4", "'pair'", "write none, symmetric:RATE"),
        ("", "''", "write none, symmetric:RATE"),
        ("none:0.4", "'none:0.4'", "write none, symmetric:RATE"),
        ("symmetric", "'symmetric'", "write none, symmetric:RATE"),
        ("symmetric:0.4:include-true:0", "'symmetric:0.4:include-true:0'", "write none"),
        ("symmetric:1", "'1'", "a number in [0, 1)"),
        ("symmetric:-0.1", "'-0.1'", "a number in [0, 1)"),
        ("symmetric:nan", "'nan'", "a number in [0, 1)"),
        ("symmetric:half", "'half'", "a number in [0, 1)"),
        ("symmetric:0.4:7>1", "'7>1'", "only include-true"),
        ("asymmetric:0.4:7-1", "'7-1'", "FROM>TO"),
        ("asymmetric:0.4:7>1,", "''", "FROM>TO"),
        ("asymmetric:0.4:7>7", "'7>7'", "another class"),
        ("asymmetric:0.4:7>1,7>2", "class 7", "once"),
    ],
)
def test_unreadable_noise_is_one_line_with_value_and_what_is_allowed(text: str, offending: str, allowed: str) -> None:
    with pytest.raises(ValueError, match=r"^noise ") as caught:
        parse_noise(text)
    message = str(caught.value)
    assert offending in message
    assert allowed in message
    assert "\n" not in message


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(1, 300),
    num_classes=st.integers(2, 12),
    rate=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_symmetric_without_the_true_class_flips_exactly_the_count(
    num_samples: int, num_classes: int, rate: float, seed: int
) -> None:
    truth = torch.randint(num_classes, (num_samples,), generator=stream(seed))
    frozen = truth.clone()
    labels = corrupt(truth, Noise("symmetric", rate), num_classes, stream(seed))
    assert torch.equal(truth, frozen)
    assert labels.dtype == torch.int64
    assert int((labels != truth).sum()) == round(rate * num_samples)
    assert 0 <= int(labels.min()) <= int(labels.max()) < num_classes


def chi_square(counts: Tensor) -> float:
    """Of counts that ought to be equal."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_symmetric_is_uniform_over_the_other_classes() -> None:
    truth = torch.full((20_000,), 3)
    counts = torch.bincount(corrupt(truth, Noise("symmetric", 0.5), 5, stream()), minlength=5).double()
    assert counts[3] == 10_000
    assert chi_square(counts[[0, 1, 2, 4]]) < 16.3  # 3 degrees of freedom, p = 0.001


def test_symmetric_with_the_true_class_is_uniform_over_all_classes() -> None:
    # 0.4 of 50,000 are drawn, and a tenth of those get their own class again: 18,000 differ, standard deviation 42
    truth = torch.full((50_000,), 3)
    labels = corrupt(truth, Noise("symmetric", 0.4, include_true=True), 10, stream())
    counts = torch.bincount(labels, minlength=10).double()
    counts[3] -= 30_000  # those that were not drawn
    assert chi_square(counts) < 27.9  # 9 degrees of freedom, p = 0.001
    assert abs(report(truth, labels, 10).realised_rate - 0.36) < 4 * 42 / 50_000


def test_noise_is_spread_over_all_samples() -> None:
    truth = torch.zeros(10_000, dtype=torch.int64)
    flipped = corrupt(truth, Noise("symmetric", 0.4), 10, stream()) != truth
    assert chi_square(flipped.view(10, 1000).sum(dim=1).double()) < 27.9


def test_asymmetric_reads_the_clean_labels_only() -> None:
    # 5 <-> 6: reading labels that were corrupted before would flip some of the fives that became sixes back again
    truth = torch.tensor([5] * 10 + [6] * 20 + [0] * 7)
    labels = corrupt(truth, Noise("asymmetric", 0.4, mapping=((5, 6), (6, 5))), 10, stream())
    expected = torch.zeros(10, 10, dtype=torch.float64)
    expected[5, 5], expected[5, 6], expected[6, 6], expected[6, 5], expected[0, 0] = 0.6, 0.4, 0.6, 0.4, 1.0
    found = report(truth, labels, 10)
    assert torch.equal(found.matrix, expected)
    assert found.realised_rate == pytest.approx(12 / 37, abs=1e-12)


def test_asymmetric_chain_flips_each_class_by_its_own_count() -> None:
    # round(0.45 * 10) = round(4.5) = 4, round(0.45 * 5) = round(2.25) = 2; class 8 is absent
    truth = torch.tensor([2] * 10 + [7] * 5 + [1] * 3)
    labels = corrupt(truth, Noise("asymmetric", 0.45, mapping=((2, 7), (7, 1), (8, 0))), 10, stream())
    assert torch.bincount(labels[:10], minlength=10).tolist() == [0, 0, 6, 0, 0, 0, 0, 4, 0, 0]
    assert torch.bincount(labels[10:15], minlength=10).tolist() == [0, 2, 0, 0, 0, 0, 0, 3, 0, 0]
    assert labels[15:].tolist() == [1, 1, 1]


def test_corrupt_is_a_function_of_its_stream() -> None:
    truth = torch.arange(200) % 10
    noise = Noise("symmetric", 0.4)
    assert torch.equal(corrupt(truth, noise, 10, stream(1)), corrupt(truth, noise, 10, stream(1)))
    assert not torch.equal(corrupt(truth, noise, 10, stream(1)), corrupt(truth, noise, 10, stream(2)))


def test_no_noise_is_a_copy() -> None:
    truth = torch.arange(10)
    labels = corrupt(truth, Noise("none"), 10, stream())
    assert torch.equal(labels, truth)
    assert labels.data_ptr() != truth.data_ptr()


def test_a_map_outside_the_classes_or_missing_is_refused() -> None:
    truth = torch.arange(10)
    with pytest.raises(ValueError, match=r"asymmetric:0.4:7>10'.*class 10 .*0\.\.9"):
        corrupt(truth, parse_noise("asymmetric:0.4:7>10"), 10, stream())
    with pytest.raises(ValueError, match=r"asymmetric:0.4:12>1'.*class 12 .*0\.\.9"):
        corrupt(truth, parse_noise("asymmetric:0.4:12>1"), 10, stream())
    with pytest.raises(ValueError, match=r"asymmetric:0.4' needs a map"):
        corrupt(truth, parse_noise("asymmetric:0.4"), 10, stream())


def test_report_agrees_with_sklearn() -> None:
    truth = torch.randint(6, (500,), generator=stream(1))
    labels = torch.randint(6, (500,), generator=stream(2))
    found = report(truth, labels, 7)  # class 6 is absent
    expected = torch.from_numpy(confusion_matrix(truth, labels, labels=range(6), normalize="true"))
    assert found.matrix.dtype == torch.float64
    assert torch.allclose(found.matrix[:6, :6], expected, rtol=0, atol=1e-15)
    assert torch.equal(found.matrix[6], torch.zeros(7, dtype=torch.float64))
    assert torch.equal(found.matrix[:, 6], torch.zeros(7, dtype=torch.float64))
    assert found.realised_rate == sum(a != b for a, b in zip(truth.tolist(), labels.tolist(), strict=True)) / 500
    assert found.label_checksum == hashlib.sha256(struct.pack("<500q", *labels.tolist())).hexdigest()
