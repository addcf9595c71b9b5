"""What goes wrong in a trial or under it, caused for real: docs/faults.md says what then happens, and which test causes it."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from optuna.trial import TrialState

from tests.faulty_sweep import FaultySweep, faulty_sweep, wait_for
from tests.sweep_process import PATIENCE, ROOT, epochs_by_trial, metric_lines
from tests.sweeps import epoch_record, make_sweep
from training.trial_run import EpochRecord, TrialRun
from training.watchdog import NOTE, Watchdog, allowed_seconds, last_words
from tune.cluster.trial import TrialActor, memory_fraction
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger, Record
from tune.search.recipes import of_trial
from tune.spec import MAX_LOST
from tune.store.stored_sweep import Sweep

# -- a trial that hangs -----------------------------------------------------------------------------------------------

HANGS = """
import re, sys, time
from pathlib import Path
from training.watchdog import Watchdog

def deep_in_c():
    re.match("(a+)+$", "a" * 64 + "b")  # holds the interpreter's lock, for longer than anybody waits

with Watchdog(Path(sys.argv[1])) as watchdog:
    for epoch in range(3):
        watchdog.expect(1.0)
        time.sleep(0.5)
    watchdog.expect(0.3)
    deep_in_c()
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_process_that_hangs_in_c_ends_and_says_where(tmp_path: Path) -> None:
    done = run(HANGS, tmp_path / "0")
    assert done.returncode == 1
    said = last_words(tmp_path / "0").splitlines()
    assert any("in deep_in_c" in line for line in said)
    assert said[-1] == "it hung: no epoch ended for 0:00:00.300000"
    assert list((tmp_path / "0").iterdir()) == []
    assert last_words(tmp_path / "0") == "", "it is told once"


def test_a_process_that_hangs_on_a_full_disk_ends_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(HANGS, tmp_path / "file" / "0")  # a folder that cannot be made
    assert done.returncode == 1
    assert "in deep_in_c" in done.stderr
    assert last_words(tmp_path / "file" / "0") == ""


WAITS = """
import sys, time
from pathlib import Path
from training.watchdog import Watchdog

with Watchdog(Path(sys.argv[1])) as watchdog:
    watchdog.expect(0.2)
time.sleep(1)
with Watchdog(Path(sys.argv[1])) as watchdog:
    watchdog.expect(0)
    time.sleep(0.5)
"""


