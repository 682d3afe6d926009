"""A plugin's project, rendered from the template beside this file."""

from __future__ import annotations

import ast
import datetime
import json
import keyword
import os
import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phosphene import InputError, UnknownName, methods

TEMPLATE = Path(__file__).parent / "template"


LICENCES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause"}


#: The method file to start from; a family without one of its own starts from an attribution.
STARTS = ("attribution", "attacks")


#: Longer names would break the lines of what is written.
LONGEST = 40


def write_project(
    name: str, *, family: str = "attribution", licence: str = "apache-2.0", author: str = "", into: Path
) -> Path:
    """Write the project of a method into a new folder ``phosphene-NAME``, whole or not at all.

    Raises InputError for a name that cannot be or is taken, and for a folder that is already there;
    UnknownName for a licence that is none of ``LICENCES``.
    """
    if licence.lower() not in LICENCES:
        raise UnknownName("licence", licence, LICENCES)
    if not author.isprintable():
        raise InputError("an author's name stands in one line")
    _check_name("method", name)
    _check_name("family", family)
    distribution = f"phosphene-{name.replace('_', '-')}"
    told = {
        "name": name,
        "words": name.replace("_", " "),
        "family": family,
        "start": family if family in STARTS else STARTS[0],
        "distribution": distribution,
        "module": distribution.replace("-", "_"),
        "licence": LICENCES[licence.lower()],
        "author": author,
        "holder": author or f"the {distribution} authors",
        "year": datetime.date.today().year,
        "version": version("phosphene"),
    }
    _check_free(told)
    folder = into / distribution
    if into.exists() and not into.is_dir():
        raise InputError(f"{into} is no folder")
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already: choose another name, or another folder with --into")
    files = _render(told)
    into.mkdir(parents=True, exist_ok=True)
    unfinished = into / f".{distribution}.{os.getpid()}"
    try:
        for path, text in files.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text, encoding="utf-8")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _check_name(kind: str, name: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) and not keyword.iskeyword(name):
        if len(name) > LONGEST:
            raise InputError(f"a {kind}'s name has at most {LONGEST} letters, {name!r} has {len(name)}")
        return
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    near = re.sub("^[0-9_]+", "", "_".join(words).lower()) or "gradient_entropy"
    near += "_method" if keyword.iskeyword(near) else ""
    allowed = "small letters, digits and single underscores, first a letter, and no word of Python"
    raise InputError(f"{name!r} cannot be the name of a {kind}: {allowed}, such as {near!r}")


def _check_free(told: dict[str, Any]) -> None:
    """Refuse a name that is taken: by a registered method, by a module, or inside the file itself."""
    name, module = told["name"], told["module"]
    for plugin in methods.plugins.values():
        if plugin.short_name == name:
            owner = f"{plugin.distribution} {plugin.version}"
            raise InputError(f"there is a method {plugin.id} already, from {owner}: choose another name")
    if find_spec(module) is not None:
        raise InputError(f"there is a module {module} already: choose another name")
    source = _environment().get_template(f"methods/{told['start']}.py.j2").render(told | {"name": "_"})
    used = {
        getattr(node, field)
        for node in ast.walk(ast.parse(source))
        for field in ("id", "name", "arg", "asname")
        if isinstance(getattr(node, field, None), str)
    }
    if name in used:
        raise InputError(f"{name!r} means something else in the method's file: choose another name")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["toml"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment


def _render(told: dict[str, Any]) -> dict[Path, str]:
    """Every file of the project: its path in the folder, rendered like its text, and the text."""
    environment, project = _environment(), TEMPLATE / "project"
    rendered = {}
    for file in sorted(project.rglob("*.j2")):
        path = environment.from_string(file.relative_to(project).as_posix().removesuffix(".j2")).render(told)
        text = environment.get_template(file.relative_to(TEMPLATE).as_posix()).render(told)
        rendered[Path(path)] = text
    return rendered
