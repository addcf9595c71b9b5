"""The append-only files under every kill and every full disk, and Optuna's own reader beside ours."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.sweeps import in_child
from tune.store import journal
from tune.store.journal import DamagedFile, Journal, LineFile

RECORDS: list[dict[str, Any]] = [{"n": 0}, {"n": 1, "text": 'ü\n"{'}, {"n": 2, "list": [1.5, None, True]}]


def lines(path: Path) -> list[dict[str, Any]]:
    """The file, read afresh."""
    return list(LineFile(path).read())


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    file = LineFile(path)
    for record in records:
        file.append([record])
    return path.read_bytes()


class FullDisk:
    """``os.write`` that takes ``room`` more bytes and then raises, as a full disk does: what fits is written first."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, descriptor: int, data: bytes) -> int:
        taken = min(self.room, len(data))
        self.room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return REAL_WRITE(descriptor, data[:taken])


REAL_WRITE = os.write


# -- a file of lines --------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert lines(path) == []
    assert not path.exists()
    content = write(path)
    assert [json.loads(line) for line in content.decode().splitlines()] == RECORDS == lines(path)


def test_a_reader_gets_each_record_once(tmp_path: Path) -> None:
    reader, writer = LineFile(tmp_path / "file"), LineFile(tmp_path / "file")
    for record in RECORDS:
        writer.append([record])
        assert list(reader.read()) == [record]
        assert list(reader.read()) == []
    writer.append(RECORDS)
    assert list(reader.read()) == RECORDS
    assert reader.line == 6


def test_every_cut_of_the_last_record_loses_that_record_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = write(path)
    start = content[:-1].rfind(b"\n") + 1
    for cut in range(start, len(content)):
        path.write_bytes(content[:cut])
        assert lines(path) == RECORDS[:-1], cut
        assert path.read_bytes() == content[:cut], "reading changed the file"
        writer = LineFile(path)
        writer.append([{"n": "a"}])
        writer.append([{"n": "b"}])
        assert lines(path) == [*RECORDS[:-1], {"n": "a"}, {"n": "b"}], cut
        assert path.read_bytes().startswith(content[:start])


def test_a_torn_tail_longer_than_one_look_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = write(path)
    path.write_bytes(content + b"x" * (2 * journal.TAIL + 17))
    LineFile(path).append([{"n": 3}])
    assert lines(path) == [*RECORDS, {"n": 3}]
    path.write_bytes(b"x" * (journal.TAIL + 1))  # not one whole record
    LineFile(path).append([{"n": 0}])
    assert lines(path) == [{"n": 0}]


@pytest.mark.parametrize("room", [0, 1, 7, 20, 33, 34, 35, 50])
def test_a_full_disk_takes_nothing_and_a_freed_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = tmp_path / "file"
    content = write(path)
    file = LineFile(path)
    reader = LineFile(path)
    assert list(reader.read()) == RECORDS
    record = {"n": 3, "text": "thirty-four bytes"}
    assert len(json.dumps(record, separators=(",", ":"))) + 1 == 35
    monkeypatch.setattr(os, "write", FullDisk(room))
    with pytest.raises(OSError, match="No space left"):
        file.append([record, {"n": 4, "text": "and some more of it"}])
    assert path.read_bytes() == content
    monkeypatch.undo()
    file.append([{"n": 5}])
    file.append([{"n": 6}])
    assert lines(path) == [*RECORDS, {"n": 5}, {"n": 6}]
    assert list(reader.read()) == [{"n": 5}, {"n": 6}]


def test_a_record_that_was_not_made_durable_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    content = write(path)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        LineFile(path).append([{"n": 3}])
    assert path.read_bytes() == content


def test_a_write_in_small_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: REAL_WRITE(descriptor, data[:3]))
    write(tmp_path / "file")
    assert lines(tmp_path / "file") == RECORDS


