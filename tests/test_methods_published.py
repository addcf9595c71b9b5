"""Every published setting of a method is one that a search over it can draw, in this project's units.

The settings are those of the papers, their released code or a named re-implementation. Learning rates are left out: they
belong to schedules, networks and batch sizes that are not this project's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from hparams import MANY_CLASSES, Hyperparameter, declared
from methods import METHODS
from methods.base import Clock
from methods.pencil import PENCIL, PENCILConfig
from tests.mutation import Mutation
from tests.tiny import make, tiny_data, tiny_task
from tune.search.space import Space
from tune.spec import make_spec


def memory(momentum: float, visits: float) -> float:
    """A factor per visit as a memory, in the fraction of so many visits after which 1/e is left."""
    return -1 / (math.log(momentum) * visits)


def sop(u: float, v: float, epochs: int, batch: int = 128) -> dict[str, float]:
    """The official rates as those of 120 epochs in batches of 128."""
    unit = epochs / 120 * 128 / batch
    return {"given_rate": u * unit, "other_rate": v * unit}


def pencil(rate: float, epochs: int, batch: int, classes: int) -> float:
    """lambda over so many epochs of stage 2 as the sum of lambda / (B K)."""
    return rate / (batch * classes) * epochs


PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("mae", "paper", {"scale": 2.0}),
    ("mae", "re-implementations", {"scale": 1.0}),
    ("gce", "paper", {"q": 0.7}),
    ("gce", "CIFAR-100, later papers", {"q": 0.5}),
    ("gce", "CIFAR-100 at 80 %, later papers", {"q": 0.9}),
    ("truncated-gce", "CIFAR-10", {"q": 0.7, "threshold": 0.5, "warmup": 40 / 120, "interval": 10 / 120}),
    ("truncated-gce", "CIFAR-100", {"q": 0.7, "threshold": 0.5, "warmup": 80 / 150, "interval": 10 / 150}),
    ("sce", "MNIST", {"alpha": 0.01, "beta": 1.0, "log_zero": math.log(1e-4)}),
    ("sce", "CIFAR-10", {"alpha": 0.1, "beta": 1.0, "log_zero": math.log(1e-4)}),
    ("sce", "CIFAR-100", {"alpha": 6.0, "beta": 0.1, "log_zero": math.log(1e-4)}),
    ("sce", "WebVision and Clothing1M", {"alpha": 10.0, "beta": 1.0, "log_zero": math.log(1e-4)}),
    ("nce-rce", "MNIST", {"alpha": 1.0, "beta": 10.0, "log_zero": math.log(1e-4)}),
    ("nce-rce", "CIFAR-10", {"alpha": 1.0, "beta": 1.0, "log_zero": math.log(1e-4)}),
    ("nce-rce", "CIFAR-100", {"alpha": 10.0, "beta": 0.1, "log_zero": math.log(1e-4)}),
    ("nce-rce", "WebVision", {"alpha": 50.0, "beta": 0.1, "log_zero": math.log(1e-4)}),
    ("nce-rce", "Clothing1M", {"alpha": 10.0, "beta": 1.0, "log_zero": math.log(1e-4)}),
    ("dal", "CIFAR", {"q_start": 0.6, "q_end": 1.5}),
    ("dal", "WebVision", {"q_start": 0.4, "q_end": 1.5}),
    ("bootstrapping", "soft", {"given_share": 0.95, "target": "soft"}),
    ("bootstrapping", "hard", {"given_share": 0.8, "target": "hard"}),
    ("label-smoothing", "paper", {"label_smoothing": 0.1}),
    *[("mixup", f"alpha {alpha}", {"alpha": alpha}) for alpha in (0.2, 1.0, 8.0, 32.0)],
    ("elr", "CIFAR-10 symmetric", {"memory": memory(0.7, 120), "strength": 3.0}),
    ("elr", "CIFAR-10 asymmetric", {"memory": memory(0.9, 120), "strength": 1.0}),
    ("elr", "CIFAR-100", {"memory": memory(0.9, 150), "strength": 7.0}),
    ("elr", "Clothing1M", {"memory": memory(0.7, 10), "strength": 3.0}),
    ("elr", "ablation, longest memory", {"memory": memory(0.99, 120), "strength": 10.0}),
    ("elr-plus", "CIFAR-10 symmetric", {"memory": memory(0.7, 200), "strength": 3.0, "ramp": 0.0, "mixup": 1.0}),
    ("elr-plus", "CIFAR-100", {"memory": memory(0.9, 250), "strength": 7.0, "ramp": 40_000 / (250 * 352), "mixup": 1.0}),
    ("elr-plus", "Clothing1M", {"memory": memory(0.7, 15), "strength": 3.0, "mixup": 1.0}),
    ("elr-plus", "CIFAR averaging", {"averaging": memory(0.997, 200 * 352)}),
    *[("cdr", f"noise rate {rate}", {"noncritical": rate}) for rate in (0.2, 0.4, 0.45, 0.8)],
    ("sr", "MNIST", {"temperature": 0.1, "exponent": 0.1, "strength": 4.0, "growth": 2.0 ** (50 / 5)}),
    ("sr", "CIFAR-10", {"temperature": 0.5, "exponent": 0.1, "strength": 1.2, "growth": 1.03**120}),
    ("sr", "CIFAR-100 symmetric", {"temperature": 0.5, "exponent": 0.01, "strength": 4.0, "growth": 1.02**200}),
    ("sr", "CIFAR-100 asymmetric", {"temperature": 0.5, "exponent": 0.01, "strength": 10.0, "growth": 1.02**200}),
    *[("ctrr", f"CIFAR-10, lambda {x:g}", {"strength": x, "agreement": 1 + math.log10(0.4)}) for x in (4.0, 8.0, 50.0, 170.0)],
    ("ctrr", "CIFAR-10 at 60 %", {"strength": 170.0, "agreement": 1 + math.log10(0.8), "averaging": memory(0.99, 550 * 195)}),
    ("ctrr", "CIFAR-100", {"strength": 130.0, "agreement": 1 + math.log(0.05) / math.log(100), "q": 0.0}),
    ("ctrr", "generalised cross-entropy", {"strength": 8.0, "q": 0.8}),
    ("mw-net", "released code", {"weight_lr": 1e-3}),
    *[("co-teaching", f"noise rate {rate}", {"forget_rate": rate, "ramp": 10 / 200}) for rate in (0.2, 0.45, 0.5, 0.8)],
    ("co-teaching-plus", "MNIST", {"forget_rate": 0.45, "ramp": 10 / 200, "warmup": 0.0}),
    ("co-teaching-plus", "CIFAR-10 at 80 %", {"forget_rate": 0.8, "ramp": 10 / 200, "warmup": 20 / 200}),
    ("co-teaching-plus", "CIFAR-100", {"forget_rate": 0.5, "ramp": 10 / 200, "warmup": 5 / 200}),
    ("co-teaching-plus", "Tiny-ImageNet", {"forget_rate": 0.5, "ramp": 10 / 200, "warmup": 100 / 200}),
    ("aum", "CIFAR", {"probe": 150 / 600, "percentile": 0.99}),
    ("aum", "ImageNet", {"probe": 60 / 300, "percentile": 0.99}),
    ("pencil", "released code", {"warmup": 70 / 320, "refinement": 130 / 320, "label_steps": pencil(600, 130, 128, 10)}),
    ("pencil", "released code's weights", {"alpha": 0.4, "beta": 0.1}),
    ("pencil", "CIFAR-10 symmetric 10 %", {"alpha": 0.1, "beta": 0.8, "label_steps": pencil(200, 130, 128, 10)}),
    ("pencil", "CIFAR-10 asymmetric 50 %", {"beta": 0.4, "label_steps": pencil(4000, 130, 128, 10)}),
    ("pencil", "CIFAR-100", {"alpha": 0.1, "beta": 0.4, "label_steps": pencil(10_000, 130, 128, 100)}),
    ("pencil", "CIFAR-100, re-implementation", {"label_steps": pencil(1000, 130, 128, 100)}),
    ("pencil", "Clothing1M", {"warmup": 5 / 25, "refinement": 10 / 25, "alpha": 0.08, "label_steps": pencil(3000, 10, 32, 14)}),
    ("pencil", "CUB", {"warmup": 35 / 160, "refinement": 65 / 160, "label_steps": pencil(3000, 65, 16, 200)}),
    *[("selc", f"CIFAR, {epochs} of 200", {"warmup": epochs / 200, "memory": memory(0.9, 200)}) for epochs in (20, 30, 40)],
    ("selc", "ANIMAL-10N", {"warmup": 40 / 100, "memory": memory(0.9, 100)}),
    ("selc", "Clothing1M", {"warmup": 5 / 40, "memory": memory(0.8, 40)}),
    ("sop", "CIFAR-10 symmetric", sop(10, 10, 120)),
    ("sop", "CIFAR-10 asymmetric", sop(10, 100, 120)),
    ("sop", "CIFAR-100 symmetric", sop(1, 10, 150)),
    ("sop", "CIFAR-100 asymmetric, released code", sop(0.1, 100, 150)),
    ("sop", "Clothing1M", sop(0.1, 1, 10, batch=64)),
    ("sop", "WebVision", sop(0.1, 1, 100, batch=32)),
    ("sop-plus", "CIFAR-10", {**sop(10, 10, 300), "consistency": 0.9, "balance": 0.1}),
    ("sop-plus", "CIFAR-100 asymmetric", {**sop(0.1, 100, 300), "consistency": 0.9, "balance": 0.1}),
    ("m-dyr-h", "CIFAR", {"warmup": 105 / 300, "mixing": 32.0, "balance_weight": 1.0}),
    ("dividemix", "CIFAR-10", {"warmup": 10 / 300, "threshold": 0.5, "ramp": 16 / 300, "temperature": 0.5, "mixing": 4.0}),
    ("dividemix", "CIFAR-100", {"warmup": 30 / 300, "balance_weight": 1.0, "unlabelled_weight": 150.0}),
    ("dividemix", "CIFAR-10 at 90 %", {"threshold": 0.6, "averaged": 5, "unlabelled_weight": 50.0}),
    ("dividemix", "CIFAR-10 asymmetric", {"warmup_entropy": 1.0}),
    ("dividemix", "WebVision and Clothing1M", {"warmup": 1 / 80, "mixing": 0.5}),
]


def of(name: str, field: str) -> Hyperparameter:
    return declared(METHODS[name].Config)[field]


@pytest.mark.parametrize(("name", "where", "values"), PUBLISHED, ids=[f"{name}: {where}" for name, where, _ in PUBLISHED])
def test_a_search_can_draw_the_published_setting(name: str, where: str, values: dict[str, Any]) -> None:
    for field, value in values.items():
        parameter = of(name, field)
        assert parameter.check(value) == value
        if parameter.search is not None:
            assert parameter.search.nearest(value) == value, f"{field} {value:g} of {where} is outside {parameter.search}"
        elif not parameter.choices:
            assert value == parameter.default, f"{field} is not searched, so only its default can be drawn"


def test_every_method_with_a_published_setting_is_looked_at() -> None:
    """ALR is a reconstruction, and cross-entropy has nothing of its own."""
    assert set(METHODS) - {name for name, _, _ in PUBLISHED} == {"ce", "alr"}


@pytest.mark.parametrize(
    ("name", "field", "nearly"), [("pencil", "alpha", 1e-3), ("dividemix", "unlabelled_weight", 0.1), ("elr", "memory", 1.0)]
)
def test_a_published_zero_or_a_limit_is_nearly_reached_on_a_logarithmic_range(name: str, field: str, nearly: float) -> None:
    drawn = of(name, field).search
    assert drawn is not None
    assert drawn.log
    assert nearly in (drawn.low, drawn.high)


# Defaults that depend on the number of classes


@pytest.mark.parametrize(
    ("name", "num_classes", "alpha", "beta"),
    [
        ("sce", 10, 0.1, 1.0),
        ("sce", 100, 6.0, 0.1),
        ("nce-rce", 10, 1.0, 1.0),
        ("nce-rce", 100, 10.0, 0.1),
        ("sce", 2, 0.1, 1.0),
        ("sce", 31, 0.1, 1.0),  # nearer to 10 than to 100, in ratio
        ("sce", 32, 6.0, 0.1),
        ("nce-rce", 1000, 10.0, 0.1),
    ],
)
def test_the_first_trial_is_the_published_one_for_its_number_of_classes(
    name: str, num_classes: int, alpha: float, beta: float
) -> None:
    spec = make_spec({"method": (name,)})
    space = Space(spec)
    params, moved = space.defaults(name, spec, num_classes)
    _, values = space.read(params)
    assert (values["alpha"], values["beta"], values["log_zero"]) == (alpha, beta, pytest.approx(-9.21034, abs=1e-5))
    assert moved == []


def test_few_and_many_classes_part_at_the_geometric_mean_of_ten_and_a_hundred() -> None:
    assert MANY_CLASSES - 1 < math.sqrt(10 * 100) < MANY_CLASSES


def test_a_default_for_many_classes_is_moved_into_a_users_range_and_a_fixed_value_stays() -> None:
    spec = make_spec({"method": ("sce",), "range": {"sce.alpha": "0.01:1:log"}, "set": {"sce.beta": "1"}})
    space = Space(spec)
    params, moved = space.defaults("sce", spec, 100)
    assert params["sce.alpha"] == 1.0
    assert moved == ["sce: the default alpha 6.0 is outside 0.01:1:log; the first trial takes 1.0"]
    assert space.read(params)[1]["beta"] == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_defaults_for_many_classes_are_legal_and_in_range(name: str) -> None:
    for parameter in declared(METHODS[name].Config).values():
        value = parameter.default_for(100)
        assert parameter.check(value) == value
        assert type(value) is parameter.type
        assert parameter.search is None or parameter.search.nearest(value) == value


# PENCIL's step


@pytest.mark.parametrize(
    ("rate", "batch", "classes", "alpha"),
    [
        (200, 128, 10, 0.1),
        (600, 128, 10, 0.1),
        (600, 128, 10, 0.4),
        (4000, 128, 10, 0.0),
        (10_000, 128, 100, 0.1),
    ],
)
def test_the_bound_of_the_official_form_stops_no_published_rate(rate: float, batch: int, classes: int, alpha: float) -> None:
    """In the published 320 epochs a visit's step is lambda / (B K)."""
    steps = pencil(rate, 130, batch, classes)
    values: dict[str, Any] = {"label_steps": steps, "alpha": alpha, "compatibility": "official"}
    method = make("pencil", tiny_task(tiny_data()), **values)
    assert isinstance(method, PENCIL)
    assert method.label_rate(Clock(70, 320)) == pytest.approx(rate / (batch * classes))


def test_the_bound_of_the_papers_form_is_what_it_was() -> None:
    assert PENCILConfig().compatibility == "paper"
    method = make("pencil", tiny_task(tiny_data()), alpha=0.4, label_steps=61.0)
    assert method.label_rate(Clock(70, 320)) == pytest.approx(2 / 5)


# Constants: the test that notices when one is changed by a tenth

FIRST = "tests/test_methods_published.py::test_the_first_trial_is_the_published_one_for_its_number_of_classes"

MUTATIONS = [
    Mutation("hparams.py", "MANY_CLASSES = 32", "MANY_CLASSES = 35", FIRST + "[sce-32-6.0-0.1]"),
]
