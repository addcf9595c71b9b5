"""Launch, resume, extend, finish and retrain a sweep: one path through ledger, coordinator and a short-lived Ray Tune run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from optuna.trial import TrialState

from data.dataset import Dataset
from tune.checks import (
    FLAG,
    TrackingUnavailable,
    check_compiler,
    check_network,
    check_resources,
    check_storage,
    check_tracking,
    check_views,
    clean,
    disregarded,
    launch_tracking,
    num_gpus,
)
from tune.cluster import executor
from tune.cluster.interruption import Interruption
from tune.cluster.nodes import address_of
from tune.report.announcement import describe, noise_text
from tune.report.closing import closing_words, num_missing
from tune.report.display import Display
from tune.report.leaderboard import best_config_text
from tune.report.tracker import Tracker
from tune.report.tracking import VARIABLE, tracking_uri
from tune.search.coordinator import Coordinator
from tune.search.ledger import RETRAIN, SWEEP, Ledger, Record
from tune.search.recipes import dataset as dataset_of
from tune.search.space import Space
from tune.search.warm_start import WarmStart, warm_start
from tune.spec import SweepSpec, check_trusted, make_spec
from tune.store.base import DAMAGED, LOCK, NOISE, RECORD, SweepStore, already_running
from tune.store.locate import as_store
from tune.store.stored_sweep import Sweep, check_name, check_place

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "ray", "optuna", "mlflow")


def _commit() -> str:
    """Of this program; ``unknown`` where there is no git, or no repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def _provenance(dataset: Dataset) -> dict[str, Any]:
    noise = dataset.noise
    found = {"noise_rate": round(noise.realised_rate, 6), "noise_labels": noise.label_checksum} if noise else {}
    return {
        "id": uuid.uuid4().hex,
        "created": round(time.time(), 3),
        "data": dataset.fingerprint,
        "table": dataset.checksum,
        **found,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


# -- the verbs --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a command ended: its exit code, what is left to say below the table, and what the table shows."""

    code: int
    advice: str = ""
    ledger: Ledger | None = None

    def say(self) -> int:
        """Says the last words; returns the exit code."""
        if self.advice:
            tell(self.advice, sys.stderr if self.code else sys.stdout)
        return self.code


def tell(text: str, file: TextIO) -> None:
    with contextlib.suppress(OSError):  # a terminal or a pipe that is gone takes nothing else with it
        print(text, file=file, flush=True)


def launch(
    name: str,
    store: Path | SweepStore,
    spec: SweepSpec,
    *,
    old: str | None = None,
    dry_run: bool = False,
    download: bool = False,
) -> Outcome:
    """Starts a sweep, with the best configurations of the sweep ``old``. ValueError for anything that a user can get wrong,
    before Ray starts."""
    store, command = as_store(store), command_line("resume", as_store(store), check_name(name))
    if store.exists(name):
        if store.files(name).running():
            raise already_running(name, store.files(name).read(LOCK) or "")
        if store.files(name).read(RECORD) is None:
            raise ValueError(f"sweep name {name!r} is taken in {store.place} by something that is no sweep; choose another one")
        raise ValueError(f"{store.taken(name)}; go on with: {command}")
    tracking, origin = launch_tracking(spec.tracking)
    spec = dataclasses.replace(spec, tracking=tracking)
    space = Space(spec)
    address = address_of(spec)
    check_resources(spec, address)
    check_trusted(spec)
    check_storage(store.storage)
    check_tracking(tracking_uri(store.storage, spec.tracking), origin)
    dataset = dataset_of(spec, download=download)
    warm = WarmStart([], [], {}) if old is None else warm_start(old, store, spec, space, dataset.num_classes)
    check_network(spec, dataset)
    check_views(space, dataset)
    if not address:
        check_compiler(spec.compile, "cuda" if spec.gpus_per_trial else "cpu")
    idle_gpus = 0 if spec.gpus_per_trial or address else num_gpus()
    for line in [*describe(spec, space, dataset, idle_gpus), *warm.lines]:
        print(line)
    if origin == VARIABLE:
        print(f"MLflow's runs go to {tracking}, as {VARIABLE} says; {FLAG} would win over it")
    if dry_run:
        return Outcome(0)
    with store.create(name) as (folder, files):
        sweep = Sweep(folder, spec, _provenance(dataset) | store.provenance | warm.provenance, files)
        if address:
            executor.check_cluster(sweep, address)
        ledger = Ledger(sweep, create=True)
        for params in warm.params:
            ledger.enqueue(params)
        for method in spec.method:
            params, moved = space.defaults(method, spec, dataset.num_classes)
            if params not in warm.params:
                ledger.enqueue(params)
            for line in moved:
                print(line)
        if dataset.damage:
            files.write(DAMAGED, "".join(f"{reason}\n" for reason in dataset.damage.values()))
        if dataset.noise:
            files.write(NOISE, noise_text(spec, dataset, dataset.noise))
        sweep.write()
    sweep = Sweep.find(store, name)
    with sweep.files.lock(command):
        return execute(sweep, SWEEP, command, address)


def check_data(sweep: Sweep, spec: SweepSpec) -> None:
    """ValueError where images, labels or split are not those of the launch."""
    before, now = sweep.provenance["data"], dataset_of(spec).fingerprint
    if now != before:
        raise ValueError(f"the data changed since {sweep.name!r} was launched: its checksum {before[:12]} is now {now[:12]}")


def resume(name: str, store: Path | SweepStore, changes: dict[str, Any]) -> Outcome:
    """Goes on with a sweep: finishes it, extends it to a larger budget, or reports that nothing is left to do."""
    sweep = Sweep.find(store, name)
    check_place(sweep, store)
    command = resume_command(sweep)
    before, now = sweep.provenance["commit"], _commit()
    if before != now and "unknown" not in (before, now):
        print(f"{name!r} was launched with version {before} of this program, this is {now}; methods and ranges may differ")
    tracking = clean(changes.get("tracking", sweep.spec.tracking))
    spec = make_spec({**vars(sweep.spec), **changes, "tracking": tracking}, stored=True)
    if "tracking" not in changes:
        say_where_tracked(sweep)
    address = address_of(spec)
    check_resources(spec, address)
    check_storage(sweep.storage)
    check_data(sweep, spec)
    if spec.trials < sweep.spec.trials:
        ledger = Ledger(sweep, read_only=True)
        if spec.trials < (num_begun := ledger.num_counted() + len(ledger.unfinished())):
            raise ValueError(f"--trials: {spec.trials} is not allowed; {num_begun} trials of {name!r} have begun already")
    try:
        check_tracking(tracking_uri(sweep.storage, spec.tracking))
    except TrackingUnavailable as error:
        print(f"warning: {error}; the runs are brought up to date when it is back", file=sys.stderr)
    with sweep.files.lock(command):
        changed = dataclasses.replace(sweep, spec=spec)
        if changes:
            changed.write()
        try:
            return execute(changed, SWEEP, command, address)
        except ValueError:  # what is refused, a cluster that is not there, is not kept for the next time
            if changes:
                sweep.write()
            raise


def say_where_tracked(sweep: Sweep) -> None:
    """A sweep stays where it was launched to be tracked; a line says so where MLflow's variable says otherwise."""
    tracked = tracking_uri(sweep.storage, sweep.spec.tracking)
    if disregarded(tracked):
        instead = f"{VARIABLE} counts for new sweeps; {FLAG} of resume moves this one"
        print(f"MLflow's runs of {sweep.name!r} stay in {tracked}: {instead}")


def retrain(name: str, store: Path | SweepStore, *, top: int, num_seeds: int) -> Outcome:
    """Trains the best configurations again, on the full budget, each with its own initialisation, order and noise per seed."""
    sweep = Sweep.find(store, name)
    check_place(sweep, store)
    say_where_tracked(sweep)
    address = address_of(sweep.spec)
    check_resources(sweep.spec, address)
    check_storage(sweep.storage)
    searched = Ledger(sweep, read_only=True)
    best = [record for record in searched.leaderboard() if record.state is TrialState.COMPLETE][:top]
    if not best:
        advice = "all were stopped, diverged or failed" if searched.is_finished else f"finish it with: {resume_command(sweep)}"
        raise ValueError(f"sweep {name!r} has no complete trial; {advice}")
    check_data(sweep, sweep.spec)
    command = command_line("retrain", sweep.files.store, sweep.name, "--top", top, "--seeds", num_seeds)
    with sweep.files.lock(command):
        sweep.files.add_part(RETRAIN)
        ledger = Ledger(sweep, RETRAIN, create=True)
        enqueue_retraining(ledger, best, num_seeds)
        return execute(sweep, RETRAIN, command, address)


def enqueue_retraining(ledger: Ledger, best: list[Record], num_seeds: int) -> None:
    """Adds the pairs of a configuration and a seed that a retraining lacks; one that failed is tried again."""
    trials = ledger.study.get_trials(deepcopy=False)
    known = {(t.user_attrs["source"], t.user_attrs["seed"]) for t in trials if t.state is not TrialState.FAIL}
    for seed in range(num_seeds):
        for record in best:
            if (record.number, seed) not in known:
                ledger.enqueue(record.params, {"source": record.number, "seed": seed, "noise_draw": seed + 1})


def command_line(verb: str, store: SweepStore, name: str, *flags: object) -> str:
    """A command about a sweep, for a user to copy."""
    return shlex.join(["python", "search.py", verb, name, *map(str, flags), *store.flags])


def resume_command(sweep: Sweep) -> str:
    """The command line that goes on with a sweep."""
    return command_line("resume", sweep.files.store, sweep.name)


def stop(name: str, store: Path | SweepStore, patience: float = 60.0) -> int:
    """Asks the driver of a running sweep to stop, as Ctrl-C does, and waits for it."""
    sweep = Sweep.find(store, name)
    request = sweep.files.stop_request
    deadline = time.monotonic() + patience
    command = ""
    while time.monotonic() < deadline:
        if not sweep.files.running():
            request.unlink(missing_ok=True)
            print(f"stopped; go on with: {command}" if command else f"sweep {name!r} is not running")
            return 0
        command = sweep.files.command() or resume_command(sweep)
        request.touch()
        time.sleep(0.3)
    raise ValueError(f"sweep {name!r} did not stop within {patience:.0f} s")


# -- running ----------------------------------------------------------------------------------------------------------


def execute(sweep: Sweep, kind: str, command: str, address: str = "") -> Outcome:
    """Runs what is left of a study on the Ray cluster at ``address``, or on this machine alone, under the caller's lock;
    ``command`` goes on with it. The exit code is 0, 1 where the sweep stopped itself or a retraining is incomplete, 128 and the
    signal's number where it was interrupted."""
    ledger = Ledger(sweep, kind)
    uri = tracking_uri(sweep.storage, sweep.spec.tracking)
    with Display(ledger, ledger.total) as display:
        coordinator = Coordinator(ledger, total=ledger.total, concurrent=0, on_event=display.event)
        idle = ledger.is_finished
        trackers = [Tracker(ledger, uri, display.line)]
        if kind == SWEEP and RETRAIN in ledger.kinds:  # its runs may be missing, too
            trackers.append(Tracker(Ledger(sweep, RETRAIN, read_only=True), uri))

        def close_trackers(within: float) -> None:
            for tracker in trackers:
                tracker.close(finished=tracker.ledger.is_finished, patience=5 if coordinator.problem else 30, within=within)
                if tracker.problem:
                    behind = f"MLflow is behind the ledger ({tracker.problem}); a resume brings it up to date"
                    tell(f"warning: {behind}", sys.stderr)

        def on_stuck() -> None:
            code = 1
            sweep.files.stop_waiting()  # the main thread may wait for a database and hold what the tracker needs
            try:
                outcome = outcome_of(ledger, coordinator, interruption.signal, command, idle)
                code = outcome.code
                display.close()
                close_trackers(within=0.5)
                outcome.say()
            except Exception:  # noqa: BLE001  a thread of its own has nobody to raise it to, and the process must end
                traceback.print_exc()
            finally:
                os._exit(code)

        interruption = Interruption(coordinator, sweep.files.stop_request, on_stuck)
        with contextlib.suppress(KeyboardInterrupt), interruption:
            try:
                if not idle:
                    executor.run(coordinator, sweep.spec, interruption, display.line, address)
            finally:
                interruption.stop_timer()
                if interruption.signal or coordinator.problem:  # which may be that they are away, and were waited for
                    sweep.files.stop_waiting()
                close_trackers(interruption.seconds_left())
    if kind == SWEEP and (best := ledger.best()):
        try:
            sweep.files.write("best_config.yaml", best_config_text(ledger, best))
        except OSError as error:
            coordinator.problem = coordinator.problem or f"best_config.yaml cannot be written: {error}"
    return outcome_of(ledger, coordinator, interruption.signal, command, idle)


def outcome_of(ledger: Ledger, coordinator: Coordinator, number: int, command: str, idle: bool) -> Outcome:
    """How a driver's work ended; ``number`` is that of the signal that ended it, or 0."""
    if number:
        num_waiting = ledger.count(TrialState.RUNNING)
        return Outcome(128 + number, f"interrupted with {num_waiting} trials in progress; go on with:\n{command}", ledger)
    if coordinator.problem:
        return Outcome(1, f"error: {coordinator.problem}; go on with: {command}", ledger)
    if ledger.kind == SWEEP:
        return Outcome(0, "\n".join(closing_words(ledger, command, idle)), ledger)
    if num_failed := num_missing(ledger):
        return Outcome(1, f"error: {num_failed} runs failed and are not in the table; try them again with: {command}", ledger)
    return Outcome(0, "", ledger)
