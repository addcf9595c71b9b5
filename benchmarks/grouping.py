"""How TPE should treat a search over several methods: quality on a free objective over the real space, and time per proposal.

    python benchmarks/grouping.py [--methods all] [--trials 500] [--seeds 12] [--timed 1000,10000]

Each sampler searches the space of ``--method all`` (or of ``--methods``), four trials at a time, defaults first. The objective
is made up, another one for each seed: a method has a best value, which the methods differ in, and loses from it by the squared
distance of each of its parameters from an optimum; that of a parameter that methods share is nearly the same for all of them.
What is observed has noise, as validation accuracy has; reported is the value without noise of the best that was observed.
Then the time of one proposal, as processor time, in a study that holds so many trials. No trial is run and no ledger written.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402  the checkout is not installed

from data.seeds import derive  # noqa: E402
from hparams import Value  # noqa: E402
from tune.report.leaderboard import mean_and_error  # noqa: E402
from tune.search.sampler import GroupedTPE  # noqa: E402
from tune.search.space import Space  # noqa: E402
from tune.spec import SweepSpec, make_spec  # noqa: E402

SLOTS = 4
NOISE = 0.01  # of one observed value: the standard error of 540 noisy labels is twice that
MARKS = (0.2, 0.5, 1.0)  # of the trials, at which the best is reported
Make = Callable[[Space, int], optuna.samplers.BaseSampler]


def stock(group: bool) -> Make:
    def make(space: Space, seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, group=group)

    return make


SAMPLERS: dict[str, Make] = {
    "random": lambda space, seed: optuna.samplers.RandomSampler(seed=seed),
    "Optuna's, group=False": stock(False),
    "Optuna's, group=True": stock(True),
    "groups of the drawn method": GroupedTPE,
}


def objective(space: Space, seed: int) -> Callable[[str, Mapping[str, Value]], float]:
    """A made-up value of a configuration, at most about 1."""
    stream = random.Random(seed)
    best = {method: 1.0 - 0.3 * stream.random() for method in space.methods}
    shared: dict[str, float] = {}
    optimum: dict[tuple[str, str], float] = {}
    weight: dict[tuple[str, str], float] = {}
    for method in space.methods:
        for parameter in space.parameters[method]:
            centre = shared.setdefault(parameter.field, stream.uniform(0.2, 0.8))
            own = min(1.0, max(0.0, stream.gauss(centre, 0.1)))
            optimum[method, parameter.field] = own if "." not in parameter.name else stream.random()
            weight[method, parameter.field] = stream.uniform(0.05, 0.5)

    def value(method: str, values: Mapping[str, Value]) -> float:
        loss = 0.0
        for parameter in space.parameters[method]:
            drawn, held = parameter.range, values[parameter.field]
            if drawn is None or drawn.choices:
                continue
            assert isinstance(held, (int, float))
            scale = math.log if drawn.log else float
            at = (scale(held) - scale(drawn.low)) / (scale(drawn.high) - scale(drawn.low))
            loss += weight[method, parameter.field] * (at - optimum[method, parameter.field]) ** 2
        return best[method] - loss

    return value


def search(make: Make, space: Space, spec: SweepSpec, num_trials: int, seed: int) -> list[float]:
    """The noiseless value of the best observed trial, after each trial. One sampler per proposal, as the ledger does."""
    value, stream = objective(space, seed), random.Random(derive("noise", seed))
    study = optuna.create_study(direction="maximize")
    for method in spec.method:
        study.enqueue_trial(space.defaults(method, spec)[0])
    running: list[tuple[optuna.Trial, str, Mapping[str, Value]]] = []
    best, lead, curve = -math.inf, 0.0, []
    for number in range(num_trials + SLOTS - 1):
        if number < num_trials:
            study.sampler = make(space, derive("sampler", seed, number) % 2**32)
            trial = study.ask()
            running.append((trial, *space.suggest(trial)))
        if len(running) == SLOTS or number >= num_trials:
            trial, method, values = running.pop(0)
            true = value(method, values)
            observed = true + stream.gauss(0.0, NOISE)
            study.tell(trial, observed)
            if observed > best:
                best, lead = observed, true
            curve.append(lead)
    return curve


def milliseconds(make: Make, space: Space, num_trials: int, repeats: int = 7) -> float:
    """Processor time of one proposal in a study of so many finished trials, drawn at random; the median."""
    value, study = objective(space, 0), optuna.create_study(direction="maximize")
    for number in range(num_trials):
        trial = optuna.trial.FixedTrial({})
        study.sampler = optuna.samplers.RandomSampler(seed=number)
        trial = study.ask()  # type: ignore[assignment]
        study.tell(trial.number, value(*space.suggest(trial)))  # type: ignore[arg-type]
    taken = []
    for number in range(repeats):
        study.sampler = make(space, number)
        trial = study.ask()  # type: ignore[assignment]
        began = time.process_time()
        space.suggest(trial)  # type: ignore[arg-type]
        taken.append(time.process_time() - began)
    return 1000 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--timed", default="1000,10000", help="numbers of trials at which a proposal is timed")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = make_spec({"method": tuple(options.methods.split(","))})
    space = Space(spec)
    marks = [max(1, round(share * options.trials)) for share in MARKS]
    timed = [int(number) for number in options.timed.split(",") if number]
    print(f"{len(spec.method)} methods, {options.seeds} seeds; distance of the best from the best possible, x 1000")
    reached: dict[str, list[list[float]]] = {}
    for name, make in SAMPLERS.items():
        reached[name] = []
        for seed in range(options.seeds):
            top = max(objective_top(space, seed))
            curve = search(make, space, spec, options.trials, seed)
            reached[name].append([1000 * (top - curve[mark - 1]) for mark in marks])
        cells = []
        for at, mark in enumerate(marks):
            mean, error = mean_and_error([row[at] for row in reached[name]])
            cells.append(f"{mark} trials {mean:6.1f} +- {error:4.1f}")
        print(f"{name:28s} {'   '.join(cells)}", flush=True)
    base = reached["Optuna's, group=True"]
    for name, rows in reached.items():
        if rows is not base:
            differences = [
                mean_and_error([row[at] - other[at] for row, other in zip(rows, base, strict=True)]) for at in range(len(marks))
            ]
            print(f"{name:28s} less group=True, paired: {'   '.join(f'{m:+6.1f} +- {e:4.1f}' for m, e in differences)}")
    for number in timed:
        for name, make in SAMPLERS.items():
            print(f"{name:28s} {milliseconds(make, space, number):8.1f} ms per proposal at {number} trials", flush=True)


def objective_top(space: Space, seed: int) -> list[float]:
    """The best value of each method: the objective's first draws."""
    stream = random.Random(seed)
    return [1.0 - 0.3 * stream.random() for _ in space.methods]


if __name__ == "__main__":
    main()
