"""Splits and where noise falls."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data import sources
from data.cache import open_table
from data.dataset import Dataset, DataSpec, load
from data.sources import RawTable, Source, find_source

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(folder))


def digits(noise: str = "symmetric:0.4", test_fraction: float = 0.2, **changes: Any) -> Dataset:
    return load(DataSpec(data="digits", noise=noise, **changes), test_fraction=test_fraction)


def truth() -> torch.Tensor:
    table = open_table(find_source("digits"))
    assert table.truth is not None
    return table.truth


def labels_by_row(dataset: Dataset) -> dict[int, int]:
    """Row of the source -> given label, over training and validation."""
    rows = torch.cat([dataset.split.train, dataset.split.validation]).tolist()
    return dict(zip(rows, torch.cat([dataset.train.labels, dataset.validation.labels]).tolist(), strict=True))


def test_sizes_are_disjoint_and_cover_everything() -> None:
    # 1797 * 0.2 = 359.4; 1438 * 0.3 = 431.4
    split = digits().split
    assert (len(split.test), len(split.validation), len(split.train)) == (359, 431, 1007)
    assert torch.cat([split.test, split.validation, split.train]).sort().values.tolist() == list(range(1797))


def test_every_part_holds_its_rows() -> None:
    dataset, images = digits(), open_table(find_source("digits")).images
    assert dataset.test is not None
    assert dataset.train_truth is not None
    for part, rows in (("train", dataset.split.train), ("validation", dataset.split.validation), ("test", dataset.split.test)):
        held = getattr(dataset, part)
        assert torch.equal(torch.cat([batch.images for batch in held.in_order(100)]), images[rows])
        assert held.images.data_ptr() == dataset.train.images.data_ptr(), "one mapping for all, of which nothing is copied"
    assert torch.equal(dataset.train_truth, truth()[dataset.split.train])
    assert torch.equal(dataset.test.labels, truth()[dataset.split.test])  # clean


def test_the_count_is_exact_over_training_and_validation_together() -> None:
    dataset = digits()
    assert dataset.noise is not None
    wrong_train = int((dataset.train.labels != truth()[dataset.split.train]).sum())
    wrong_validation = int((dataset.validation.labels != truth()[dataset.split.validation]).sum())
    assert wrong_train + wrong_validation == 575  # 0.4 * 1438 = 575.2
    assert dataset.noise.realised_rate == 575 / 1438
    # validation is as noisy as the rest: hypergeometric, mean 0.4, standard deviation 0.02
    assert abs(wrong_validation / 431 - 0.4) < 0.08


def test_asymmetric_takes_the_map_of_the_source() -> None:
    dataset = digits("asymmetric:0.4")
    assert dataset.noise is not None
    rest = torch.cat([dataset.split.train, dataset.split.validation])
    counts = torch.bincount(truth()[rest], minlength=10).tolist()
    matrix = dataset.noise.matrix
    for source, target in {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}.items():
        assert matrix[source, target] == round(0.4 * counts[source]) / counts[source]
    for kept in (0, 1, 4, 8, 9):
        assert matrix[kept, kept] == 1
    expected = sum(round(0.4 * counts[source]) for source in (2, 3, 5, 6, 7)) / len(rest)
    assert dataset.noise.realised_rate == pytest.approx(expected, abs=1e-12)
    own = digits("asymmetric:0.4:0>1").noise
    assert own is not None
    assert own.matrix[0, 1] == round(0.4 * counts[0]) / counts[0]
    assert own.matrix[2, 2] == 1


def test_noise_and_split_are_separate_streams() -> None:
    first, other_noise = digits(), digits(noise_seed=1)
    assert torch.equal(first.split.train, other_noise.split.train)
    assert torch.equal(first.split.test, other_noise.split.test)
    assert not torch.equal(first.train.labels, other_noise.train.labels)
    # the same places among the rows that are not test rows are corrupted, whichever rows these are
    other_split = digits(split_seed=1)
    assert not torch.equal(first.split.test, other_split.split.test)
    places = []
    for dataset in (first, other_split):
        given = labels_by_row(dataset)
        places.append([given[row] != int(truth()[row]) for row in sorted(given)])
    assert places[0] == places[1]


def test_the_size_of_the_validation_set_changes_no_label() -> None:
    half, third = digits(validation_fraction=0.5), digits()
    assert len(half.split.validation) == 719
    assert labels_by_row(half) == labels_by_row(third)


def test_streams_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits()
    assert torch.equal(torch.rand(3), expected)


def test_the_fingerprint_follows_what_a_sweep_depends_on() -> None:
    first = digits()
    assert first.fingerprint == digits().fingerprint
    assert first.fingerprint == digits("symmetric:0.40").fingerprint
    changed = [digits(split_seed=1), digits(noise_seed=1), digits("symmetric:0.2"), digits(validation_fraction=0.5)]
    changed.append(dataclasses.replace(first, checksum="0" * 64))
    swapped = dataclasses.replace(first.split, train=first.split.test, test=first.split.train)
    changed.append(dataclasses.replace(first, split=swapped))
    for part in ("train", "validation"):
        labels = getattr(first, part).labels.clone()
        labels[0] = (labels[0] + 1) % 10
        changed.append(dataclasses.replace(first, **{part: dataclasses.replace(getattr(first, part), labels=labels)}))
    prints = {dataset.fingerprint for dataset in changed}
    assert len(prints) == len(changed)
    assert first.fingerprint not in prints


@pytest.mark.parametrize("num_trusted", [10, 95, 100])
def test_trusted_samples_are_clean_balanced_and_out_of_the_training_set(num_trusted: int) -> None:
    before, after = digits(), digits(trusted=num_trusted)
    assert before.trusted is None
    assert after.trusted is not None
    split = after.split
    assert torch.equal(after.trusted.labels, truth()[split.trusted])
    (everything,) = after.trusted.in_order(num_trusted)
    assert torch.equal(everything.images, open_table(find_source("digits")).images[split.trusted])
    counts = torch.bincount(after.trusted.labels, minlength=10)
    assert counts.sum() == num_trusted
    assert counts.max() - counts.min() <= (num_trusted % 10 > 0)
    assert torch.cat([split.train, split.trusted]).sort().values.tolist() == before.split.train.tolist()
    assert labels_by_row(after).items() <= labels_by_row(before).items(), "the others keep their labels"
    assert torch.equal(split.validation, before.split.validation)
    assert len({before.fingerprint, after.fingerprint, digits(trusted=num_trusted + 1).fingerprint}) == 3


def test_more_trusted_samples_than_there_are_in_balanced_classes_are_refused() -> None:
    smallest = int(torch.bincount(truth()[digits().split.train]).min())
    digits(trusted=10 * smallest)
    with pytest.raises(ValueError, match=rf"--trusted: {10 * smallest + 1} is not allowed; .* {10 * smallest} in balanced"):
        digits(trusted=10 * smallest + 1)


def test_nothing_is_held_out_for_a_test_that_is_not_wanted() -> None:
    dataset = digits(test_fraction=0)
    assert dataset.test is None
    assert (len(dataset.split.train), len(dataset.split.validation)) == (1258, 539)  # 1797 * 0.3 = 539.1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_validation_fraction_outside_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"validation_fraction: {fraction!r} .* \(0, 1\)"):
        digits(validation_fraction=fraction)


def test_a_test_fraction_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test_fraction: 1.0 .* \[0, 1\)"):
        digits(test_fraction=1.0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="leave 1 training and 1437 validation samples of 1797"):
        digits(validation_fraction=0.9995)
    with pytest.raises(ValueError, match="leave 1438 training and 0 validation samples of 1797"):
        digits(validation_fraction=0.0001)
    assert len(digits(validation_fraction=1436 / 1438).train) == 2


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown data set 'x'"):
        load(DataSpec(data="x", noise="none"))
    with pytest.raises(ValueError, match="unknown kind 'flip'"):
        digits("flip:0.4")


def annotated(name: str, clean: torch.Tensor | None, split: torch.Tensor | None = None) -> Source:
    images = torch.arange(10 * 4, dtype=torch.uint8).view(10, 1, 2, 2)
    given = torch.tensor([1, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    return Source(name, name, lambda: RawTable.of(images, 3, truth=clean, given=given, split=split), defaults={})


def test_a_source_with_labels_of_its_own_keeps_them_unless_noise_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.arange(10) % 3
    monkeypatch.setitem(sources.READERS, "annotated", lambda *_: annotated("annotated", clean))
    given = torch.tensor([1, 1, 2, 0, 1, 2, 0, 1, 2, 0])  # differs from the truth in row 0 only
    kept = load(DataSpec(data="annotated", noise="none"))
    rest = torch.cat([kept.split.train, kept.split.validation]).tolist()
    assert labels_by_row(kept) == {row: int(given[row]) for row in rest}
    assert kept.noise is not None
    assert kept.noise.realised_rate == (0 in rest) / 8
    assert kept.test is not None
    assert torch.equal(kept.test.labels, clean[kept.split.test])
    asked = load(DataSpec(data="annotated", noise="symmetric:0"))
    assert labels_by_row(asked) == {row: row % 3 for row in rest}  # noise falls on the truth


def test_a_source_without_truth_has_no_test_set_and_takes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.READERS, "wild", lambda *_: annotated("wild", None))
    wild = load(DataSpec(data="wild", noise="none"))
    assert (wild.test, wild.train_truth, wild.noise) == (None, None, None)
    assert (len(wild.split.train), len(wild.split.validation)) == (7, 3)
    assert isinstance(wild.fingerprint, str)
    with pytest.raises(ValueError, match=r"noise 'symmetric:0.4': data set 'wild' has no clean labels"):
        load(DataSpec(data="wild", noise="symmetric:0.4"))
    with pytest.raises(ValueError, match=r"noise 'asymmetric:0.4': data set 'wild' has no clean labels"):
        load(DataSpec(data="wild", noise="asymmetric:0.4"))


def test_a_sources_own_split_stays_and_only_what_it_lacks_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test labels are clean, the others unknown: no truth in training, no noise on top, nothing drawn for testing."""
    clean = torch.tensor([-1, -1, -1, -1, -1, -1, 2, 0, -1, -1])
    split = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, 0, 0])
    monkeypatch.setitem(sources.READERS, "tested", lambda *_: annotated("tested", clean, split))
    tested = load(DataSpec(data="tested", noise="none"))
    assert tested.split.test.tolist() == [6, 7]
    assert tested.test is not None
    assert tested.test.labels.tolist() == [2, 0]
    assert (tested.train_truth, tested.noise) == (None, None)
    assert (len(tested.split.train), len(tested.split.validation)) == (6, 2)
    with pytest.raises(ValueError, match=r"noise 'symmetric:0.4': data set 'tested' has no clean labels"):
        load(DataSpec(data="tested", noise="symmetric:0.4"))
    with pytest.raises(ValueError, match=r"--trusted: 3 is not allowed; data set 'tested' has no clean labels"):
        load(DataSpec(data="tested", noise="none", trusted=3))
    split = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 0, 0])
    monkeypatch.setitem(sources.READERS, "split", lambda *_: annotated("split", clean, split))
    divided = load(DataSpec(data="split", noise="none"))
    assert divided.split.validation.tolist() == [4, 5]
    assert divided.split.train.tolist() == [0, 1, 2, 3, 8, 9]


