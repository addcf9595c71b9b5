"""Writes the pages that follow from code and result files: ``docs/methods.md`` and ``docs/results.md`` (``make docs``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from data.table import TrainData  # noqa: E402  the checkout is not installed
from hparams import MANY_CLASSES, Hyperparameter, Value, declared  # noqa: E402
from methods import METHODS  # noqa: E402
from methods.base import Config, Task  # noqa: E402
from models.network import Network  # noqa: E402
from tune.report.leaderboard import mean_and_error  # noqa: E402

NUM_SAMPLES = 97  # no other side of a tensor in a method or in the network below is of this length
HEAD = "<!-- made by docs/pages.py (make docs): do not edit -->\n"


# -- methods.md -------------------------------------------------------------------------------------------------------


def bytes_per_sample(name: str, classes: int) -> float:
    """What a method keeps of each sample, read off its state."""

    def make_net(num_classes: int | None = None) -> Network:
        return Network(nn.Flatten(), 4, num_classes or classes, 0.0)

    def view(images: torch.Tensor) -> torch.Tensor:
        return images.float()

    labels = torch.arange(NUM_SAMPLES) % classes
    trusted = TrainData(torch.zeros(classes, 1, 2, 2, dtype=torch.uint8), torch.arange(classes))
    method = METHODS[name](METHODS[name].Config(), Task(classes, labels, make_net, view, view, view, trusted))
    kept: list[torch.Tensor] = [value for value in method.state_dict().values() if value.shape[:1] == (NUM_SAMPLES,)]
    return sum([value.numel() * value.element_size() for value in kept]) / NUM_SAMPLES


def state(name: str) -> str:
    """Bytes per sample as a function of the number of classes K."""
    ten, twenty = bytes_per_sample(name, 10), bytes_per_sample(name, 20)
    slope = (twenty - ten) / 10
    parts = [f"{slope:g} K"] * bool(slope) + [f"{ten - 10 * slope:g}"] * bool(ten - 10 * slope)
    return " + ".join(parts) or "0"


def shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parameter_row(hyperparameter: Hyperparameter) -> list[str]:
    drawn = str(hyperparameter.search) if hyperparameter.search else "-"
    legal = hyperparameter.legal.text if hyperparameter.legal else ", ".join(map(str, hyperparameter.choices))
    default, many = hyperparameter.default, hyperparameter.many_classes
    return [
        f"`{hyperparameter.name}`",
        shown(default) if many is None else f"{shown(default)}, {shown(many)} from {MANY_CLASSES} classes on",
        drawn,
        legal,
        hyperparameter.meaning,
    ]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


PARAMETERS = ["name", "default", "searched", "legal", "meaning"]


def methods_page(costs: dict[str, Any]) -> str:
    """Every method with its hyperparameters, its state and its cost."""
    overview = [
        [
            f"[`{name}`](#{name})",
            method.summary,
            state(name),
            f"{costs['relative'][name]:.1f}" if name in costs["relative"] else "-",
        ]
        for name, method in METHODS.items()
    ]
    parts = [
        HEAD,
        "# Methods\n",
        f"""State: what a method keeps of each training sample, in bytes, for K classes. Cost: the time of a whole run
divided by that of cross-entropy, median of {costs["repeats"]} ({costs["what"]}; `python benchmarks/method_costs.py`).
""",
        markdown(["method", "what it is", "state", "cost"], overview),
        """## What every method has

