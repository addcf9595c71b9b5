"""Recipes from a sweep's trial, from flags, and from a ``best_config.yaml``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.cache import open_table
from data.dataset import Dataset
from data.spec import DataSpec
from errors import UserError
from hparams import declared
from methods import find_method
from training.trial_run import Recipe
from tune.search.ledger import Ledger, Record
from tune.search.space import Space
from tune.spec import FIELDS, SpecLoader, SweepSpec, check_trusted, make_spec, read_field, require_trusted


def of_trial(ledger: Ledger, record: Record) -> Recipe:
    """All that a trial's numbers depend on. A retrained trial draws its noise anew."""
    noise_seed = ledger.sweep.spec.noise_seed + record.attrs.get("noise_draw", 0)
    recipe = _recipe(ledger.sweep.spec, record.method, record.values, seed=ledger.seed(record), noise_seed=noise_seed)
    return dataclasses.replace(recipe, table=ledger.sweep.provenance.get("table", ""))


def best_config_text(ledger: Ledger, record: Record) -> str:
    """A trial's recipe as YAML, which ``search.py train`` runs again."""
    recipe = vars(of_trial(ledger, record))
    return f"# {ledger.sweep.name}, trial {record.number}\n" + yaml.safe_dump(dict(recipe), sort_keys=False)


def prepare(spec: DataSpec, *, download: bool = False) -> None:
    """Decodes a data set into this machine's cache, again where it has changed since."""
    open_table(spec.source(download=download), fresh=True)


def dataset(spec: SweepSpec, *, download: bool = False) -> Dataset:
    """What every trial of a sweep is run on, in main memory; read again where it has changed."""
    prepare(DataSpec.of(spec), download=download)
    return _recipe(spec, spec.method[0], {}, seed=spec.seed, noise_seed=spec.noise_seed).dataset()


def _recipe(spec: SweepSpec, method: str, values: Mapping[str, Any], *, seed: int, noise_seed: int) -> Recipe:
    names = {field.name for field in dataclasses.fields(Recipe)} & set(FIELDS)
    of_spec = {name: getattr(spec, name) for name in names}
    return Recipe(**{**of_spec, "method": method, "values": dict(values), "seed": seed, "noise_seed": noise_seed})


def from_flags(flags: Mapping[str, Any], *, download: bool = False) -> Recipe:
    """What ``train`` runs for flags, its data set ready: defaults depend on the number of classes. UserError names what is
    wrong."""
    spec = make_spec(flags)
    if len(spec.method) != 1:
        raise UserError(f"--method: {','.join(spec.method)!r} is not allowed; train runs one method")
    space, method = Space(spec), spec.method[0]
    check_trusted(spec)
    defaults, _ = space.defaults(method, spec, dataset(spec, download=download).num_classes)
    return _recipe(spec, method, space.read(defaults)[1], seed=spec.seed, noise_seed=spec.noise_seed)


def from_yaml(path: Path) -> Recipe:
    """What ``train`` runs for a file that a sweep wrote. UserError names what is wrong."""
    try:
        content = yaml.load(path.read_text(), Loader=SpecLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    fields = dataclasses.fields(Recipe)
    names, needed = [f.name for f in fields], {f.name for f in fields if f.default is dataclasses.MISSING}
    if not isinstance(content, dict) or not needed <= set(content) <= set(names) or not isinstance(content.get("values"), dict):
        raise UserError(f"{path} is no configuration; it must have the keys {', '.join(names)}")
    hyperparameters = declared(find_method(str(content["method"])).Config)
    values = {}
    for name, value in content.pop("values").items():
        if name not in hyperparameters:
            raise UserError(f"{path}: unknown hyperparameter {name!r}; known are {', '.join(hyperparameters)}")
        values[name] = hyperparameters[name].parse(value)
    method, table = str(content.pop("method")), str(content.pop("table", ""))
    others = {name: read_field(name, value) for name, value in content.items()}
    require_trusted(make_spec({**others, "method": (method,)}, stored=True))
    return Recipe(method=method, values=values, table=table, **others)
