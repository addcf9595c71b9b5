"""Hyperparameters to Optuna's suggestions, define-by-run, and back.

In the ledger a parameter is called ``field`` where a method takes it over unchanged from the base Config, so that methods share
what they learn about it, and ``method.field`` where it is the method's own or the user gave that method its own value or range.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from errors import UserError
from hparams import Hyperparameter, Range, Value, build, declared, inherited
from methods import find_method
from methods.config import Config
from tune.spec import SweepSpec


@dataclass(frozen=True)
class Parameter:
    """One field of one method: its name in the ledger, and either a fixed value or a range."""

    field: str
    name: str
    declared: Hyperparameter
    fixed: Value | None
    range: Range | None

    @property
    def distribution(self) -> BaseDistribution | None:
        """What Optuna draws it from; None where its value is fixed, or the range holds only one."""
        limits = self.range
        if limits is None:
            return None
        distribution: BaseDistribution
        if limits.choices:
            distribution = CategoricalDistribution(limits.choices)
        elif self.declared.type is int:
            distribution = IntDistribution(int(limits.low), int(limits.high), log=limits.log, step=int(limits.step) or 1)
        else:
            distribution = FloatDistribution(limits.low, limits.high, log=limits.log, step=limits.step or None)
        return None if distribution.single() else distribution

    @property
    def count(self) -> int | None:
        """How many values it may have; None where there is no end of them."""
        return self.range.count(self.declared.type) if self.range else 1


class Space:
    """The conditional space of a sweep's methods. Raises UserError for a name, value or range that means nothing."""

    def __init__(self, spec: SweepSpec) -> None:
        self.methods = spec.method
        self.parameters: dict[str, list[Parameter]] = {}
        names: set[str] = set()
        of_source = spec.source_defaults()
        for method in spec.method:
            self.parameters[method] = [
                self._parameter(method, name, hyperparameter, spec, of_source, names)
                for name, hyperparameter in declared(find_method(method).Config).items()
            ]
        for flag, pairs in (("set", spec.set), ("range", spec.range)):
            for name in pairs:
                if name not in names:
                    raise UserError(f"--{flag}: unknown hyperparameter {name!r}; known are {', '.join(self._names())}")
                if flag == "set" and name in spec.range:
                    raise UserError(f"{name} has both a value and a range; give --set or --range")
        self.groups = self._groups()
        sizes = [self._size(method) for method in self.methods]
        self.size = sum(size for size in sizes if size) if all(sizes) else None  # configurations; None: no end of them

    def _size(self, method: str) -> int | None:
        """How many configurations a method has."""
        counts = [parameter.count for parameter in self.parameters[method]]
        return math.prod(count for count in counts if count) if all(counts) else None

    def _parameter(
        self,
        method: str,
        field: str,
        hyperparameter: Hyperparameter,
        spec: SweepSpec,
        of_source: Mapping[str, Value],
        names: set[str],
    ) -> Parameter:
        """A method's field in the space; its names are added to ``names``."""
        full_name = f"{method}.{field}"
        special = full_name in spec.set or full_name in spec.range
        shared = field in inherited(find_method(method).Config, Config) and not (special and len(spec.method) > 1)
        fixed = of_source.get(field, hyperparameter.default)
        searched = hyperparameter.search
        for key in (field, full_name):  # what names the method is said last
            if key in spec.set:
                fixed, searched = hyperparameter.parse(spec.set[key]), None
            if key in spec.range:
                searched = hyperparameter.parse_range(spec.range[key])
        names |= {field, full_name}
        return Parameter(field, field if shared else full_name, hyperparameter, None if searched else fixed, searched)

    def _groups(self) -> list[tuple[frozenset[str], dict[str, BaseDistribution]]]:
        """The parameters that are drawn, by which methods have them: first those of all methods, the method itself among
        them. Within a group in the order of their names."""
        owners: dict[str, set[str]] = {}
        distributions: dict[str, BaseDistribution] = {}
        if len(self.methods) > 1:
            owners["method"], distributions["method"] = set(self.methods), CategoricalDistribution(self.methods)
        for method, parameters in self.parameters.items():
            for parameter in parameters:
                if drawn := parameter.distribution:
                    owners.setdefault(parameter.name, set()).add(method)
                    distributions[parameter.name] = drawn
        groups: dict[frozenset[str], dict[str, BaseDistribution]] = {}
        for name in sorted(owners):
            groups.setdefault(frozenset(owners[name]), {})[name] = distributions[name]
        return sorted(groups.items(), key=lambda item: (-len(item[0]), min(item[1])))

    def _names(self) -> list[str]:
        return sorted({parameter.name for parameters in self.parameters.values() for parameter in parameters})

    def suggest(self, trial: optuna.Trial) -> tuple[str, dict[str, Value]]:
        """The method and all its Config values. A trial that already has some of its parameters keeps them."""
        method = self.methods[0]
        if len(self.methods) > 1:
            method = trial.suggest_categorical("method", self.methods)
        values: dict[str, Value] = {}
        for parameter in self.parameters[method]:
            limits, kind = parameter.range, parameter.declared.type
            if limits is None:
                assert parameter.fixed is not None
                values[parameter.field] = parameter.fixed
            elif limits.choices:
                chosen = trial.suggest_categorical(parameter.name, limits.choices)
                assert chosen is not None
                values[parameter.field] = chosen
            elif kind is int:
                low, high, step = int(limits.low), int(limits.high), int(limits.step) or 1
                values[parameter.field] = trial.suggest_int(parameter.name, low, high, log=limits.log, step=step)
            else:
                number = trial.suggest_float(parameter.name, limits.low, limits.high, log=limits.log, step=limits.step or None)
                values[parameter.field] = limits.exact(number, kind)
        return method, values

    def number(self, method: str, values: Mapping[str, Value]) -> int | None:
        """Which of the space's ``size`` configurations this is; None where it is none of them, as one may be that was drawn
        from other ranges."""
        number = sum(self._size(other) or 0 for other in self.methods[: self.methods.index(method)])
        weight = 1
        for parameter in self.parameters[method]:
            if parameter.range is None:
                continue
            place = parameter.range.place(values[parameter.field], parameter.declared.type)
            if place is None:
                return None
            number, weight = number + weight * place, weight * (parameter.count or 1)
        return number

    def configuration(self, number: int) -> dict[str, Value]:
        """The parameters of the configuration of that number, by their names in the ledger."""
        for method in self.methods:
            if number < (size := self._size(method) or 0):
                break
            number -= size
        params: dict[str, Value] = {"method": method} if len(self.methods) > 1 else {}
        for parameter in self.parameters[method]:
            if parameter.range:
                number, place = divmod(number, parameter.count or 1)
                params[parameter.name] = parameter.range.at(place, parameter.declared.type)
        return params

    def read(self, params: Mapping[str, Value], stored: Container[str] | None = None) -> tuple[str, dict[str, Value]]:
        """What :meth:`suggest` gave for a stored trial's parameters, without a trial, also where ranges were others then.

        ``stored``: the names that earlier trials of the study have; a hyperparameter that is not among them is newer than the
        trial, and has its default. ValueError where another one is missing, or a value is not legal.
        """
        method = str(params.get("method")) if len(self.methods) > 1 else self.methods[0]
        if method not in self.parameters:
            raise ValueError(f"method {method!r} is not one of {', '.join(self.methods)}")
        values: dict[str, Value] = {}
        for parameter in self.parameters[method]:
            newer = stored is not None and parameter.name not in stored
            default = parameter.declared.default if newer else None
            value = params.get(parameter.name, default) if parameter.range else parameter.fixed
            if value is None:
                raise ValueError(f"{parameter.name} is missing")
            value = parameter.declared.check(value)
            values[parameter.field] = parameter.range.exact(value, parameter.declared.type) if parameter.range else value
        return method, values

    def is_whole(self, params: Mapping[str, Value]) -> bool:
        """Whether nothing is left to be drawn of a trial with these parameters."""
        try:
            self.read(params)
        except ValueError:
            return False
        return True

    def views(self) -> set[str]:
        """The views that a trial may have."""
        names: set[str] = set()
        for parameters in self.parameters.values():
            for parameter in parameters:
                if parameter.field == "views":
                    names |= {str(value) for value in (parameter.range.choices if parameter.range else [parameter.fixed])}
        return names

    def defaults(self, method: str, spec: SweepSpec, num_classes: int = 10) -> tuple[dict[str, Value], list[str]]:
        """The parameters of the published configuration for that many classes, moved to the nearest bound where a range
        excludes it, and a line for each that was moved."""
        params: dict[str, Value] = {"method": method} if len(self.methods) > 1 else {}
        notes = []
        of_source = spec.source_defaults()
        for parameter in self.parameters[method]:
            if parameter.range is None:
                continue
            published = of_source.get(parameter.field, parameter.declared.default_for(num_classes))
            nearest = parameter.range.nearest(published)
            params[parameter.name] = nearest
            if nearest != published:
                notes.append(
                    f"{method}: the default {parameter.field} {published} is outside {parameter.range}; "
                    f"the first trial takes {nearest}"
                )
        return params, notes

    def begins(self, method: str, values: Mapping[str, Value]) -> float:
        """The fraction of the budget at which a configuration's method proper starts."""
        return build(find_method(method).Config, values).begins()
