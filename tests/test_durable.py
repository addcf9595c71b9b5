"""Files that are written whole under every kill and full disk, and locks that no dead process holds."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

from data.durable import LocksUnsupported, lock, lock_path, unlock, write_whole
from tests.sweeps import in_child

HOLD = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.{}); print('locked', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("content", ["ü\n", b"\xff\0", memoryview(b"view"), ""])
def test_a_file_holds_what_was_written(content: str | bytes | memoryview, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for before in (None, "something longer than that"):
        if before:
            path.write_text(before)
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("num_syncs", [1, 2])
def test_a_kill_leaves_the_old_content_or_the_new(num_syncs: int, private: bool, tmp_path: Path) -> None:
    """Half of the new content is on the disk at the first; at the second the folder is synced, so the name is durable, too."""
    path = tmp_path / "file"
    write_whole(path, "old", private=private)

    def die() -> None:
        synced: list[bool] = []

        def fsync(descriptor: int) -> None:
            synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
            if len(synced) == num_syncs:
                assert synced == [False, True][:num_syncs]
                if num_syncs == 1:
                    os.ftruncate(descriptor, 1)
                os._exit(9)

        os.fsync = fsync
        write_whole(path, "new", private=private)

    assert in_child(die) == 9
    assert path.read_text() == ("old" if num_syncs == 1 else "new")
    leftovers = [other for other in tmp_path.iterdir() if other != path]
    assert len(leftovers) == (num_syncs == 1)
    write_whole(path, "newest", private=private)
    assert path.read_text() == "newest"
    assert [other for other in tmp_path.iterdir() if other != path] == (leftovers if private else [])


def test_writers_of_one_path_have_a_file_each(tmp_path: Path) -> None:
    path, inside = tmp_path / "file", []

    def check(temporary: Path) -> None:
        inside.append(temporary.read_text())
        assert in_child(lambda: write_whole(path, "another's", private=True)) == 0
        assert path.read_text() == "another's"
        assert temporary.read_text() == "ours"

    write_whole(path, "ours", check=check, private=True)
    assert inside == ["ours"]
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_a_check_is_not_kept(tmp_path: Path) -> None:
    def check(temporary: Path) -> NoReturn:
        raise ValueError(temporary.read_text())

    write_whole(tmp_path / "file", "old")
    with pytest.raises(ValueError, match=r"^new$"):
        write_whole(tmp_path / "file", "new", check=check)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
        try:
            write_whole(tmp_path / "file", "x" * 10_000)
        except OSError:
            os._exit(7)

    assert in_child(write) == 7
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("number", "is_harmless"), [(errno.EINVAL, True), (errno.EBADF, True), (errno.EIO, False)])
def test_file_systems_that_sync_no_folders(
    number: int, is_harmless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if is_harmless:
        write_whole(tmp_path / "file", "new")
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


# -- locks ------------------------------------------------------------------------------------------------------------


def hold(path: Path, kind: str) -> subprocess.Popen[str]:
    """Another process, which has the lock of that kind until its input ends or it dies."""
    command = [sys.executable, "-c", HOLD.format(kind), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("patience", [0, 0.1])
def test_a_lock_of_another_process(shared: bool, patience: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    other = hold(path, "LOCK_EX")
    with path.open() as file:
        assert not lock(file, shared=shared, patience=patience)
        other.kill()
        other.wait()
        assert lock(file, shared=shared, patience=0), "a dead process holds nothing"


def test_shared_locks_exclude_only_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    other = hold(path, "LOCK_SH")
    with path.open() as file:
        assert not lock(file, patience=0)
        assert lock(file.fileno(), shared=True, patience=0)
        other.communicate("")
        assert lock(file, patience=0)
        with path.open() as again:
            assert not lock(again, patience=0)
            unlock(file)
            assert lock(again, patience=0)


def test_a_lock_without_patience_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the warning the other process is told to let go, so the order of events is sure."""
    path = tmp_path / "file"
    path.write_text("a note")
    other = hold(path, "LOCK_EX")

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            other.communicate("")

    handler = Release()
    logging.getLogger("data.durable").addHandler(handler)
    try:
        with lock_path(path, "another process builds it"), path.open() as file:
            assert not lock(file, patience=0)
    finally:
        logging.getLogger("data.durable").removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] == ["another process builds it; waiting for it"]
    assert path.read_text() == "a note"
    with lock_path(tmp_path / "new", "nobody"):
        assert (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: IO[Any], how: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match=os.strerror(number)) as raised:
        lock(file)
    assert isinstance(raised.value, LocksUnsupported) == (number != errno.EIO)
    assert raised.value.errno == number
