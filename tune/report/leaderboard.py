"""What a sweep found, for people and for programs: leaderboard, best configuration, plots."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from optuna.trial import TrialState

from errors import UserError
from tune.search.budget import HOUR, Usage, short_number
from tune.search.ledger import SWEEP, Ledger, Record
from tune.search.rungs import Rungs
from tune.store.base import SweepStore
from tune.store.stored_sweep import Sweep

NOTES = "tracker.jsonl"  # in a sweep's folder: which of MLflow's runs is which trial's


def noted_runs(ledger: Ledger) -> dict[int, str]:
    """MLflow's run id of each trial, as far as they were noted."""
    return {note["trial"]: note["run"] for note in ledger.lines(NOTES).read() if "trial" in note}


def rows(ledger: Ledger, runs: Mapping[int, str], records: Sequence[Record] | None = None) -> list[dict[str, Any]]:
    """The leaderboard, best first, as ``best --json`` prints it: ``value`` is noisy validation accuracy. Of ``records``, if
    they are given: a sweep of thousands need not be written out for the few that are shown."""
    return [_row(record, runs.get(record.number)) for record in (ledger.leaderboard() if records is None else records)]


def _row(record: Record, run_id: str | None) -> dict[str, Any]:
    extra: dict[str, Any] = {key: record.attrs[key] for key in ("source", "seed") if key in record.attrs}
    return {
        "trial": record.number,
        "method": record.method,
        "state": record.status,
        "value": record.value,
        "epochs": record.epochs,
        "seconds": round(record.seconds, 3),
        "params": {name: value for name, value in record.params.items() if name != "method"},
        "mlflow_run_id": run_id,
        "test_accuracy": record.summary.get("test_accuracy", record.metrics.get("test/accuracy")),
        "error": record.summary.get("error"),
        **extra,
    }


def rungs(ledger: Ledger) -> dict[str, dict[str, float]]:
    """What stands at each rung of ASHA: epoch -> trial -> value."""
    return {
        str(epoch): {str(number): standing[number] for number in sorted(standing)}
        for epoch, standing in Rungs(ledger).values.items()
    }


def short(value: object) -> str:
    """A value in a table: four significant digits of a float, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _params(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name.removeprefix(row['method'] + '.')}={short(value)}" for name, value in row["params"].items())


PLOTTED = 1000  # trials on the page of plots
COLUMNS = ("trial", "method", "state", "val", "test", "epochs", "seconds", "parameters")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def leaderboard(board: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]], str]:
    """Leaderboard rows as a header, lines of text, and what the columns mean; without clean test labels, without ``test``."""
    has_test = any(row["test_accuracy"] is not None for row in board)
    lines = []
    for row in board:
        line = [str(row["trial"]), row["method"], row["state"], percent(row["value"]), percent(row["test_accuracy"])]
        lines.append([*line, str(row["epochs"]), f"{row['seconds']:.1f}", _params(row)])
    meaning = "val: noisy validation accuracy %, what the search selects on"
    if has_test:
        return COLUMNS, lines, meaning + "; test: clean test accuracy %"
    at = COLUMNS.index("test")
    return COLUMNS[:at] + COLUMNS[at + 1 :], [line[:at] + line[at + 1 :] for line in lines], meaning


def text_table(header: tuple[str, ...], lines: list[list[str]]) -> str:
    """Aligned columns; words to the left, numbers to the right, a rule under the header."""
    widths = [max(len(line[i]) for line in [list(header), *lines]) for i in range(len(header))]

    def aligned(line: list[str]) -> str:
        joined = [
            word.rjust(width) if word.replace(".", "").replace("-", "").isdigit() else word.ljust(width)
            for word, width in zip(line, widths, strict=True)
        ]
        return "  ".join(joined).rstrip()

    return "\n".join([aligned(list(header)), "  ".join("-" * width for width in widths), *map(aligned, lines)])


def saved(record: Record, full: int) -> Usage:
    """What a trial that ASHA stopped would still have taken to ``full`` epochs, at its own seconds per epoch."""
    if record.status != "stopped":
        return Usage()
    missing = full - record.epochs
    share = missing / record.epochs
    return Usage(missing, 0.0, share * record.seconds, share * record.gpu_seconds)


def cost_metrics(records: Iterable[Record], full: int) -> Iterator[dict[str, float]]:
    """For MLflow, after each finished trial in the order of their ends: what all trials had spent when its last epoch was
    recorded, or an earlier one's if that came later, and what had been saved. What is 0 is left out."""
    usage = savings = Usage()
    for record in records:
        usage, savings = max(usage, record.usage), savings.plus(saved(record, full))
        values: dict[str, float] = {"spent/hours": usage.seconds / HOUR}
        for group, cost in (("spent", usage), ("saved", savings)):
            values[f"{group}/epochs"] = cost.epochs
            values[f"{group}/trial_hours"] = cost.trial_seconds / HOUR
            values[f"{group}/gpu_hours"] = cost.gpu_seconds / HOUR
        yield {name: value for name, value in values.items() if value}


def cost_text(ledger: Ledger) -> str:
    """One line: what a sweep has spent, of its budgets where they are limited, and what stopping early has saved."""
    usage, savings = ledger.account.usage, Usage()
    for record in list(ledger.records.values()):
        savings = savings.plus(saved(record, ledger.sweep.spec.epochs))
    budgets = [str(budget) for budget in ledger.budgets() if budget.name != "gpu_hours" or budget.limit or usage.gpu_seconds]
    words = [*budgets, f"{usage.epochs} epochs", f"{short_number(usage.trial_seconds / HOUR)} trial-hours"]
    line = "spent: " + ", ".join(words)
    if ledger.kind == SWEEP and ledger.sweep.spec.rungs():
        line += f"; saved by ASHA: {savings.epochs} epochs, {short_number(savings.trial_seconds / HOUR)} trial-hours"
        line += f", {short_number(savings.gpu_seconds / HOUR)} GPU-hours" if usage.gpu_seconds else ""
    return line


