"""Launch, resume, extend, finish and retrain: one path through a ledger, a desk and a Ray Tune run that is thrown away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from data.noise import NoiseReport, parse_noise
from data.views import SAID_OF_VIEWS
from methods import METHODS
from methods.base import first_epoch
from tune.checks import (
    FLAG,
    NoAnswer,
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
from tune.report.display import Display
from tune.report.leaderboard import best_config_text
from tune.report.tracker import Tracker
from tune.report.tracking import VARIABLE, tracking_uri
from tune.search.budget import CONFIGURATIONS
from tune.search.coordinator import Desk
from tune.search.ledger import RETRAIN, SWEEP, Ledger, Record
from tune.search.recipes import dataset as dataset_of
from tune.search.space import Space
from tune.search.warm_start import WarmStart, warm_start
from tune.spec import SweepSpec, check_trusted, make_spec
from tune.store.base import DAMAGED, LOCK, NOISE, RECORD, Home, held
from tune.store.locate import as_home
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


class Ended(NamedTuple):
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
    home: Path | Home,
    spec: SweepSpec,
    *,
    old: str | None = None,
    dry_run: bool = False,
    download: bool = False,
) -> Ended:
    """Starts a sweep, with the best configurations of the sweep ``old``. ValueError for anything that a user can get wrong,
    before Ray starts."""
    home, command = as_home(home), command_line("resume", as_home(home), check_name(name))
    if home.exists(name):
        if home.files(name).running():
            raise held(name, home.files(name).read(LOCK) or "")
        if home.files(name).read(RECORD) is None:
            raise ValueError(f"sweep name {name!r} is taken in {home.place} by something that is no sweep; choose another one")
        raise ValueError(f"{home.taken(name)}; go on with: {command}")
    tracking, origin = launch_tracking(spec.tracking)
    spec = dataclasses.replace(spec, tracking=tracking)
    space = Space(spec)
    check_resources(spec)
    check_trusted(spec)
    check_storage(home.storage)
    check_tracking(tracking_uri(home.storage, spec.tracking), origin)
    dataset = dataset_of(spec, download=download)
    warm = WarmStart([], [], {}) if old is None else warm_start(old, home, spec, space, dataset.num_classes)
    check_network(spec, dataset)
    check_views(space, dataset)
    if not address_of(spec):
        check_compiler(spec.compile, "cuda" if spec.gpus_per_trial else "cpu")
    for line in [*describe(spec, space, dataset), *warm.lines]:
        print(line)
    if origin == VARIABLE:
        print(f"MLflow's runs go to {tracking}, as {VARIABLE} says; {FLAG} would win over it")
    if dry_run:
        return Ended(0)
    with home.making(name) as (folder, files):
        sweep = Sweep(folder, spec, _provenance(dataset) | home.provenance | warm.provenance, files)
        if address_of(spec):
            executor.check_cluster(sweep)
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
    sweep = Sweep.find(home, name)
    with sweep.files.lock(command):
        return execute(sweep, SWEEP, command)


def describe(spec: SweepSpec, space: Space, dataset: Dataset) -> list[str]:
    """What is about to run, for the user to check: data, noise, network, defaults, ranges and rungs."""
    report = dataset.noise
    noise = f", {report}" if report else ""
    sizes = f"{len(dataset.train)} training, {len(dataset.validation.labels)} validation (noisy labels)"
    sizes += f", {len(dataset.test.labels)} test (clean labels)" if dataset.test else ""
    sizes += f", {len(dataset.trusted)} trusted (clean labels)" if dataset.trusted else ""
    channels, side = dataset.input_shape
    shape = f"{dataset.num_classes} classes, images of {side} x {side} x {channels}"
    lines = [f"data {spec.data}: {shape}; {sizes}", f"noise {spec.noise} (seed {spec.noise_seed}){noise}; network {spec.model}"]
    lines[1:1] = dataset.remarks
    mapping = parse_noise(spec.noise).completed(dataset.source.maps).numbered(dataset.classes).mapping
    if mapping and dataset.classes:
        flips = [f"{dataset.classes[int(one)]} to {dataset.classes[int(other)]}" for one, other in mapping]
        lines.append(f"classes flip {', '.join(flips[:10])}{' ...' if len(flips) > 10 else ''}")
    lines += dataset.label_remarks()
    if not spec.gpus_per_trial and not address_of(spec) and num_gpus():
        lines.append(f"trials run on the CPU; this machine has {num_gpus()} GPUs: --gpus-per-trial 0.25 puts four on each")
    rungs = spec.rungs()
    limits = [f"at most {limit:g} {unit}, " for limit, unit in ((spec.hours, "hours"), (spec.gpu_hours, "GPU-hours")) if limit]
    lines.append(
        f"{spec.trials} trials of {spec.epochs} epochs, {''.join(limits)}ASHA rungs at {', '.join(map(str, rungs)) or 'none'}"
    )
    if space.size is not None and space.size < spec.trials:
        lines.append(
            f"the ranges hold {space.size} configurations: the sweep ends when each has been run, before {spec.trials} trials"
        )
    left_out = {name for name, method in METHODS.items() if method.needs_trusted and not spec.trusted}
    if left_out and set(spec.method) == set(METHODS) - left_out:
        lines.append(
            f"without {', '.join(sorted(left_out))}, which also learns from clean labels: give their number with --trusted"
        )
    lines += views_lines(space, dataset)
    for method in spec.method:
        parameters = space.parameters[method]
        drawn = [f"{parameter.field} {parameter.range}" for parameter in parameters if parameter.range]
        fixed = [f"{parameter.field}={parameter.fixed}" for parameter in parameters if parameter.range is None]
        lines.append(f"{method}: searches {', '.join(drawn) or 'nothing'}; fixed {' '.join(fixed)}")
        late = {p.field: p.range.high if p.range else p.fixed for p in parameters if p.range is None or p.declared.legal}
        begins = first_epoch(space.begins(method, {k: v for k, v in late.items() if v is not None}), spec.epochs)
        unjudged = [rung for rung in rungs if rung <= begins]
        if unjudged and len(unjudged) == len(rungs):
            lines.append(f"{method} can begin as late as epoch {begins}: such a trial is never stopped early")
        elif unjudged:
            lines.append(f"{method} can begin as late as epoch {begins}: rungs up to then do not judge such a trial")
    return lines


def views_lines(space: Space, dataset: Dataset) -> list[str]:
    """How images are changed, and where that is not for every kind of image."""
    drawn = space.views()
    said = "; ".join(f"{name}: {SAID_OF_VIEWS[name if name != 'auto' else dataset.source.views]}" for name in sorted(drawn))
    return [f"views {said}"]


def noise_text(spec: SweepSpec, dataset: Dataset, noise: NoiseReport) -> str:
    """What noise training and validation labels hold, as JSON: ``matrix[i][j]`` is the share of class i that is labelled j."""
    classes = list(dataset.classes) or [str(label) for label in range(dataset.num_classes)]
    found = {
        "noise": spec.noise,
        "noise_seed": spec.noise_seed,
        "realised_rate": noise.realised_rate,
        "labels": noise.num_labels,
        "known": noise.num_known,
        "open_set": noise.num_open,
        "labels_sha256": noise.label_checksum,
        "classes": classes,
        "matrix": [[round(share, 6) for share in row] for row in noise.matrix.tolist()],
    }
    return json.dumps(found) + "\n"


def check_data(sweep: Sweep, spec: SweepSpec) -> None:
    """ValueError where images, labels or split are not those of the launch."""
    before, now = sweep.provenance["data"], dataset_of(spec).fingerprint
    if now != before:
        raise ValueError(f"the data changed since {sweep.name!r} was launched: its checksum {before[:12]} is now {now[:12]}")


def resume(name: str, home: Path | Home, changes: dict[str, Any]) -> Ended:
    """Goes on with a sweep: finishes it, extends it to a larger budget, or reports that nothing is left to do."""
    sweep = Sweep.find(home, name)
    check_place(sweep, home)
    command = resume_command(sweep)
    before, now = sweep.provenance["commit"], _commit()
    if before != now and "unknown" not in (before, now):
        print(f"{name!r} was launched with version {before} of this program, this is {now}; methods and ranges may differ")
    tracking = clean(changes.get("tracking", sweep.spec.tracking))
    spec = make_spec({**vars(sweep.spec), **changes, "tracking": tracking}, stored=True)
    if "tracking" not in changes:
        say_where_tracked(sweep)
    check_resources(spec)
    check_storage(sweep.storage)
    check_data(sweep, spec)
    if spec.trials < sweep.spec.trials:
        ledger = Ledger(sweep, read_only=True)
        if spec.trials < (num_begun := ledger.num_counted() + len(ledger.unfinished())):
            raise ValueError(f"--trials: {spec.trials} is not allowed; {num_begun} trials of {name!r} have begun already")
    try:
        check_tracking(tracking_uri(sweep.storage, spec.tracking))
    except NoAnswer as error:
        print(f"warning: {error}; the runs are brought up to date when it is back", file=sys.stderr)
    with sweep.files.lock(command):
        changed = dataclasses.replace(sweep, spec=spec)
        if changes:
            changed.write()
        try:
            return execute(changed, SWEEP, command)
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


def retrain(name: str, home: Path | Home, *, top: int, num_seeds: int) -> Ended:
    """Trains the best configurations again, on the full budget, each with its own initialisation, order and noise per seed."""
    sweep = Sweep.find(home, name)
    check_place(sweep, home)
    say_where_tracked(sweep)
    check_resources(sweep.spec)
    check_storage(sweep.storage)
    searched = Ledger(sweep, read_only=True)
    best = [record for record in searched.leaderboard() if record.state is TrialState.COMPLETE][:top]
    if not best:
        advice = "all were stopped, diverged or failed" if searched.spent else f"finish it with: {resume_command(sweep)}"
        raise ValueError(f"sweep {name!r} has no complete trial; {advice}")
    check_data(sweep, sweep.spec)
    command = command_line("retrain", sweep.files.home, sweep.name, "--top", top, "--seeds", num_seeds)
    with sweep.files.lock(command):
        sweep.files.add_part(RETRAIN)
        ledger = Ledger(sweep, RETRAIN, create=True)
        enqueue_retraining(ledger, best, num_seeds)
        return execute(sweep, RETRAIN, command)


def enqueue_retraining(ledger: Ledger, best: list[Record], num_seeds: int) -> None:
    """Adds the pairs of a configuration and a seed that a retraining lacks; one that failed is tried again."""
    trials = ledger.study.get_trials(deepcopy=False)
    known = {(t.user_attrs["source"], t.user_attrs["seed"]) for t in trials if t.state is not TrialState.FAIL}
    for seed in range(num_seeds):
        for record in best:
            if (record.number, seed) not in known:
                ledger.enqueue(record.params, {"source": record.number, "seed": seed, "noise_draw": seed + 1})


def command_line(verb: str, home: Home, name: str, *flags: object) -> str:
    """A command about a sweep, for a user to copy."""
    return shlex.join(["python", "search.py", verb, name, *map(str, flags), *home.flags])


def resume_command(sweep: Sweep) -> str:
    """The command line that goes on with a sweep."""
    return command_line("resume", sweep.files.home, sweep.name)


def stop(name: str, home: Path | Home, patience: float = 60.0) -> int:
    """Asks the driver of a running sweep to stop, as Ctrl-C does, and waits for it."""
    sweep = Sweep.find(home, name)
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


def execute(sweep: Sweep, kind: str, command: str) -> Ended:
    """Runs what is left of a study, under the caller's lock; ``command`` goes on with it. The exit code is 0, 1 where the sweep
    stopped itself or a retraining is incomplete, 128 and the signal's number where it was interrupted."""
    ledger = Ledger(sweep, kind)
    uri = tracking_uri(sweep.storage, sweep.spec.tracking)
    with Display(ledger, ledger.total) as display:
        desk = Desk(ledger, total=ledger.total, concurrent=0, on_event=display.event)
        idle = ledger.spent
        trackers = [Tracker(ledger, uri, display.line)]
        if kind == SWEEP and RETRAIN in ledger.kinds:  # its runs may be missing, too
            trackers.append(Tracker(Ledger(sweep, RETRAIN, read_only=True), uri))

        def close_trackers(within: float) -> None:
            for tracker in trackers:
                tracker.close(spent=tracker.ledger.spent, patience=5 if desk.problem else 30, within=within)
                if tracker.problem:
                    behind = f"MLflow is behind the ledger ({tracker.problem}); a resume brings it up to date"
                    tell(f"warning: {behind}", sys.stderr)

        def farewell() -> None:
            code = 1
            sweep.files.hurry()  # the main thread may be waiting for a database, with what the tracker needs in its hands
            try:
                ended = outcome(ledger, desk, interruption.signal, command, idle)
                code = ended.code
                display.close()
                close_trackers(within=0.5)
                ended.say()
            except Exception:  # noqa: BLE001  a thread of its own has nobody to raise it to, and the process must end
                traceback.print_exc()
            finally:
                os._exit(code)

        interruption = Interruption(desk, sweep.files.stop_request, farewell)
        with contextlib.suppress(KeyboardInterrupt), interruption:
            try:
                if not idle:
                    executor.run(desk, sweep.spec, interruption, display.line)
            finally:
                interruption.settle()
                if interruption.signal or desk.problem:  # which may be that they are away, and were waited for
                    sweep.files.hurry()
                close_trackers(interruption.left())
    if kind == SWEEP and (best := ledger.best()):
        try:
            sweep.files.write("best_config.yaml", best_config_text(ledger, best))
        except OSError as error:
            desk.problem = desk.problem or f"best_config.yaml cannot be written: {error}"
    return outcome(ledger, desk, interruption.signal, command, idle)


