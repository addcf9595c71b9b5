"""The cache file: zero-copy, private, whole or rebuilt."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import table_file
from data.cache import open_table
from data.folders import cache_folder, data_folder
from data.readers.base import Block
from data.sources import RawTable, Source, find_source
from data.table_file import Table

ROOT = Path(__file__).parents[1]
IMAGES = torch.randint(256, (5, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))  # 135 bytes: padded
TRUTH, GIVEN = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 1, 1, 1, 2])


class Counted:
    """Builds a small source and counts how often."""

    def __init__(self) -> None:
        self.built = 0
        self.source = Source("tiny", "tiny", self, defaults={})

    def __call__(self) -> RawTable:
        self.built += 1
        return RawTable.of(IMAGES, 3, truth=TRUTH, given=GIVEN)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path))
    return tmp_path


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path
    monkeypatch.delenv("NOISY_LABEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/noisy-label-search")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/noisy-label-search")
    assert data_folder() == Path("/home/someone/.cache/noisy-label-search/data-sets")
    monkeypatch.setenv("NOISY_LABEL_DATA", "/data")
    assert data_folder() == Path("/data")


def test_what_was_built_is_what_is_mapped(folder: Path) -> None:
    counted = Counted()
    first = open_table(counted.source)
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
    assert {path.name for path in folder.iterdir()} == {"tiny.lock", "tiny.table"}  # nothing else stays


def test_statistics_leave_the_source_s_own_test_images_out(folder: Path) -> None:
    split = torch.arange(len(IMAGES)) % 3  # TRAIN, VALIDATION, TEST
    table = open_table(Source("split", "split", lambda: RawTable.of(IMAGES, 3, truth=TRUTH, split=split), defaults={}))
    scaled = IMAGES[split != 2].double().div(255).transpose(0, 1).flatten(1)
    assert table.mean == pytest.approx(scaled.mean(dim=1).tolist(), abs=1e-12)
    assert table.std == pytest.approx(scaled.std(dim=1, correction=0).tolist(), abs=1e-12)
    assert torch.equal(table.images, IMAGES)


def test_a_source_may_lack_either_labels() -> None:
    def bare(name: str, truth: torch.Tensor | None, given: torch.Tensor | None) -> Table:
        return open_table(Source(name, name, lambda: RawTable.of(IMAGES, 3, truth=truth, given=given), defaults={}))

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
    damage: Callable[[bytes], bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted()
    open_table(counted.source)
    path = folder / "tiny.table"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        table = open_table(counted.source)
    assert torch.equal(table.images, IMAGES)
    assert counted.built == 2
    assert path.read_bytes() == whole
    (record,) = caplog.records
    assert "tiny.table is damaged" in record.getMessage() or record.getMessage().endswith(
        "is of another version of this program; it is built again"
    )
    assert "\n" not in record.getMessage()


def test_the_checksum_is_verified_once_per_machine_and_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    open_table(counted.source)
    checks: list[int] = []
    sha256 = hashlib.sha256

    def counting(content: bytes | memoryview) -> object:
        checks.append(len(bytes(content)))
        return sha256(content)

    monkeypatch.setattr("data.table_file.hashlib.sha256", counting)
    payload = 136 + 2 * 5 * 8
    open_table(counted.source)
    assert payload not in checks
    whole = (folder / "tiny.table").read_bytes()
    (folder / "copy").write_bytes(whole)
    os.replace(folder / "copy", folder / "tiny.table")  # another file of the same name is checked again
    open_table(counted.source)
    open_table(counted.source)
    assert checks.count(payload) == 1
    assert counted.built == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(ValueError, match=r"file/folder.*set NOISY_LABEL_CACHE"):
        open_table(Counted().source)


BUILDER = """
import sys, time
from pathlib import Path
import torch
from data import build
from data.cache import open_table
from data.readers.base import Block
from data.sources import RawTable, Source

marks, stop_after = Path(sys.argv[1]), int(sys.argv[2])
images = torch.arange(20_000).remainder(251).to(torch.uint8).view(-1, 1, 10, 10)
build.SYNC_SECONDS = 0

def blocks(rows):
    (marks / f"{time.monotonic_ns()} {rows[0]}").touch()
    for number, row in enumerate(range(rows[0], len(images), 10)):
        if number == stop_after:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        yield Block(images[row : row + 10])