def test_a_reader_never_sees_what_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing write of two records stands for a moment with the first of them whole."""
    path = tmp_path / "file"
    write(path)
    reader = LineFile(path)
    seen: list[dict[str, Any]] = []

    def half_and_look(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return REAL_WRITE(descriptor, data[:-5])
        child = os.fork()  # a reader in another process, so that it cannot wait for itself
        if child == 0:
            signal.alarm(1)
            os._exit(len(list(reader.read())))
        seen.append({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", half_and_look)
    with pytest.raises(OSError, match="full"):
        LineFile(path).append([{"n": 3}, {"n": 4}])
    assert seen in ([{"code": len(RECORDS)}], [{"code": -signal.SIGALRM}])  # what is there for good, or it waits


@pytest.mark.parametrize("damage", [b'{"n":1,', b"\xff\xfe{}", b"[1]", b"", b'{"n":1}{"n":2}', b"\0\0\0\0"])
def test_damage_in_the_middle_is_named_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "file"
    parts = write(path).splitlines(keepends=True)
    parts[1] = damage + b"\n"
    path.write_bytes(b"".join(parts))
    file = LineFile(path)
    before: list[dict[str, Any]] = []
    with pytest.raises(DamagedFile) as caught:
        before.extend(file.read())
    assert before == RECORDS[:1]
    assert str(caught.value) == f"{path}: line 2 is damaged; the file was left as it is"
    assert path.read_bytes() == b"".join(parts)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.just("reopen"), st.integers(0, 40), st.tuples(st.integers(0, 30))), max_size=12))
def test_any_mixture_of_writes_tears_and_full_disks(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Beside a list: a number writes a record of that length, ``(k,)`` fails after k bytes, ``reopen`` follows a torn write."""
    path = tmp_path_factory.mktemp("mixture") / "file"
    file, model = LineFile(path, fsync=False), []
    for number, step in enumerate(steps):
        record = {"n": number, "text": "x" * (step if isinstance(step, int) else 9)}
        if step == "reopen":
            with path.open("ab") as torn:
                torn.write(json.dumps(record).encode()[: number + 1])
            file = LineFile(path, fsync=False)
        elif isinstance(step, tuple):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "write", FullDisk(*step))
                try:
                    file.append([record])
                    model.append(record)
                except OSError:
                    pass
        else:
            file.append([record])
            model.append(record)
        assert lines(path) == model


# -- several processes ------------------------------------------------------------------------------------------------


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def many(who: int) -> None:
        file = LineFile(path, fsync=False)
        for n in range(150):
            file.append([{"who": who, "n": n, "text": "x" * (7 * n)}, {"who": who, "n": n, "half": 2}])

    children = []
    for who in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                many(who)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    reader, seen = LineFile(path), []
    while children:
        seen += list(reader.read())
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert status == 0
            children.pop(0)
    seen += list(reader.read())
    assert seen == lines(path)
    for who in range(3):
        own = [record for record in seen if record["who"] == who]
        assert [record["n"] for record in own] == [n for n in range(150) for _ in range(2)]
        assert all("text" in first and "half" in second for first, second in zip(own[::2], own[1::2], strict=True))


HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_APPEND)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b'{"n":"torn"')
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path)
    holder = subprocess.Popen([sys.executable, "-S", "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with path.open("ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    began = time.monotonic()
    LineFile(path).append([{"n": 3}])
    assert time.monotonic() - began < 2
    holder.wait()
    holder.stdout.close()
    assert lines(path) == [*RECORDS, {"n": 3}]


def test_a_writer_waits_for_one_that_lives(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def impatient() -> None:
            signal.alarm(1)
            LineFile(path).append([{"n": 3}])

        assert in_child(impatient) == -signal.SIGALRM
    assert lines(path) == RECORDS


# -- Optuna on top ----------------------------------------------------------------------------------------------------


def drive(storage: Any) -> optuna.Study:
    """Everything that a sweep asks of a study: enqueued trials, attributes, values by step, and each way to end."""
    study = optuna.create_study(
        storage=storage, study_name="sweep", direction="maximize", sampler=optuna.samplers.RandomSampler(seed=3)
    )
    study.enqueue_trial({"lr": 0.05, "kind": "b"}, user_attrs={"source": 7})
    for number in range(7):
        trial = study.ask()
        lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
        trial.suggest_categorical("kind", ["a", "b", "c"])
        trial.suggest_int("size", 2, 64)
        for step in range(1, 4):
            storage.set_trial_intermediate_value(trial._trial_id, step, lr * step)
        storage.set_trial_user_attr(trial._trial_id, "summary", {"epochs": 3, "error": 'Traceback\n  "ü"'})
        if number < 4:
            study.tell(number, lr * 3)
        elif number < 6:
            study.tell(number, state=(TrialState.PRUNED, TrialState.FAIL)[number - 4])
    return study


def content(study: optuna.Study) -> list[Any]:
    return [
        (t.number, t.state, t.params, t.distributions, t.values, t.intermediate_values, t.user_attrs, t.system_attrs)
        for t in study.get_trials(deepcopy=False)
    ]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a study that was driven through our file."""
    path = tmp_path_factory.mktemp("driven") / "journal.log"
    drive(JournalStorage(Journal(LineFile(path))))
    return path


def loaded(backend: Any) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=JournalStorage(backend))


def test_a_study_in_our_file_is_the_same_as_in_memory(driven: Path) -> None:
    in_memory = drive(InMemoryStorage())
    assert content(loaded(Journal(LineFile(driven)))) == content(in_memory)
    assert len(in_memory.trials) == 7


def test_optunas_own_reader_sees_the_same_study(driven: Path) -> None:
    theirs, ours = loaded(JournalFileBackend(str(driven))), loaded(Journal(LineFile(driven)))
    assert content(theirs) == content(ours)
    dates = [[(t.datetime_start, t.datetime_complete) for t in study.trials] for study in (theirs, ours)]
    assert dates[0] == dates[1]


def test_optunas_own_writer_goes_on_in_our_file(driven: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(driven.read_bytes())
    theirs = loaded(JournalFileBackend(str(path)))
    theirs.tell(theirs.ask().number, 0.5)
    ours = loaded(Journal(LineFile(path)))
    ours.tell(ours.ask().number, 0.75)
    assert [t.value for t in loaded(JournalFileBackend(str(path))).trials[7:]] == [0.5, 0.75]


def test_two_processes_on_one_study_see_each_other(driven: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(driven.read_bytes())
    first, second = loaded(Journal(LineFile(path))), loaded(Journal(LineFile(path)))
    assert first.ask().number == 7
    assert second.ask().number == 8
    first.tell(8, 0.25)
    assert second.trials[8].value == 0.25


def test_after_every_torn_record_the_study_goes_on(driven: Path, tmp_path: Path) -> None:
    """Resume, two further writes and a second resume; only the torn record is missing."""
    whole = driven.read_bytes().splitlines(keepends=True)
    path = tmp_path / "journal.log"
    for number in range(1, len(whole)):
        path.write_bytes(b"".join(whole[:number]) + whole[number][: len(whole[number]) // 2])
        study = loaded(Journal(LineFile(path)))
        before = content(study)
        asked = study.ask()
        if asked.number == len(before):  # not the enqueued one
            asked.suggest_float("lr", 1e-3, 1.0, log=True)
        after = content(loaded(Journal(LineFile(path))))
        assert len(after) == max(len(before), asked.number + 1)
        assert after[: asked.number] == before[: asked.number]
        assert [line + b"\n" for line in path.read_bytes().splitlines()][:number] == whole[:number]
        assert content(loaded(JournalFileBackend(str(path)))) == after


@pytest.mark.parametrize("room", [0, 30, 90])
def test_a_disk_that_was_full_and_is_free_again(
    driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """In the same process, as Optuna's own backend fails to."""
    path = tmp_path / "journal.log"
    path.write_bytes(driven.read_bytes())
    study = loaded(Journal(LineFile(path)))
    before = content(study)
    monkeypatch.setattr(os, "write", FullDisk(room))
    with pytest.raises(OSError, match="No space left"):
        study.ask()
    monkeypatch.undo()
    assert content(study) == before
    assert study.ask().number == 7
    study.tell(7, 0.5)
    assert content(loaded(Journal(LineFile(path)))) == content(study)
    assert content(loaded(JournalFileBackend(str(path)))) == content(study)


def test_what_belongs_together_is_one_write_or_none(driven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several values of a trial with one durable write; where it fails, Optuna has none of them, either."""
    path = tmp_path / "journal.log"
    path.write_bytes(driven.read_bytes())
    backend = Journal(LineFile(path))
    study = loaded(backend)
    trial, synced = study.ask(), 0

    def count(descriptor: int) -> None:
        nonlocal synced
        synced += 1

    monkeypatch.setattr(os, "fsync", count)
    with backend.at_once():
        for epoch in (1, 2, 3):
            trial.report(epoch / 4, epoch)
        assert loaded(Journal(LineFile(path))).trials[trial.number].intermediate_values == {}
    assert synced == 1
    values = {1: 0.25, 2: 0.5, 3: 0.75}
    assert study.trials[trial.number].intermediate_values == values
    assert loaded(JournalFileBackend(str(path))).trials[trial.number].intermediate_values == values

    def report(*epochs: int, broken: bool = False) -> None:
        with backend.at_once():
            for epoch in epochs:
                study._storage.set_trial_intermediate_value(trial._trial_id, epoch, 1.0)
            if broken:
                raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        report(4, broken=True)
    monkeypatch.setattr(os, "write", FullDisk(150))  # room for one of the two
    with pytest.raises(OSError, match="No space left"):
        report(4, 5)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert study.trials[trial.number].intermediate_values == values
    study.tell(trial.number, 0.5)
    assert content(loaded(Journal(LineFile(path)))) == content(study)


def test_a_pickled_storage_reads_the_file_again(driven: Path) -> None:
    backend: Callable[[int], Any] = Journal(LineFile(driven)).read_logs
    first = list(backend(0))
    assert list(backend(len(first))) == []
    assert list(backend(2)) == first[2:]
    assert list(backend(0)) == first
