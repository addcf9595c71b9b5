"""Sweeps without Ray: a folder with a spec and a journal, trials whose epochs are made up, and what a kill does to a file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psycopg
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from hparams import Value
from tests.postgres import dumped
from training.locations import check_writable
from training.trial_run import EpochRecord
from tune.search.coordinator import FINISHED, Coordinator
from tune.search.ledger import Ledger, Record
from tune.spec import make_spec
from tune.store.base import SweepStore
from tune.store.folder import FolderStore
from tune.store.locate import as_store
from tune.store.stored_sweep import Sweep

CREATED = 1_700_000_000.25


def new_storage(folder: Path, migrated_store: Path) -> Path:
    """A storage folder with an MLflow store in it, which a launch would take seconds to make."""
    folder.mkdir()
    shutil.copy(migrated_store, folder / "mlflow.db")
    return folder


def make_sweep(store: Path | SweepStore, name: str = "first", *, defaults_first: bool = False, **fields: Any) -> Sweep:
    """A sweep as ``launch`` leaves it: spec and study are kept, no trial has run. ``fields`` are those of the spec."""
    store = as_store(store)
    check_writable(store.storage)
    spec = make_spec({"method": ("ce",), "model": "mlp", "trials": 4, "epochs": 4, "sampler": "random", **fields})
    provenance = {
        "id": f"{name}-0123456789abcdef",
        "created": CREATED,
        "data": "0" * 64,
        "commit": "unknown",
    } | store.provenance
    with store.create(name) as (folder, files):
        sweep = Sweep(folder, spec, provenance, files)
        ledger = Ledger(sweep, create=True)
        if defaults_first:
            for method in spec.method:
                ledger.enqueue(ledger.space.defaults(method, spec)[0])
        sweep.write()
    return Sweep(store.folder(name, provenance), spec, provenance, store.files(name))


def epoch_record(epoch: int, objective: float, **metrics: float) -> EpochRecord:
    """An epoch whose time and metrics follow from its number and objective."""
    held = {"train/loss": 2.0 / epoch, "val/accuracy": objective, "seconds": 0.5, **metrics}
    return EpochRecord(epoch, CREATED + 60 * epoch + objective, objective, held)


def made_up(values: dict[str, Value], epoch: int) -> float:
    """A trial's value: a pure function of its parameters and the epoch, so that it must survive any kill."""
    spread = sum((i + 1) * float(value) for i, value in enumerate(values.values()) if isinstance(value, (int, float)))
    return round((0.3 + spread) % 0.5 + 0.1 * epoch / (epoch + 1), 6)


def play(
    coordinator: Coordinator,
    value: Callable[[Record, int], float] = lambda record, epoch: made_up(record.values, epoch),
    *,
    keep: Iterable[int] = (),
) -> None:
    """Runs what a coordinator hands out, one epoch of each live trial in turn, until the budget is spent; writes a file as each
    trial's checkpoint. Trials in ``keep`` are left running after their first epoch."""
    slots = iter(range(10**6))
    held = set()
    while True:
        while (record := coordinator.next(f"slot-{next(slots)}")) not in (None, FINISHED):
            folder = coordinator.ledger.checkpoints / str(record.number)  # type: ignore[union-attr]
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
            (folder / "checkpoint.pt").write_bytes(b"state")
        moving = {key: live for key, live in coordinator.live.items() if live.number not in held}
        if not moving:
            return
        for key, live in moving.items():
            epoch = live.epochs + 1
            if not coordinator.result(key, [epoch_record(epoch, value(live, epoch))], failure=None, diverged=False):
                coordinator.released(key)
            elif live.number in keep:
                held.add(live.number)


def metric_lines(sweep: Sweep) -> list[dict[str, Any]]:
    """All of ``metrics.jsonl``, read without the code under test."""
    path = sweep.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kept_lines(sweep: Sweep, name: str) -> list[bytes]:
    """The whole lines of a file of lines, in a folder or a database, read without the code under test."""
    if isinstance(sweep.files.store, FolderStore):
        path = sweep.folder / name
        content = path.read_bytes() if path.exists() else b""
        return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    query = "select line from noisy_label_lines where sweep = %s and file = %s order by number"
    with psycopg.connect(sweep.files.store.url) as connection:
        return [row[0].encode() + b"\n" for row in connection.execute(query, [sweep.name, name])]


def stored_trials(sweep: Sweep, study: str = "sweep") -> list[FrozenTrial]:
    """A study as Optuna's own backend reads it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(kept_lines(sweep, "journal.log")))
        file.flush()
        storage = optuna.storages.JournalStorage(JournalFileBackend(file.name))
        return optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)


def everything(sweep: Sweep) -> tuple[Any, ...]:
    """All that is kept of a sweep, to see whether something changed."""
    store = sweep.files.store
    files = bytes_below(sweep.folder) if isinstance(sweep.folder, Path) else {}
    return files, *([] if isinstance(store, FolderStore) else dumped(store.url))


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def files_with(text: str, *folders: Path) -> list[Path]:
    """Every file below the folders that holds the text, whatever kind of file it is, as far as it is still there."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes():
                found.append(path)
    return found


def in_child(work: Callable[[], object]) -> int:
    """Runs ``work`` in a forked process and returns its exit code: what it passed to ``os._exit``, 0 at its end, 1 for an
    exception, minus the number of the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
