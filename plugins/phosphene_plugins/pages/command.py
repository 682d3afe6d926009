"""The command ``phosphene pages``, which writes the results of a stream as HTML pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phosphene import hookimpl
from phosphene.errors import type_name


def pages(
    folder: Annotated[Path, typer.Argument(metavar="RESULT", help="Folder of a stream.")],
    out: Annotated[str, typer.Option(help="Output folder of the pages.", metavar="FOLDER")] = "pages",
) -> None:
    """Write the results of a stream as static HTML pages, 50 images on each."""
    from phosphene import InputError, load_result
    from phosphene.results import ResultStream

    from ._stream_pages import write_pages

    stream = load_result(folder)
    if not isinstance(stream, ResultStream):
        raise InputError(
            f"{folder} is {type_name(stream)}, whose figure is {folder / 'picture.png'}; pages are "
            "written of a stream: run(..., stream=True)"
        )
    print(write_pages(stream, Path(out), folder.resolve().name).resolve().as_uri())


@hookimpl
def phosphene_commands(app):
    app.command()(pages)
