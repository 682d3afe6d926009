"""The Python in the README and in the book's pages runs unchanged."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: tests/authoring/test_tutorial.py runs docs/first-plugin.md with its shell commands, and
#: tests/parity/test_moving.py the other libraries' lines of docs/moving.md.
PAGES = [
    *("README.md", "docs/quickstart.md", "docs/concepts.md", "docs/models.md", "docs/moving.md"),
    *(
        "docs/programs.md",
        "docs/attention.md",
        "docs/one-transformer.md",
        "docs/comparing-models.md",
        "docs/influence.md",
        "docs/vision-language.md",
        "docs/streams.md",
    ),
]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
