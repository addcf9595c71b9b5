"""Which rows are held out: by hand, by scikit-learn, and by what must hold for any classes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from data import sources
from data.dataset import Dataset, DataSpec, load
from data.seeds import generator
from data.sources import TEST, TRAIN, VALIDATION, RawTable, Source
from data.split import held_out, stratified

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def held(sizes: list[int], num_test: int, num_validation: int) -> list[tuple[int, int]]:
    return held_out(sizes, num_test, num_validation, range(len(sizes)))


def test_largest_remainders_by_hand() -> None:
    # of 20 rows 4 are for the test and 5 validate: shares of (10, 6, 4) are (2, 1.2, 0.8) and (2.5, 1.5, 1)
    # held out together are 4.5, 2.7 and 1.8: 4 + 2 + 1, and one more for the remainders 0.8 and 0.7, which makes 4, 3, 2
    # of the first 4 then 2 validate, since 2 are for the test; of the second 3 one or two; of the last 2 one: 5 are 2 + 2 + 1
    assert held([10, 6, 4], 4, 5) == [(2, 2), (1, 2), (1, 1)]
    # without a test: shares of 6 are 3, 1.8, 1.2
    assert held([10, 6, 4], 0, 6) == [(0, 3), (0, 2), (0, 1)]
    # equal remainders: those that come first by the order that is given; shares of 2 are 2 / 3
    assert held_out([4, 4, 4], 0, 2, [2, 0, 1]) == [(0, 1), (0, 0), (0, 1)]


def test_a_class_keeps_a_training_row() -> None:
    assert held([1, 1, 1, 9], 0, 4) == [(0, 0), (0, 0), (0, 0), (0, 3)]  # 4 / 12 of 9; the others have nothing to give
    assert held([2] * 4, 0, 4) == [(0, 1)] * 4
    assert held([2] * 4, 0, 6) == [(0, 1)] * 4  # a share of 1.5 leaves a half, so it is made 1
    assert held([1] * 5, 1, 2) == [(0, 0)] * 5
    assert held([5, 5], 0, 0) == [(0, 0)] * 2


@given(SIZES, st.floats(0, 0.9), st.floats(0.05, 0.95))
@settings(max_examples=500, deadline=None)
def test_every_class_has_its_share_in_every_part(sizes: list[int], tested: float, validated: float) -> None:
    total = sum(sizes)
    num_test = round(tested * total)
    num_validation = round(validated * (total - num_test))
    counts = held(sizes, num_test, num_validation)
    exact = True
    for size, (test, validation) in zip(sizes, counts, strict=True):
        train = size - test - validation
        shares = [Fraction(size * number, total) for number in (num_test, num_validation)]
        left = size - sum(shares)
        if left < 1:  # it keeps one row, and what it gives is in proportion
            exact = False
            shares = [share * (size - 1) / (size - left) for share in shares]
            left = Fraction(1)
        assert test >= 0
        assert validation >= 0
        assert train >= 1
        for number, share in zip((train, test, validation), (left, *shares), strict=True):
            assert abs(number - share) < 1
    if exact:
        assert [sum(part) for part in zip(*counts, strict=True)] == [num_test, num_validation]


@given(st.lists(st.integers(2, 40), min_size=2, max_size=12), st.floats(0.1, 0.5))
@settings(max_examples=100, deadline=None)
def test_scikit_learn_counts_alike(sizes: list[int], share: float) -> None:
    """``train_test_split``, where no two remainders are equal, which it breaks at random."""
    total, labels = sum(sizes), [label for label, size in enumerate(sizes) for _ in range(size)]
    number = round(share * total)
    assume(len(sizes) <= number <= total - len(sizes))
    shares = [Fraction(size * number, total) for size in sizes]
    assume(all(size - part >= 1 for size, part in zip(sizes, shares, strict=True)))
    assume(len({part % 1 for part in shares}) == len(sizes))
    _, theirs = train_test_split(labels, test_size=number, stratify=labels, random_state=0)
    assert [validation for _, validation in held(sizes, 0, number)] == [theirs.count(label) for label in range(len(sizes))]


@given(SIZES, st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_rows_of_the_counts_are_drawn_anew_by_every_seed_and_the_same_by_one(sizes: list[int], seed: int) -> None:
    labels = torch.repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes), generator=generator("test", seed))]
    num_test, num_validation = round(0.2 * len(labels)), round(0.24 * len(labels))

    def parts(number: int) -> torch.Tensor:
        return stratified(labels, num_test, num_validation, generator("split", number))

    first = parts(seed)
    assert torch.equal(first, parts(seed))
    assert set(first.tolist()) <= {TRAIN, VALIDATION, TEST}
    for label in range(len(sizes)):
        assert int((first[labels == label] == TRAIN).sum()) >= 1
    if len(labels) > 60:
        assert not torch.equal(first, parts(seed + 1))


def test_every_row_of_a_class_is_as_likely_as_another() -> None:
    """And, of equal classes, every class as likely to give one row more: 3 of 30 rows are held out 400 times."""
    labels = torch.arange(30) % 10
    times = sum((stratified(labels, 0, 3, generator("test", seed)) == VALIDATION).int() for seed in range(400))
    assert isinstance(times, torch.Tensor)
    assert int(times.sum()) == 1200
    # 40 each, standard deviation 6
    assert 18 <= int(times.min()) <= int(times.max()) <= 66
    assert 75 <= int(times.view(3, 10).sum(dim=0).min()) <= int(times.view(3, 10).sum(dim=0).max()) <= 165


# --- in a data set ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path / "cache"))


def load_with(monkeypatch: pytest.MonkeyPatch, labels: list[int], spec: dict[str, Any], **columns: Any) -> Dataset:
    """A data set of one pixel an image, whose own labels are these."""
    columns = {name: torch.tensor(column) for name, column in columns.items()}
    images = (torch.arange(len(labels)) % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    classes = tuple(f"c{label}" for label in range(max(labels) + 1))
    table = RawTable.of(images, len(classes), given=torch.tensor(labels), classes=classes, **columns)
    name = f"own{abs(hash(str((labels, columns))))}"
    monkeypatch.setitem(sources.READERS, name, lambda *_: Source(name, name, lambda: table, defaults={}, stream="own"))
    return load(DataSpec(**{"data": name, "noise": "none", "split": "stratified", **spec}))


def test_of_150_classes_with_two_images_each_every_one_is_learnt_and_half_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [label for label in range(150) for _ in range(2)]
    dataset = load_with(monkeypatch, labels, {})
    assert torch.bincount(dataset.train.labels, minlength=150).min() == 1
    assert len(dataset.validation) == 90  # 0.3 * 300, of 90 classes
    assert torch.bincount(dataset.validation.labels).max() == 1
    assert dataset.label_remarks() == [
        "60 of 150 classes have no validation image, so that the search does not see how they do"
    ]
    before = load_with(monkeypatch, labels, {"split": ""})
    assert torch.bincount(before.train.labels, minlength=150).min() == 0
    assert before.label_remarks()[0].startswith("classes without a training image, which nothing is learnt of: 'c")


def test_single_images_are_learnt_from_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_with(monkeypatch, [0] * 10 + [1] * 10 + [2, 3], {})
    assert torch.bincount(dataset.train.labels).tolist() == [7, 7, 1, 1]
    assert dataset.label_remarks() == [
        "2 of 4 classes have no validation image, so that the search does not see how they do; 2 have a single image, which is"
        " learnt from"
    ]
    assert load_with(monkeypatch, [0] * 10 + [1] * 10, {}).label_remarks() == []


def test_classes_that_a_sources_own_split_leaves_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_with(monkeypatch, [0, 0, 0, 1, 2, 2], {}, split=[TRAIN, TRAIN, VALIDATION, VALIDATION, TRAIN, VALIDATION])
    assert dataset.label_remarks() == ["classes without a training image, which nothing is learnt of: 'c1'"]


def test_noise_moves_no_row_and_the_sources_own_labels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given labels are stratified, not the truth behind them, and not what synthetic noise makes of it."""
    given, truth = [0] * 8 + [1] * 4 + [2] * 8, [0] * 4 + [1] * 8 + [2] * 8
    plain, noisy, other = (
        load_with(monkeypatch, given, {"noise": noise, "noise_seed": seed}, truth=truth)
        for noise, seed in (("none", 0), ("symmetric:0.5", 0), ("symmetric:0.5", 1))
    )
    for dataset in (noisy, other):
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(dataset.split, part), getattr(plain.split, part))
    assert not torch.equal(noisy.train.labels, other.train.labels)
    assert torch.bincount(torch.tensor(given)[plain.split.test]).tolist() == [2, 1, 1]  # 1.6, 0.8, 1.6, of 4
    assert torch.bincount(plain.validation.labels).tolist() == [2, 1, 2]  # 2, 1, 2, of 5
    clean = load_with(monkeypatch, [0] * 8 + [1] * 4, {"noise": "pair:0.5", "labels_are_clean": True})
    assert torch.equal(clean.split.test, load_with(monkeypatch, [0] * 8 + [1] * 4, {"labels_are_clean": True}).split.test)


