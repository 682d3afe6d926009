"""HTML pages that are one file: images embedded as data URIs, results as rows of panels."""

from __future__ import annotations

import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from torchvision.transforms.functional import to_tensor

from phosphene import InputError, Result
from phosphene.files import write_file
from phosphene.images import data_uri, resize
from phosphene.results import Panel


def panel_rows(result: Result) -> list[list[Panel]]:
    """A result's panels in rows; the figure, for a result type that draws its own (a chart).

    Raises InputError for a result without panels.
    """
    if type(result).draw is not Result.draw:
        return [[Panel(to_tensor(Image.open(io.BytesIO(result.png()))))]]
    rows = [row for row in result.rows() if row]
    if not rows:
        raise InputError(f"this {type(result).__name__} has no images to show")
    return rows


def shrink(panel: Panel, max_side: int) -> Panel:
    """The panel with its longer side reduced to ``max_side`` pixels."""
    sides = panel.image.shape[1:]
    if max(sides) <= max_side:
        return panel
    height, width = (max(1, round(side * max_side / max(sides))) for side in sides)
    return Panel(resize(panel.image, (height, width)), panel.title, panel.is_output)


def write_page(page: Path, package: str, template: str, **values: Any) -> None:
    """Render a template of ``package``, which may extend ``base.html.j2``, and write it atomically."""
    html = _environment(package).get_template(template).render(values)
    write_file(page, html)


def picture(rows: list[list[Panel]], about: str) -> str:
    """Rows of panels as HTML with embedded images; ``about`` is the alternative text of untitled panels."""
    figure: Any = _environment().get_template("figure.html.j2").make_module()
    return str(figure.picture(rows, about))


def _environment(*packages: str) -> jinja2.Environment:
    """A template environment of these packages and this one."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(p) for p in (*packages, __package__)])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )
    environment.globals |= {"data_uri": data_uri, "version": version("phosphene"), "is_web_link": is_web_link}
    return environment


def is_page(text: str) -> bool:
    """Whether a text is a page of this template, of any version: the first ones had no generator tag."""
    signs = ('<meta name="generator" content="Phosphene ', "--paper: #fbfaf7; --card: #ffffff;")
    return any(sign in text[:2000] for sign in signs)


def is_web_link(url: str) -> bool:
    """Whether a URL is a web address: a ``javascript:`` URL would run in the page."""
    return re.match(r"https?://[^\s\x00-\x1f]", url, re.IGNORECASE) is not None


def _without_controls(value: Any) -> Any:
    """A text without characters that reorder or hide the text around them, such as U+202E or NUL."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value)