def test_a_process_that_waits_for_the_driver_does_not_hang(tmp_path: Path) -> None:
    assert run(WAITS, tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_how_long_an_epoch_may_take() -> None:
    assert allowed_seconds(1800, 0.1, first=False) == 1800
    assert allowed_seconds(1800, 600.0, first=False) == 6000, "epochs that are long by nature"
    assert allowed_seconds(1800, 0.0, first=True) == 18_000, "the table, the weights, the compiler"
    assert allowed_seconds(1800, 7200.0, first=True) == 72_000
    assert allowed_seconds(0, 7200.0, first=True) == 0


class Slow:
    """An experiment whose epochs take the seconds that it says they took; after the last one it raises."""

    def __init__(self, seconds: list[float], error: BaseException | None = None, done: int = 0) -> None:
        self.seconds = seconds
        self.error = error
        self.history = [self._record(n) for n in range(1, done + 1)]

    def _record(self, epoch: int) -> EpochRecord:
        return epoch_record(epoch, 0.5, seconds=self.seconds[epoch - 1])

    def advance(self) -> EpochRecord:
        if self.error and len(self.history) == len(self.seconds):
            activations = torch.zeros(1000)  # held by the traceback
            HELD.append(weakref.ref(activations))
            raise self.error
        self.history.append(self._record(len(self.history) + 1))
        return self.history[-1]

    def save(self) -> None:
        pass


HELD: list[weakref.ref[Any]] = []


class Actor(TrialActor):
    """Without Tune's own start, which wants a cluster, and with an experiment of the test's."""

    def __init__(self, experiment: Slow, **trial: Any) -> None:
        self.made = experiment
        timing = {"hang_seconds": 60.0, "report_seconds": 0.0, "checkpoint_seconds": 1e6, "cpus": 1, "gpus": 0}
        self.setup({"trial": json.dumps({"number": 0, "reported": 0, "rungs": [], "recipe": {"epochs": 9}, **timing, **trial})})

    def _build(self) -> Any:
        made, self.made = self.made, None  # type: ignore[assignment]
        return made


def test_each_epoch_is_given_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the build, before each epoch; and also where a restored trial stands at a rung and trains a step later."""
    given: list[float] = []
    monkeypatch.setattr(Watchdog, "expect", lambda self, seconds: given.append(seconds))
    actor = Actor(Slow([1.0, 1.0, 30.0, 1.0]), folder=str(tmp_path))
    for _ in range(4):
        actor.step()
    assert given == [600, 600, 60, 60, 60, 60, 60, 300]
    given.clear()
    actor = Actor(Slow([1.0, 30.0, 1.0], done=2), folder=str(tmp_path), rungs=[2])
    assert [epoch["epoch"] for epoch in actor.step()["epochs"]] == [1, 2]
    assert given == [600]
    actor.step()
    assert given == [600, 600, 600]


def test_a_trial_that_hangs_three_times_has_failed_and_says_where(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    coordinator = Coordinator(Ledger(sweep), total=4, concurrent=1)
    for lost in range(MAX_LOST):
        record = coordinator.next("a")
        assert isinstance(record, Record)
        assert record.number == 0
        folder = coordinator.ledger.checkpoints / "0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text(f"Timeout (0:30:00)!\nThread 0x1 (most recent call first):\n  File x.py in stuck_{lost}\n")
        coordinator.lost("a", "Ray says: it exited")
    (record,) = Ledger(sweep, read_only=True).records.values()
    assert record.state is TrialState.FAIL
    said = record.summary["error"].splitlines()
    assert said[1] == "  File x.py in stuck_2"
    why = "lost its process 3 times in a row; the last epoch reported was 0; the last time it hung: no epoch ended for 0:30:00"
    assert said[-1] == why


# -- a process that is gone: what Ray says ----------------------------------------------------------------------------

KILLED = """Failure # 1 (occurred at 2026-11-23_18-12-52)
The actor died unexpectedly before finishing this task.
\tclass_name: ResourceTrainable
\tpid: 22558
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly \
exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer
"""
OUT_OF_MEMORY = """Failure # 1 (occurred at 2026-11-23_18-16-00)
1 worker(s) were killed due to the node running low on memory. Memory on the node was 23.40GB used / 23.54GB limit (0.99)
OOM kill reason: Memory usage 25126502016B exceeded threshold of 24012676915B (95.0% of 25276502016B limit)
"""
WITHHELD = """Failure # 1 (occurred at 2026-11-23_23-32-42)
\x1b[36mray::ResourceTrainable.train()\x1b[39m (pid=3962, ip=127.0.0.1, actor_id=5f0b, repr=<TrialActor object at 0x7f61>)
OSError: [Errno 5] Input/output error

The above exception was the direct cause of the following exception:

\x1b[36mray::ResourceTrainable.train()\x1b[39m (pid=3962, ip=127.0.0.1, actor_id=5f0b, repr=<TrialActor object at 0x7f61>)
  File "/app/tune/cluster/trial.py", line 48, in step
    diverged = self._advance(epochs, watchdog)
               ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
training.locations.Away: checkpoint /runs/first/checkpoints/0/checkpoint.pt cannot be read: Input/output error
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KILLED, "Ray says: Worker unexpectedly exits with a connection error code 2. End of file."),
        (
            OUT_OF_MEMORY,
            "Ray says: 1 worker(s) were killed due to the node running low on memory. "
            "Memory on the node was 23.40GB used / 23.54GB limit (0.99)",
        ),
        (WITHHELD, "checkpoint /runs/first/checkpoints/0/checkpoint.pt cannot be read: Input/output error"),
        ("", ""),
    ],
)
def test_why_a_process_was_lost(error: str, line: str, tmp_path: Path) -> None:
    """As Ray 2.60 words it; in the ledger all of it is kept."""
    from tune.cluster.scheduler import LedgerScheduler

    file = tmp_path / "error.txt"
    file.write_text(error)
    ended = SimpleTrial("a", str(file) if error else None)
    sweep = make_sweep(tmp_path)
    coordinator = Coordinator(Ledger(sweep), total=4, concurrent=1)
    for _ in range(MAX_LOST):
        coordinator.next("a")
        LedgerScheduler(coordinator).on_trial_error(None, ended)  # type: ignore[arg-type]
    (record,) = Ledger(sweep, read_only=True).records.values()
    said = record.summary["error"]
    assert said.splitlines()[-1].endswith(f"; the last time {line}" if line else "the last epoch reported was 0")
    assert error.partition("\n")[2].strip() in said


class SimpleTrial:
    """What the scheduler asks of Tune's trial."""

    def __init__(self, trial_id: str, error_file: str | None) -> None:
        self.trial_id = trial_id
        self.error_file = error_file


# -- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_a_trial_that_ran_out_of_memory_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    """Played, as it takes a GPU to cause it: nothing of the trial is held any more when the device's cache is emptied, what
    the traceback held neither, and the actor goes on."""
    HELD.clear()
    emptied: list[bool] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(all(held() is None for held in HELD)))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    experiment = Slow([1.0], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    experiment.itself = experiment  # type: ignore[attr-defined]  a cycle, which needs the collector
    HELD.append(weakref.ref(experiment))
    actor = Actor(experiment, folder=str(tmp_path), gpus=gpus)
    del experiment
    gc.disable()
    try:
        assert actor.step()["failure"] is None
        failed = actor.step()
    finally:
        gc.enable()
    assert failed["epochs"] == []
    assert failed["failure"].splitlines()[-1] == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert len(HELD) == 2
    assert all(held() is None for held in HELD)
    assert emptied == ([True] if gpus else [])
    actor.made = Slow([1.0])
    actor.reset_config({"trial": json.dumps(actor.trial | {"number": 1})})
    assert [epoch["epoch"] for epoch in actor.step()["epochs"]] == [1]


def test_a_share_of_a_gpu_without_what_a_process_takes_itself() -> None:
    total = 80 * 2**30
    assert [memory_fraction(share, total) * 80 for share in (0.25, 0.5)] == [19.25, 39.25], "three quarters of a GiB less"
    with pytest.raises(ValueError, match=r"--gpus-per-trial: 0.005 of this GPU's 80 GiB .* \(0.75 GiB\)"):
        memory_fraction(0.005, total)


def test_a_trial_is_held_to_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else of it is on the GPU; one that has a whole one is not held to anything."""
    told: list[Any] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**30, 8 * 2**30))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", told.append)
    monkeypatch.setattr("training.trial_run.TrialRun", lambda recipe, folder, rungs, device: told.append(device))
    trial = {
        "cpus": 1,
        "recipe": {"method": "ce", "values": {}, "data": "digits", "noise": "none", "model": "mlp", "epochs": 1, "seed": 0},
        "folder": "/nowhere",
        "rungs": [],
    }
    for gpus in (0.5, 1, 0):
        actor = TrialActor.__new__(TrialActor)
        actor.trial = {**trial, "gpus": gpus}
        actor._build()
    assert told == [0.5 - 0.75 / 8, "cuda", "cuda", "cpu"]


