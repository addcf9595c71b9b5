"""One real sweep in which eight things go wrong, in the workers' processes: what tests of faults and of secrets look at."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from data.seeds import derive
from tests.sweep_process import PATIENCE, SEARCH
from tests.sweeps import files_with

FAULTY = Path(__file__).parent / "faulty"
SECRETS = ("PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRETS += ("RAY_AUTH_TOKEN",)


@dataclass
class FaultySweep:
    """A launch that goes through faults: ``struck`` holds trial, what and process; ``listening`` who listens where; ``leaks``
    the files that held a secret while it ran, ``scratch`` those that Tune had written by then."""

    folder: Path
    ray: Path
    secrets: dict[str, str]
    process: subprocess.Popen[str]
    listening: set[tuple[str, str]] = field(default_factory=set)
    leaks: set[Path] = field(default_factory=set)
    scratch: set[str] = field(default_factory=set)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def struck(self) -> list[tuple[int, str, int]]:
        path = self.folder / "struck"
        numbers = {str(seed_of(number)): number for number in range(100)}
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(numbers[seed], what, int(pid)) for seed, what, pid in lines]

    def look(self) -> None:
        """Notes where the driver and what it has started listen now, and which files hold a secret."""
        for process in self.family():
            try:
                listens = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                self.listening |= {(process.name(), ip) for ip in listens}
            except psutil.Error:  # it has just ended
                pass
        self.scratch |= {path.name for path in (self.folder / "tmp").rglob("*")}
        for secret in self.secrets.values():
            self.leaks.update(files_with(secret, self.folder, self.ray))

    def family(self) -> list[psutil.Process]:
        driver = psutil.Process(self.process.pid)
        return [driver, *driver.children(recursive=True)]


def seed_of(number: int) -> int:
    """A trial's seed, by which a fault finds it."""
    return derive("trial", 0, number)


@contextmanager
def faulty_sweep(folder: Path, store: Path, faults: dict[int, tuple[str, int, int]], **spec: Any) -> Iterator[FaultySweep]:
    """Launches a sweep in the background. ``faults``: by trial what strikes it, at the start of which epoch, how often. It has
    a folder of its own for Ray, one for temporary files, and secrets in its environment."""
    (folder / "runs").mkdir(parents=True)
    (folder / "tmp").mkdir()
    shutil.copy(store, folder / "runs" / "mlflow.db")
    (folder / "faults.json").write_text(json.dumps({str(seed_of(number)): fault for number, fault in faults.items()}))
    (folder / "spec.yaml").write_text(yaml.safe_dump({"method": "ce", "model": "mlp", "sampler": "random", **spec}))
    ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the sake of its sockets
    hidden = {name: secrets.token_hex(32) for name in SECRETS}
    places = {"RAY_TMPDIR": str(ray), "TMPDIR": str(folder / "tmp")}
    own = {"PYTHONPATH": str(FAULTY), "FAULTS": str(folder / "faults.json"), **places, **hidden}
    command = [*SEARCH, "launch", "faulty", "--storage", str(folder / "runs"), "--spec", str(folder / "spec.yaml")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=os.environ | own)
    try:
        yield FaultySweep(folder, ray, hidden, process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE)
        shutil.rmtree(ray, ignore_errors=True)


def wait_for(sweep: FaultySweep, condition: Any) -> None:
    """Waits for ``condition()`` while the sweep runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert sweep.process.poll() is None, f"the process ended with {sweep.process.returncode}:\n{sweep.said}"
        assert time.monotonic() < deadline, sweep.said
        time.sleep(0.1)
