"""Drivers, workers, nodes and the MLflow server killed at random moments of one sweep, which is resumed each time.

Then everything is compared with what nobody disturbed: each trial's recipe, trained again in this process from its first epoch.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from tests.faulty_sweep import FAULTY
from tests.ray_nodes import RayNodes
from tests.sweep_process import (
    PATIENCE,
    RAYS_SECONDS,
    assert_ended,
    assert_nothing_left,
    assert_projected,
    assert_whole,
    board,
    end_all,
    family,
    metric_lines,
    search,
    start,
    still_there,
)
from tests.sweeps import new_storage, stored_trials
from training import checkpoint
from training.trial_run import TrialRun
from tune.report.leaderboard import noted_runs
from tune.search.ledger import Ledger
from tune.search.recipes import of_trial
from tune.store.stored_sweep import Sweep

SPEC = {"trials": 5000, "epochs": 24, "checkpoint_seconds": 0.5, "report_seconds": 0.2, "reduction_factor": 2}  # never ends
EPOCH_SECONDS = 0.1  # by which its epochs are slowed down: kills are rare, and each is trained again at the end
NUM_NODES = 2  # of one trial each, where the sweep runs on a cluster
MARK = "NOISY_LABEL_CHAOS"  # in the environment of every process that a driver or the cluster starts
TIMED = {"seconds", "samples_per_second"}  # metrics that no replay repeats
OURS_SECONDS = 10  # after the end of the sweep or of its driver, until no process is left in which trials ran
AGAIN_SECONDS = 12  # in which a driver starts, and is killed again before it has got ahead


class Server:
    """A real MLflow server on this machine, over a database that outlives it."""

    def __init__(self, storage: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{storage / 'mlflow.db'}"]
        self.command += ["--artifacts-destination", str(storage / "mlartifacts")]
        self.environment = {key: value for key, value in os.environ.items() if key != MARK}
        self.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """In a session of its own, so that its children end with it."""
        with open(os.devnull, "w") as nowhere:
            self.process = subprocess.Popen(
                self.command, stdout=nowhere, stderr=nowhere, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while wait and not self.answers():
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass
class Chaos:
    """One sweep, its driver, and what was done to it."""

    storage: Path
    log: Path
    server: Server
    stream: random.Random
    mark: str
    nodes: RayNodes | None
    again: bool  # whether half of the drivers that are resumed are killed at any moment of their start
    driver: subprocess.Popen[str] | None = None
    started: set[psutil.Process] = field(default_factory=set)  # what drivers and the cluster have started
    hits: Counter[str] = field(default_factory=Counter)  # kills of a worker or a node by which a trial lost its process
    repeated: int = 0  # epochs that stood in the metrics, but in no checkpoint, when their process was killed
    seconds_lost: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # until an epoch is recorded again

    @property
    def folder(self) -> Path:
        return self.storage / "chaos"

    def run(self, *arguments: object) -> None:
        self.driver = start(self.log, *arguments, "--storage", self.storage)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits while the driver runs. Where Ray did not come up in time, on a busy machine, the sweep is resumed."""
        assert self.driver
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.driver.poll() == 1 and "Ray did not start" in self.log.read_text():
                self.run("resume", "chaos")
                deadline = time.monotonic() + PATIENCE
            assert self.driver.poll() is None, f"the driver ended with {self.driver.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def epochs_more(self, number: int) -> Callable[[], bool]:
        goal = len(metric_lines(self.folder)) + number
        return lambda: len(metric_lines(self.folder)) >= goal

    def recorded(self) -> Counter[int]:
        """By trial, how many epochs are recorded."""
        return Counter(line["trial"] for line in metric_lines(self.folder))

    def behind(self) -> Counter[int]:
        """By running trial, the epochs that are recorded, but not yet in its checkpoint."""
        recorded, missing = self.recorded(), Counter[int]()
        for row in board(self.storage, "chaos"):
            if row["state"] == "running":
                path = self.folder / "checkpoints" / str(row["trial"]) / "checkpoint.pt"
                saved = len(checkpoint.load(path)["history"]) if path.exists() else 0
                missing[row["trial"]] = max(0, recorded[row["trial"]] - saved)
        return missing

    def lost(self) -> list[int]:
        """Trials of which the driver has said that they lost their process, in that order."""
        return [int(number) for number in re.findall(r"trial (\d+) \S* ?lost its process", self.log.read_text())]

    def look(self) -> None:
        """Notes what the driver and the cluster have started by now."""
        for process in (self.driver, self.nodes and self.nodes.process):
            if process:
                self.started |= family(process.pid)

    def stop(self) -> None:
        assert self.driver
        self.look()
        search("stop", "chaos", "--storage", self.storage)
        assert self.driver.wait(PATIENCE) == 143, self.log.read_text()

    def wait(self) -> None:
        """Until the driver has ended well."""
        assert self.driver
        deadline = time.monotonic() + PATIENCE * 4
        while self.driver.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()
            self.look()
            time.sleep(0.5)
        assert self.driver.returncode == 0, self.log.read_text()

    def kill(self, kind: str) -> None:
        """One kill, and what a user would do about it."""
        began = time.monotonic()
        if kind == "driver":
            self.kill_driver()
            if self.again and self.stream.random() < 0.5:
                kind = "driver, twice"
                time.sleep(self.stream.random() * AGAIN_SECONDS)
                self.kill_driver()
            self.until(self.epochs_more(1))
        elif kind == "server":
            self.server.kill()
        else:
            self.kill_a_trials(kind)
        self.seconds_lost[kind].append(time.monotonic() - began)

    def kill_driver(self) -> None:
        """And resume. The processes of its trials end by themselves meanwhile."""
        assert self.driver
        trials = trials_of(self.mark)
        self.look()
        self.driver.kill()
        self.driver.wait()
        deadline = time.monotonic() + OURS_SECONDS
        self.repeated += self.behind().total() if trials else 0
        self.run("resume", "chaos")
        assert_ended(trials, deadline)

    def kill_a_trials(self, kind: str) -> None:
        """Kills a process in which a trial runs, or the node that it runs on; until that trial has got ahead again."""
        trials: list[psutil.Process] = []
        self.until(lambda: trials.extend(trials_of(self.mark)) or bool(trials))
        behind, recorded, num_before, others = self.behind(), self.recorded(), len(self.lost()), self.epochs_more(10)
        if kind == "worker":
            with suppress(psutil.NoSuchProcess):  # it has ended just now
                self.stream.choice(trials).kill()
        else:
            assert self.nodes
            self.look()
            self.nodes.tell("preempt" if kind == "preempt" else "kill")
        self.until(lambda: len(self.lost()) > num_before or others())  # or no trial was there just then
        if self.nodes and kind != "worker":
            self.nodes.tell("add", 1)
        lost = self.lost()[num_before:]
        self.hits[kind] += bool(lost)
        for hit in lost:
            self.repeated += behind[hit]
            self.until(lambda: self.recorded()[hit] > recorded[hit])  # noqa: B023  called here


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name that every process which a driver of this test starts carries in its environment, beside what slows epochs."""
    name = uuid.uuid4().hex
    monkeypatch.setenv(MARK, name)
    monkeypatch.setenv("PYTHONPATH", str(FAULTY))
    monkeypatch.setenv("EPOCH_SECONDS", str(EPOCH_SECONDS))
    yield name
    end_all()


def marked(mark: str) -> list[psutil.Process]:
    """The drivers of this test, its cluster, and the processes that they have started, as far as their environment can be read:
    not that of Ray's agents."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def with_words(mark: str, *words: str) -> list[psutil.Process]:
    """Those whose command line holds one of the words."""
    found = []
    for process in marked(mark):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if any(word in line for word in words):
                found.append(process)
    return found


