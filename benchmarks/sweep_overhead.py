"""What a sweep costs beyond training: ours, the same work without Ray, and the stock stack, on digits with two slots.

    python benchmarks/sweep_overhead.py [--repeats 5] [--trials 24] [--epochs 30] [--out FILE.json]

Contenders, each in a fresh process, all of them in every repeat, in an order that rotates:

ours            ``search.py launch`` with ASHA and MLflow.
ideal           the (trial, epochs) that ours has just run, in the same order, by one process per slot that takes the next piece
                of work from one list: no Ray, no search, no record.
stock defaults  the same trainer as a function that reports every epoch, under Ray's ``OptunaSearch``, ``ASHAScheduler`` and
                ``MLflowLoggerCallback``, all else as Tune has it.
stock tuned     the same with ``reuse_actors=True`` and ``max_concurrent_trials``.

The rule of timing, one for all: ``wall`` lasts from the start of the first epoch to the end of the last one, by the clock
readings that the trainer takes. What comes before (imports, ``ray.init``, the first process) is ``start``, what follows until
Ray is down is ``finish``: both are shown, neither is compared. Whatever starts after the first epoch is part of the wall: a
process per trial, and a second slot that opens late. MLflow stores are copies of one that was migrated. A trial has one core,
one thread and the priority of Ray's workers, and test accuracy is measured at the same epochs everywhere.

The stock scheduler stops other trials than ours, so contenders are compared by epochs trained per second of wall; walls are
shown too. The slots' time is divided into ``busy`` (inside epochs), ``within`` (between the epochs of a trial: reports and
checkpoints) and the rest (between trials, and slots not yet or no longer used); ``epoch`` is the mean length of an epoch, which
a driver that takes the trials' cores makes longer. Driver figures are per epoch recorded, from the first result to the last:
``calls`` wall inside searcher and scheduler, ``logs`` wall inside MLflow's callback (ours has a thread instead), ``loop`` wall
of Tune's whole loop less its waiting, ``main`` and ``all`` processor time of the main thread and of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SLOTS = 2
CONTENDERS = {"ours": "ours", "ideal": "ideal", "defaults": "stock defaults", "tuned": "stock tuned"}
ROTATION = [["ours", "ideal"], ["defaults"], ["tuned"]]  # the ideal follows ours, whose work it repeats
NICENESS = 15  # of Ray's workers, by default
COLUMNS = {"trials": 0, "epochs": 0, "start": 1, "finish": 1, "busy": 2, "within": 2, "epoch": 0}  # with decimals
DRIVER = ("calls", "logs", "loop", "main", "all")
Stamp = tuple[str, float, float]  # trial, start and end of one epoch in seconds since 1970


# -- in the driver ----------------------------------------------------------------------------------------------------


class Watch:
    """Times a driver from outside: what it wraps is otherwise unchanged."""

    def __init__(self) -> None:
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.stamps: list[Stamp] = []
        self.readings: list[dict[str, float]] = []

    def time(self, owner: Any, name: str, key: str, after: Callable[..., None] = lambda *arguments: None) -> None:
        """Adds the wall time of ``owner.name`` to ``key``; ``after`` is called with the same positional arguments."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                self.wall[key] += time.perf_counter() - began
                after(*arguments)

        setattr(owner, name, timed)

    def attach(self, scheduler: type, searcher: type, stamps: Callable[[Any, dict[str, Any]], list[Stamp]]) -> None:
        """Wraps the doors and Tune's loop. ``stamps`` reads the epochs off one result of a Tune trial."""
        import ray
        from ray.tune.execution.tune_controller import TuneController

        def seen(_scheduler: Any, _controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self.stamps += stamps(trial, result)

        self.time(scheduler, "on_trial_result", "calls", seen)
        for name in ("suggest", "on_trial_result", "on_trial_complete"):
            self.time(searcher, name, "calls")
        self.time(ray, "wait", "wait")
        self.time(TuneController, "step", "step", self._read)

    def _read(self, _controller: Any) -> None:
        """A reading after each turn of the loop that brought epochs."""
        if len(self.stamps) > (self.readings[-1]["epochs"] if self.readings else 0):
            wall = {"calls": self.wall["calls"], "logs": self.wall["logs"], "loop": self.wall["step"] - self.wall["wait"]}
            self.readings.append({"epochs": len(self.stamps), "main": time.thread_time(), "all": time.process_time()} | wall)

    def driver(self) -> dict[str, float]:
        """Milliseconds per epoch between the first and the last reading."""
        first, last = self.readings[0], self.readings[-1]
        return {key: 1000 * (last[key] - first[key]) / (last["epochs"] - first["epochs"]) for key in DRIVER}


def run_ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import search
    from tune.cluster.scheduler import LedgerScheduler
    from tune.cluster.searcher import LedgerSearcher
    from tune.search.ledger import Ledger
    from tune.search.recipes import of_trial
    from tune.store.stored_sweep import Sweep

    def stamps(trial: Any, result: dict[str, Any]) -> list[Stamp]:
        return [(trial.trial_id, e["time"] - e["metrics"]["seconds"], e["time"]) for e in result["epochs"]]

    watch = Watch()
    watch.attach(LedgerScheduler, LedgerSearcher, stamps)
    flags = ["--method=alr", f"--trials={options.trials}", f"--epochs={options.epochs}", f"--seed={options.seed}"]
    code = search.main(["launch", "sweep", *flags, f"--concurrent={SLOTS}", f"--storage={folder}"])
    ended = time.time()
    if code:
        raise RuntimeError(f"the sweep ended with code {code}")
    ledger = Ledger(Sweep.find(folder, "sweep"), read_only=True)
    work = [
        {"recipe": dataclasses.asdict(of_trial(ledger, record)), "epochs": record.epochs, "rungs": ledger.sweep.spec.rungs()}
        for record in sorted(ledger.records.values(), key=lambda record: record.number)
    ]
    return {"stamps": watch.stamps, "ended": ended, "driver": watch.driver(), "work": work}


def run_stock(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from tune.report.tracking import tracking_uri
    from tune.search.recipes import from_flags
    from tune.search.space import Space
    from tune.spec import make_spec

    fields = {"method": ("alr",), "epochs": options.epochs, "seed": options.seed}
    spec, recipe = make_spec(fields), dataclasses.asdict(from_flags(fields))
    rungs = spec.rungs()
    space = {
        parameter.field: (tune.loguniform if parameter.range.log else tune.uniform)(parameter.range.low, parameter.range.high)
        for parameter in Space(spec).parameters["alr"]
        if parameter.range
    }

    def train(config: dict[str, Any]) -> None:
        import torch

        from training.trial_run import Recipe, TrialRun

        torch.set_num_threads(1)
        for record in TrialRun(Recipe(**{**recipe, "values": {**recipe["values"], **config}}), rungs=rungs):
            tune.report({"objective": record.objective, "epoch": record.epoch, "ended": record.time, **record.metrics})

    def stamps(trial: Any, result: dict[str, Any]) -> list[Stamp]:
        return [(trial.trial_id, result["ended"] - result["seconds"], result["ended"])]

    watch = Watch()
    watch.attach(ASHAScheduler, OptunaSearch, stamps)
    for name in ("log_trial_start", "log_trial_result", "log_trial_end"):
        watch.time(MLflowLoggerCallback, name, "logs")
    ray.init(address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    goal: dict[str, Any] = {"metric": "objective", "mode": "max"}
    asha = {"max_t": options.epochs, "grace_period": min([*rungs, options.epochs]), "reduction_factor": spec.reduction_factor}
    choices: dict[str, Any] = {"reuse_actors": True, "max_concurrent_trials": SLOTS} if options.contender == "tuned" else {}
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(seed=options.seed, **goal),
            scheduler=ASHAScheduler(**goal, **asha),
            num_samples=options.trials,
            **choices,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"),
            callbacks=[MLflowLoggerCallback(tracking_uri=tracking_uri(folder, ""), experiment_name="sweep")],
        ),
    ).fit()
    ray.shutdown()
    ended = time.time()
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed")
    return {"stamps": watch.stamps, "ended": ended, "driver": watch.driver()}


# -- without a driver -------------------------------------------------------------------------------------------------


def replay(work: list[dict[str, Any]], barrier: Any, position: Any, stamps: Any) -> None:
    """One slot: takes the next piece of work until none is left. Imports and data are there before the clock starts."""
    import torch

    from training.trial_run import Recipe, TrialRun

    torch.set_num_threads(1)
    os.nice(NICENESS)

    def build(piece: dict[str, Any]) -> TrialRun:
        return TrialRun(Recipe(**piece["recipe"]), rungs=piece["rungs"])

    build(work[0])
    done: list[Stamp] = []
    barrier.wait(600)
    while True:
        with position.get_lock():
            index, position.value = position.value, position.value + 1
        if index >= len(work):
            break
        experiment = build(work[index])
        for _ in range(work[index]["epochs"]):
            record = experiment.advance()
            done.append((str(index), record.time - record.metrics["seconds"], record.time))
    stamps.send(done)


def run_ideal(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    work = json.loads((folder / "work.json").read_text())
    context = multiprocessing.get_context("spawn")
    barrier, position = context.Barrier(SLOTS), context.Value("i", 0)
    readers = []
    for _ in range(SLOTS):
        reader, writer = context.Pipe(duplex=False)
        context.Process(target=replay, args=(work, barrier, position, writer)).start()
        writer.close()
        readers.append(reader)
    collected = [stamp for reader in readers for stamp in reader.recv()]  # EOFError where a slot died
    return {"stamps": collected, "ended": time.time()}


# -- measuring and telling --------------------------------------------------------------------------------------------


def measure(contender: str, folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The figures of one contender. RuntimeError with the end of its output where it fails."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    command = [sys.executable, __file__, f"--trials={options.trials}", f"--epochs={options.epochs}", f"--seed={seed}"]
    command += [f"--contender={contender}", f"--folder={folder}"]
    environment = os.environ | quiet | {"PYTHONPATH": paths}
    began = time.time()
    with (folder / "output.txt").open("w") as output:
        code = subprocess.call(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    if code:
        raise RuntimeError(f"{CONTENDERS[contender]} failed:\n{(folder / 'output.txt').read_text()[-4000:]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result | summary(result["stamps"], began, result["ended"])


def summary(stamps: list[Stamp], began: float, ended: float) -> dict[str, Any]:
    """The figures that every contender has, in seconds, epochs per second, shares of the slots' time and milliseconds."""
    first, last = min(start for _, start, _ in stamps), max(end for _, _, end in stamps)
    wall, inside = last - first, sum(end - start for _, start, end in stamps)
    trials: defaultdict[str, list[float]] = defaultdict(list)
    for trial, start, end in stamps:
        trials[trial] += [start, end]
    within = sum(max(moments) - min(moments) for moments in trials.values()) - inside
    figures = {"trials": len(trials), "epochs": len(stamps), "epoch": 1000 * inside / len(stamps)}
    shares = {"busy": inside / (SLOTS * wall), "within": within / (SLOTS * wall)}
    return figures | shares | {"wall": wall, "start": first - began, "finish": ended - last, "rate": len(stamps) / wall}


def one_repeat(number: int, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All contenders once, and ours against the others."""
    figures: dict[str, Any] = {"load": os.getloadavg()[0]}
    turn = number % len(ROTATION)
    for contender in [contender for group in ROTATION[turn:] + ROTATION[:turn] for contender in group]:
        with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as name:
            folder = Path(name)
            shutil.copy(store, folder / "mlflow.db")
            if contender == "ideal":
                (folder / "work.json").write_text(json.dumps(figures["ours"]["work"]))
            figures[contender] = measure(contender, folder, options, options.seed + number)
    figures["fraction"] = figures["ideal"]["wall"] / figures["ours"]["wall"]
    for stock in ("tuned", "defaults"):
        figures[f"rate over {stock}"] = figures["ours"]["rate"] / figures[stock]["rate"]
        figures[f"wall over {stock}"] = figures[stock]["wall"] / figures["ours"]["wall"]
    return figures


def table(repeats: list[dict[str, Any]]) -> str:
    """Medians, with the smallest and the largest where it matters."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    lines = [f"{'':15}{'wall':>21}{'epochs/s':>21}" + "".join(f"{name:>8}" for name in (*COLUMNS, *DRIVER))]
    for key, name in CONTENDERS.items():
        mine = [repeat[key] for repeat in repeats]
        line = f"{name:15}" + "".join(f"{spread([m[column] for m in mine]):>21}" for column in ("wall", "rate"))
        line += "".join(f"{statistics.median(m[column] for m in mine):8.{digits}f}" for column, digits in COLUMNS.items())
        parts = DRIVER if "driver" in mine[0] else ()
        lines.append(line + "".join(f"{statistics.median(m['driver'][part] for m in mine):8.1f}" for part in parts))
    lines.append("seconds; epoch and the driver's calls, logs, loop, main, all in milliseconds, the latter per epoch recorded")
    lines.append(f"fraction of ideal: {spread([repeat['fraction'] for repeat in repeats])}")
    for stock in ("tuned", "defaults"):
        by_rate, by_wall = (spread([repeat[f"{kind} over {stock}"] for repeat in repeats]) for kind in ("rate", "wall"))
        lines.append(f"over stock {stock}: {by_rate} times the epochs per second; its wall is {by_wall} times ours")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sweep costs beyond training, beside the ideal and the stock stack.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat's searches; later ones count up")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        runner = {"ours": run_ours, "ideal": run_ideal}.get(options.contender, run_stock)
        (options.folder / "result.json").write_text(json.dumps(runner(options.folder, options)))
        return
    repeats = []
    with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as name:
        store = Path(name) / "mlflow.db"
        migrate = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{store}').search_experiments()"
        subprocess.run([sys.executable, "-c", migrate], capture_output=True, check=True)
        for number in range(options.repeats):
            repeats.append(one_repeat(number, store, options))
            print(f"repeat {number + 1}: {repeats[-1]['fraction']:.2f} of ideal", file=sys.stderr, flush=True)
    print(table(repeats))
    if options.out:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        asked = {name: getattr(options, name) for name in ("trials", "epochs", "seed")}
        options.out.write_text(json.dumps({"machine": machine, **asked, "repeats": repeats}, indent=1))


if __name__ == "__main__":
    main()
