"""``phosphene digest FOLDER``: one line per saved result, equal for results with equal bits."""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from phosphene import InputError, hookimpl


def digest_of(folder: Path) -> str:
    """A digest of a saved result's data, without its provenance (when and where it was made)."""
    document = json.loads((folder / "result.json").read_text())
    data = {part: document[part] for part in ("type", "fields", "inputs")}
    sha = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    sha.update((folder / "arrays.safetensors").read_bytes())
    return sha.hexdigest()


def digest(
    folder: Annotated[Path, typer.Argument(help="A saved result, or a folder that contains some.")],
) -> None:
    """Print digests of saved results: compare two machines, or before and after a change."""
    results = sorted(path.parent for path in folder.rglob("result.json"))
    if not results:
        raise InputError(f"there is no saved result in {folder}")
    for result in results:
        provenance = json.loads((result / "result.json").read_text())["provenance"] or {}
        method = provenance.get("method", "unknown")
        print(digest_of(result)[:16], method, result.relative_to(folder), sep="  ")


@hookimpl
def phosphene_commands(app):
    app.command()(digest)