def outcome(ledger: Ledger, desk: Desk, number: int, command: str, idle: bool) -> Ended:
    """How a driver's work ended; ``number`` is that of the signal that ended it, or 0."""
    if number:
        num_waiting = ledger.count(TrialState.RUNNING)
        return Ended(128 + number, f"interrupted with {num_waiting} trials in progress; go on with:\n{command}", ledger)
    if desk.problem:
        return Ended(1, f"error: {desk.problem}; go on with: {command}", ledger)
    if ledger.kind == SWEEP:
        return Ended(0, "\n".join(closing_words(ledger, command, idle)), ledger)
    if num_failed := num_missing(ledger):
        return Ended(1, f"error: {num_failed} runs failed and are not in the table; try them again with: {command}", ledger)
    return Ended(0, "", ledger)


def closing_words(ledger: Ledger, command: str, idle: bool) -> list[str]:
    """What is said of a sweep whose budget is spent. ``idle``: it was so before."""
    said = [] if ledger.best() else ["no trial is complete: every one was stopped, diverged or failed"]
    over = [budget for budget in ledger.budgets() if budget.over]
    if idle or any(budget.name != "trials" for budget in over):
        lead = "nothing was left to do" if idle else "the budget is spent"
        if any(budget.name == CONFIGURATIONS for budget in over):
            more = f"wider ranges in a sweep of its own: launch NAME --from {ledger.sweep.name} --range ..."
        else:
            more = " ".join([command, *(f"{budget.flag} N" for budget in over)])
        said.append(f"{lead}: {', '.join(map(str, over))}; for more: {more}")
    return said


def num_missing(ledger: Ledger) -> int:
    """Pairs of a configuration and a seed that failed and were not made up for."""
    pairs: dict[TrialState, set[tuple[int, int]]] = {state: set() for state in TrialState}
    for record in ledger.records.values():
        pairs[record.state].add((record.attrs["source"], record.attrs["seed"]))
    return len(pairs[TrialState.FAIL] - pairs[TrialState.COMPLETE] - pairs[TrialState.PRUNED])
