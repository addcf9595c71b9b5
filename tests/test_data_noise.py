"""Noise: exact counts against examples worked by hand, and what is read off them."""

from __future__ import annotations

import hashlib
import re
import struct
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from torch import Tensor

from data.dataset import DataSpec, load
from data.noise import Noise, corrupt, instance_labels, parse_noise, report
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
        (
            "asymmetric:0.4:cat>dog,Down Coat>T-Shirt",
            Noise("asymmetric", 0.4, mapping=(("cat", "dog"), ("Down Coat", "T-Shirt"))),
        ),
        ('asymmetric:0.4:"a,b">c:d,"7">1', Noise("asymmetric", 0.4, mapping=(("a,b", "c:d"), ("7", 1)))),
        ("asymmetric:0.4:superclass", Noise("asymmetric", 0.4, map_name="superclass")),
        ("pair:0.4", Noise("pair", 0.4)),
        ("instance:0.4", Noise("instance", 0.4)),
    ],
)
def test_noise_is_read_and_written_back(text: str, noise: Noise) -> None:
    assert parse_noise(text) == noise
    assert str(noise) == text
    hash(noise)


@pytest.mark.parametrize(
    ("text", "offending", "allowed"),
    [
        ("flip:0.4", "'flip'", "write none, symmetric:RATE"),
        ("pair", "'pair'", "write none, symmetric:RATE"),
        ("pair:0.4:1>2", "'1>2'", "nothing is"),
        ("instance:0.4:0", "'0'", "nothing is"),
        ("asymmetric:0.4:Super", "'Super'", "FROM>TO"),
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
        ("asymmetric:0.4:cat>dog,cat>eel", "class cat", "once"),
        ("asymmetric:0.4:cat>cat", "'cat>cat'", "another class"),
        ("asymmetric:0.4:cat>dog>eel", "'cat>dog>eel'", "FROM>TO"),
        ("asymmetric:0.4:cat>,dog>eel", "'cat>'", "FROM>TO"),
        ('asymmetric:0.4:"cat>dog', "'\"cat>dog'", "FROM>TO"),
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


def test_a_map_is_written_in_the_labels_where_these_are_numbers() -> None:
    written = parse_noise("asymmetric:0.4:1>2,10>1")
    assert written.numbered(("1", "2", "10")).mapping == ((0, 1), (2, 0))
    assert written.numbered(("1", "10", "2")).mapping == ((0, 2), (1, 0)), "the order of folders"
    for plain in ((), tuple("abcdefghijk"), tuple(map(str, range(11)))):
        assert written.numbered(plain) == written
    with pytest.raises(ValueError, match=r"^noise 'asymmetric:0.4:1>2,10>1': class 10 does not exist; classes are 1, 2, 3$"):
        written.numbered(("1", "2", "3"))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=2, max_size=6, unique=True), st.randoms())
@settings(max_examples=300, deadline=None)
def test_any_class_can_be_named(classes: list[str], random: Random) -> None:
    """And the text is stable: what is read is written, what is written is read as the same."""
    flips = tuple((name, random.choice([one for one in classes if one != name])) for name in classes)
    text = str(Noise("asymmetric", 0.4, mapping=flips))
    read = parse_noise(text)
    assert str(read) == text
    assert read.mapping == flips
    place = {name: number for number, name in enumerate(classes)}
    assert read.numbered(classes).mapping == tuple((place[one], place[other]) for one, other in flips)


