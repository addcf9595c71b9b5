"""The verbs that run a sweep: launch, resume (which also extends and finishes it) and retrain."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import subprocess
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from data.dataset import Dataset
from errors import UserError
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
from tune.cluster.nodes import address_of
from tune.commands import command_line, resume_command
from tune.execution import Outcome, execute
from tune.report.announcement import describe, noise_text
from tune.report.tracking import VARIABLE, tracking_uri
from tune.search.ledger import RETRAIN, SWEEP, Ledger, Record
from tune.search.recipes import dataset as dataset_of
from tune.search.space import Space
from tune.search.warm_start import WarmStart, warm_start
from tune.spec import SweepSpec, check_trusted, make_spec, require_trusted
from tune.store.base import DAMAGED, LOCK, NOISE, RECORD, SweepStore, already_running
from tune.store.locate import as_store
from tune.store.stored_sweep import Sweep, check_name

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
    noise_fields = {"noise_rate": round(noise.realised_rate, 6), "noise_labels": noise.label_checksum} if noise else {}
    return {
        "id": uuid.uuid4().hex,
        "created": round(time.time(), 3),
        "data": dataset.fingerprint,
        "table": dataset.checksum,
        **noise_fields,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def launch(
    name: str,
    store: Path | SweepStore,
    spec: SweepSpec,
    *,
    old: str | None = None,
    dry_run: bool = False,
    download: bool = False,
) -> Outcome:
    """Starts a sweep, with the best configurations of the sweep ``old``. UserError for anything that a user can get wrong,
    before Ray starts."""
    store, command = as_store(store), command_line("resume", as_store(store), check_name(name))
    check_free(name, store, command)
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
    sweep = create(name, store, spec, space, dataset, warm, address)
    with sweep.files.lock(command):
        return execute(sweep, SWEEP, command, address, space)


def check_free(name: str, store: SweepStore, command: str) -> None:
    """UserError where the store has something of that name already; ``command`` goes on with it, where it is a sweep."""
    if not store.exists(name):
        return
    if store.files(name).running():
        raise already_running(name, store.files(name).read(LOCK) or "")
    if store.files(name).read(RECORD) is None:
        raise UserError(
            f"sweep name {name!r} is taken in {store.display_name} by something that is no sweep; choose another one"
        )
    raise UserError(f"{store.already_exists(name)}; go on with: {command}")


def create(
    name: str, store: SweepStore, spec: SweepSpec, space: Space, dataset: Dataset, warm: WarmStart, address: str
) -> Sweep:
    """Writes a new sweep, whole or not at all: its record, and its study with the first trials in its queue.

    Configurations of an earlier sweep come first, then each method's published one, moved into its range with a line.
    """
    provenance = _provenance(dataset) | store.provenance | warm.provenance
    with store.create(name) as (folder, files):
        sweep = Sweep(folder, spec, provenance, files)
        if address:
            executor.check_cluster(sweep, address)
        ledger = Ledger(sweep, space=space, create=True)
        for params in warm.params:
            ledger.enqueue(params)
        for method in spec.method:
            params, notes = space.defaults(method, spec, dataset.num_classes)
            if params not in warm.params:
                ledger.enqueue(params)
            for line in notes:
                print(line)
        if dataset.damage:
            files.write(DAMAGED, "".join(f"{reason}\n" for reason in dataset.damage.values()))
        if dataset.noise:
            files.write(NOISE, noise_text(spec, dataset, dataset.noise))
        sweep.write()
    return Sweep(store.folder(name, provenance), spec, provenance, store.files(name))


def check_data(sweep: Sweep, spec: SweepSpec) -> None:
    """UserError where images, labels or split are not those of the launch."""
    before, now = sweep.provenance["data"], dataset_of(spec).fingerprint
    if now != before:
        raise UserError(f"the data changed since {sweep.name!r} was launched: its checksum {before[:12]} is now {now[:12]}")


def resume(name: str, store: Path | SweepStore, changes: dict[str, Any]) -> Outcome:
    """Goes on with a sweep: finishes it, extends it to a larger budget, or reports that nothing is left to do."""
    sweep = Sweep.find(store, name)
    sweep.check_storage()
    command = resume_command(sweep)
    before, now = sweep.provenance["commit"], _commit()
    if before != now and "unknown" not in (before, now):
        print(f"{name!r} was launched with version {before} of this program, this is {now}; methods and ranges may differ")
    tracking = clean(changes.get("tracking", sweep.spec.tracking))
    spec = make_spec({**vars(sweep.spec), **changes, "tracking": tracking}, stored=True)
    require_trusted(spec)
    if "tracking" not in changes:
        say_where_tracked(sweep)
    address = address_of(spec)
    check_resources(spec, address)
    check_storage(sweep.storage)
    check_data(sweep, spec)
    if spec.trials < sweep.spec.trials:
        ledger = Ledger(sweep, read_only=True)
        if spec.trials < (num_begun := ledger.num_counted() + len(ledger.unfinished())):
            raise UserError(f"--trials: {spec.trials} is not allowed; {num_begun} trials of {name!r} have begun already")
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
    sweep.check_storage()
    say_where_tracked(sweep)
    address = address_of(sweep.spec)
    check_resources(sweep.spec, address)
    check_storage(sweep.storage)
    searched = Ledger(sweep, read_only=True)
    best = [record for record in searched.leaderboard() if record.state is TrialState.COMPLETE][:top]
    if not best:
        advice = "all were stopped, diverged or failed" if searched.is_finished else f"finish it with: {resume_command(sweep)}"
        raise UserError(f"sweep {name!r} has no complete trial; {advice}")
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
    existing = {(t.user_attrs["source"], t.user_attrs["seed"]) for t in trials if t.state is not TrialState.FAIL}
    for seed in range(num_seeds):
        for record in best:
            if (record.number, seed) not in existing:
                ledger.enqueue(record.params, {"source": record.number, "seed": seed, "noise_draw": seed + 1})
