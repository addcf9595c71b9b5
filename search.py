"""The command line: launch, resume, best, retrain, train, list, stop, ui.

Every verb imports what it needs when it runs, so that help and refusals come at once: torch, Ray and MLflow take seconds each.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from errors import UserError
from tune.spec import EXECUTION, FIELDS, READING, make_spec, read_field, read_yaml

if TYPE_CHECKING:
    from tune.execution import Outcome
    from tune.search.ledger import Ledger

EXAMPLES = """examples:
  python search.py launch first --method alr --trials 24        a sweep over ALR on digits with 40 % symmetric noise
  python search.py resume first --trials 48                     go on after an interruption, or extend
  python search.py best first                                   the leaderboard, also while it runs
  python search.py retrain first --top 3 --seeds 5              the best configurations again, over seeds
  python search.py ui                                           the runs in MLflow's pages
"""
LEDGER = "postgresql://USER@HOST:PORT/DATABASE instead of files in the storage (default: $NOISY_LABEL_LEDGER)"
DOWNLOAD = "fetch the data set where it is missing (cifar10, cifar100)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def add_spec_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds flags for fields of SweepSpec; the spec itself reads and checks their values."""
    for name in names:
        flag, meaning = "--" + name.replace("_", "-"), FIELDS[name].metadata["meaning"]
        default = FIELDS[name].default
        shown = f" (default: {default})" if isinstance(default, (int, float)) and default else ""
        if name in ("set", "range"):
            parser.add_argument(flag, action="append", metavar="NAME=...", help=meaning)
        elif FIELDS[name].type == "bool":
            parser.add_argument(flag, action="store_const", const="true", help=meaning)
        else:
            parser.add_argument(flag, metavar=name.split("_")[0].upper(), help=meaning + shown)