def test_a_process_that_has_lost_its_gpu_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played: after an illegal access every later call fails in that process, which must not take other trials with it."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail() -> NoReturn:
        raise broken

    monkeypatch.setattr("torch.cuda.synchronize", fail)
    actor = Actor(Slow([1.0], broken), folder=str(tmp_path), gpus=0.5)
    actor.step()
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        actor.step()


# -- a real sweep -----------------------------------------------------------------------------------------------------


def undisturbed(sweep: Sweep, record: Record) -> list[float]:
    """What a trial comes to when nothing happens to it."""
    recipe = of_trial(Ledger(sweep, read_only=True), record)
    return [epoch.objective for epoch in TrialRun(recipe, rungs=sweep.spec.rungs())]


def test_faults_cost_their_own_trial_alone(faulty: FaultySweep) -> None:
    """Hung three times: failed. A torn checkpoint: trained again from the start, to the same values. Out of memory: failed at
    once, without losing the process. Weights that are no numbers: diverged. And the sweep ends with all that was asked for."""
    assert faulty.process.returncode == 0, faulty.said
    sweep = Sweep.find(faulty.storage, "faulty")
    ledger = Ledger(sweep, read_only=True)
    records = list(ledger.records.values())
    assert [record.status for record in records] == ["failed", "complete", *["failed"] * 3, "diverged", "complete"]
    assert [record.attrs.get("lost", (0, 0))[0] for record in records] == [3, 1, 0, 0, 0, 0, 0]
    assert [record.epochs for record in records] == [1, 4, 1, 1, 1, 2, 4]
    assert epochs_by_trial(sweep.folder) == {n: list(range(1, record.epochs + 1)) for n, record in enumerate(records)}
    for record in records:
        expected = undisturbed(sweep, record)
        lines = [line for line in metric_lines(sweep.folder) if line["trial"] == record.number]
        assert [line["objective"] for line in lines] == expected[: record.epochs]
        assert list(record.objectives.values()) == expected[: record.epochs]

    hung, *_ = errors = [record.summary.get("error", "") for record in records]
    assert ", line " in hung
    assert "in hang\n" in hung, "the function that hung"
    told = r"it hung: no epoch ended for 0:00:\d\d(\.\d+)?"  # 5 s, or ten times what an epoch took on a busy machine
    why = f"lost its process 3 times in a row; the last epoch reported was 1; the last time {told}"
    assert re.fullmatch(why, hung.splitlines()[-1])
    assert "can't allocate memory" in errors[2].splitlines()[-1]
    assert errors[3].splitlines()[-1] == "MemoryError"
    assert errors[4].splitlines()[-1].startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert all(error.startswith("Traceback") for error in errors[2:5])
    processes = [process for number, _, process in faulty.struck if number in (2, 3, 4, 5)]
    assert len(processes) == 4
    assert len(set(processes)) < 4, "a process survives that a trial ran out of memory"

    assert len(re.findall(rf"trial 0 lost its process after epoch 1 \({told}\); it will be run again", faulty.said)) == 2
    assert "trial 1 lost its process after epoch 3 (Ray says: Worker unexpectedly exits" in faulty.said
    assert "Traceback" not in faulty.said
    held = {path.relative_to(sweep.folder / "checkpoints") for path in (sweep.folder / "checkpoints").rglob("*")}
    assert {str(path) for path in held} == {"1", "1/checkpoint.pt", "6", "6/checkpoint.pt"}


