"""The pages say what the code and the files say: generated pages, names of methods and tests, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def without_blocks(text: str) -> str:
    """A page without its code blocks, in which ``#`` begins no heading and brackets are no links."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings: small letters, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere: the file is missing, or it has no heading for the anchor."""
    dead = []
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    assert dead_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, it is\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[file](other.md) [heading](other.md#a-heading-it-is) [here](#own) [web](https://example.org/x#y) `[no](link)`\n\n"
        "[no file](missing.md) [no heading](other.md#no-heading) [not here](#a-heading-it-is)\n\n## Own\n"
    )
    assert dead_links(page) == ["missing.md", "other.md#no-heading", "#a-heading-it-is"]


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_index_of_the_decisions_lists_every_entry_in_its_order() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text()
    assert re.findall(r"^- \[(.+)\]\(#", text, flags=re.MULTILINE) == re.findall(r"^### (.+)$", text, flags=re.MULTILINE)


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


def test_the_example_of_a_method_is_one() -> None:
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "def losses" in code
    assert code in (ROOT / "methods" / "gce.py").read_text()


def test_the_tests_that_the_page_of_faults_names_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
