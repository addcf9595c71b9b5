"""The pages that are made of code and result files are those that ``make docs`` makes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from methods import METHODS

ROOT = Path(__file__).parent.parent


def test_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = module.pages()
    assert pages
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name} is not what the code says: make docs"


def test_every_method_has_its_place_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in text] == []


def test_the_example_of_a_method_in_the_readme_is_one() -> None:
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "def losses" in code
    assert code in (ROOT / "methods" / "gce.py").read_text()


def test_the_tests_that_the_page_of_faults_names_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
