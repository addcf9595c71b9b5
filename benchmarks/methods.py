"""Every method under the same budget: its own search on noisy labels, then the winner over seeds on clean test data.

    python benchmarks/methods.py --storage FOLDER [--methods all] [--noises symmetric:0.2,...] [--trials 16] [--epochs 30]
                                 [--seeds 5] [--trusted 50] [--set NAME=VALUE ...] [--out docs/results.json]

For each noise and method: a search with this project's sampler and ASHA over noisy validation labels; then the best complete
trial by *noisy* validation accuracy is trained again over seeds, initialisation, order and noise drawn anew, the same for all
methods. Beside it the oracle: the complete trial with the best *clean test* accuracy, which nobody could have chosen, over the
same seeds. Methods that learn from clean labels, too, get ``--trusted`` of them; no other method does. ``--set`` fixes what
would be searched, such as a published setting; such a row stands beside the one without.

Trials run in two processes that live as long as the benchmark, without Ray, whose start would take longer than most of these
searches. Each search is a sweep on disk: started again, the benchmark goes on where it was. ``--out`` gets a row for each
noise, budget, method and setting as it is finished; ``docs/results.md`` is made of it (``make docs``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from optuna.trial import TrialState  # noqa: E402  the checkout is not installed

from methods import METHODS  # noqa: E402
from training.trial_run import EpochRecord  # noqa: E402
from tune.report.leaderboard import mean_and_error, retrain_rows  # noqa: E402
from tune.search.coordinator import FINISHED, Coordinator  # noqa: E402
from tune.search.ledger import RETRAIN, SWEEP, Ledger, Record  # noqa: E402
from tune.search.recipes import dataset as dataset_of  # noqa: E402
from tune.spec import SweepSpec, make_spec, read_pairs  # noqa: E402
from tune.store.folder import FolderFiles  # noqa: E402
from tune.store.stored_sweep import Sweep  # noqa: E402
from tune.sweep import enqueue_retraining  # noqa: E402

SLOTS = 2
NOISES = "symmetric:0.2,symmetric:0.4,symmetric:0.6,asymmetric:0.4"


# -- trials without Ray -----------------------------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    """A slot's process: takes a trial's configuration or None for "go on"; answers with what the trial reports."""
    from tune.cluster.trial import TrialActor

    actor = TrialActor.__new__(TrialActor)  # the trial itself, without Tune's files around it
    while (config := pipe.recv()) != "end":
        if config is not None:
            actor.reset_config(config)
        pipe.send(actor.step())


@contextmanager
def slots() -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(SLOTS)]
    processes = [context.Process(target=serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    yield [ours for ours, _ in pairs]
    for ours, _ in pairs:
        ours.send("end")
    for process in processes:
        process.join()


def run(ledger: Ledger, total: int, pipes: list[Connection]) -> None:
    """Runs what is left of a study. RuntimeError where a trial fails."""
    coordinator, turn = Coordinator(ledger, total=total, concurrent=SLOTS), threading.Lock()

    def work(slot: int) -> None:
        for number in range(10**9):
            key = f"{slot}-{number}"
            with turn:
                record = coordinator.next(key)
                config = {"trial": json.dumps(coordinator.config(record))} if isinstance(record, Record) else None
            if record == FINISHED:
                return
            if config is None:
                time.sleep(0.02)
                continue
            keep = True
            while keep:
                pipes[slot].send(config)
                result, config = pipes[slot].recv(), None
                if result["failure"]:
                    raise RuntimeError(result["failure"])
                epochs = [EpochRecord(**epoch) for epoch in result["epochs"]]
                with turn:
                    keep = coordinator.result(key, epochs, failure=None, diverged=result["diverged"])
            with turn:
                coordinator.released(key)

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(work, range(SLOTS)))


# -- one method under one noise ---------------------------------------------------------------------------------------


def opened(folder: Path, spec: SweepSpec) -> Sweep:
    """The sweep in ``folder``, made if there is none."""
    if not (folder / "sweep.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        dataset = dataset_of(spec)
        provenance = {"id": uuid.uuid4().hex, "created": time.time(), "data": dataset.fingerprint, "commit": "benchmark"}
        sweep = Sweep(folder, spec, provenance, FolderFiles(folder))
        ledger = Ledger(sweep, create=True)
        ledger.enqueue(ledger.space.defaults(spec.method[0], spec, dataset.num_classes)[0])
        sweep.write()
    return Sweep.read(folder)


def examined(method: str, noise: str, options: argparse.Namespace, pipes: list[Connection]) -> dict[str, Any]:
    """Search and retraining of one method, as a row of the results."""
    trusted = options.trusted if METHODS[method].needs_trusted else 0
    fields = {"trials": options.trials, "epochs": options.epochs, "seed": options.seed, "trusted": trusted}
    spec = make_spec({"method": (method,), "noise": noise, "set": read_pairs("set", options.set), **fields})
    folder = "-".join([method, spec.noise.replace(":", "-"), str(spec.epochs), *options.set])
    sweep = opened(options.storage / folder, spec)
    search = Ledger(sweep, SWEEP)
    run(search, spec.trials, pipes)
    complete = [record for record in search.leaderboard() if record.state is TrialState.COMPLETE]
    winner = complete[0]
    oracle = max(complete, key=lambda record: record.summary["test_accuracy"])
    sweep.files.add_part(RETRAIN)
    enqueue_retraining(Ledger(sweep, RETRAIN, create=True), [winner, oracle][: 1 + (oracle is not winner)], options.seeds)
    again = Ledger(sweep, RETRAIN)
    run(again, len(again.study.get_trials(deepcopy=False)), pipes)
    by_source = {row["source"]: row for row in retrain_rows(again)}
    return {
        "method": method,
        "noise": spec.noise,
        "trials": spec.trials,
        "budget": spec.epochs,
        "trusted": trusted,
        "set": options.set,
        "validation": winner.value,
        "by_seed": by_source[winner.number]["by_seed"],
        "oracle_by_seed": by_source[oracle.number]["by_seed"],
        "params": by_source[winner.number]["params"],
        "epochs": sum(record.epochs for record in search.records.values()),
        "seconds": round(sum(record.seconds for record in search.records.values()), 1),
        "stopped": search.count(TrialState.PRUNED),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="folder of the sweeps; the benchmark goes on from there")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--noises", default=NOISES)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trusted", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, help="JSON file of rows, kept up to date")
    options = parser.parse_args()
    options.storage = options.storage.resolve()
    methods = list(METHODS) if options.methods == "all" else options.methods.split(",")
    with slots() as pipes:
        for noise in options.noises.split(","):
            for method in methods:
                row = examined(method, noise, options, pipes)
                mean, error = mean_and_error(list(row["by_seed"].values()))
                label = " ".join([method, *options.set])
                print(f"{noise:16s} {label:16s} {100 * mean:6.2f} +- {100 * error:.2f}  {row['seconds']:.0f} s", flush=True)
                if options.out:
                    write(options.out, row)


def write(path: Path, row: dict[str, Any]) -> None:
    """Puts a row into the file, in place of an earlier one of the same noise, budget, method and setting."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old[key] != row[key] for key in ("noise", "budget", "method", "set"))]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
