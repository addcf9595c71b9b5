"""The registry of learning algorithms, by the name that a user writes. A method's module is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from errors import UserError
from hparams import Hyperparameter, declared, inherited
from methods.config import Config

if TYPE_CHECKING:
    from methods.base import Method


class Registry(Mapping[str, "type[Method[Any]]"]):
    """Methods by name. The names are known without torch; asking for a method imports its module, and with it torch."""

    def __init__(self, places: Mapping[str, tuple[str, str]]) -> None:
        """``places``: the module in this package and the class in it, by name."""
        self._places = places

    def __getitem__(self, name: str) -> type[Method[Any]]:
        module, class_name = self._places[name]
        method: type[Method[Any]] = getattr(import_module(f"methods.{module}"), class_name)
        return method

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS = Registry(
    {
        "ce": ("ce", "CrossEntropy"),
        "mae": ("mae", "MeanAbsoluteError"),
        "gce": ("gce", "GeneralizedCrossEntropy"),
        "truncated-gce": ("truncated_gce", "TruncatedGeneralizedCrossEntropy"),
        "sce": ("sce", "SymmetricCrossEntropy"),
        "nce-rce": ("nce_rce", "NormalizedAndReverseCrossEntropy"),
        "dal": ("dal", "DynamicsAwareLoss"),
        "bootstrapping": ("bootstrapping", "Bootstrapping"),
        "label-smoothing": ("ce", "LabelSmoothing"),
        "mixup": ("mixup", "Mixup"),
        "elr": ("elr", "EarlyLearningRegularization"),
        "elr-plus": ("elr_plus", "ELRPlus"),
        "cdr": ("cdr", "CDR"),
        "sr": ("sr", "SparseRegularization"),
        "ctrr": ("ctrr", "CTRR"),
        "mw-net": ("mw_net", "MetaWeightNet"),
        "co-teaching": ("co_teaching", "CoTeaching"),
        "co-teaching-plus": ("co_teaching_plus", "CoTeachingPlus"),
        "aum": ("aum", "AUM"),
        "pencil": ("pencil", "PENCIL"),
        "selc": ("selc", "SELC"),
        "sop": ("sop", "SOP"),
        "sop-plus": ("sop_plus", "SOPPlus"),
        "m-dyr-h": ("m_dyr_h", "MDYRH"),
        "dividemix": ("dividemix", "DivideMix"),
        "alr": ("alr", "ALR"),
    }
)


def check_name(name: str) -> str:
    """The name itself. UserError for an unknown one says the known ones, and the one that was probably meant."""
    if name in METHODS:
        return name
    close = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}{hint}")


def find_method(name: str) -> type[Method[Any]]:
    """The method of that name. UserError for an unknown one."""
    return METHODS[check_name(name)]


def parameters(method_name: str) -> dict[str, Hyperparameter]:
    """A method's hyperparameters by their name in the ledger, in order of declaration.

    ``field`` where the method takes it over from the base unchanged, so that methods share what they have in common; else
    ``method.field``. UserError for an unknown method.
    """
    config = find_method(method_name).Config
    shared = inherited(config, Config)
    return {
        name if name in shared else f"{method_name}.{name}": hyperparameter for name, hyperparameter in declared(config).items()
    }


__all__ = ["METHODS", "check_name", "find_method", "parameters"]