def build_parser() -> Parser:
    parser = Parser(
        prog="search.py",
        description="Hyperparameter search for learning with noisy labels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def add(verb: str, help_text: str, named: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(verb, help=help_text, description=help_text)
        if named:
            sub.add_argument("name", metavar="NAME", help="the sweep")
        sub.add_argument("--storage", help="folder of the sweeps, or s3://BUCKET/... with --ledger (default: runs)")
        sub.add_argument("--ledger", metavar="URL", default=os.environ.get("NOISY_LABEL_LEDGER", ""), help=LEDGER)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
        return sub

    flags = [name for name, f in FIELDS.items() if f.metadata["flag"]]
    sub = add("launch", "start a sweep")
    sub.add_argument(
        "--spec", metavar="FILE.yaml", help="fields of the sweep as KEY: VALUE, or an old sweep's sweep.yaml; flags win over it"
    )
    sub.add_argument("--from", dest="old", metavar="OLD", help="run the best configurations of an earlier sweep first")
    sub.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    sub.add_argument("--download", action="store_true", help=DOWNLOAD)
    add_spec_flags(sub, flags)
    sub = add("resume", "go on with a sweep: finish it, or extend it with a larger --trials, --hours or --gpu-hours")
    add_spec_flags(sub, ["trials", *(name for name in flags if name in EXECUTION)])
    sub = add("best", "the leaderboard, also while the sweep runs")
    sub.add_argument("--top", default="10", help="how many rows (default: 10)")
    sub.add_argument("--json", action="store_true", help="every trial as JSON, best first")
    sub.add_argument("--rungs", action="store_true", help="what stands at each rung of ASHA")
    sub = add("retrain", "train the best configurations again, over seeds, and report clean test accuracy")
    sub.add_argument("--top", default="3", help="how many configurations (default: 3)")
    sub.add_argument("--seeds", default="3", help="seeds of each (default: 3)")
    sub.add_argument("--json", action="store_true", help="print the table as JSON")
    sub = add("train", "one run, without Ray: a best_config.yaml, or a method and its values", named=False)
    sub.add_argument("config", nargs="?", metavar="best_config.yaml", help="a configuration that a sweep wrote")
    sub.add_argument("--download", action="store_true", help=DOWNLOAD)
    train_flags = ["method", "data", *READING, "noise", "labels_are_clean", "model", "precision", "compile", "epochs"]
    add_spec_flags(sub, [*train_flags, "trusted", "seed", "set"])
    add("list", "the sweeps in the storage", named=False)
    add("stop", "stop a running sweep, as Ctrl-C does")
    sub = add("ui", "MLflow's pages on this machine", named=False)
    sub.add_argument("--port", default="5000", help="port on 127.0.0.1 (default: 5000)")
    return parser


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Reads and checks the fields of the spec that were given as flags."""
    values = {name: v for name, v in vars(options).items() if name in FIELDS and v is not None}
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():  # a shell's variable that is not set
            raise UserError(f"--{name.replace('_', '-')}: {value!r} is not allowed; give a value, or leave the flag out")
    return {name: read_field(name, value) for name, value in values.items()}


def whole_number(flag: str, text: str, low: int, high: int = 10**9) -> int:
    """Reads an integer. UserError where ``text`` is none from ``low`` to ``high``."""
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UserError(f"{flag}: {text!r} is not allowed; it must be an integer from {low} to {high}")
    return int(text)


def launch(options: argparse.Namespace) -> int:
    values, flags = read_yaml(Path(options.spec), print) if options.spec else {}, given(options)
    given_here = {**flags.get("set", {}), **flags.get("range", {})}
    for name in ("set", "range"):  # a flag wins over the file, hyperparameter by hyperparameter
        from_file = {key: value for key, value in values.get(name, {}).items() if key not in given_here}
        flags[name] = from_file | flags.get(name, {})
    spec = make_spec(values | flags)
    from tune import sweep

    how = {"old": options.old, "dry_run": options.dry_run, "download": options.download}
    outcome = sweep.launch(options.name, options.store, spec, **how)
    return finish(outcome, leaderboard_of(10))


def resume(options: argparse.Namespace) -> int:
    from tune import sweep

    outcome = sweep.resume(options.name, options.store, given(options))
    return finish(outcome, leaderboard_of(10))


def finish(outcome: Outcome, table: Callable[[Ledger], str]) -> int:
    """Prints the table after a run, then what is left to say, also where a database has gone. Returns the exit code."""
    try:
        if outcome.ledger:
            print(table(outcome.ledger), flush=True)
    except OSError as error:
        print(f"warning: the table cannot be shown: {error}", file=sys.stderr)
    return outcome.say()


def retrain(options: argparse.Namespace) -> int:
    top, num_seeds = whole_number("--top", options.top, 1), whole_number("--seeds", options.seeds, 1, 1000)
    from tune import sweep
    from tune.report.leaderboard import retrain_rows, retrain_text

    if not options.json:
        return finish(sweep.retrain(options.name, options.store, top=top, num_seeds=num_seeds), retrain_text)
    with contextlib.redirect_stdout(sys.stderr):  # the JSON stands alone
        outcome = sweep.retrain(options.name, options.store, top=top, num_seeds=num_seeds)
    return finish(outcome, lambda ledger: json.dumps(retrain_rows(ledger), indent=1))


def best(options: argparse.Namespace) -> int:
    top = whole_number("--top", options.top, 1)
    from tune.report.leaderboard import noted_runs, rows, rungs
    from tune.search.ledger import Ledger
    from tune.store.stored_sweep import Sweep

    ledger = Ledger(Sweep.find(options.store, options.name), read_only=True)
    if not (options.json or options.rungs):
        print(leaderboard_of(top)(ledger))
        return 0
    board = rows(ledger, noted_runs(ledger))
    if options.rungs:
        print(json.dumps({"rungs": rungs(ledger), "trials": board} if options.json else rungs(ledger), indent=1))
    else:
        print(json.dumps(board, indent=1))
    return 0


def leaderboard_of(top: int) -> Callable[[Ledger], str]:
    """Writes a leaderboard of the ``top`` best trials."""
    from tune.report.leaderboard import leaderboard_text, noted_runs

    return lambda ledger: leaderboard_text(ledger, noted_runs(ledger), top)


def train(options: argparse.Namespace) -> int:
    from training.fit import Diverged
    from tune.search.recipes import from_flags, from_yaml, prepare

    flags = given(options)
    if options.config and flags:
        raise UserError(f"--{next(iter(flags))} cannot be combined with {options.config}; the file says it all")
    if options.config:
        recipe = from_yaml(Path(options.config))
        prepare(recipe, download=options.download)
    else:
        recipe = from_flags(flags, download=options.download)
    import torch

    from training.trial_run import TrialRun
    from tune.checks import check_compiler

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as a trial with one CPU: sums in another order are other numbers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_compiler(recipe.compile, device)
    experiment = TrialRun(recipe, device=device)
    report = recipe.dataset().noise
    noise = f"noise {recipe.noise}{f' ({report})' if report else ''}"
    print(f"{recipe.method} on {recipe.data}, {noise}, network {recipe.model}, {recipe.epochs} epochs")
    try:
        for record in experiment:
            test = record.metrics.get("test/accuracy")
            tail = f"  test {100 * test:.2f}" if test is not None else ""
            loss, val = record.metrics["train/loss"], 100 * record.metrics["val/accuracy"]
            print(f"epoch {record.epoch:4d}  loss {loss:.4f}  val {val:.2f}{tail}", flush=True)
    except Diverged as error:
        print(f"error: the run diverged: {error}", file=sys.stderr)
        return 1
    print(f"objective (noisy validation accuracy, mean over the last tenth): {100 * experiment.history[-1].objective:.2f}")
    return 0


def list_sweeps(options: argparse.Namespace) -> int:
    from tune.report.leaderboard import sweep_lines

    for line in sweep_lines(options.store):
        print(line)
    return 0


def stop(options: argparse.Namespace) -> int:
    from tune import commands

    return commands.stop(options.name, options.store)


def ui(options: argparse.Namespace) -> int:
    port = whole_number("--port", options.port, 1, 65535)
    from training.locations import Remote
    from tune.report.mlflow_database import prepare_for_pages
    from tune.report.tracking import DATABASE, quiet, tracking_uri

    storage = options.store.storage
    if isinstance(storage, Remote) or not (storage / DATABASE).is_file():
        raise UserError(f"no MLflow database in {storage}; launch a sweep first, or open the server it was tracked on")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise UserError(f"--port: {port} cannot be had on 127.0.0.1: {error.strerror}; choose another") from error
    prepare_for_pages(storage, print)
    quiet()
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # workers for chat evaluations: not needed here
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri(storage, "")]
    os.execv(sys.executable, [*server, "--host", "127.0.0.1", "--port", str(port)])


VERBS = {
    "launch": launch,
    "resume": resume,
    "best": best,
    "retrain": retrain,
    "train": train,
    "list": list_sweeps,
    "stop": stop,
    "ui": ui,
}

RUNNING = {"launch", "resume", "retrain"}  # verbs that go on when nobody reads their output any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    An error of the user's, or of their system (a full disk, a missing file), is one line, exit code 2. Anything else is an
    error of ours: its traceback is shown, exit code 1.
    """
    debug = False
    try:
        options = build_parser().parse_args(arguments)
        debug = options.debug
        from tune.store.locate import open_store

        options.store = open_store(options.storage, options.ledger)
        code = VERBS[options.verb](options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output went away; a sweep's output outlasts it
        return 128 + signal.SIGPIPE  # as for a process that the signal ends
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()  # the error is the last line, also in a file that holds both
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:  # noqa: BLE001  the process's boundary: it ends by leave(), which Python's own handling would pass by
        traceback.print_exc()
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process without taking the interpreter apart, in which the threads that Ray leaves behind crash now and then."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def open_streams() -> None:
    """Puts the null device where the caller has closed standard input, output or error: no file of ours takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest number that is free
            os.set_inheritable(number, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    open_streams()
    if RUNNING.intersection(sys.argv[1:2]):
        from tune.report.output import outlast_readers

        outlast_readers()
    leave(main())