def test_names_in_a_map() -> None:
    classes = ("cat", "dog", "T-Shirt", "Down Coat")
    written = parse_noise("asymmetric:0.40: cat > dog , Down Coat>T-Shirt")
    assert str(written) == "asymmetric:0.4:cat>dog,Down Coat>T-Shirt"
    assert written.numbered(classes).mapping == ((0, 1), (3, 2))
    assert parse_noise("asymmetric:0.4:0>dog").numbered(classes).mapping == ((0, 1),)
    assert parse_noise('asymmetric:0.4:"7">1').numbered(("7", "x")).mapping == ((0, 1),), "by name, not the eighth class"
    assert parse_noise('asymmetric:0.4:"7">9').numbered(("7", "9")).mapping == ((0, 1),)
    for text, said in (
        ("asymmetric:0.4:Cat>dog", "class Cat does not exist (did you mean 'cat'?); classes are cat, dog, T-Shirt, Down Coat"),
        ("asymmetric:0.4:cat>boat", "class boat does not exist"),
        ("asymmetric:0.4:cat>0", "class cat is mapped to itself"),
        ("asymmetric:0.4:cat>dog,0>2", "class cat is mapped twice"),
    ):
        with pytest.raises(ValueError, match=f"^noise '{text}': {re.escape(said)}"):
            parse_noise(text).numbered(classes)
    with pytest.raises(ValueError, match=r"class cat does not exist; this data set's classes have no names$"):
        parse_noise("asymmetric:0.4:cat>dog").numbered(())


def test_a_map_is_taken_by_its_name_or_is_the_first() -> None:
    maps = {"ring": {0: 1, 1: 2, 2: 0}, "swap": {0: 1, 1: 0}}
    first, second = (Noise("asymmetric", 0.4, mapping=mapping) for mapping in (((0, 1), (1, 2), (2, 0)), ((0, 1), (1, 0))))
    assert parse_noise("asymmetric:0.4").completed(maps) == first
    assert parse_noise("asymmetric:0.4:ring").completed(maps) == first
    assert parse_noise("asymmetric:0.4:swap").completed(maps) == second
    own, other = parse_noise("asymmetric:0.4:2>1"), parse_noise("symmetric:0.4")
    assert own.completed(maps) is own
    assert other.completed(maps) is other
    with pytest.raises(ValueError, match=r"^noise 'asymmetric:0.4:rings': unknown map 'rings'; known are ring, swap$"):
        parse_noise("asymmetric:0.4:rings").completed(maps)
    with pytest.raises(
        ValueError, match=r"^noise 'asymmetric:0.4:ring': unknown map 'ring'; this data set has none; write one"
    ):
        parse_noise("asymmetric:0.4:ring").completed({})


def test_pair_flips_each_class_to_the_next_by_its_own_count() -> None:
    # round(0.45 * 10) = round(4.5) = 4, round(0.45 * 5) = round(2.25) = 2, round(0.45 * 20) = 9
    truth = torch.tensor([0] * 10 + [1] * 5 + [2] * 20)[torch.randperm(35, generator=stream())]
    labels = corrupt(truth, Noise("pair", 0.45), 3, stream())
    expected = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.45, 0.0, 0.55]], dtype=torch.float64)
    assert torch.equal(report(truth, labels, 3).matrix, expected)
    ring = Noise("asymmetric", 0.45, mapping=((0, 1), (1, 2), (2, 0)))
    assert torch.equal(labels, corrupt(truth, ring, 3, stream()))


def pictures(num: int, seed: int = 0) -> Tensor:
    """Half of them nearly alike, with a bright ground; uint8 [num, 3, 4, 4]."""
    found = torch.randint(256, (num, 3, 4, 4), generator=stream(seed), dtype=torch.uint8)
    found[::2] = 200 + found[::2] // 8
    return found


def test_instance_noise_has_the_rate_of_its_truncated_normal() -> None:
    # 20,000 draws of a flip with probability q: standard deviation of their mean at most 0.0035
    truth, images = torch.arange(20_000) % 5, pictures(20_000)
    for rate, mean in ((0.05, 0.1009), (0.2, 0.2055), (0.4, 0.4), (0.6, 0.6)):
        labels = corrupt(truth, Noise("instance", rate), 5, stream(), images.__getitem__)
        found = report(truth, labels, 5)
        assert found.realised_rate == pytest.approx(mean, abs=4 * 0.0035)
        assert found.matrix.diagonal().tolist() == pytest.approx([1 - mean] * 5, abs=4 * 0.008)  # of each class alike
        assert 0 <= int(labels.min()) <= int(labels.max()) < 5
    assert torch.equal(corrupt(truth, Noise("instance", 0.0), 5, stream(), images.__getitem__), truth)


