"""What a run of each method costs beside cross-entropy: the same budget, one thread, in one process.

    python benchmarks/method_costs.py [--methods all] [--epochs 10] [--repeats 3] [--out docs/costs.json]

Each run is a whole budget on digits with small-cnn at default hyperparameters, evaluation included, so that phases of
different cost (warm-ups, probes) have their share; in so short a budget every epoch measures test accuracy. In each
repeat every method is run right after a run of cross-entropy, which it is divided by; reported is the median of the repeats.
``--out`` keeps what it holds of other methods, if they were measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from methods import METHODS  # noqa: E402  the checkout is not installed
from training.trial_run import Recipe, TrialRun  # noqa: E402

TRUSTED = 50


def seconds(method: str, epochs: int) -> float:
    """Wall time of one run at default hyperparameters."""
    trusted = TRUSTED if METHODS[method].needs_trusted else 0
    experiment = TrialRun(
        Recipe(
            method,
            {"batch_size": 64},
            data="digits",
            noise="symmetric:0.4",
            model="small-cnn",
            epochs=epochs,
            seed=0,
            trusted=trusted,
        )
    )
    began = time.perf_counter()
    for _ in experiment:
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of the ratios")
    options = parser.parse_args()
    what = f"digits, small-cnn, {options.epochs} epochs, batches of 64, one thread of a CPU"
    old = json.loads(options.out.read_text()) if options.out and options.out.exists() else None
    if old and options.methods != "all" and (old["what"], old["repeats"]) != (what, options.repeats):
        parser.error(f"{options.out} holds {old['what']}, {old['repeats']} repeats: measure all methods, or in the same way")
    torch.set_num_threads(1)
    seconds("ce", 2)
    relative = {}
    for method in METHODS if options.methods == "all" else options.methods.split(","):
        ratios = []
        for _ in range(options.repeats):
            baseline = seconds("ce", options.epochs)
            ratios.append(seconds(method, options.epochs) / baseline)
        relative[method] = round(statistics.median(ratios), 2)
        print(f"{method:18s} {relative[method]:6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    if options.out:
        known = (old["relative"] if old and options.methods != "all" else {}) | relative
        new: dict[str, Any] = {"what": what, "repeats": options.repeats}
        new["relative"] = {name: known[name] for name in METHODS if name in known}
        options.out.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    main()