def test_random_numbers_follow_the_stream_and_not_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a folder may be moved."""
    for name in ("here", "there"):
        source = dataclasses.replace(annotated(name, torch.arange(10) % 3), stream="folder")
        monkeypatch.setitem(sources.READERS, name, lambda *_, source=source: source)
    here, there = (load(DataSpec(data=name, noise="symmetric:0.4")) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint


READER = """
import sys, psutil, torch
from data import sources
from data.dataset import DataSpec, load
from data.sources import RawTable, Source

torch.set_num_threads(1)
images = lambda: torch.randint(256, (4096, 3, 128, 128), dtype=torch.uint8)
source = Source("large", "large", lambda: RawTable.of(images(), 2, truth=torch.arange(4096) % 2), defaults={})
sources.READERS["large"] = lambda *_: source
if sys.argv[1] == "build":
    load(DataSpec(data="large", noise="symmetric:0.4"))
    sys.exit()
data = load(DataSpec(data="large", noise="symmetric:0.4"))
for part in (data.train, data.validation, data.test):
    for batch in part.in_order(64):
        batch.images.sum()
print("read", flush=True)
sys.stdin.readline()
print(sum(held.pss for held in psutil.Process().memory_maps() if held.path.endswith("/large.table")), flush=True)
sys.stdin.readline()
"""


def test_trials_on_one_machine_hold_one_copy() -> None:
    """Two processes that have read all of 201 MB hold it once between them, by the proportional set sizes of their mappings."""
    subprocess.run([sys.executable, "-c", READER, "build"], cwd=ROOT, check=True)
    command = [sys.executable, "-c", READER, "read"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]

    def answers() -> list[str]:
        return [process.stdout.readline().strip() for process in processes if process.stdout]

    def tell() -> None:
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()

    assert answers() == ["read", "read"]
    tell()
    held = [int(answer) for answer in answers()]
    tell()
    assert [process.wait(60) for process in processes] == [0, 0]
    assert 0.99 * 201.3e6 < sum(held) < 1.01 * 201.4e6
    assert held[0] == held[1]
