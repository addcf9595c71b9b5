"""A sweep's folder: made whole or not at all, and what a launch that was killed leaves."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from tests.sweeps import in_child, make_sweep
from tune.files import FolderHome
from tune.spec import Sweep


def left_by_a_killed_launch(storage: Path, name: str, minutes: float) -> Path:
    """The folder that it was making, last written to so many minutes ago."""

    def die() -> None:
        with FolderHome(storage).making(name):
            os._exit(9)

    before = set(storage.glob(".*"))
    assert in_child(die) == 9
    (left,) = set(storage.glob(".*")) - before
    written(left, minutes)
    return left


def written(folder: Path, minutes: float) -> None:
    os.utime(folder, (time.time() - 60 * minutes,) * 2)


def make(storage: Path, name: str) -> None:
    with FolderHome(storage).making(name) as (folder, _):
        (folder / "sweep.yaml").write_text("")


def test_a_second_launch_leaves_the_first_alone_however_long_that_takes(tmp_path: Path) -> None:
    with FolderHome(tmp_path).making("first") as (folder, _):
        assert isinstance(folder, Path)
        (folder / "journal.log").write_text("x")
        written(folder, 120)
        with contextlib.suppress(InterruptedError), FolderHome(tmp_path).making("first"):
            raise InterruptedError
        assert (folder / "journal.log").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first" / "journal.log").read_text() == "x"
    assert not FolderHome(tmp_path).files("first").running()


def test_what_killed_launches_left_goes(tmp_path: Path) -> None:
    """But for that of another name, and for what is so new that its lock may be about to be taken."""
    left = left_by_a_killed_launch(tmp_path, "first", 2)
    new = left_by_a_killed_launch(tmp_path, "first", 0)
    others = [left_by_a_killed_launch(tmp_path, name, 2) for name in ("first.x", "first.12345678")]
    unlocked = tmp_path / ".first.abcdefgh"
    unlocked.mkdir()
    written(unlocked, 2)
    make(tmp_path, "first")
    assert set(tmp_path.iterdir()) == {new, *others, tmp_path / "first"}
    assert left not in tmp_path.iterdir()


def test_a_name_that_was_taken_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sweep 'first' exists in "), FolderHome(tmp_path).making("first"):
        make_sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_folder_that_cannot_be_renamed_for_another_reason_is_not_said_to_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path, "first")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("identity", ["'*'", "../other", "a/b", "''", "[x]", "12", "a'b", '"a\\nb"', None])
def test_an_id_that_is_none_is_damage(tmp_path: Path, identity: str | None) -> None:
    """It becomes part of the name of a folder, and of a pattern by which such folders are removed."""
    sweep = make_sweep(tmp_path)
    record = sweep.folder / "sweep.yaml"
    lines = [line for line in record.read_text().splitlines() if not line.startswith("  id: ")]
    assert lines[-1].startswith("  ")
    record.write_text("\n".join([*lines, *([f"  id: {identity}"] if identity else [])]))
    with pytest.raises(ValueError, match=r"sweep\.yaml is damaged: "):
        Sweep.find(tmp_path, "first")
    record.write_text("\n".join([*lines, "  id: first-0123456789abcdef"]))
    assert Sweep.find(tmp_path, "first") == sweep
