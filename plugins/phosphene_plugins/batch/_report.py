"""What a batch gave, on one page for people and as JSON for programs."""

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
from phosphene.images import resize
from phosphene.results import Panel

from ..pages._single_file_page import rows_of, write_page, write_whole
from ._execute_plan import Batch, Combination, Outcome

FORMAT = 1


#: A cell shows so many pictures, so large (a single one larger); the others are a click away.
_MOST, _SIDE, _SIDE_ALONE = 12, 224, 640


@dataclass(frozen=True)
class Cell:
    """An outcome on the page: some of its pictures in rows, and how many more there are."""

    combination: Combination
    state: str
    seconds: float
    failure: str
    rows: list[list[Panel]]
    more: int

    @property
    def spec(self) -> MethodSpec:
        """What the method says of itself."""
        return methods[self.combination.call].spec


@dataclass
class Section:
    """What was made of the same pictures: those, and for each setting of a method its cells by model."""

    pictures: list[Panel] = field(default_factory=list)
    rows: dict[int, dict[str | None, Cell]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models in it."""
        return list(dict.fromkeys(model for row in self.rows.values() for model in row if model is not None))


class Report:
    """The outcomes of a batch as they come in; of each only what is told of it is kept."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.counts: Counter[str] = Counter()
        self.sections: dict[str | None, Section] = {label: Section() for label in (*batch.images, None)}
        self.failures: list[Outcome] = []
        self.runs: list[dict[str, Any]] = []
        self._started = datetime.datetime.now(datetime.UTC)

    def add(self, outcome: Outcome) -> None:
        """Take in one outcome."""
        made, result = outcome.combination, outcome.result
        rows, more = ([], 0) if result is None else _excerpt(result)
        section = self.sections[made.images]
        cell = Cell(made, outcome.state, outcome.seconds, outcome.failure, rows, more)
        section.rows.setdefault(made.row, {})[made.model] = cell
        if made.images is not None and not section.pictures and result is not None:
            section.pictures = _pictures(cell.spec, result)
        self.counts[outcome.state] += 1
        self.runs.append(_record(outcome, self.batch.out))
        if outcome.failure:
            self.failures.append(outcome)

    def standing(self) -> str:
        """How many came to which end: ``24 runs: 20 made, 3 kept, 1 failed``."""
        ends = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        return f"{self.counts.total()} runs: {ends}"

    def document(self) -> dict[str, Any]:
        """All that programs may want to know; folders are told from the report's own."""
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
        """Write ``report.json`` and ``report.html``, each when it is whole; where the page is."""
        page, document = self.batch.out / "report.html", self.document()
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page.with_suffix(".json"), json.dumps(document, indent=2, ensure_ascii=False))
        shown = {label: section for label, section in self.sections.items() if section.rows}
        values = {"report": self, "sections": shown, "plan": self.batch.plan, "document": document}
        write_page(page, "phosphene_plugins.batch", "report.html.j2", **values)
        return page


def _excerpt(result: Result) -> tuple[list[list[Panel]], int]:
    """The pictures that a cell shows: what the method made, else whole rows; and how many are left out."""
    rows = rows_of(result)
    every = [panel for row in rows for panel in row]
    if made := [panel for panel in every if panel.is_output]:
        shown = made[:_MOST]
        rows = [shown[start : start + 4] for start in range(0, len(shown), 4)]
        return _small(rows), len(made) - len(shown)
    count = max(1, _MOST // max(map(len, rows)))
    return _small(rows[:count]), len(every) - sum(map(len, rows[:count]))


def _pictures(spec: MethodSpec, result: Result) -> list[Panel]:
    """Some of the pictures that a method was given."""
    shown = spec.input("images")
    given = result.inputs.get(shown.name) if shown else None
    return _small([[Panel(image) for image in given[:_MOST]]])[0] if isinstance(given, Tensor) else []


def _small(rows: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    """Panels no larger than a page needs them."""
    most = _SIDE_ALONE if sum(map(len, rows)) == 1 else _SIDE
    return [[_shrunk(panel, most) for panel in row] for row in rows]


def _shrunk(panel: Panel, most: int) -> Panel:
    sides = panel.image.shape[1:]
    if max(sides) <= most:
        return panel
    height, width = (max(1, round(side * most / max(sides))) for side in sides)
    return Panel(resize(panel.image, (height, width)), panel.title, panel.is_output)


def _record(outcome: Outcome, out: Path) -> dict[str, Any]:
    """An outcome for programs."""
    made, result = outcome.combination, outcome.result
    forward, backward = made.passes or (None, None)
    how = result.provenance if result else None
    return {
        "method": made.method,
        "model": made.model,
        "images": made.images,
        "state": outcome.state,
        "error": outcome.failure or None,
        "folder": made.folder.relative_to(out).as_posix(),
        "forward": forward,
        "backward": backward,
        "seconds": outcome.seconds,
        "lines": result.lines() if result else [],
        "provenance": how.model_dump(mode="json") if how else None,
    }
