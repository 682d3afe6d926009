"""A page that is one file, with every picture in it, and a result's pictures as rows of it."""

from __future__ import annotations

import io
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from torchvision.transforms.functional import to_tensor

from phosphene import InputError, Result
from phosphene.images import data_uri
from phosphene.results import Panel


def rows_of(result: Result) -> list[list[Panel]]:
    """A result's panels; where it draws a figure of its own (a chart, say), that.

    Raises InputError where there is nothing to see.
    """
    if type(result).figure is not Result.figure:
        return [[Panel(to_tensor(Image.open(io.BytesIO(result.png()))))]]
    rows = [row for row in result.rows() if row]
    if not rows:
        raise InputError(f"this {type(result).__name__} holds no pictures to show")
    return rows


def write_page(page: Path, package: str, template: str, **values: Any) -> None:
    """Fill a template of ``package``, which may extend our ``base.html.j2``; the page appears whole."""
    html = _environment(package).get_template(template).render(values)
    write_whole(page, html)


def picture(rows: list[list[Panel]], about: str) -> str:
    """Rows of panels as a piece of HTML, every picture in it; ``about`` is for who cannot see them."""
    figure: Any = _environment().get_template("figure.html.j2").make_module()
    return str(figure.picture(rows, about))


def _environment(*packages: str) -> jinja2.Environment:
    """Templates of these packages, and ours."""
    found = jinja2.ChoiceLoader([jinja2.PackageLoader(p) for p in (*packages, __package__)])
    environment = jinja2.Environment(loader=found, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"data_uri": data_uri, "version": version("phosphene")}
    return environment


def write_whole(file: Path, text: str) -> None:
    """Write a text file under a temporary name, and give it its own once it is whole."""
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
