"""What fits on the nodes."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from tests.sweep_process import ROOT
from tests.sweeps import epoch_record, make_sweep
from tune.cluster import environment, executor
from tune.cluster.interruption import Interruption
from tune.cluster.nodes import SILENT_SECONDS, capacity, how_many
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger
from tune.spec import make_spec


@pytest.mark.parametrize(
    ("have", "need", "times"),
    [(1, 0.2, 5), (1, 0.1, 10), (2, 0.1, 20), (16, 1.6, 10), (1, 0.3, 3), (3, 2, 1), (1, 0.0001, 10_000), (0, 1, 0)],
)
def test_fractions_are_counted_as_ray_counts_them(have: float, need: float, times: int) -> None:
    assert how_many(have, need) == times


NODES = [
    {"NodeID": "a", "Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}},
    {"NodeID": "b", "Alive": True, "Resources": {"CPU": 4.0}},
    {"NodeID": "c", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("cpus", "gpus", "trials"),
    [(1, 0, 20), (2.5, 0, 7), (1, 0.2, 10), (1, 0.3, 6), (4, 0.2, 4), (1, 1, 2), (16, 0, 1)],
)
def test_capacity_of_living_nodes(cpus: float, gpus: float, trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    assert capacity(make_spec({"cpus_per_trial": cpus, "gpus_per_trial": gpus})) == trials


@pytest.mark.parametrize(("cpus", "gpus"), [(17, 0), (17, 0.5), (17, 1)])
def test_a_trial_that_no_node_holds(cpus: float, gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = NODES
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    with pytest.raises(
        ValueError, match=f"no node holds a trial of {cpus} CPUs and {gpus} GPUs; the largest have 16 CPUs and 2"
    ):
        capacity(make_spec({"cpus_per_trial": cpus, "gpus_per_trial": gpus}))


def test_a_ray_that_does_not_come_up_is_the_sweeps_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception. It is started once: what one start cannot do on a busy machine, three cannot either."""
    attempts = []

    def too_slow(**options: object) -> NoReturn:
        attempts.append(options["address"])
        raise Exception("The current node timed out\nduring startup.")  # as Ray raises it

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("ray.init", too_slow)
    sweep = make_sweep(tmp_path)
    coordinator = Coordinator(Ledger(sweep), total=4, concurrent=0)
    with Interruption(coordinator, sweep.folder / "stop") as interruption:
        executor.run(coordinator, sweep.spec, interruption, print)
    assert coordinator.problem == "Ray did not start: The current node timed out during startup."
    assert attempts == ["local"]


def test_no_garbage_is_collected_while_ray_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread it would end the process: what is collected refers to what is going."""
    collected = []
    monkeypatch.setattr("ray.shutdown", lambda: collected.append(gc.isenabled()))
    executor.shut_down()
    assert collected == [False]
    assert gc.isenabled()


def test_the_head_of_a_cluster_is_missed_when_it_is_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("tune.cluster.executor.time", now)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        why_died = executor.watch_head()
        now.monotonic = lambda: 1000.0
        assert why_died() == "", "it answers"
    for seconds, said in (
        (1000 + SILENT_SECONDS, ""),
        (1010 + SILENT_SECONDS, f"the head of the Ray cluster {address} does not"),
    ):
        now.monotonic = lambda: seconds  # noqa: B023  called here
        assert why_died().startswith(said)
        assert bool(why_died()) == bool(said)


def test_a_result_of_a_trial_that_was_given_up_is_not_taken(tmp_path: Path) -> None:
    """As of one whose process Ray says is gone."""
    coordinator = Coordinator(Ledger(make_sweep(tmp_path)), total=4, concurrent=1)
    coordinator.next("a")
    coordinator.lost("a")
    assert not coordinator.result("a", [epoch_record(1, 0.5)], failure=None, diverged=False)
    assert coordinator.ledger.records[0].epochs == 0


TOO_SLOW = """
import sys
from pathlib import Path
import psutil
from search import leave
from tests.sweeps import make_sweep
from tune.cluster import executor
from tune.cluster.interruption import Interruption
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger

executor._prepare()
from ray._private import services

def too_slow(*arguments):
    print(*sorted(child.name() for child in psutil.Process().children() if child.name() in executor.SERVERS))
    raise Exception("The current node timed out during startup.")

services.get_node = too_slow
sweep = make_sweep(Path(sys.argv[1]))
coordinator = Coordinator(Ledger(sweep), total=4, concurrent=0)
with Interruption(coordinator, sweep.folder / "stop") as interruption:
    executor.run(coordinator, sweep.spec, interruption, print)
_, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=20)
print(coordinator.problem, alive)
leave(0)
"""


def test_nothing_is_left_of_a_ray_that_did_not_come_up(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TOO_SLOW, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False)
    said = "Ray did not start: The current node timed out during startup."
    assert done.stdout == f"gcs_server raylet\n{said} []\n", done.stderr
    assert done.returncode == 0


BUSY = """
import sys
from search import leave
from tune.cluster import executor

executor._prepare()
executor.connect("")
import ray
print(int(ray.cluster_resources()["CPU"]) > 0)
executor.shut_down()
leave(0)
"""
NUM_BUSY = 10


@pytest.mark.slow
def test_ray_starts_on_a_busy_machine() -> None:
    """Ten processes at the normal priority want all of each processor."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(NUM_BUSY)]
    try:
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, cwd=ROOT, check=False)
            assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_dead_server_is_noticed(tmp_path: Path) -> None:
    """Also by a process that has not asked for its exit code; one that is there from before is none of ours."""
    executable = tmp_path / "raylet"
    executable.write_bytes(Path(shutil.which("sleep") or "").read_bytes())
    executable.chmod(0o755)
    other = subprocess.Popen(["sleep", "60"])
    own_ray = executor.OwnRay()
    server = subprocess.Popen([executable, "60"])
    assert own_ray.why_died() == ""
    server.kill()
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and waits to be asked
    assert own_ray.why_died() == "Ray on this machine has ended"
    server.wait()
    assert own_ray.why_died() == "Ray on this machine has ended"
    left = subprocess.Popen(["sleep", "60"])
    own_ray.kill()
    assert left.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_every_agent_gets_a_port_of_its_own() -> None:
    ports = environment.free_ports()
    assert len(set(ports.values())) == len(ports) == 4
    for port in ports.values():
        socket.create_server(("127.0.0.1", port)).close()


def test_a_preempted_node_costs_a_process_as_any_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune does not count it as a failure by itself: it would run the trial again beside the coordinator, which does so too."""
    from ray.exceptions import ActorDiedError
    from ray.tune.experiment import Trial

    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE", None)
    error = ActorDiedError()
    error._preempted = True
    assert error.preempted
    for prepared in (False, True):
        if prepared:
            executor._prepare()
        trial = Trial("x", stub=True)
        trial._handle_ray_actor_error(error)
        assert trial.should_recover() is not prepared


def test_what_tune_wrote_for_a_killed_driver_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only that: a copy of the sweep, which has the same id, may be running."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sweep = make_sweep(tmp_path / "runs")
    copied = dataclasses.replace(sweep, folder=tmp_path / "runs" / "copy")
    left, other = executor.own_folder(sweep), executor.own_folder(copied)
    new = executor.own_folder(sweep)
    assert not left.exists()
    assert other.is_dir()
    assert new.is_dir()
