"""The command ``phosphene demo``, which writes the gallery. Torch is imported only when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phosphene import hookimpl

if TYPE_CHECKING:
    from ._gallery_page import Exhibit


def demo(
    model: Annotated[
        str | None, typer.Option(help="Model URI, such as timm:resnet18 (default: bundled).", metavar="URI")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights of the model: a file, or a name of its loader, such as DEFAULT.",
            metavar="FILE|NAME",
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Load the default pretrained weights.")
    ] = False,
    image: Annotated[
        list[str],
        typer.Option(
            help="Input image, folder or pattern; repeatable (default: bundled). With a network of other "
            "classes than the bundled scenes' they are also the data set.",
            metavar="FILE|FOLDER",
        ),
    ] = [],  # noqa: B006
    count: Annotated[
        int, typer.Option(min=1, help="Largest number of input images per method; data sets have all.")
    ] = 4,
    only: Annotated[list[str], typer.Option(help="Run only this method; repeatable.", metavar="NAME")] = [],  # noqa: B006
    out: Annotated[str, typer.Option(help="Output folder of the page.", metavar="FOLDER")] = "gallery",
) -> None:
    """Run every method on a network and images (default: bundled), and write an HTML gallery of the results.

    A method that needs another network, or an input that the gallery lacks, gets a card with the reason.
    """
    from ._gallery_page import make_gallery

    console = Console(width=None if sys.stdout.isatty() else 200)

    def report(exhibit: Exhibit) -> None:
        text = Text(exhibit.failure, "red") if exhibit.failure else Text(exhibit.spec.summary)
        seconds = Text(f"{exhibit.seconds:6.1f} s  ", "dim")
        console.print(Text.assemble(seconds, (f"{exhibit.call:26} ", "cyan"), text))

    settings = {key: v for key, v in (("weights", weights), ("pretrained", pretrained)) if v}
    try:
        gallery = make_gallery(
            out, model=model, settings=settings, images=image, count=count, only=only, report=report
        )
    except KeyboardInterrupt as error:  # typer would not print the error's notes
        print("\n", *getattr(error, "__notes__", ()), sep="", file=sys.stderr)
        raise
    if gallery.scores:
        table = Table(
            "maximum of the map", "in the object", "within 4 pixels", "by chance", "scenes", box=None
        )
        for name, score in gallery.scores.items():
            chance = f"{score.chance_inside:.0%}, {score.chance_near:.0%}"
            table.add_row(name, f"{score.inside:.0%}", f"{score.near:.0%}", chance, str(score.count))
        console.print("", table, "", sep="\n")
    for broken in gallery.broken:
        console.print(Text(f"broken plugin {broken.plugin.qualified}: {broken.reason}", "yellow"))
    if gallery.warning:
        console.print(Text(gallery.warning, "yellow"))
    failed = [exhibit.call for exhibit in gallery.exhibits if exhibit.failure]
    if failed:
        verb, style = ("failed", "red") if gallery.bundled else ("did not run", "yellow")
        message = f"{len(failed)} of {len(gallery.exhibits)} methods {verb}: {', '.join(failed)}"
        console.print(Text(message, style))
    print(gallery.page.resolve().as_uri())
    if failed and gallery.bundled:
        raise typer.Exit(1)


@hookimpl
def phosphene_commands(app):
    app.command()(demo)
