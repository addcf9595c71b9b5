"""Ten thousand trials that cost nothing: what the driver, the ledger and the MLflow store cost as a sweep grows.

    python benchmarks/scale.py [--methods alr] [--marks 100,1000,10000] [--folder FOLDER] [--no-mlflow] [--out FILE.json]

The coordinator, the ledger on disk, the sampler, the display and the projection into MLflow are the real ones.
What is free is the training: a trial's epochs are made up, with the metrics of an ALR trial, and come in results as a trial
reports them, up to its next rung. Ray is left out: what its loop costs is in ``sweep_overhead.py``. Up to the last hundred
trials before a mark configurations are drawn at random, which is faster; over those hundred TPE proposes, and these stand at
the mark:

- the driver's time per result (recording, judging, ending a trial, the line on the screen) and per suggestion (proposal and
  what an actor needs), as processor time and as wall time, which on a shared machine and a slow disk is larger;
- one look of the tracker at the ledger per 100 trials, per trial; and a look that finds nothing new;
- the driver's memory, and the files and bytes in the storage;
- what opening the ledger costs, and the commands ``best`` and ``resume`` from start to end, in processes of their own. With
  nothing left to do, ``resume`` still opens the ledger and brings MLflow's parent run up to date, plots included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.grouping import objective  # noqa: E402  the checkout is not installed
from training.trial_run import EpochRecord  # noqa: E402
from tune.report.display import Display  # noqa: E402
from tune.report.projection import Projection  # noqa: E402
from tune.report.tracking import tracking_uri  # noqa: E402
from tune.search.coordinator import Coordinator  # noqa: E402
from tune.search.ledger import Ledger, Record  # noqa: E402
from tune.search.recipes import dataset as dataset_of  # noqa: E402
from tune.spec import make_spec  # noqa: E402
from tune.store.folder import FolderFiles  # noqa: E402
from tune.store.stored_sweep import Sweep  # noqa: E402

NAME, EPOCHS, SLOTS = "scale", 30, 8
SYNC_EACH = 100  # trials
WINDOW = 100  # trials before a mark over which times are taken
METRICS = [
    *("lr", "samples_per_second", "train/loss", "train/memorised", "train/prediction_changes"),
    *(f"refine/{name}" for name in ("accuracy", "auroc", "changed", "drift", "entropy", "given_mass", "hardened")),
    *(f"refine/{name}" for name in ("hardened_wrong", "precision", "recall")),
    *(f"refine/threshold_p{share}" for share in (10, 50, 90)),
]


class Watch:
    """Sums up wall and processor time of what is done under it."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[float, float]]] = {}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.taken.setdefault(what, []).append((time.perf_counter() - wall, time.process_time() - processor))

    def milliseconds(self, what: str) -> dict[str, float]:
        """Mean processor and median wall time of one."""
        walls, processors = zip(*self.taken[what], strict=True)
        return {"processor": 1000 * statistics.fmean(processors), "wall": 1000 * statistics.median(walls)}


class Free:
    """Trials that cost nothing: a value for each configuration and epoch, and the metrics that a real trial reports."""

    def __init__(self, ledger: Ledger) -> None:
        self.value = objective(ledger.space, 0)
        self.stream = random.Random(0)

    def epochs(self, record: Record, last: int) -> list[EpochRecord]:
        """What the trial reports when it has trained up to ``last``."""
        found = []
        for epoch in range(record.epochs + 1, last + 1):
            value = max(0.0, self.value(record.method, record.values) - 1 / (1 + epoch) + self.stream.gauss(0, 0.02))
            metrics = {name: self.stream.random() for name in METRICS} | {"val/accuracy": value, "seconds": 1.0}
            found.append(EpochRecord(epoch, time.time(), value, metrics))
        found[-1].metrics["test/accuracy"] = value
        return found


def grow(coordinator: Coordinator, free: Free, total: int, watch: Watch, projection: Projection | None) -> None:
    """Runs trials, slot by slot, until ``total`` have ended."""
    stops = [*coordinator.ledger.sweep.spec.rungs(), EPOCHS]
    coordinator.total = total
    num_given, synced = len(coordinator.ledger.records), coordinator.ledger.num_counted()
    while coordinator.ledger.num_counted() < total:
        while True:
            key = f"{num_given}"
            with watch("suggestion"):
                record = coordinator.next(key)
                if isinstance(record, Record):
                    json.dumps(coordinator.config(record))
            if not isinstance(record, Record):
                watch.taken["suggestion"].pop()
                break
            num_given += 1
        for key, record in list(coordinator.live.items()):
            report = free.epochs(record, next(stop for stop in stops if stop > record.epochs))
            folder = Path(str(coordinator.ledger.checkpoints)) / str(record.number)
            folder.mkdir(parents=True, exist_ok=True)  # a trial saves at its rungs
            (folder / "checkpoint.pt").write_bytes(b"state" * 1000)
            with watch("result"):
                if not coordinator.result(key, report, failure=None, diverged=False):
                    coordinator.released(key)
        if projection and (coordinator.ledger.num_counted() - synced >= SYNC_EACH or coordinator.ledger.num_counted() >= total):
            num_new, synced = coordinator.ledger.num_counted() - synced, coordinator.ledger.num_counted()
            with watch("tracker"):
                projection.sync()
            watch.taken["tracker"][-1] = tuple(taken / max(1, num_new) for taken in watch.taken["tracker"][-1])  # type: ignore[assignment]


