"""Pictures of the page about the lecture: what the calls on the page return, drawn when the book is built."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from method_pages import cached_demo

from phosphene.files import write_file
from phosphene_plugins.pages._single_file_page import panel_rows, picture

PAGE = Path(__file__).parent / "lecture.md"
#: A heading, a block of code, or a reference to one of the pictures.
_PARTS = re.compile(
    r"^#+ (?P<section>[\d.]+) |^```python\n(?P<code>.*?)^```"
    r"|^:file: _build/pictures/lecture-(?P<picture>[\w.]+)\.html",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code: its section, and the names of the pictures below it."""

    section: str
    code: str
    pictures: tuple[str, ...]


def page_blocks(page: str) -> list[Block]:
    """The blocks of code of the page, in its order."""
    section, blocks = "", list[Block]()
    for part in _PARTS.finditer(page):
        if part["section"]:
            section = part["section"].rstrip(".")
        elif part["code"]:
            blocks.append(Block(section, part["code"], ()))
        else:
            blocks[-1] = blocks[-1]._replace(pictures=(*blocks[-1].pictures, part["picture"]))
    return blocks


def named_calls(block: Block) -> dict[str, ast.expr]:
    """The expressions of a block by the names of their pictures: the section with a method or a variable.

    In section 21.4.2 the picture of ``run("saliency", ...)`` is "21.4.2.saliency", and that of
    ``plain = run(...)`` "21.4.2.plain".
    """
    calls: dict[str, ast.expr] = {}
    for statement in ast.parse(block.code).body:
        match statement:
            case ast.Expr(
                value=ast.Call(func=ast.Name(id="run"), args=[ast.Constant(value=str(name)), *_]) as call
            ):
                calls[f"{block.section}.{name}"] = call
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="run")) as call):
                calls[f"{block.section}.{name}"] = call
    return calls


def write_lecture(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Run the calls that have a picture below them, and draw it; again only when sources or calls differ."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = page_blocks(PAGE.read_text())
    assignments = "".join(block.code for block in blocks if not block.pictures and not named_calls(block))
    namespace: dict[str, Any] = {}
    pending: list[str] = []  # assignments before the next call, executed when one is drawn
    for block in blocks:
        calls = named_calls(block)
        if not block.pictures and not calls:
            pending.append(block.code)
        for name in block.pictures:
            digest = hashlib.sha256((sources + assignments + ast.dump(calls[name])).encode()).hexdigest()
            stem = folder / f"lecture-{name}"
            if cached_demo(stem, digest):
                continue
            tell(f"drawing {name} of the lecture")
            exec(compile("\n".join(pending), PAGE.name, "exec"), namespace)
            pending.clear()
            result = eval(compile(ast.Expression(calls[name]), PAGE.name, "eval"), namespace)
            write_file(folder / f"{stem.name}.html", picture(panel_rows(result), name))
            write_file(folder / f"{stem.name}.json", json.dumps({"sources": digest}))