def trials_of(mark: str) -> list[psutil.Process]:
    """The processes in which trials run."""
    return with_words(mark, "Trainable")


def assert_gone(state: Chaos) -> None:
    """After a sweep, no process of ours some seconds later, and none of Ray's some minutes later. A cluster stays until it is
    ended, and may keep idle workers for whoever comes next."""
    of_a_worker = ("Trainable",) if state.nodes else ("ray::", "default_worker.py")
    began = time.monotonic()
    while left := with_words(state.mark, "search.py", *of_a_worker):
        assert time.monotonic() < began + OURS_SECONDS, left
        time.sleep(0.2)
    if state.nodes:
        state.look()
        state.nodes.end()
    assert len(state.started) > 4, "Ray's servers, agents and workers"
    while left := [*marked(state.mark), *still_there(state.started)]:
        assert time.monotonic() < began + RAYS_SECONDS, left
        time.sleep(0.2)


def assert_undisturbed(storage: Path, uri: str) -> None:
    """Each trial's recipe, trained here in one go, has the very metrics that were recorded through all kills; so have its
    objectives in the study and in MLflow."""
    from mlflow.tracking import MlflowClient

    ledger = Ledger(Sweep.find(storage, "chaos"), read_only=True)
    client, runs = MlflowClient(tracking_uri=uri), noted_runs(ledger)
    in_study = {trial.number: trial.intermediate_values for trial in stored_trials(ledger.sweep)}
    assert set(in_study) == set(ledger.records)
    recorded: dict[int, list[dict[str, object]]] = {}
    for line in metric_lines(storage / "chaos"):
        recorded.setdefault(line["trial"], []).append(line)
    for number, lines in recorded.items():
        experiment = TrialRun(of_trial(ledger, ledger.records[number]), rungs=ledger.sweep.spec.rungs())
        for line in lines:
            record = experiment.advance()
            assert (line["epoch"], line["objective"]) == (record.epoch, record.objective), number
            metrics = dict(line["metrics"])  # type: ignore[call-overload]
            assert {k: v for k, v in metrics.items() if k not in TIMED} == {
                k: v for k, v in record.metrics.items() if k not in TIMED
            }, (number, record.epoch)
        objectives = {record.epoch: record.objective for record in experiment.history}
        assert in_study.pop(number) == objectives, number
        points = client.get_metric_history(runs[number], "val/objective")
        assert sorted((point.step, point.value) for point in points) == sorted(objectives.items()), number
    assert not any(in_study.values()), "epochs of which there are no metrics"


