"""The method pages of the documentation: complete, as the specs have them, and drawn once."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from phosphene import methods

DOCS = Path(__file__).parent.parent / "docs"
OURS = sorted(id for id in methods if methods.resolve(id).distribution == "phosphene")


@pytest.fixture(scope="module")
def book() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_pages", DOCS / "method_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", OURS)
def test_page_contains_the_whole_spec(name: str, book: ModuleType) -> None:
    spec = methods[name].spec
    page = book.method_page(spec, {"command": "THE COMMAND", "python": "THE LINES", "seconds": 1.0})
    assert page.startswith(f"# {spec.title}\n\n{spec.summary}\n")
    assert f":file: {name}.html" in page and "THE COMMAND" in page and "THE LINES" in page
    for row in (*(i.name for i in spec.inputs), *spec.params_schema["properties"]):
        assert len(re.findall(rf"^\| `{row}`", page, flags=re.MULTILINE)) == 1, row
    listed = len(spec.invariants) + len(spec.relations) + len(spec.exempt) + len(spec.references)
    assert page.partition("## Signature")[2].count("\n- ") == listed
    assert all(reference.url in page for reference in spec.references)
    assert spec.cost is None or f"forward `{spec.cost.forward}`" in page
    assert spec.oracle is None or "## Oracle" in page
    assert f"`{spec.returns}`" in page


@pytest.mark.parametrize("name", OURS)
def test_equations_and_examples_are_blocks_of_their_own(name: str, book: ModuleType) -> None:
    page = book.method_page(methods[name].spec, {"command": "", "python": "", "seconds": 1.0})
    description = page.partition("## Description")[2].partition("## Signature")[0]
    equations = re.findall(r"```text\n(.*?)\n```", description, flags=re.DOTALL)
    for equation in equations:
        assert not equation.endswith(".")
        assert equation in methods[name].spec.description
    examples = re.findall(r"```python\n(.*?)\n```", description, flags=re.DOTALL)
    assert len(examples) == len(re.findall(r"^Example::", methods[name].spec.description, flags=re.MULTILINE))
    assert description.count("```") == 2 * (len(equations) + len(examples))


def test_every_family_is_documented() -> None:
    assert {name.partition(".")[0] for name in OURS} >= {"attribution", "attacks", "style", "synthesis"}


def test_prose_displays_as_written(book: ModuleType) -> None:
    escaped = book._escaped("G_j, a*b, [1] <- |x| and ``a*b``")
    assert escaped == r"G\_j, a\*b, \[1\] \<- \|x\| and ``a*b``"


def test_figure_is_drawn_once_for_the_same_sources(book: ModuleType, tmp_path: Path) -> None:
    log: list[str] = []
    stem = tmp_path / "attribution.saliency"
    assert book.cached_demo(stem, "a") is None
    demo = book.draw("saliency", stem, "a", log.append)
    assert log == ["drawing saliency"]
    assert demo["command"] == "phosphene run saliency"
    cached = book.cached_demo(stem, "a")
    assert cached is not None and cached["python"] == demo["python"]
    assert book.cached_demo(stem, "b") is None
    assert "data:image/png;base64," in (tmp_path / "attribution.saliency.html").read_text()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json"]


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", contents, flags=re.MULTILINE), page
