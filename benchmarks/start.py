"""What the time before a sweep's first epoch is made of: ``python -m benchmarks.start [REPEATS]``.

Each repeat launches a sweep of one trial on digits in a process of its own, in a temporary storage, and prints the seconds from
one mark to the next. The mark "first epoch" is when the worker noted it, less the seconds that the epoch itself took.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKS = {
    "imports": "Python starts, the program is imported",
    "launch": "checks, data, MLflow's database, the sweep's folder",
    "ray": "Ray is imported and starts",
    "tune": "Tune is imported and makes its first proposal",
    "epoch": "a worker starts, imports the trainer and reads the data",
}


def marked(marks: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the time of its first end under ``name``."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        marks.setdefault(name, time.time())
        return result

    return call


def launch(storage: Path, started: float) -> None:
    """Launches a sweep of one trial and prints the seconds between the marks as JSON."""
    os.chdir(ROOT)
    marks: dict[str, float] = {"start": started}
    from tune import sweep
    from tune.cluster import executor
    from tune.search.coordinator import Coordinator
    from tune.spec import make_spec

    spec = make_spec({"method": ("ce",), "model": "mlp", "trials": 1, "epochs": 3})
    marks["imports"] = time.time()

    prepare, propose = executor._prepare, Coordinator.next
    executor._prepare = marked(marks, "launch", prepare)
    executor.connect = marked(marks, "ray", executor.connect)
    Coordinator.next = marked(marks, "tune", propose)  # type: ignore[method-assign]
    with contextlib.redirect_stdout(sys.stderr):
        sweep.launch("start", storage, spec)
    first = json.loads((storage / "start" / "metrics.jsonl").read_text().splitlines()[0])
    marks["epoch"] = first["time"] - first["metrics"]["seconds"]
    times = list(marks.values())
    print(json.dumps(dict(zip(MARKS, (b - a for a, b in itertools.pairwise(times)), strict=True))), flush=True)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "launch":
        from search import leave

        launch(Path(sys.argv[2]), float(sys.argv[3]))
        leave(0)
    rows = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.start", "launch", folder, str(time.time())]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    for name, meaning in MARKS.items():
        print(f"{statistics.median(row[name] for row in rows):6.1f} s  {meaning}   {[round(row[name], 1) for row in rows]}")
    totals = [sum(row.values()) for row in rows]
    print(f"{statistics.median(totals):6.1f} s  before the first epoch   {[round(total, 1) for total in totals]}")


if __name__ == "__main__":
    main()