def test_a_storage_that_is_away_while_a_trial_is_restored_costs_no_epoch(tmp_path: Path, migrated_store: Path) -> None:
    """One process is killed, the next cannot read the checkpoint and counts as lost, and the third goes on from it."""
    spec = {"trials": 1, "epochs": 4, "scheduler": "none", "report_seconds": 0, "checkpoint_seconds": 0, "concurrent": 1}
    with faulty_sweep(tmp_path, migrated_store, {0: ("withhold", 3, 1)}, **spec) as sweep:
        assert sweep.process.wait(PATIENCE) == 0, sweep.said
        told = re.findall(r"trial 0 lost its process after epoch 2 \((.*)\); it will be run again", sweep.said)
        path = sweep.storage / "faulty" / "checkpoints" / "0" / "checkpoint.pt"
        assert told[1:] == [f"checkpoint {path} cannot be read: Input/output error"]
        found = Sweep.find(sweep.storage, "faulty")
        (record,) = Ledger(found, read_only=True).records.values()
        assert list(record.objectives.values()) == undisturbed(found, record)
        assert epochs_by_trial(found.folder) == {0: [1, 2, 3, 4]}
        assert "Traceback" not in sweep.said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_sweep_whose_epochs_are_long_stops_all_the_same(
    tmp_path: Path, migrated_store: Path, number: signal.Signals, code: int
) -> None:
    """Both trials are in C code for longer than the grace, one with the interpreter's lock: 7.5 s, then it is broken off."""
    faults = {0: ("hang", 2, 1), 1: ("sleep", 2, 1)}
    spec = {"trials": 2, "epochs": 4, "scheduler": "none", "report_seconds": 0, "checkpoint_seconds": 0, "concurrent": 2}
    with faulty_sweep(tmp_path, migrated_store, faults, **spec) as sweep:
        wait_for(sweep, lambda: len(sweep.struck) == 2)
        workers = [process for process in sweep.family() if "Trainable" in " ".join(process.cmdline())]
        assert len(workers) == 2
        began = time.monotonic()
        sweep.process.send_signal(number)
        assert sweep.process.wait(PATIENCE) == code, sweep.said
        took = time.monotonic() - began
        assert took > 7, "the epochs had their grace; without an end to it they would go on for ever"
        command = f"python search.py resume faulty --storage {sweep.storage}"
        assert sweep.said.splitlines()[-2:] == ["interrupted with 2 trials in progress; go on with:", command]
        _, left = psutil.wait_procs(workers, timeout=60)
        assert left == []
        assert epochs_by_trial(sweep.storage / "faulty") == {0: [1], 1: [1]}
        assert sorted(path.parent.name for path in sweep.storage.glob("faulty/checkpoints/*/checkpoint.pt")) == ["0", "1"]
