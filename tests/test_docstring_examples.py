"""The example in every method's docstring runs as it is written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from phosphene import methods

FIRST_PARTY = sorted(id for id in methods if methods.resolve(id).distribution == "phosphene")


@pytest.mark.parametrize("name", FIRST_PARTY)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(
        r"^Example::\n((?:\n|[ ]{4}.*\n?)+)", methods[name].spec.description + "\n", re.MULTILINE
    )
    assert len(examples) == 1, f"{name} has {len(examples)} examples"
    exec(compile(textwrap.dedent(examples[0]), name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("name", FIRST_PARTY)
def test_docstring_has_every_section(name: str) -> None:
    headings = re.findall(
        r"^(Returns|Raises|Example|Source)::?", methods[name].spec.description, re.MULTILINE
    )
    assert sorted(headings) == ["Example", "Raises", "Returns", "Source"], name
