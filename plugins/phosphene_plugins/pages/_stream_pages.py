"""The results of a stream as HTML pages: 50 images on each, with their row of the index."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phosphene import InputError, Result, progress_bar
from phosphene.files import check_output_file
from phosphene.images import data_uri, to_pil
from phosphene.results import Panel, ResultStream

from ._single_file_page import is_page, panel_rows, shrink, write_page

#: Images on a page, and the largest side of each of their panels in pixels.
PAGE_IMAGES, MAX_SIDE = 50, 200

#: The largest side of a panel that is written without loss; larger ones are JPEG, a tenth of the bytes.
_LOSSLESS_SIDE = 96

#: Pages beside the first, ``index.html``.
_PAGE = re.compile(r"page-([0-9]{2,})\.html")

#: Columns of the index that are shown in another form, and numbers of classes, whose names are shown.
_OMITTED_COLUMNS = (
    *("id", "target", "prediction", "confidence", "shard", "row", "labels", "before", "after", "names"),
)


@dataclass(frozen=True)
class Card:
    """One image on a page: its number, its row of the index, its panels and the further columns."""

    number: int
    row: Mapping[str, Any]
    panels: list[Panel]
    more: dict[str, str]


def page_name(number: int) -> str:
    """The file name of a page, counted from 1."""
    return "index.html" if number == 1 else f"page-{number:02d}.html"


def write_pages(stream: ResultStream, out: Path, title: str) -> Path:
    """Write the pages of a stream into a folder; returns the path of the first.

    Pages of an earlier, longer stream are deleted. Raises InputError where a page would replace a file that
    is none of Phosphene's.
    """
    count = -(-len(stream) // PAGE_IMAGES)
    earlier = [path for path in out.glob("page-*.html") if _PAGE.fullmatch(path.name)]
    for path in (out / page_name(1), *earlier):
        check_output_file(path, is_page)
    out.mkdir(parents=True, exist_ok=True)
    pages = progress_bar(_cards(stream), "pages", count)
    for number, cards in enumerate(pages, start=1):
        values = {
            "title": title,
            "stream": stream,
            "cards": cards,
            "number": number,
            "count": count,
            "page_name": page_name,
            "neighbors": _neighbors(number, count),
            "picture_uri": _picture_uri,
            # Pixels that a card needs for its panels, four in a row at most.
            "widest": max([125 * min(4, len(card.panels)) for card in cards] + [250]),
        }
        write_page(out / page_name(number), "phosphene_plugins.pages", "stream.html.j2", **values)
    for path in earlier:
        if int(_PAGE.fullmatch(path.name)[1]) > count:  # type: ignore[index]
            path.unlink(missing_ok=True)
    return out / page_name(1)


def _cards(stream: ResultStream) -> Iterator[list[Card]]:
    """The images of each page."""
    results, numbers = iter(stream), itertools.count()
    for rows in stream.index_rows(PAGE_IMAGES):
        yield [
            Card(number, row, _panels(result), _further_columns(row))
            for row, result, number in zip(rows, results, numbers, strict=False)
        ]


def _panels(result: Result) -> list[Panel]:
    """The panels of one image, reduced to the size at which the page shows them."""
    try:
        rows = panel_rows(result)
    except InputError:  # a result without images to show
        return []
    return [shrink(panel, MAX_SIDE) for panel in itertools.chain(*rows)]


def _further_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """The other columns of the index, as text."""
    more = {name: value for name, value in row.items() if name not in _OMITTED_COLUMNS}
    return {name.replace("_", " "): _text(value) for name, value in more.items()}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _neighbors(number: int, count: int) -> list[int | None]:
    """The pages that a page links to: the first, the last and those around it; None for a gap."""
    near = {1, count, *range(max(1, number - 2), min(count, number + 2) + 1)}
    linked: list[int | None] = []
    for page in sorted(near):
        if linked and linked[-1] is not None and page > linked[-1] + 1:
            linked.append(None)
        linked.append(page)
    return linked


def _picture_uri(panel: Panel) -> str:
    """A panel as a ``data:`` URI: PNG for a small one, else JPEG."""
    if max(panel.image.shape[1:]) <= _LOSSLESS_SIDE:
        return data_uri(panel.image)
    buffer = io.BytesIO()
    to_pil(panel.image).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