def test_an_unknown_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^unknown split 'sorted'; known are stratified, shuffled$"):
        load_with(monkeypatch, [0, 0, 1, 1], {"split": "sorted"})


def test_where_nothing_can_validate_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="leave 4 training and 0 validation samples of 4; at least 2 and 1 are needed"):
        load_with(monkeypatch, [0, 1, 2, 3], {})


# --- truth in some rows -----------------------------------------------------------------------------------------------------


def test_a_small_clean_set_is_enough_for_trusted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 of 60 labels have a truth, of which two are of no class; the trusted rows are of the others, balanced."""
    given = [row % 3 for row in range(60)]
    truth = [-1] * 60
    for row in range(10):
        truth[row] = (row + (row == 4)) % 3
    truth[10] = truth[11] = 3
    dataset = load_with(monkeypatch, given, {"trusted": 3}, truth=truth)
    assert dataset.test is None
    assert dataset.trusted is not None
    rows = dataset.split.trusted
    assert dataset.trusted.labels.tolist() == [truth[row] for row in rows.tolist()]
    assert sorted(dataset.trusted.labels.tolist()) == [0, 1, 2]
    assert dataset.train_truth is not None
    assert dataset.train_truth.tolist() == [truth[row] for row in dataset.split.train.tolist()]
    assert dataset.noise is not None
    assert (dataset.noise.num_labels, dataset.noise.num_known, dataset.noise.num_open) == (60, 12, 2)
    assert dataset.noise.realised_rate == 3 / 12  # row 4, and the two of no class
    assert dataset.noise.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1 / 4, 3 / 4]]
    assert " 0.2500 over the 12 of 60 labels whose clean one is known (of no class: 2), labels " in str(dataset.noise)
    assert dataset.label_remarks() == [
        "statistics of labels are over the training and validation images whose clean label is known; no test images are drawn"
        " from them (a list can name some: split test)"
    ]
    before = load_with(monkeypatch, given, {}, truth=truth)
    assert torch.cat([dataset.split.train, rows]).sort().values.tolist() == before.split.train.tolist()


def test_too_few_clean_labels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given, truth = [row % 3 for row in range(60)], [-1] * 60
    with pytest.raises(ValueError, match=r"^--trusted: 3 is not allowed; data set 'own[0-9]+' has no clean labels$"):
        load_with(monkeypatch, given, {"trusted": 3}, truth=[*truth[:59], 3])
    truth[:20] = given[:20]
    for row in range(2, 20, 3):
        truth[row] = -1 if row > 3 else 0
    said = r"has 0 in balanced classes here \(of 42 training samples [0-9]+ have a clean label, 0 of them of class 'c2'\)$"
    with pytest.raises(ValueError, match=said):
        load_with(monkeypatch, given, {"trusted": 3}, truth=truth)
    with pytest.raises(ValueError, match=r"has clean labels for 15 of 60 samples only; only none is allowed, or --labels-are"):
        load_with(monkeypatch, given, {"noise": "pair:0.2"}, truth=truth)


def test_labels_that_are_said_to_be_clean_are_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [row % 3 for row in range(60)]
    with pytest.raises(ValueError, match=r"has no clean labels to corrupt; only none is allowed, or --labels-are-clean where"):
        load_with(monkeypatch, given, {"noise": "symmetric:0.25"})
    clean = load_with(monkeypatch, given, {"noise": "symmetric:0.25", "labels_are_clean": True})
    assert clean.test is not None
    assert clean.test.labels.tolist() == [given[row] for row in clean.split.test.tolist()]
    assert clean.noise is not None
    assert clean.noise.realised_rate == 0.25  # 12 of 48
    assert clean.train_truth is not None
    assert clean.train_truth.tolist() == [given[row] for row in clean.split.train.tolist()]
    some = load_with(monkeypatch, given, {"labels_are_clean": True}, truth=[*given[:30], *[-1] * 30])
    assert some.noise is not None
    assert (some.noise.num_known, some.noise.realised_rate) == (48, 0)
    with pytest.raises(ValueError, match=r"^--labels-are-clean is not allowed; 2 labels of 'own[0-9]+' are not their truth$"):
        load_with(monkeypatch, given, {"labels_are_clean": True}, truth=[1, 3, *[-1] * 58])
    split = [TEST if row < 3 else TRAIN for row in range(60)]  # a test row's given label is not what it is tested on
    tested = load_with(monkeypatch, given, {"labels_are_clean": True}, truth=[1, 1, 2, *[-1] * 57], split=split)
    assert tested.test is not None
    assert tested.test.labels.tolist() == [1, 1, 2]


def test_a_map_of_names_is_that_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [row % 3 for row in range(60)]
    named, numbered = (
        load_with(monkeypatch, given, {"noise": f"asymmetric:0.5:{flips}", "labels_are_clean": True})
        for flips in ("c0>c2,c1>c0", "0>2,1>0")
    )
    assert named.fingerprint == numbered.fingerprint
    with pytest.raises(ValueError, match=r"class C0 does not exist \(did you mean 'c0'\?\); classes are c0, c1, c2$"):
        load_with(monkeypatch, given, {"noise": "asymmetric:0.5:C0>c1", "labels_are_clean": True})
