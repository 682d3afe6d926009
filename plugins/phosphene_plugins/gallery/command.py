"""``phosphene demo``: the command that makes the gallery. Torch is imported when it runs, not before."""

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
        str | None, typer.Option(help="Scheme:name, such as timm:resnet18.", metavar="URI")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="The model's, as for 'run'.", metavar="FILE")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="With its scheme's usual weights.")
    ] = False,
    image: Annotated[list[str], typer.Option(help="Repeatable.", metavar="FILE|FOLDER")] = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="This method; repeatable.", metavar="NAME")] = [],  # noqa: B006
    out: Annotated[str, typer.Option(help="Folder for the page.", metavar="FOLDER")] = "gallery",
) -> None:
    """Run every method on the small world that comes along, and make a page of what they show."""
    from ._gallery_page import make_gallery

    console = Console(width=None if sys.stdout.isatty() else 200)

    def tell(exhibit: Exhibit) -> None:
        said = Text(exhibit.failure, "red") if exhibit.failure else Text(exhibit.spec.summary)
        took = Text(f"{exhibit.seconds:6.1f} s  ", "dim")
        console.print(Text.assemble(took, (f"{exhibit.call:22}", "cyan"), said))

    settings = {key: v for key, v in (("weights", weights), ("pretrained", pretrained)) if v}
    gallery = make_gallery(out, model=model, settings=settings, images=image, only=only, tell=tell)
    if gallery.scores:
        table = Table(
            "where a map is highest", "in the object", "within 4 pixels", "by chance", "scenes", box=None
        )
        for name, score in gallery.scores.items():
            chance = f"{score.chance_inside:.0%}, {score.chance_near:.0%}"
            table.add_row(name, f"{score.inside:.0%}", f"{score.near:.0%}", chance, str(score.count))
        console.print("", table, "", sep="\n")
    for broken in gallery.broken:
        console.print(Text(f"broken plugin {broken.plugin.qualified}: {broken.reason}", "yellow"))
    failed = [exhibit.call for exhibit in gallery.exhibits if exhibit.failure]
    if failed:
        told = f"{len(failed)} of {len(gallery.exhibits)} methods gave no picture: {', '.join(failed)}"
        console.print(Text(told, "red"))
    print(gallery.page.resolve().as_uri())
    if failed and gallery.bundled:
        raise typer.Exit(1)


@hookimpl
def phosphene_commands(app):
    app.command()(demo)