def test_instance_noise_is_spread_as_the_formula_says() -> None:
    # one image in all rows: its class flips to each other class as softmax(x W) says, x of mean 0 and standard deviation 1
    image = torch.tensor([[[[0, 40], [90, 30]]]], dtype=torch.uint8)
    truth = torch.full((40_000,), 1)
    labels = instance_labels(lambda rows: image.expand(len(rows), -1, -1, -1), truth, 0.5, 3, stream(6))
    random = stream(6)
    torch.rand(2, 40_000, generator=random, dtype=torch.float64)
    _, weights = (torch.randn(4, 3, generator=random, dtype=torch.float64) for _ in range(2))
    scaled = (image.double().flatten() - 40) / (1050**0.5)  # mean 40, variance (1600 + 0 + 2500 + 100) / 4
    odds = (scaled @ weights)[[0, 2]].exp()
    flipped = torch.bincount(labels, minlength=3).double()
    assert 0.05 < float(odds[0] / odds.sum()) < 0.95  # both happen
    assert float(flipped[0] / (flipped[0] + flipped[2])) == pytest.approx(
        float(odds[0] / odds.sum()), abs=4 * 0.5 / 20_000**0.5
    )


def test_instance_noise_depends_on_the_image_not_on_its_brightness() -> None:
    def to(images: Tensor) -> Tensor:
        """How often each image, given 2,000 times as class 0, becomes each of four classes, with one W."""
        repeated = images.repeat_interleave(2000, dim=0)
        labels = instance_labels(repeated.__getitem__, torch.zeros(len(repeated), dtype=torch.int64), 0.5, 4, stream())
        return torch.stack([torch.bincount(part, minlength=4) for part in labels.split(2000)]) / 2000

    images = pictures(8) // 2
    shares = to(torch.cat([images, images + 60]))
    assert shares[:, 0].tolist() == pytest.approx([0.5] * 16, abs=0.05)
    assert torch.allclose(shares[:8], shares[8:], rtol=0, atol=0.06)
    assert len(shares[:8, 1:].argmax(dim=1).unique()) > 1  # what they become differs from image to image


def test_instance_noise_is_a_function_of_its_stream_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, images, asked = torch.arange(300) % 3, pictures(300), []

    def look(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return images[rows]

    labels = corrupt(truth, Noise("instance", 0.4), 3, stream(1), look)
    assert max(asked) == 100
    assert not torch.equal(labels, corrupt(truth, Noise("instance", 0.4), 3, stream(2), look))
    asked.clear()
    monkeypatch.setattr("data.noise.CHUNK_VALUES", 7 * 48)
    assert torch.equal(labels, corrupt(truth, Noise("instance", 0.4), 3, stream(1), look))
    assert max(asked) == 7


def test_only_instance_noise_looks_at_images() -> None:
    def look(rows: Tensor) -> Tensor:
        raise AssertionError(f"asked for {rows}")

    truth = torch.arange(20) % 4
    for text in ("none", "symmetric:0.4", "symmetric:0.4:include-true", "asymmetric:0.4:0>1", "pair:0.4", "instance:0"):
        noise = parse_noise(text)
        labels = corrupt(truth, noise, 4, stream(), look)
        assert bool((labels != truth).any()) == (noise.rate > 0)


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


def test_instance_noise_on_a_data_set() -> None:
    first, second = (load(DataSpec(data="digits", noise="instance:0.3", validation_fraction=share)) for share in (0.3, 0.5))
    assert first.noise is not None
    assert second.noise is not None
    assert first.noise.realised_rate == pytest.approx(0.3, abs=4 * (0.21 / 1438) ** 0.5)
    assert first.noise.label_checksum == second.noise.label_checksum