def command(*words: str) -> dict[str, float]:
    """A command of ``search.py`` from start to end: seconds, and processor seconds."""
    with open(os.devnull, "w") as nowhere:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "search.py"), *words], stdout=nowhere)
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, words
    return {"wall": time.perf_counter() - began, "processor": used.ru_utime + used.ru_stime}


def contents(storage: Path) -> dict[str, Any]:
    """Files and bytes in the storage, and the bytes of those that grow."""
    files = [path for path in storage.rglob("*") if path.is_file()]
    folders = [path for path in storage.rglob("*") if path.is_dir()]
    grown = {name: storage / NAME / name for name in ("journal.log", "metrics.jsonl", "tracker.jsonl")}
    grown["mlflow.db"] = storage / "mlflow.db"
    return {
        "files": len(files),
        "folders": len(folders),
        "bytes": sum(path.stat().st_size for path in files),
        "checkpoint files": len(list((storage / NAME / "checkpoints").rglob("*.pt"))),
        **{name: path.stat().st_size for name, path in grown.items() if path.exists()},
    }


def at_mark(sweep: Sweep, number: int, watch: Watch, projection: Projection | None) -> dict[str, Any]:
    row: dict[str, Any] = {"trials": number, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if projection:
        with watch("idle"):
            projection.sync()
    row |= {what: watch.milliseconds(what) for what in watch.taken}
    row["storage"] = contents(Path(str(sweep.storage)))
    began = time.process_time()
    Ledger(sweep, read_only=True)
    row["reopened"] = time.process_time() - began
    place = ("--storage", str(sweep.storage))
    row["best"] = command("best", NAME, *place)
    if projection:
        row["resume"] = command("resume", NAME, *place)
    return row


def measured(options: argparse.Namespace, storage: Path) -> Iterator[dict[str, Any]]:
    marks = [int(mark) for mark in options.marks.split(",")]
    spec = make_spec({"method": tuple(options.methods.split(",")), "trials": marks[-1], "epochs": EPOCHS})
    provenance = {"id": uuid.uuid4().hex, "created": time.time(), "data": dataset_of(spec).fingerprint, "commit": "benchmark"}
    (storage / NAME).mkdir(parents=True)
    sweep = Sweep(storage / NAME, spec, provenance, FolderFiles(storage / NAME))
    sweep.write()
    ledger = Ledger(sweep, create=True)
    for method in spec.method:
        ledger.enqueue(ledger.space.defaults(method, spec)[0])
    projection = None if options.no_mlflow else Projection(ledger, tracking_uri(storage, ""))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), Display(ledger, marks[-1]) as display:
        coordinator = Coordinator(ledger, total=0, concurrent=SLOTS, on_event=display.event)
        free = Free(ledger)
        for mark in marks:
            ledger.sweep = dataclasses.replace(sweep, spec=dataclasses.replace(spec, sampler="random"))
            grow(coordinator, free, max(1, mark - WINDOW), Watch(), projection)
            ledger.sweep, watch = sweep, Watch()
            grow(coordinator, free, mark, watch, projection)
            dataclasses.replace(sweep, spec=make_spec({**vars(spec), "trials": mark})).write()
            yield at_mark(sweep, mark, watch, projection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="alr")
    parser.add_argument("--marks", default="100,1000,10000", help="numbers of trials at which to measure, ascending")
    parser.add_argument("--folder", help="where the storage is made and thrown away (default: the temporary folder)")
    parser.add_argument("--no-mlflow", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.folder) as storage:
        for row in measured(options, Path(storage)):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a column for each mark."""

    def times(row: dict[str, Any], what: str) -> str:
        return f"{row[what]['processor']:.1f} ({row[what]['wall']:.1f})" if what in row else "-"

    def megabytes(row: dict[str, Any], name: str) -> str:
        return f"{row['storage'][name] / 1e6:.1f}" if name in row["storage"] else "-"

    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "driver per result, ms of processor (wall)": lambda row: times(row, "result"),
        "driver per suggestion, ms": lambda row: times(row, "suggestion"),
        "tracker per trial, ms": lambda row: times(row, "tracker"),
        "tracker with nothing new, ms": lambda row: times(row, "idle"),
        "driver's memory at most, MB": lambda row: f"{row['memory']:.0f}",
        "`journal.log`, MB": lambda row: megabytes(row, "journal.log"),
        "`metrics.jsonl`, MB": lambda row: megabytes(row, "metrics.jsonl"),
        "`mlflow.db`, MB": lambda row: megabytes(row, "mlflow.db"),
        "files, folders in the storage": lambda row: f"{row['storage']['files']}, {row['storage']['folders']}",
        "ledger reopened, s of processor": lambda row: f"{row['reopened']:.2f}",
        "`best`, s of processor (wall)": lambda row: times(row, "best"),
        "`resume` with nothing left to do": lambda row: times(row, "resume"),
    }
    out = ["| | " + " | ".join(f"{row['trials']:,} trials" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    out += [f"| {name} | " + " | ".join(cell(row) for row in rows) + " |" for name, cell in lines.items()]
    return "\n".join(out)


if __name__ == "__main__":
    main()