raw = RawTable((200, 1, 10, 10), blocks, 10, truth=torch.arange(200) % 10)
table = open_table(Source("shared", "shared", lambda: raw, defaults={}))
assert torch.equal(table.images, images)
print(table.checksum, *table.mean, *table.std)
"""


def builder(marks: Path, stop_after: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(marks), str(stop_after)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def starts(marks: Path) -> list[int]:
    """The rows from which processes have begun to decode, in order of time."""
    return [int(name.split()[1]) for name in sorted(path.name for path in marks.iterdir())]


def test_of_two_processes_one_builds_and_the_other_waits(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    marks = tmp_path_factory.mktemp("marks")
    builders = [builder(marks) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in builders]
    assert [process.returncode for process in builders] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert starts(marks) == [0]
    assert {path.name for path in folder.iterdir()} == {"shared.lock", "shared.table"}


def test_a_build_that_was_killed_goes_on(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """After kill -9 in the middle, what was on disk is not decoded again, and the file is the one of an undisturbed build."""
    marks = tmp_path_factory.mktemp("marks")
    assert builder(marks, stop_after=7).wait(120) == -9
    assert not (folder / "shared.table").exists()
    assert builder(marks, stop_after=5).wait(120) == -9
    resumed = builder(marks)
    answer, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert starts(marks) == [0, 70, 120]
    whole = (folder / "shared.table").read_bytes()
    (folder / "shared.table").unlink()
    undisturbed = builder(marks)
    assert undisturbed.communicate(timeout=120)[0] == answer
    assert (folder / "shared.table").read_bytes() == whole


def test_a_build_of_another_source_is_not_continued(folder: Path) -> None:
    source = Counted().source
    (folder / "tiny.partial").write_bytes(bytes(135))
    (folder / "tiny.partial.json").write_text('{"stamp": "other", "shape": [5, 3, 3, 3], "rule": "", "done": 5, "damage": {}}')
    (folder / "tiny.partial.facts").write_bytes(bytes(120))
    assert torch.equal(open_table(source).images, IMAGES)


def test_a_source_that_has_changed_is_read_again_where_asked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    stamp = ["one"]
    counted = Counted()
    source = dataclasses.replace(counted.source, stamp=lambda: stamp[0])
    open_table(source, fresh=True)
    open_table(source, fresh=True)
    assert counted.built == 1
    stamp[0] = "two"
    open_table(source)
    assert counted.built == 1, "a trial does not ask"
    with caplog.at_level(logging.WARNING):
        open_table(source, fresh=True)
    assert counted.built == 2
    assert "is of before the data set changed" in caplog.text
    open_table(source, fresh=True)
    assert counted.built == 2


def test_an_unreadable_source_is_not_the_folders_fault() -> None:
    def missing() -> RawTable:
        raise FileNotFoundError(2, "No such file or directory", "/data/image.png")

    with pytest.raises(ValueError, match=r"^data set tiny: .*No such file or directory: '/data/image.png'$"):
        open_table(dataclasses.replace(Counted().source, build=missing))


def test_a_source_that_gives_too_few_images_is_a_defect() -> None:
    raw = RawTable((6, 3, 3, 3), lambda rows: iter([Block(IMAGES)]), 3)
    with pytest.raises(RuntimeError, match="gave 5 images of 6"):
        open_table(dataclasses.replace(Counted().source, build=lambda: raw))


FRUGAL = """
import resource, sys, torch
from data.cache import open_table
from data.readers.base import Block
from data.sources import RawTable, Source

def blocks(rows):
    for row in range(rows[0], 4096, 64):
        yield Block(torch.full((64, 3, 128, 128), row % 256, dtype=torch.uint8))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_table(Source("large", "large", lambda: RawTable((4096, 3, 128, 128), blocks, 2), defaults={}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_build_needs_memory_for_its_blocks_only() -> None:
    done = subprocess.run([sys.executable, "-c", FRUGAL], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 2**20, "of 201 million bytes of images"


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
    with pytest.raises(ValueError, match=r"^unknown data set 'x'; known are digits, folder, manifest, "):
        find_source("x")


def test_a_table_larger_than_the_memory_is_mapped(folder: Path) -> None:
    """A sparse file of a terabyte, which Linux refuses to reserve memory for."""
    path = folder / "huge"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert len(table_file.mapped(path)) == 2**40


def test_a_table_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Counted().source
    open_table(source)

    def refused(*_: object) -> torch.Tensor:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(table_file, "mapped", refused)
    with pytest.raises(ValueError, match=r"cannot be used \(Permission denied\); set NOISY_LABEL_CACHE"):
        open_table(source)
