"""A plan: which models, pictures and methods go together, read from YAML and checked key by key."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from phosphene import InputError
from phosphene.parameter_text import DocumentPath, read_document, value_text


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Entry):
    """A model: its URI and what else ``load_model`` is told; ``options`` go to the scheme's factory."""

    uri: str
    name: str | None = None
    weights: str | None = None
    pretrained: bool = False
    input_size: tuple[int, int, int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: list[str] | None = None
    options: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """What it is called in the report and in folders' names."""
        return self.name or self.uri.partition(":")[2] or self.uri

    def settings(self) -> dict[str, Any]:
        """What ``load_model`` is told beside the URI."""
        return self.model_dump(exclude={"uri", "name", "options"}, exclude_unset=True) | self.options


class ImagesEntry(_Entry):
    """Pictures that go together, as ``run`` reads them, and what they show, for methods that want to know."""

    images: str | Annotated[list[str], Field(min_length=1)]
    name: str | None = None
    target: str | int | list[str | int] | None = None
    labels: str | int | list[str | int] | None = None

    @property
    def label(self) -> str:
        """What they are called in the report and in folders' names."""
        several = [self.images] if isinstance(self.images, str) else self.images
        first = several[0].removeprefix("builtin:")
        shown = first if first != several[0] else Path(first).stem or first
        return self.name or (shown if len(several) == 1 else f"{shown} and {len(several) - 1} more")


class MethodEntry(_Entry):
    """A method, with what it is given beside model and images; ``grid`` runs every mixture of its values."""

    method: str
    name: str | None = None
    models: list[str] | None = None
    target: str | int | list[str | int] | None = None
    inputs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @property
    def label(self) -> str:
        """What it is called in the report and in folders' names; settings of a grid come behind it."""
        return self.name or self.method

    def settings(self) -> list[dict[str, Any]]:
        """Every mixture of the grid's values; a single empty one where there is no grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]


def _entries(key: str) -> Any:
    """A list of entries, each of which may be written as the value of its one key: ``- saliency``."""

    def spell_out(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{key: item} if isinstance(item, (str, list)) else item for item in value]

    return BeforeValidator(spell_out)


class Plan(_Entry):
    """Models x images x methods, and where their results go."""

    out: str | None = None
    title: str | None = None
    models: Annotated[list[ModelEntry], _entries("uri"), Field(min_length=1)] = [
        ModelEntry(uri="builtin:shapes-vgg")
    ]
    images: Annotated[list[ImagesEntry], _entries("images"), Field(min_length=1)] = [
        ImagesEntry(images="builtin:scenes/4")
    ]
    methods: Annotated[list[MethodEntry], _entries("method"), Field(min_length=1)]
    #: Given to every method that draws and is not told a seed, so that a plan's results come out again.
    seed: int = Field(default=0, ge=0)
    device: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    executor: str = "local"

    _file: Path = PrivateAttr(default=Path("plan.yaml"))
    _node: Any = PrivateAttr(default=None)

    @property
    def stem(self) -> str:
        """The name of its file, without the ending."""
        return self._file.stem

    def where(self, place: DocumentPath) -> str:
        """File and line of a place in the plan: ``plan.yaml, line 7``."""
        return _where(self._file, self._node, place)


def read_plan(file: str | Path) -> Plan:
    """Read and check a plan. InputError tells every fault with its line, and the nearest right key."""
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeats(file, node)
        document = None if node is None else loader.construct_document(node)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}, line {line}: this is no YAML, {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist, say
        raise InputError(f"{file} is no YAML: {error}") from error
    finally:
        loader.dispose()
    if document is None:
        raise InputError(f"{file} is empty; a plan needs methods: a list of their names")
    plan = read_document(Plan, document, lambda place: _where(file, node, place))
    plan._file, plan._node = file, node
    return plan


def _refuse_repeats(file: Path, node: Any) -> None:
    """YAML would keep the last of two equal keys and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise InputError(f"{file}, line {line}: {name!r} stands in line {seen[name]} already")
            seen[name] = line
            _refuse_repeats(file, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(file, item)


def _where(file: Path, node: Any, place: DocumentPath) -> str:
    line = 1 if node is None else node.start_mark.line + 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return f"{file}, line {line}"


def folder_name(label: str) -> str:
    """A label as a folder's name: ``pgd eps=8/255`` -> ``pgd-eps=8-255``."""
    return re.sub(r"[^\w.=,+-]+", "-", label).strip("-.")[:100] or "unnamed"


def setting_text(settings: dict[str, Any]) -> str:
    """A grid's setting as a person would write it: ``eps=8/255 norm=l2``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in settings.items())