def survive(tmp_path: Path, migrated_store: Path, mark: str, kills: list[str], *, seed: int, again: bool) -> Chaos:
    """A sweep through all its kills; then it is stopped, what it has begun is finished, and everything must hold. It is on a
    cluster where nodes are killed, else on this machine alone."""
    storage = new_storage(tmp_path / "runs", migrated_store)
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    server, stream = Server(storage), random.Random(seed)
    nodes = RayNodes(num_cpus=0) if {"node", "preempt"} & set(kills) else None
    try:
        server.start()
        where = ["--concurrent", 2]
        if nodes:
            where = ["--address", nodes.address]
            for _ in range(NUM_NODES):
                nodes.tell("add", 1)
        state = Chaos(storage, tmp_path / "log", server, stream, mark, nodes, again)
        state.run("launch", "chaos", "--spec", spec, "--tracking", server.uri, *where)
        state.until(lambda: state.folder.exists() and bool(metric_lines(state.folder)))
        for kind in kills:
            state.until(state.epochs_more(stream.randint(1, 6)))
            time.sleep(stream.random() / 5)
            if server.process is None:
                server.start(wait=False)  # back again when something else is killed
            state.kill(kind)
        if server.process is None:
            server.start()
        state.stop()
        trials = len(board(storage, "chaos"))
        state.run("resume", "chaos", "--trials", trials)
        state.wait()
        assert "View run" not in state.log.read_text(), "MLflow's client prints no address of a page for each run"
        assert_gone(state)
        rows = board(storage, "chaos")
        assert_whole(state.folder, rows, trials)
        assert_projected(storage, "chaos", rows, uri=server.uri)
        assert_nothing_left(storage, "chaos")
        assert_undisturbed(storage, server.uri)
    finally:
        server.kill()
        if nodes:
            nodes.end()
    return state


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, migrated_store: Path, mark: str) -> None:
    """One of each kind: minutes instead of the half hour of the next one. By itself each is caused in the default suite, too: a
    worker and a driver in ``test_sweep``, a node in ``test_cluster``, the server in ``test_tracking_server``."""
    kills = ["worker", "server", "node", "preempt", "driver"]
    state = survive(tmp_path, migrated_store, mark, kills, seed=0, again=False)
    assert state.hits.total() >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts",
    [{"driver": 8, "worker": 10, "server": 6}, {"driver": 6, "worker": 6, "node": 5, "preempt": 5, "server": 4}],
    ids=["one machine", "a cluster"],
)
def test_many_kills_at_random_moments(tmp_path: Path, migrated_store: Path, mark: str, counts: dict[str, int]) -> None:
    """Prints its figures: with ``-s`` they are seen."""
    kills = list(Counter(counts).elements())
    random.Random(1).shuffle(kills)
    state = survive(tmp_path, migrated_store, mark, kills, seed=1, again=True)
    for kind in ("worker", "node", "preempt"):
        assert state.hits[kind] >= counts.get(kind, 0) / 2, state.hits
    print(f"\nkills: {counts}, of which hit a trial: {dict(state.hits)}")
    num_trials = len(board(state.storage, "chaos"))
    print(f"{num_trials} trials; epochs recorded: {len(metric_lines(state.folder))}, repeated: {state.repeated}")
    for kind, seconds in state.seconds_lost.items():
        print(f"{kind}, {len(seconds)} times: {sum(seconds):.0f} s until the next epoch, {max(seconds):.0f} s at most")
