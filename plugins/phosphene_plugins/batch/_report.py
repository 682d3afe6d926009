"""The report of a batch: an HTML page and a JSON document."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from phosphene import MethodSpec, Result, methods
from phosphene.files import write_file
from phosphene.results import Panel

from ..pages._single_file_page import panel_rows, shrink, write_page
from ._execute_plan import Batch, Combination, Outcome

FORMAT = 1


#: Images per cell of the page, their largest side in pixels, and the largest side of a single image.
MAX_IMAGES, MAX_SIDE, MAX_SIDE_SINGLE = 12, 224, 640


@dataclass(frozen=True)
class Cell:
    """An outcome on the page: its first panels in rows, and the number of omitted ones."""

    combination: Combination
    state: str
    seconds: float
    failure: str
    rows: list[list[Panel]]
    more: int

    @property
    def spec(self) -> MethodSpec:
        """The spec of its method."""
        return methods[self.combination.call].spec


@dataclass
class Section:
    """The part of the page for one set of images: the images, and a row of cells per setting of a method."""

    images: list[Panel] = field(default_factory=list)
    rows: dict[int, dict[str | None, Cell]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The labels of the models in this section."""
        return list(dict.fromkeys(model for row in self.rows.values() for model in row if model is not None))


class Report:
    """Collects the outcomes of a batch; of each result only what the report shows is stored."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.counts: Counter[str] = Counter()
        self.sections: dict[str | None, Section] = {label: Section() for label in (*batch.images, None)}
        self.failures: list[Outcome] = []
        self.runs: list[dict[str, Any]] = []
        self._started = datetime.datetime.now(datetime.UTC)

    def add(self, outcome: Outcome) -> None:
        """Add one outcome."""
        combination, result = outcome.combination, outcome.result
        rows, more = ([], 0) if result is None else _excerpt(result)
        section = self.sections[combination.images]
        cell = Cell(combination, outcome.state, outcome.seconds, outcome.failure, rows, more)
        section.rows.setdefault(combination.row, {})[combination.model] = cell
        if combination.images is not None and not section.images and result is not None:
            section.images = _input_panels(cell.spec, result)
        self.counts[outcome.state] += 1
        self.runs.append(_record(outcome, self.batch.out))
        if outcome.failure:
            self.failures.append(outcome)

    def summary(self) -> str:
        """The number of runs by state: ``24 runs: 20 completed, 3 reused, 1 failed``."""
        states = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        return f"{self.counts.total()} runs: {states}"

    def document(self) -> dict[str, Any]:
        """The JSON report; folders are relative to the report's folder."""
        batch, now = self.batch, datetime.datetime.now(datetime.UTC)
        return {
            "format": FORMAT,
            "phosphene": version("phosphene"),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round((now - self._started).total_seconds(), 3),
            "plan": batch.plan.model_dump(mode="json"),
            "models": {label: {"source": m.source, "digest": m.digest} for label, m in batch.models.items()},
            "counts": dict(self.counts),
            "runs": self.runs,
        }

    def write(self) -> Path:
        """Write ``report.json`` and ``report.html`` atomically; returns the path of the page."""
        page, document = self.batch.out / "report.html", self.document()
        page.parent.mkdir(parents=True, exist_ok=True)
        write_file(page.with_suffix(".json"), json.dumps(document, indent=2, ensure_ascii=False))
        sections = {label: section for label, section in self.sections.items() if section.rows}
        values = {"report": self, "sections": sections, "plan": self.batch.plan, "document": document}
        write_page(page, "phosphene_plugins.batch", "report.html.j2", **values)
        return page


def _excerpt(result: Result) -> tuple[list[list[Panel]], int]:
    """The panels of a cell (outputs of the method, else complete rows), and the number of omitted ones."""
    rows = panel_rows(result)
    panels = [panel for row in rows for panel in row]
    if outputs := [panel for panel in panels if panel.is_output]:
        first = outputs[:MAX_IMAGES]
        rows = [first[start : start + 4] for start in range(0, len(first), 4)]
        return _shrink_rows(rows), len(outputs) - len(first)
    count = max(1, MAX_IMAGES // max(map(len, rows)))
    return _shrink_rows(rows[:count]), len(panels) - sum(map(len, rows[:count]))


def _input_panels(spec: MethodSpec, result: Result) -> list[Panel]:
    """The first input images of a method."""
    declared = spec.input("images")
    images = result.inputs.get(declared.name) if declared else None
    if not isinstance(images, Tensor):
        return []
    return _shrink_rows([[Panel(image) for image in images[:MAX_IMAGES]]])[0]


def _shrink_rows(rows: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    """Rows of panels, reduced to the size at which the page shows them."""
    max_side = MAX_SIDE_SINGLE if sum(map(len, rows)) == 1 else MAX_SIDE
    return [[shrink(panel, max_side) for panel in row] for row in rows]


def _record(outcome: Outcome, out: Path) -> dict[str, Any]:
    """An outcome as an entry of the JSON report."""
    combination, result = outcome.combination, outcome.result
    forward, backward = combination.passes or (None, None)
    provenance = result.provenance if result else None
    return {
        "method": combination.method,
        "model": combination.model,
        "images": combination.images,
        "state": outcome.state,
        "error": outcome.failure or None,
        "folder": combination.folder.relative_to(out).as_posix(),
        "forward": forward,
        "backward": backward,
        "seconds": outcome.seconds,
        "lines": result.lines() if result else [],
        "provenance": provenance.model_dump(mode="json") if provenance else None,
    }
