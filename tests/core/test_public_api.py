"""The public API changes together with the changelog, and plugins and documents use nothing else."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import public_api
import pytest
from public_api import MODULES, ROOT, Sources, changes, lines_of, renew

HOW = """
Is that what was meant? Then say so in CHANGELOG.md, under "Unreleased", with the names in backticks, and
renew the record: python -m tests.core.public_api
"""


def test_public_api_is_as_recorded() -> None:
    if found := changes():
        pytest.fail("\n".join(["the public API is not what tests/core/public_api.json says:", *found, HOW]))


def test_contributing_names_the_public_modules() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## The public interface and its versions")[2]
    (named,) = re.findall(r"modules `phosphene(\.[^;]*);", section)
    short = re.findall(r"\.[a-z._]+", named)
    assert {f"phosphene{name}" for name in short} == set(MODULES) - {"phosphene"}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module: str) -> None:
    found = importlib.import_module(module)
    names = Sources(ROOT).names(module)
    assert names
    assert all(hasattr(found, name) for name in names)
    assert not hasattr(found, "__all__") or sorted(found.__all__) == sorted(names)


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a module imports of Phosphene, also for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            if node.module and node.module.partition(".")[0] == "phosphene":
                yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (("phosphene", a.name[10:]) for a in node.names if a.name.startswith("phosphene."))


def code() -> Iterator[tuple[str, ast.Module]]:
    """The plugins, the example plugins, and the Python in the documents."""
    for folder in ("plugins", "docs/examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            if "import " in block:
                yield path.name, ast.parse(block)


def test_plugins_examples_and_documents_import_only_what_is_public() -> None:
    sources = Sources(ROOT)
    public = {module: sources.names(module) for module in MODULES}
    used = [(where, *found) for where, tree in code() for found in imports(tree)]
    assert len(used) > 100
    private = [u for u in used if u[2] not in public.get(u[1], ()) and f"{u[1]}.{u[2]}" not in MODULES]
    assert private == []


def test_what_others_do_inside_a_module_is_no_change() -> None:
    lines = lines_of()
    assert any(line.startswith("phosphene.run(name: str | Method[..., Any], *, out: ") for line in lines)
    assert "phosphene.Cost is phosphene.spec.Cost" in lines
    assert "phosphene.spec.Cost.backward: _Count = Constant(0)" in lines
    assert any(line.startswith("phosphene.methods.find(self, text: ") for line in lines)
    assert "phosphene.models.Model.classes" in lines
    assert "phosphene.registry.phosphene_before_run(run: PreparedRun) -> None  @hookspec" in lines
    assert not any("._" in line.partition("(")[0].replace(".__", "") for line in lines)
    assert not any(line.startswith("phosphene.images.Tensor") for line in lines)  # imported, not defined


# --- on a copy, what happens where somebody changes something ----------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the core's sources, with a changelog of one entry, and recorded."""
    for path in (ROOT / "core").rglob("*.py*"):
        if path.suffix in (".py", ".pyi"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- `run` runs, `Cost` costs.\n")
    (tmp_path / public_api.RECORD).parent.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:  # the first record: there is nothing to tell
        patch.setattr(public_api, "untold", lambda root: [])
        renew(tmp_path)
    assert changes(tmp_path) == []
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, old
    file.write_text(text.replace(old, new))


def refused(checkout: Path) -> str:
    with pytest.raises(SystemExit) as error:
        renew(checkout)
    assert changes(checkout)
    return str(error.value)


def test_a_change_is_recorded_once_the_changelog_names_it(checkout: Path) -> None:
    edit(
        checkout / "core/phosphene/spec/cost.py",
        "backward: _Count = Constant(0)",
        "backward: _Count = Constant(1)",
    )
    gone, new = changes(checkout)
    assert gone == "- phosphene.spec.Cost.backward: _Count = Constant(0)"
    assert new == "+ phosphene.spec.Cost.backward: _Count = Constant(1)"
    changelog = checkout / "CHANGELOG.md"
    told = 'not recorded: CHANGELOG.md says nothing new of `Cost` under "Unreleased"'
    assert refused(checkout) == told  # it is named, but was so before
    edit(changelog, "costs.", "costs.\n- A mended slip, and the Cost of it.")
    assert refused(checkout) == told  # not in backticks: any word may be a name
    edit(changelog, "- `run` runs, `Cost`", "- `run` runs,\n  `Cost`")
    assert refused(checkout) == told  # lines broken differently say nothing new
    edit(changelog, "# Changelog\n", "# Changelog\n\nOf `Cost`.\n")
    edit(changelog, "`Cost` costs.", "costs.")
    assert refused(checkout) == told  # in the wrong place
    edit(changelog, "costs.\n", "costs.\n- `Cost.backward` is one unless told.\n- `Cost` it was.\n")
    renew(checkout)
    assert changes(checkout) == []


def test_a_second_change_needs_a_second_word(checkout: Path) -> None:
    running, changelog = checkout / "core/phosphene/runs/run.py", checkout / "CHANGELOG.md"
    for number in (1, 2):
        first = "def run(\n    name: str | Method[..., Any],\n"
        edit(running, first, f"{first}    more{number}: int,\n")
        assert "`run`" in refused(checkout)
        edit(changelog, "## Unreleased\n", f"## Unreleased\n\n- `run(more{number})`.\n")
        renew(checkout)


def test_a_release_needs_no_renewal_and_begins_the_telling_anew(checkout: Path) -> None:
    changelog = checkout / "CHANGELOG.md"
    edit(changelog, "## Unreleased\n", "## Unreleased\n\n## 0.1.0\n")
    assert changes(checkout) == []
    edit(checkout / "core/phosphene/__init__.pyi", "from .runs.replay import replay as replay\n", "")
    assert changes(checkout)[0].startswith("- phosphene.replay(")
    assert "`replay`" in refused(checkout)
    edit(changelog, "## 0.1.0\n", "### Removed\n- `replay`.\n\n## 0.1.0\n")
    renew(checkout)


def test_names_members_attributes_and_hooks_count_and_private_ones_do_not(checkout: Path) -> None:
    core = checkout / "core/phosphene"
    (core / "parameter_text.py").write_text("NEW = 1\n_own = 2\n" + (core / "parameter_text.py").read_text())
    edit(core / "models/model.py", "        self.crop_pct = crop_pct\n", "        self.crop = crop_pct\n")
    edit(
        core / "registry/hookspecs.py",
        "def phosphene_before_run(run: PreparedRun)",
        "def phosphene_before_run(run: PreparedRun, on: str)",
    )
    edit(
        core / "errors.py",
        "from __future__ import annotations\n",
        "from __future__ import annotations\nimport os\n",
    )
    names = [line.partition("(")[0] for line in changes(checkout)]
    assert names == [
        "+ phosphene.models.Model.crop",
        "- phosphene.models.Model.crop_pct",
        "+ phosphene.parameter_text.NEW = 1",
        "- phosphene.registry.phosphene_before_run",
        "+ phosphene.registry.phosphene_before_run",
    ]
    assert re.findall("`(.*?)`", refused(checkout)) == ["Model", "NEW", "phosphene_before_run"]


def test_without_a_record_everything_is_to_be_told(checkout: Path) -> None:
    (checkout / public_api.RECORD).unlink()
    assert "`load_model`" in refused(checkout)
