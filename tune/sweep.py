"""Launch, resume, extend, finish and retrain: one path through a ledger, a desk and a Ray Tune run that is thrown away."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from methods import METHODS
from methods.base import first_epoch
from tune import executor
from tune.desk import Desk
from tune.display import Display
from tune.driver import STOP_REQUEST, Interrupted, Interruption, driver_lock
from tune.ledger import RETRAIN, SWEEP, Ledger, Record
from tune.recipes import default_recipe
from tune.space import Space
from tune.spec import Sweep, SweepSpec, check_name
from tune.tracker import Tracker, tracking_uri

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "ray", "optuna", "mlflow")


# -- before anything is written ---------------------------------------------------------------------------------------


def check_storage(storage: Path) -> None:
    """ValueError where the storage folder cannot be made or written."""
    try:
        storage.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=storage):
            pass
    except OSError as error:
        raise ValueError(f"storage {str(storage)!r} cannot be written: {error.strerror}") from error


def check_resources(spec: SweepSpec) -> None:
    """ValueError where a trial asks for more than this machine has. A cluster is asked when it is connected to."""
    if spec.address:
        return
    num_cpus = os.cpu_count() or 1
    if spec.cpus_per_trial > num_cpus:
        raise ValueError(f"--cpus-per-trial: {spec.cpus_per_trial:g} is not allowed; this machine has {num_cpus} CPUs")
    if spec.gpus_per_trial > 0:
        import torch

        num_gpus = torch.cuda.device_count()
        if spec.gpus_per_trial > num_gpus:
            raise ValueError(f"--gpus-per-trial: {spec.gpus_per_trial:g} is not allowed; this machine has {num_gpus} GPUs")


def check_tracking(uri: str) -> None:
    """ValueError where ``uri`` is not a tracking URI, or its server does not answer within five seconds."""
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"tracking server {uri} does not answer: {reason}") from error
    elif not uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")):
        raise ValueError(f"--tracking: {uri!r} is not allowed; give http(s)://HOST:PORT or a database such as sqlite:///FILE")


def _provenance(fingerprint: str) -> dict[str, Any]:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "id": uuid.uuid4().hex,
        "created": round(time.time(), 3),
        "data": fingerprint,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


# -- the verbs --------------------------------------------------------------------------------------------------------


def launch(name: str, storage: Path, spec: SweepSpec, *, dry_run: bool = False) -> int:
    """Starts a sweep. Returns the exit code. ValueError for anything that a user can get wrong, before Ray starts."""
    folder = storage / check_name(name)
    if folder.exists():
        raise ValueError(f"sweep {name!r} exists in {storage}; go on with: {resume_command(folder)}")
    space = Space(spec)
    check_resources(spec)
    check_storage(storage)
    uri = tracking_uri(storage, spec.tracking)
    check_tracking(uri)
    dataset = default_recipe(spec, spec.method[0]).dataset()
    for line in describe(spec, space, dataset):
        print(line)
    if dry_run:
        return 0
    making = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=storage))
    try:
        making.chmod(0o755)
        sweep = Sweep(making, spec, _provenance(dataset.fingerprint))
        sweep.write()
        ledger = Ledger(sweep, create=True)
        for method in spec.method:
            params, moved = space.defaults(method, spec)
            ledger.enqueue(params)
            for line in moved:
                print(line)
        try:
            making.rename(folder)
        except OSError as error:
            raise ValueError(f"sweep {name!r} exists in {storage}; go on with: {resume_command(folder)}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return execute(Sweep.read(folder), SWEEP)


def describe(spec: SweepSpec, space: Space, dataset: Any) -> list[str]:
    """What is about to run, for the user to check: data, noise, network, defaults, ranges and rungs."""
    report = dataset.noise
    noise = f", realised rate {report.realised_rate:.4f}, labels {report.label_checksum[:12]}" if report else ""
    sizes = f"{len(dataset.train)} training, {len(dataset.validation.labels)} validation (noisy labels)"
    sizes += f", {len(dataset.test.labels)} test (clean labels)" if dataset.test else ""
    sizes += f", {len(dataset.trusted)} trusted (clean labels)" if dataset.trusted else ""
    lines = [f"data {spec.data}: {sizes}", f"noise {spec.noise} (seed {spec.noise_seed}){noise}; network {spec.model}"]
    rungs = spec.rungs()
    lines.append(f"{spec.trials} trials of {spec.epochs} epochs, ASHA rungs at {', '.join(map(str, rungs)) or 'none'}")
    left_out = {name for name, method in METHODS.items() if method.needs_trusted and not spec.trusted}
    if left_out and set(spec.method) == set(METHODS) - left_out:
        lines.append(
            f"without {', '.join(sorted(left_out))}, which also learns from clean labels: give their number with --trusted"
        )
    for method in spec.method:
        parameters = space.parameters[method]
        drawn = [f"{parameter.field} {parameter.range}" for parameter in parameters if parameter.range]
        fixed = [f"{parameter.field}={parameter.fixed}" for parameter in parameters if parameter.range is None]
        lines.append(f"{method}: searches {', '.join(drawn) or 'nothing'}; fixed {' '.join(fixed)}")
        late = {p.field: p.range.high if p.range else p.fixed for p in parameters if not (p.range and p.range.choices)}
        begins = first_epoch(space.begins(method, {k: v for k, v in late.items() if v is not None}), spec.epochs)
        unjudged = [rung for rung in rungs if rung <= begins]
        if unjudged and len(unjudged) == len(rungs):
            lines.append(f"{method} can begin as late as epoch {begins}: such a trial is never stopped early")
        elif unjudged:
            lines.append(f"{method} can begin as late as epoch {begins}: rungs up to then do not judge such a trial")
    return lines


def resume(name: str, storage: Path, changes: dict[str, Any]) -> int:
    """Goes on with a sweep: finishes it, extends it to more trials, or reports that nothing is left to do."""
    sweep = Sweep.find(storage, name)
    spec = dataclasses.replace(sweep.spec, **changes)
    check_resources(spec)
    check_storage(storage)
    fingerprint = default_recipe(spec, spec.method[0]).dataset().fingerprint
    if fingerprint != sweep.provenance["data"]:
        before = sweep.provenance["data"]
        raise ValueError(f"the data changed since {name!r} was launched: its checksum {before[:12]} is now {fingerprint[:12]}")
    sweep = Sweep(sweep.folder, spec, sweep.provenance)
    if changes:
        with driver_lock(sweep.folder):
            sweep.write()
    try:
        check_tracking(tracking_uri(storage, spec.tracking))
    except ValueError as error:
        print(f"warning: {error}; the runs are brought up to date when it is back", file=sys.stderr)
    return execute(sweep, SWEEP)


def retrain(name: str, storage: Path, *, top: int, num_seeds: int) -> int:
    """Trains the best configurations again, on the full budget, each with its own initialisation, order and noise per seed."""
    sweep = Sweep.find(storage, name)
    check_resources(sweep.spec)
    check_storage(storage)
    best = [record for record in Ledger(sweep, read_only=True).leaderboard() if record.state is TrialState.COMPLETE][:top]
    if not best:
        raise ValueError(f"sweep {name!r} has no complete trial yet; finish it with: {resume_command(sweep.folder)}")
    with driver_lock(sweep.folder):
        (sweep.folder / RETRAIN).mkdir(exist_ok=True)
        enqueue_retraining(Ledger(sweep, RETRAIN, create=True), best, num_seeds)
    return execute(sweep, RETRAIN)


def enqueue_retraining(ledger: Ledger, best: list[Record], num_seeds: int) -> None:
    """Adds the pairs of a configuration and a seed that a retraining lacks; ``best`` comes first in its reports."""
    attrs = [trial.user_attrs for trial in ledger.study.get_trials(deepcopy=False)]
    known = {(held["source"], held["seed"]) for held in attrs}
    for seed in range(num_seeds):
        for rank, record in enumerate(best, 1):
            if (record.number, seed) not in known:
                pair = {"source": record.number, "rank": rank, "seed": seed, "noise_draw": seed + 1}
                ledger.enqueue(record.params, pair)


def resume_command(folder: Path, kind: str = SWEEP) -> str:
    """The command line that goes on with a sweep."""
    verb = "resume" if kind == SWEEP else "retrain"
    place = "" if folder.parent == Path("runs").resolve() else f" --storage {folder.parent}"
    return f"python search.py {verb} {folder.name}{place}"


def stop(name: str, storage: Path, patience: float = 30.0) -> int:
    """Asks the driver of a running sweep to stop, as Ctrl-C does, and waits for it."""
    folder = Sweep.find(storage, name).folder
    request = folder / STOP_REQUEST
    deadline = time.monotonic() + patience
    asked = False
    while time.monotonic() < deadline:
        try:
            with driver_lock(folder):
                request.unlink(missing_ok=True)
            print(f"stopped; go on with: {resume_command(folder)}" if asked else f"sweep {name!r} is not running")
            return 0
        except ValueError:
            request.touch()
            asked = True
            time.sleep(0.3)
    raise ValueError(f"sweep {name!r} did not stop within {patience:.0f} s")


# -- running ----------------------------------------------------------------------------------------------------------


def execute(sweep: Sweep, kind: str) -> int:
    """Runs what is left of a study. Returns 0, 1 where the sweep stopped itself, 130 or 143 where it was interrupted."""
    with driver_lock(sweep.folder):
        ledger = Ledger(sweep, kind)
        total = sweep.spec.trials if kind == SWEEP else len(ledger.study.get_trials(deepcopy=False))
        with Display(ledger, total) as display:
            desk = Desk(ledger, total=total, concurrent=0, on_event=display.event)
            tracker = Tracker(ledger, tracking_uri(sweep.storage, sweep.spec.tracking))
            with Interruption(desk, sweep.folder / STOP_REQUEST) as interruption, contextlib.suppress(Interrupted):
                if desk.num_counted() < total or desk.waiting:
                    executor.run(desk, sweep.spec, interruption)
                interruption.settle()
                tracker.close(spent=desk.num_counted() >= total and not ledger.unfinished())
    if tracker.problem:
        print(f"warning: MLflow is behind the ledger ({tracker.problem}); a resume brings it up to date", file=sys.stderr)
    if interruption.signal:
        print(f"interrupted with {ledger.count(TrialState.RUNNING)} trials in progress; go on with:")
        print(resume_command(sweep.folder, kind), flush=True)
        return 128 + interruption.signal
    if desk.problem:
        print(f"error: {desk.problem}; go on with: {resume_command(sweep.folder, kind)}", file=sys.stderr)
        return 1
    return 0
