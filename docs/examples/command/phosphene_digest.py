"""``phosphene digest FOLDER``: one line for every saved result, the same wherever the bits are."""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from phosphene import InputError, hookimpl


def digest_of(folder: Path) -> str:
    """A digest of what a saved result holds; of when and where it was made it knows nothing."""
    document = json.loads((folder / "result.json").read_text())
    held = {part: document[part] for part in ("type", "fields", "inputs")}
    found = hashlib.sha256(json.dumps(held, sort_keys=True).encode())
    found.update((folder / "arrays.safetensors").read_bytes())
    return found.hexdigest()


def digest(
    folder: Annotated[Path, typer.Argument(help="A saved result, or a folder with such somewhere inside.")],
) -> None:
    """Tell saved results by their contents: compare two machines, or before and after a change."""
    found = sorted(path.parent for path in folder.rglob("result.json"))
    if not found:
        raise InputError(f"there is no saved result in {folder}")
    for place in found:
        made = json.loads((place / "result.json").read_text())["provenance"] or {}
        print(digest_of(place)[:16], made.get("method", "unknown"), place.relative_to(folder), sep="  ")


@hookimpl
def phosphene_commands(app):
    app.command()(digest)
