"""Hyperparameters to Optuna's suggestions, define-by-run, and back.

In the ledger a parameter is called ``field`` where a method takes it over unchanged from the base Config, so that methods share
what they learn about it, and ``method.field`` where it is the method's own or the user gave that method its own value or range.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hparams import Hyperparameter, Range, Value, build, declared, inherited
from methods import find_method
from methods.base import Config
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
        drawn = self.range
        if drawn is None:
            return None
        found: BaseDistribution
        if drawn.choices:
            found = CategoricalDistribution(drawn.choices)
        elif self.declared.type is int:
            found = IntDistribution(int(drawn.low), int(drawn.high), log=drawn.log)
        else:
            found = FloatDistribution(drawn.low, drawn.high, log=drawn.log)
        return None if found.single() else found


class Space:
    """The conditional space of a sweep's methods. Raises ValueError for a name, value or range that means nothing."""

    def __init__(self, spec: SweepSpec) -> None:
        self.methods = spec.method
        self.parameters: dict[str, list[Parameter]] = {}
        used: set[str] = set()
        for method in spec.method:
            self.parameters[method] = [
                self._parameter(method, name, hyperparameter, spec, used)
                for name, hyperparameter in declared(find_method(method).Config).items()
            ]
        for flag, pairs in (("set", spec.set), ("range", spec.range)):
            for name in pairs:
                if name not in used:
                    raise ValueError(f"--{flag}: unknown hyperparameter {name!r}; known are {', '.join(self._names())}")
                if flag == "set" and name in spec.range:
                    raise ValueError(f"{name} has both a value and a range; give --set or --range")
        self.groups = self._groups()

    def _parameter(self, method: str, field: str, hyperparameter: Hyperparameter, spec: SweepSpec, used: set[str]) -> Parameter:
        own = f"{method}.{field}"
        special = own in spec.set or own in spec.range
        shared = field in inherited(find_method(method).Config, Config) and not (special and len(spec.method) > 1)
        fixed = spec.source_defaults().get(field, hyperparameter.default)
        searched = hyperparameter.search
        for key in (field, own):  # what names the method is said last
            if key in spec.set:
                fixed, searched = hyperparameter.parse(spec.set[key]), None
            if key in spec.range:
                searched = hyperparameter.parse_range(spec.range[key])
        used |= {field, own}
        return Parameter(field, field if shared else own, hyperparameter, None if searched else fixed, searched)

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
            drawn, kind = parameter.range, parameter.declared.type
            if drawn is None:
                assert parameter.fixed is not None
                values[parameter.field] = parameter.fixed
            elif drawn.choices:
                chosen = trial.suggest_categorical(parameter.name, drawn.choices)
                assert chosen is not None
                values[parameter.field] = chosen
            elif kind is int:
                values[parameter.field] = trial.suggest_int(parameter.name, int(drawn.low), int(drawn.high), log=drawn.log)
            else:
                values[parameter.field] = trial.suggest_float(parameter.name, drawn.low, drawn.high, log=drawn.log)
        return method, values

    def read(self, params: Mapping[str, Value], stored: Container[str] | None = None) -> tuple[str, dict[str, Value]]:
        """What :meth:`suggest` gave for a stored trial's parameters, without a trial, also where ranges were others then.

        ``stored``: the names that trials of the study have; a hyperparameter that is not among them is newer than the study,
        and has its default. ValueError where another one is missing, or a value is not legal.
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
            values[parameter.field] = parameter.declared.check(value)
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
        found: set[str] = set()
        for parameters in self.parameters.values():
            for parameter in parameters:
                if parameter.field == "views":
                    found |= {str(value) for value in (parameter.range.choices if parameter.range else [parameter.fixed])}
        return found

    def defaults(self, method: str, spec: SweepSpec, num_classes: int = 10) -> tuple[dict[str, Value], list[str]]:
        """The parameters of the published configuration for that many classes, moved to the nearest bound where a range
        excludes it, and a line for each that was moved."""
        params: dict[str, Value] = {"method": method} if len(self.methods) > 1 else {}
        moved = []
        for parameter in self.parameters[method]:
            if parameter.range is None:
                continue
            published = spec.source_defaults().get(parameter.field, parameter.declared.default_for(num_classes))
            nearest = parameter.range.nearest(published)
            params[parameter.name] = nearest
            if nearest != published:
                moved.append(
                    f"{method}: the default {parameter.field} {published} is outside {parameter.range}; "
                    f"the first trial takes {nearest}"
                )
        return params, moved

    def begins(self, method: str, values: Mapping[str, Value]) -> float:
        """The fraction of the budget at which a configuration's method proper starts."""
        return build(find_method(method).Config, values).begins()
