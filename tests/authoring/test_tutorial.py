"""docs/first-plugin.md: its commands run, with its code, in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import phosphene
import phosphene_plugins
from phosphene import load_result

PAGE = (Path(__file__).parents[2] / "docs" / "first-plugin.md").read_text()


class Block(NamedTuple):
    """A code block of the page: its language, ``sh``, ``python`` or ``text``, and its text."""

    language: str
    text: str


BLOCKS = [
    Block(*match) for match in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
]
PYTHON = [block.text for block in BLOCKS if block.language == "python"]
#: ``pytest`` in the author's project runs the checks of ``phosphene check``, all of which are run: here some.
SHORTER = {"pytest": "pytest -k 'oracle or refuses or matter'"}
METHOD = Path("src", "phosphene_gradient_entropy", "__init__.py")


class Author:
    """A shell in an empty folder, in an environment with Phosphene and without network."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "work"
        self.folder.mkdir()
        venv.create(home / "venv", symlinks=True)
        (bin_,) = {path.parent for path in (home / "venv").glob("*/python*") if path.name == "python"}
        (site,) = (home / "venv").glob("lib/*/site-packages")
        # Libraries come from the tests' environment, Phosphene from where the tests import it, which may be
        # another checkout than the installed one; installations go into the fresh one.
        borrowed = sysconfig.get_path("purelib")
        code = [Path(str(module.__file__)).parents[1] for module in (phosphene, phosphene_plugins)]
        (site / "borrowed.pth").write_text(
            "".join(f"{folder}\n" for folder in code) + f"import site; site.addsitedir({borrowed!r})\n"
        )
        for command in ("pip", "pytest", "phosphene"):
            script = bin_ / command
            script.write_text(
                f"#!{bin_ / 'python'}\nfrom importlib.metadata import entry_points\n"
                f"(entry,) = entry_points(group='console_scripts', name={command!r})\n"
                "raise SystemExit(entry.load()())\n"
            )
            script.chmod(0o755)
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON", "PHOSPHENE_"))}
        self.environment = mine | {
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # no isolation: pip reads build_isolation=0
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def do(self, line: str, *, fails: bool = False) -> str:
        """Run one line and return its output."""
        if line.startswith("cd "):
            self.folder /= line.removeprefix("cd ")
            assert self.folder.is_dir()
            return ""
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        output = done.stdout + done.stderr
        assert done.returncode == (1 if fails else 0), f"{line}\n{output}"
        return output


def write_between_the_marks(file: Path, lines: str, part: str = "method") -> None:
    start, mark, rest = re.split(rf"(    # --- your {part}: [^\n]*\n)", file.read_text())
    _, end = rest.split(f"    # --- end of your {part} ---\n")
    file.write_text(f"{start}{mark}{lines}    # --- end of your {part} ---\n{end}")


def test_tutorial_commands(tmp_path: Path) -> None:
    author, outputs = Author(tmp_path), {}
    five_lines, oracle_lines, complete_file, *_ = PYTHON
    assert len(five_lines.splitlines()) == 5
    for block in BLOCKS:
        if block.text == complete_file:
            break
        if block.text == five_lines:
            write_between_the_marks(author.folder / METHOD, five_lines)
        if block.text == oracle_lines:
            write_between_the_marks(author.folder / METHOD, oracle_lines, "oracle")
        if block.language == "sh":
            outputs |= {line: author.do(SHORTER.get(line, line)) for line in block.text.splitlines()}
    assert "Successfully installed phosphene-gradient-entropy-0.1.0" in outputs["pip install -e '.[test]'"]
    assert re.search(r"\d\d passed", outputs["pytest"])
    assert "failed" not in outputs["pytest"]
    checked = outputs["phosphene check gradient_entropy"]
    assert "attribution.gradient_entropy   phosphene-gradient-entropy 0.1.0   profile ci" in checked
    assert re.search(r"^passed +map_per_pixel", checked, flags=re.MULTILINE)
    assert re.search(r"gradient_entropy: \d\d passed, \d+ skipped in", checked)
    assert re.search(r"^gradient_entropy +Blurred saliency", outputs["phosphene list"], flags=re.MULTILINE)
    run = "phosphene run gradient_entropy --image builtin:scenes/4 --out first-look"
    assert "picture.png" in outputs[run]
    maps = load_result(author.folder / "first-look").maps
    assert maps.shape == (4, 64, 64)
    assert ((maps.sum((1, 2)) > 8) & (maps.sum((1, 2)) < 12)).all()
    demo = outputs["phosphene demo --only saliency --only gradient_entropy"]
    assert re.search(r"^ *gradient_entropy +\d+%", demo, flags=re.MULTILINE)
    assert "Gradient entropy" in (author.folder / "gallery" / "index.html").read_text()


def test_tutorial_second_part(tmp_path: Path) -> None:
    author = Author(tmp_path)
    for line in (
        "phosphene new gradient_entropy",
        "cd phosphene-gradient-entropy",
        "pip install -e '.[test]'",
    ):
        author.do(line)
    five_lines, _, complete_file, *_ = PYTHON
    file = author.folder / METHOD
    # The page's output of a division by zero, with the file of its first half.
    careless = five_lines.replace(".clamp(min=tiny)\n", "\n", 1)
    assert careless != five_lines
    write_between_the_marks(file, careless)
    broken = author.do("phosphene check gradient_entropy --only finite", fails=True)
    (output,) = [block.text for block in BLOCKS if block.text.startswith("FAILED")]
    for line in output.splitlines():
        assert line.strip() in broken
    # The complete file, and the command below it.
    file.write_text(complete_file)
    after = BLOCKS[BLOCKS.index(Block("python", complete_file)) + 1]
    assert after.language == "sh"
    checked = author.do(after.text.strip())
    for check in ("entropy_bound", "oracle", "seed_matters", "batch_equals_single", "within_cost"):
        assert re.search(rf"^passed +{check}", checked, flags=re.MULTILINE), check
    assert "gradient_entropy   phosphene-gradient-entropy 0.1.0" in author.do(
        "phosphene show gradient_entropy"
    )


def test_tutorial_fragments_run() -> None:
    namespace: dict[str, object] = {}
    for fragment in PYTHON[3:]:
        exec(compile(fragment, "docs/first-plugin.md", "exec"), namespace)
