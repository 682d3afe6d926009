"""Renders the project of a plugin from the template in this folder."""

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


#: The method templates: the file's name and what it starts from.
METHOD_TEMPLATES = {
    "attribution": "a map of the pixels that a score depends on",
    "attacks": "an attack on the predicted class",
    "objective_attack": "an attack on any objective, with a result type of its own",
    "dataset": "sums over a data set, with a result type of its own",
    "training": "a training of a classifier",
}


#: The template of a family, where none is named; of all other families the first.
FAMILY_TEMPLATES = {
    "attacks": "attacks",
    "activations": "dataset",
    "embeddings": "dataset",
    "defenses": "training",
}


#: Largest length of a method's name: longer ones would exceed the line length of the generated code.
MAX_NAME_LENGTH = 40


def write_project(
    name: str,
    *,
    family: str = "attribution",
    template: str | None = None,
    licence: str = "apache-2.0",
    author: str = "",
    into: Path,
) -> Path:
    """Write the project of a method into a new folder ``phosphene-NAME``; no partial folder is left behind.

    Raises InputError for a name that is invalid or in use, and for a folder that exists already; UnknownName
    for a licence that is not in ``LICENCES`` and a template that is not in ``METHOD_TEMPLATES``.
    """
    template = FAMILY_TEMPLATES.get(family, "attribution") if template is None else template
    if template not in METHOD_TEMPLATES:
        raise UnknownName("template", template, METHOD_TEMPLATES)
    if licence.lower() not in LICENCES:
        raise UnknownName("licence", licence, LICENCES)
    if not author.isprintable():
        raise InputError("an author's name is one line")
    _check_name("method", name)
    _check_name("family", family)
    distribution = f"phosphene-{name.replace('_', '-')}"
    values = {
        "name": name,
        "words": name.replace("_", " "),
        "family": family,
        "start": template,
        "result": "".join(word.capitalize() for word in name.split("_")) + "Result",
        "distribution": distribution,
        "module": distribution.replace("-", "_"),
        "licence": LICENCES[licence.lower()],
        "author": author,
        "holder": author or f"the {distribution} authors",
        "year": datetime.date.today().year,
        "version": version("phosphene"),
    }
    _check_unused(values)
    folder = into / distribution
    if into.exists() and not into.is_dir():
        raise InputError(f"{into} is not a folder")
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already: choose another name, or another folder with --into")
    files = _render(values)
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
        if len(name) > MAX_NAME_LENGTH:
            raise InputError(
                f"a {kind}'s name has at most {MAX_NAME_LENGTH} characters, {name!r} has {len(name)}"
            )
        return
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    near = re.sub("^[0-9_]+", "", "_".join(words).lower()) or "gradient_entropy"
    near += "_method" if keyword.iskeyword(near) else ""
    allowed = "lowercase letters, digits and single underscores, the first a letter, no Python keyword"
    raise InputError(f"{name!r} cannot be the name of a {kind}: {allowed}, such as {near!r}")


def _check_unused(values: dict[str, Any]) -> None:
    """Refuse a name that is in use: by a registered method, by a module, or in the method's file."""
    name, module = values["name"], values["module"]
    for plugin in methods.plugins.values():
        if plugin.short_name == name:
            owner = f"{plugin.distribution} {plugin.version}"
            raise InputError(f"there is a method {plugin.id} already, from {owner}: choose another name")
    if find_spec(module) is not None:
        raise InputError(f"there is a module {module} already: choose another name")
    source = _environment().get_template(f"methods/{values['start']}.py.j2").render(values | {"name": "_"})
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


def _render(values: dict[str, Any]) -> dict[Path, str]:
    """The files of the project: path in the folder and text, both rendered."""
    environment, project = _environment(), TEMPLATE / "project"
    rendered = {}
    for file in sorted(project.rglob("*.j2")):
        path = environment.from_string(file.relative_to(project).as_posix().removesuffix(".j2")).render(
            values
        )
        text = environment.get_template(file.relative_to(TEMPLATE).as_posix()).render(values)
        rendered[Path(path)] = text
    return rendered
