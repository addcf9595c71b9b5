"""No number in a method's equations can be changed by a tenth without a test that notices.

Each ``test_methods_*.py`` lists the mutations of its methods in ``MUTATIONS``, with the test that must fail; default values are
no part of them, as the tests of published defaults compare those one by one. That they still fit the source is checked here.
Running them takes minutes of two cores and happens on demand, after a change to a method:
``.venv/bin/python -m pytest -m slow tests/test_mutations.py``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.mutation import Mutation, survivors

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("test_methods_*.py") if "MUTATIONS" in path.read_text())


def listed(family: str) -> list[Mutation]:
    found: list[Mutation] = importlib.import_module(f"tests.{family}").MUTATIONS
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutation_fits_the_source(family: str) -> None:
    """Its text stands once in the file that it names, what takes its place is Python, and there is such a test."""
    mutations = listed(family)
    assert len(mutations) == len(set(mutations)) > 0
    for mutation in mutations:
        compile(mutation.mutant(), mutation.path, "exec")
        file, test = mutation.test.split("[")[0].split("::")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert hasattr(module, test), mutation


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_changed_constant_is_noticed(family: str) -> None:
    assert survivors(listed(family)) == []


def test_a_mutation_that_does_not_fit_is_named() -> None:
    with pytest.raises(AssertionError, match=r"'no such text' stands 0 times in methods/ce.py"):
        Mutation("methods/ce.py", "no such text", "", "").mutant()


def test_a_change_that_nothing_depends_on_is_reported() -> None:
    harmless = Mutation(
        "methods/ce.py",
        "the baseline that every other method must beat",
        "the baseline",
        "tests/test_methods_identities.py::test_gce_at_a_tiny_exponent_is_cross_entropy",
    )
    (survivor,) = survivors([harmless])
    assert survivor["exit"] == 0
