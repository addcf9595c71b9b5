"""The registry of learning algorithms, by the name that a user writes."""

from __future__ import annotations

import difflib
from typing import Any

from hparams import Hyperparameter, declared, inherited
from methods.alr import ALR
from methods.aum import AUM
from methods.base import Config, Method
from methods.bootstrapping import Bootstrapping
from methods.cdr import CDR
from methods.ce import CrossEntropy, LabelSmoothing
from methods.co_teaching import CoTeaching
from methods.co_teaching_plus import CoTeachingPlus
from methods.ctrr import CTRR
from methods.dal import DynamicsAwareLoss
from methods.dividemix import DivideMix
from methods.elr import EarlyLearningRegularization
from methods.elr_plus import ELRPlus
from methods.gce import GeneralizedCrossEntropy
from methods.m_dyr_h import MDYRH
from methods.mae import MeanAbsoluteError
from methods.mixup import Mixup
from methods.mw_net import MetaWeightNet
from methods.nce_rce import NormalizedAndReverseCrossEntropy
from methods.pencil import PENCIL
from methods.sce import SymmetricCrossEntropy
from methods.selc import SELC
from methods.sop import SOP
from methods.sop_plus import SOPPlus
from methods.sr import SparseRegularization
from methods.truncated_gce import TruncatedGeneralizedCrossEntropy

METHODS: dict[str, type[Method[Any]]] = {
    "ce": CrossEntropy,
    "mae": MeanAbsoluteError,
    "gce": GeneralizedCrossEntropy,
    "truncated-gce": TruncatedGeneralizedCrossEntropy,
    "sce": SymmetricCrossEntropy,
    "nce-rce": NormalizedAndReverseCrossEntropy,
    "dal": DynamicsAwareLoss,
    "bootstrapping": Bootstrapping,
    "label-smoothing": LabelSmoothing,
    "mixup": Mixup,
    "elr": EarlyLearningRegularization,
    "elr-plus": ELRPlus,
    "cdr": CDR,
    "sr": SparseRegularization,
    "ctrr": CTRR,
    "mw-net": MetaWeightNet,
    "co-teaching": CoTeaching,
    "co-teaching-plus": CoTeachingPlus,
    "aum": AUM,
    "pencil": PENCIL,
    "selc": SELC,
    "sop": SOP,
    "sop-plus": SOPPlus,
    "m-dyr-h": MDYRH,
    "dividemix": DivideMix,
    "alr": ALR,
}


def find_method(name: str) -> type[Method[Any]]:
    """The method of that name. ValueError names the known ones, and the one that was probably meant."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}{hint}")


def parameters(method_name: str) -> dict[str, Hyperparameter]:
    """A method's hyperparameters by their name in the ledger, in order of declaration.

    ``field`` where the method takes it over from the base unchanged, so that methods share what they have in common; else
    ``method.field``. ValueError for an unknown method.
    """
    config = find_method(method_name).Config
    shared = inherited(config, Config)
    return {
        name if name in shared else f"{method_name}.{name}": hyperparameter for name, hyperparameter in declared(config).items()
    }


__all__ = ["METHODS", "Method", "find_method", "parameters"]