Lengths and memories are fractions of the full budget. In a search over several methods these are learnt together.
""",
        markdown(PARAMETERS, [parameter_row(parameter) for parameter in declared(Config).values()]),
    ]
    for name, method in METHODS.items():
        text = (sys.modules[method.__module__].__doc__ or "").strip()
        own = [parameter_row(p) for field, p in declared(method.Config).items() if field not in declared(Config)]
        parts += [f"## {name}\n", f"{method.summary[0].upper()}{method.summary[1:]}.\n", f"```text\n{text}\n```\n"]
        parts.append(markdown(PARAMETERS, own) if own else "No hyperparameters of its own.\n")
    return "\n".join(parts)


# -- results.md -------------------------------------------------------------------------------------------------------


def percent(values: dict[str, float]) -> str:
    mean, error = mean_and_error(list(values.values()))
    return f"{100 * mean:.2f} ± {100 * error:.2f}"


def results_page(rows: list[dict[str, Any]]) -> str:
    """One table per noise and budget: the winner's clean test accuracy over seeds, and the oracle's."""
    parts = [
        HEAD,
        "# Methods compared\n",
        """`python benchmarks/methods.py` searches each method on its own, on digits with small-cnn. The best complete trial by
*noisy* validation accuracy is then trained again over seeds. The columns:

- **clean test**: clean test accuracy of the winner, %, mean and standard error over seeds
- **minus ce**: the difference to cross-entropy under the same seeds, paired
- **oracle**: the same as clean test for the trial with the best clean test accuracy, which nobody can choose without clean
  labels
- **noisy val**: noisy validation accuracy of the winner in the search, %; it was selected on
- **epochs**, **seconds**: of the search, all trials together; the machine was shared, and [methods.md](methods.md) has costs
  that can be compared

What stands behind a method's name was fixed and not searched.

Ranges and defaults were fixed in a commit before the tables were made. These exceptions were searched again: ELR+'s `ramp`
got its range after the first table; PENCIL got a bound on its label step and another range; CDR got its `sparsity`; SELC and
ALR got wider ranges of `warmup` and `memory` after runs under 60 % noise.

All tables are from before these changes ([decisions.md](decisions.md)), and nothing was searched again since:

- The split was `split: shuffled`; it is stratified now.
- SCE and NCE+RCE had A = -4 and beta = 1, and their `alpha` below belongs to these (`log_zero`, `beta`). Now A is ln 1e-4,
  and beta is searched.
- The ranges of Co-teaching(+), DivideMix, ELR(+), PENCIL, SOP(+) and SR became wider, so that they hold every published
  setting.

Why some methods do not beat cross-entropy in 30 epochs is in [below_ce.md](below_ce.md).
""",
    ]
    for noise, budget in sorted({(row["noise"], row["budget"]): None for row in rows}, key=lambda pair: pair[1]):
        here = [row for row in rows if (row["noise"], row["budget"]) == (noise, budget)]
        baseline: dict[str, float] = next((row["by_seed"] for row in here if row["method"] == "ce"), {})
        trials, seeds = here[0]["trials"], len(here[0]["by_seed"])
        parts.append(f"## {noise}, {budget} epochs\n\n{trials} trials of up to {budget} epochs, {seeds} seeds.\n")
        lines = []
        for row in sorted(here, key=lambda row: -mean_and_error(list(row["by_seed"].values()))[0]):
            paired = {seed: value - baseline[seed] for seed, value in row["by_seed"].items() if seed in baseline}
            mean, error = mean_and_error(list(paired.values())) if paired else (float("nan"), float("nan"))
            name = " ".join([row["method"], *row["set"]]) + (f" ({row['trusted']} clean labels)" if row["trusted"] else "")
            difference = "" if row["method"] == "ce" else f"{100 * mean:+.2f} ± {100 * error:.2f}"
            params = " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row["params"].items()
            )
            lines.append(
                [
                    name,
                    percent(row["by_seed"]),
                    difference,
                    percent(row["oracle_by_seed"]),
                    f"{100 * row['validation']:.2f}",
                    str(row["epochs"]),
                    f"{row['seconds']:.0f}",
                    params,
                ]
            )
        header = ["method", "clean test", "minus ce", "oracle", "noisy val", "epochs", "seconds", "parameters of the winner"]
        parts.append(markdown(header, lines))
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Each page's path and text."""
    costs = json.loads((DOCS / "costs.json").read_text())
    found = {DOCS / "methods.md": methods_page(costs)}
    if (DOCS / "results.json").exists():
        found[DOCS / "results.md"] = results_page(json.loads((DOCS / "results.json").read_text()))
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
