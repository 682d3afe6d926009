"""The Python in the README and in the book's pages runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: docs/first-plugin.md is performed whole, shell and all, by tests/authoring/test_tutorial.py; the other
#: libraries' lines on docs/moving.md beside ours by tests/parity/test_moving.py.
PAGES = ["README.md", "docs/quickstart.md", "docs/concepts.md", "docs/moving.md", "docs/programs.md"]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
