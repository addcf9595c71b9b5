"""The cache file: zero-copy, private, whole or rebuilt."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import cache
from data.cache import cache_folder, open_table
from data.sources import RawTable, Source, find_source

ROOT = Path(__file__).parents[1]
IMAGES = torch.randint(256, (5, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))  # 135 bytes: padded
TRUTH, GIVEN = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 1, 1, 1, 2])


class Counted:
    """Builds a small source and counts how often."""

    def __init__(self) -> None:
        self.built = 0
        self.source = Source("tiny", self, num_classes=3, defaults={}, confusions={})

    def __call__(self) -> RawTable:
        self.built += 1
        return RawTable(IMAGES, TRUTH, GIVEN)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path))
    return tmp_path


def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets which files were checked."""
    monkeypatch.setattr(cache, "_verified", set())


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path
    monkeypatch.delenv("NOISY_LABEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/noisy-label-search")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/noisy-label-search")


def test_what_was_built_is_what_is_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    first = open_table(counted.source)
    a_new_process(monkeypatch)
    for table in (first, open_table(counted.source)):
        assert torch.equal(table.images, IMAGES)
        assert table.images.dtype == torch.uint8
        assert table.truth is not None
        assert table.given is not None
        assert torch.equal(table.truth, TRUTH)
        assert torch.equal(table.given, GIVEN)
        assert table.num_classes == 3
        scaled = IMAGES.double().div(255).transpose(0, 1).flatten(1)
        assert table.mean == pytest.approx(scaled.mean(dim=1).tolist(), abs=1e-12)
        assert table.std == pytest.approx(scaled.std(dim=1, correction=0).tolist(), abs=1e-12)
        payload = bytes(IMAGES.flatten().tolist()) + bytes(1) + b"".join(x.numpy().tobytes() for x in (TRUTH, GIVEN))
        assert table.checksum == hashlib.sha256(payload).hexdigest()
    assert counted.built == 1
    assert [path.name for path in folder.iterdir()] == ["tiny.table"]  # no temporary file stays


def test_a_source_may_lack_either_labels() -> None:
    def bare(name: str, truth: torch.Tensor | None, given: torch.Tensor | None) -> cache.Table:
        return open_table(Source(name, lambda: RawTable(IMAGES, truth, given), num_classes=3, defaults={}, confusions={}))

    only_truth, only_given = bare("clean", TRUTH, None), bare("noisy", None, GIVEN)
    assert only_truth.given is None
    assert only_given.truth is None
    assert only_truth.truth is not None
    assert only_given.given is not None
    assert torch.equal(only_truth.truth, TRUTH)
    assert torch.equal(only_given.given, GIVEN)


def test_the_mapping_is_one_and_copies_nothing(folder: Path) -> None:
    table = open_table(Counted().source)
    assert table.truth is not None
    assert table.images.data_ptr() == table.images.untyped_storage().data_ptr()  # images come first
    assert table.truth.untyped_storage().data_ptr() == table.images.data_ptr()
    if not Path("/proc/self/maps").exists():
        pytest.skip("the rest reads Linux's list of mappings")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(folder / "tiny.table"))]
    spans = [tuple(int(bound, 16) for bound in line.split()[0].split("-")) for line in lines]
    assert any(low <= table.images.data_ptr() < high for low, high in spans)


def test_a_write_stays_in_the_process_that_wrote(folder: Path) -> None:
    source = Counted().source
    before = (open_table(source), (folder / "tiny.table").read_bytes())
    written = open_table(source)
    written.images.add_(1)
    assert torch.equal(written.images, IMAGES + 1)
    assert torch.equal(before[0].images, IMAGES)
    assert torch.equal(open_table(source).images, IMAGES)
    assert (folder / "tiny.table").read_bytes() == before[1]


def flip(position: int) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        changed = bytearray(whole)
        changed[position] ^= 1
        return bytes(changed)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: whole[:20], id="a few bytes"),
        pytest.param(lambda whole: whole[:-1], id="last byte missing"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="half"),
        pytest.param(lambda whole: whole[1:], id="first byte missing"),
        pytest.param(flip(0), id="a pixel"),
        pytest.param(flip(140), id="a label"),
        pytest.param(flip(-70), id="a footer byte"),
        pytest.param(flip(-48), id="the length of the footer"),
        pytest.param(flip(-43), id="a high byte of that length"),
        pytest.param(flip(-20), id="the footer's checksum"),
        pytest.param(flip(-1), id="magic"),
    ],
)
def test_a_damaged_file_is_built_again(
    damage: Callable[[bytes], bytes], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted()
    open_table(counted.source)
    path = folder / "tiny.table"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    a_new_process(monkeypatch)
    with caplog.at_level(logging.WARNING):
        table = open_table(counted.source)
    assert torch.equal(table.images, IMAGES)
    assert counted.built == 2
    assert path.read_bytes() == whole
    (record,) = caplog.records
    assert "tiny.table is damaged" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_checksum_is_verified_once_per_process_and_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    open_table(counted.source)
    checks: list[int] = []
    sha256 = hashlib.sha256

    def counting(content: bytes | memoryview) -> object:
        checks.append(len(bytes(content)))
        return sha256(content)

    monkeypatch.setattr("data.cache.hashlib.sha256", counting)
    payload = 136 + 2 * 5 * 8
    open_table(counted.source)
    assert payload not in checks
    whole = (folder / "tiny.table").read_bytes()
    (folder / "copy").write_bytes(whole)
    os.replace(folder / "copy", folder / "tiny.table")  # another file of the same name is checked again
    open_table(counted.source)
    assert checks.count(payload) == 1
    assert counted.built == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(ValueError, match=r"file/folder.*set NOISY_LABEL_CACHE"):
        open_table(Counted().source)


BUILDER = """
import os, sys, time
from pathlib import Path
import torch
from data.cache import open_table
from data.sources import RawTable, Source

meeting, flush = Path(sys.argv[1]), os.fsync

def meet_and_flush(file):
    (meeting / sys.argv[2]).touch()
    end = time.monotonic() + 60
    while len(list(meeting.iterdir())) < 2:  # until both have written and neither has renamed
        assert time.monotonic() < end, "the other process does not write"
        time.sleep(0.001)
    flush(file)

def build():
    images = torch.arange(20_000).remainder(251).to(torch.uint8).view(-1, 1, 10, 10)
    return RawTable(images, torch.arange(len(images)) % 10, None)

os.fsync = meet_and_flush
table = open_table(Source("shared", build, num_classes=10, defaults={}, confusions={}))
assert int(table.images[1, 0, 0, 1]) == 101
print(table.checksum)
"""


def test_two_processes_build_at_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    meeting = tmp_path_factory.mktemp("meeting")
    builders = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(meeting), name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    answers = [builder.communicate(timeout=120)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(answers[0]) == 65
    assert answers[0] == answers[1]
    assert [path.name for path in folder.iterdir()] == ["shared.table"]


def test_digits_are_what_scikit_learn_has() -> None:
    from sklearn.datasets import load_digits

    digits, table = load_digits(), open_table(find_source("digits"))
    assert table.images.shape == (1797, 1, 8, 8)
    assert table.given is None
    assert table.truth is not None
    assert table.truth.tolist() == digits.target.tolist()
    assert (table.images[:, 0].int().numpy() == digits.images * 15).all()
    assert table.mean == pytest.approx([digits.images.mean() * 15 / 255], abs=1e-12)
    assert table.std == pytest.approx([digits.images.std() * 15 / 255], abs=1e-12)


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown data set 'x'; known are digits$"):
        find_source("x")
