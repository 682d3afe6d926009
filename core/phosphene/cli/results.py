"""Commands on saved results: figures, panels, tables and exported networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, UnknownName
from .app import app
from .model_options import (
    ModelClasses,
    ModelMean,
    ModelStd,
    ModelTask,
    Pretrained,
    Weights,
    model_settings,
)

_Folder = Annotated[Path, typer.Argument(metavar="RESULT", help="Folder of a saved result.")]
_Cmap = Annotated[str | None, typer.Option(help="Color map of maps, by matplotlib's name: viridis.")]
_Alpha = Annotated[float | None, typer.Option(help="Opacity of maps over images, 0 to 1.")]
_Dpi = Annotated[float | None, typer.Option(help="Dots per inch.")]


@app.command()
def figure(
    folder: _Folder,
    out: Annotated[Path, typer.Argument(help="File to write: .png, .pdf or .svg.")],
    cmap: _Cmap = None,
    alpha: _Alpha = None,
    columns: Annotated[int | None, typer.Option(help="Panels in a row.")] = None,
    titles: Annotated[
        bool | None, typer.Option("--titles/--no-titles", help="Whether panels have titles.")
    ] = None,
    dpi: _Dpi = None,
) -> None:
    """Draw a saved result as PNG, PDF or SVG."""
    from ..runs.saved_results import load_result

    options = {"cmap": cmap, "alpha": alpha, "columns": columns, "dpi": dpi}
    load_result(folder).save_figure(out, titles=False if titles is False else None, **options)
    print(out)


@app.command()
def panel(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Folders of saved results.")],
    out: Annotated[Path, typer.Option(help="File to write: .png, .pdf or .svg.")],
    cmap: _Cmap = None,
    alpha: _Alpha = None,
    dpi: Annotated[float, typer.Option(help="Dots per inch.")] = 200,
) -> None:
    """Draw results of the same images side by side: a row for each image, a column for each result."""
    from ..results import panel as draw_panel
    from ..results import write_figure
    from ..runs.saved_results import load_result

    write_figure(draw_panel([*map(load_result, folders)], cmap=cmap, alpha=alpha, dpi=dpi), out)
    print(out)


@app.command()
def table(
    folder: _Folder,
    out: Annotated[Path, typer.Argument(help="File to write: .csv or .parquet.")],
    detections: Annotated[
        bool, typer.Option("--detections", help="A row for each object that the detector finds.")
    ] = False,
) -> None:
    """Write a saved result's table, such as a row for each image, as CSV or Parquet."""
    from ..runs.saved_results import load_result

    suffixes = (".csv", ".parquet")
    if out.suffix.lower() not in suffixes:
        raise UnknownName("suffix of a table", out.suffix or str(out), suffixes)
    result = load_result(folder)
    write = result.to_csv if out.suffix.lower() == ".csv" else result.to_parquet
    write(out, "detections" if detections else "results")
    print(out)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RESULT|MODEL", help="Folder of a trained network, or a model's URI.")
    ],
    out: Annotated[Path, typer.Argument(help="File to write: .pt2 (torch.export) or .onnx.")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    model_task: ModelTask = None,
    model_classes: ModelClasses = None,
    model_mean: ModelMean = None,
    model_std: ModelStd = None,
) -> None:
    """Write a classifier or a style network as a program of torch.export, or as ONNX."""
    from ..models import load_model
    from ..runs.export import export as export_network

    values = {"weights": weights, "pretrained": pretrained, "model_task": model_task}
    values |= {"model_classes": model_classes, "model_mean": model_mean, "model_std": model_std}
    settings = model_settings(values)
    if settings and Path(source, "result.json").is_file():
        option = next(name for name, value in values.items() if value).replace("_", "-")
        raise InputError(f"--{option} is an option of a model's URI, and {source} is a saved result")
    print(export_network(load_model(source, **settings) if settings else source, out))
