"""No constant of a method can be changed by a tenth without a test that notices.

Each ``test_methods_*.py`` lists the mutations of its methods in ``MUTATIONS``, with the test that must fail. They take minutes
of two cores, so they run on demand, after a change to a method: ``.venv/bin/python -m pytest -m slow tests/test_mutations.py``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.mutation import Mutation, survivors

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("test_methods_*.py") if "MUTATIONS" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_changed_constant_is_noticed(family: str) -> None:
    mutations = importlib.import_module(f"tests.{family}").MUTATIONS
    assert mutations
    assert survivors(mutations) == []


def test_a_change_that_nothing_depends_on_is_reported() -> None:
    harmless = Mutation(
        "methods/ce.py",
        "the baseline that every other method must beat",
        "the baseline",
        "tests/test_methods_identities.py::test_gce_at_a_tiny_exponent_is_cross_entropy",
    )
    (survivor,) = survivors([harmless])
    assert survivor["exit"] == 0