def leaderboard_text(ledger: Ledger, runs: Mapping[int, str], top: int) -> str:
    """The leaderboard and what its columns mean."""
    board = rows(ledger, runs)
    if not ledger.sweep.files.running():
        board = [row | {"state": "waiting"} if row["state"] == "running" else row for row in board]
    header, lines, meaning = leaderboard(board[:top])
    more = f"\n... and {len(board) - top} more" if len(board) > top else ""
    return f"{text_table(header, lines)}{more}\n{meaning}\n{cost_text(ledger)}"


def markdown_table(board: list[dict[str, Any]]) -> str:
    """The top of the leaderboard for the note on MLflow's run page."""
    header, lines, meaning = leaderboard(board)
    table = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(table) + f"\n\n{meaning}."


def plots_page(ledger: Ledger) -> str:
    """One page with the search's history, learning curves, parameters and their importance; empty before two trials ended.
    Of a larger sweep it shows the best ``PLOTTED`` trials: time and size would grow without bound, and nothing be seen."""
    if ledger.count(TrialState.COMPLETE) < 2:
        return ""
    import optuna
    from optuna import visualization as draw

    study = ledger.study
    if len(ledger.records) > PLOTTED:
        shown = {record.number for record in ledger.leaderboard()[:PLOTTED]}
        study = optuna.create_study(direction="maximize")
        study.add_trials(trial for trial in ledger.study.get_trials(deepcopy=False) if trial.number in shown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, and of what is experimental: nothing that a user can act on
        figures = [draw.plot_optimization_history(study), draw.plot_intermediate_values(study)]
        figures.append(draw.plot_parallel_coordinate(study))
        complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state is TrialState.COMPLETE]
        varied = len({trial.value for trial in complete}) > 1 and any(trial.params for trial in complete)
        if varied:
            figures.append(draw.plot_param_importances(study))
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)]
    return "<!doctype html><meta charset='utf-8'>" + "\n".join(parts)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def retrain_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """One row per retrained configuration, in the order of the sweep's leaderboard, in which ``rank`` is its place.

    ``measure`` says what the mean and ``by_seed`` are: clean test accuracy, or noisy validation accuracy where there are no
    clean test labels. None where a mean or its error is not known.
    """
    searched = Ledger(ledger.sweep, read_only=True)
    ranks = {record.number: rank for rank, record in enumerate(searched.leaderboard(), 1)}
    groups: dict[int, list[Record]] = {}
    for record in ledger.records.values():
        if record.state is TrialState.COMPLETE:
            groups.setdefault(record.attrs["source"], []).append(record)
    table = []
    for source, records in groups.items():
        has_test = any(record.summary["test_accuracy"] is not None for record in records)
        by_seed = {record.attrs["seed"]: record.summary["test_accuracy"] if has_test else record.value for record in records}
        values = [value for value in by_seed.values() if value is not None]
        mean = statistics.fmean(values) if values else None
        table.append(
            {
                "source": source,
                "rank": ranks[source],
                "method": records[0].method,
                "seeds": len(records),
                "measure": "test" if has_test else "val",
                "test_accuracy": mean if has_test else None,
                "mean": mean,
                "standard_error": mean_and_error(values)[1] if len(values) > 1 else None,
                "by_seed": {str(seed): by_seed[seed] for seed in sorted(by_seed)},
                "params": {name: value for name, value in records[0].params.items() if name != "method"},
            }
        )
    return sorted(table, key=lambda row: row["rank"])


def retrain_text(ledger: Ledger) -> str:
    """The retrained configurations as a table."""
    board = retrain_rows(ledger)
    lines = [
        [
            str(row["rank"]),
            str(row["source"]),
            row["method"],
            str(row["seeds"]),
            percent(row["mean"]),
            percent(row["standard_error"]),
            _params(row),
        ]
        for row in board
    ]
    measure = board[0]["measure"] if board else "test"
    header = ("rank", "trial", "method", "seeds", measure, "+-", "parameters")
    meaning = {"test": "clean test accuracy", "val": "noisy validation accuracy (there are no clean test labels)"}[measure]
    return f"{text_table(header, lines)}\n{measure}: {meaning} %, mean over the seeds; +-: its standard error"


def sweep_lines(store: SweepStore) -> list[str]:
    """One line per sweep."""
    lines = []
    for name in store.names():
        try:
            sweep = Sweep.find(store, name)
            ledger = Ledger(sweep, read_only=True)
        except UserError:
            lines.append([name, "damaged", "", "", "", f"see: best {name}"])
            continue
        best = ledger.best()
        value = f"{100 * best.value:.2f}" if best and best.value is not None else "-"
        num_done = ledger.count(TrialState.COMPLETE, TrialState.PRUNED)
        methods = ",".join(sweep.spec.method)
        lines.append([name, methods, sweep.spec.data, sweep.spec.noise, f"{num_done}/{sweep.spec.trials}", value])
    if not lines:
        return [f"no sweeps in {store.display_name}"]
    return text_table(("sweep", "methods", "data", "noise", "trials", "best val"), lines).splitlines()
