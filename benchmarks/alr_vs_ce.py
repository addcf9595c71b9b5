"""ALR against CE: each searched with the same budget on noisy validation labels, the winners retrained over seeds.

    python benchmarks/alr_vs_ce.py [--methods alr,ce] [--data digits] [--model NAME] [--noise symmetric:0.4]
                                   [--trials 32] [--epochs 30] [--seeds 5]

Each method gets a sweep of its own with the same number of trials, epochs and seed. The best complete trial of each, by noisy
validation accuracy, is trained again over the seeds: initialisation, order and noise drawn anew, the same for every method,
so that differences are paired; labels with noise of their own (``--noise none``) keep it. Reported: clean test accuracy, mean
and standard error, and the paired difference to the last method of the list.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tune.report.leaderboard import mean_and_error, text_table  # noqa: E402  the checkout is not installed


def search(*arguments: object) -> str:
    """Runs the command line; its progress goes to the screen, its output comes back."""
    command = [sys.executable, str(ROOT / "search.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def searched_and_retrained(method: str, storage: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The retrained winner of a method's own search."""
    words = (method, options.noise, options.model, options.data)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))[:80]
    place = ("--storage", storage)
    what = ("--method", method, "--data", options.data, "--noise", options.noise, "--model", options.model)
    budget = ("--trials", options.trials, "--epochs", options.epochs, "--seed", options.seed)
    if not (storage / name).exists():
        search("launch", name, *place, *what, *budget)
    (row,) = json.loads(search("retrain", name, *place, "--top", 1, "--seeds", options.seeds, "--json"))
    board = json.loads(search("best", name, *place, "--json"))
    row["searched_value"] = board[0]["value"]
    row["epochs_trained"] = sum(trial["epochs"] for trial in board)
    return dict(row)


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard error of each method, and the paired difference to the last one."""
    last = rows[-1]
    lines = []
    for row in rows:
        differences = [row["by_seed"][seed] - last["by_seed"][seed] for seed in last["by_seed"]]
        mean, error = mean_and_error(differences)
        paired = f"{100 * mean:+.2f} +- {100 * error:.2f}" if row is not last else ""
        lines.append(
            [
                row["method"],
                f"{100 * row['searched_value']:.2f}",
                f"{100 * row['mean']:.2f} +- {100 * row['standard_error']:.2f}",
                paired,
                " ".join(f"{100 * value:.2f}" for value in row["by_seed"].values()),
                " ".join(f"{name}={value:.4g}" for name, value in row["params"].items()),
            ]
        )
    measured = {"test": "clean test", "val": "noisy val again"}[last["measure"]]
    header = ("method", "noisy val", measured, f"minus {last['method']}", "by seed", "parameters")
    return text_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="alr,ce")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="small-cnn")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", default="symmetric:0.4")
    parser.add_argument("--storage", type=Path, help="folder of the sweeps (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="where the rows are written as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        storage = options.storage or Path(temporary)
        rows = [searched_and_retrained(method, storage, options) for method in options.methods.split(",")]
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
