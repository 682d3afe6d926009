"""Plans: models, images and methods to combine, read from YAML and checked key by key."""

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
    """A model: its URI and further arguments of ``load_model``; ``options`` go to the scheme's factory."""

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
        """Its name in the report and in folder names."""
        return self.name or self.uri.partition(":")[2] or self.uri

    def settings(self) -> dict[str, Any]:
        """The arguments of ``load_model`` besides the URI."""
        return self.model_dump(exclude={"uri", "name", "options"}, exclude_unset=True) | self.options


class ImagesEntry(_Entry):
    """A set of images as ``run`` reads them, and the ``target`` and ``labels`` of methods that take them."""

    images: str | Annotated[list[str], Field(min_length=1)]
    name: str | None = None
    target: str | int | list[str | int] | None = None
    labels: str | int | list[str | int] | None = None

    @property
    def label(self) -> str:
        """Its name in the report and in folder names."""
        paths = [self.images] if isinstance(self.images, str) else self.images
        first = paths[0].removeprefix("builtin:")
        label = first if first != paths[0] else Path(first).stem or first
        return self.name or (label if len(paths) == 1 else f"{label} and {len(paths) - 1} more")


class MethodEntry(_Entry):
    """A method with its parameters and inputs; ``grid`` runs every combination of its values."""

    method: str
    name: str | None = None
    models: list[str] | None = None
    target: str | int | list[str | int] | None = None
    inputs: dict[str, Any] = {}
    params: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @property
    def label(self) -> str:
        """Its name in the report and in folder names, without the settings of a grid."""
        return self.name or self.method

    def settings(self) -> list[dict[str, Any]]:
        """All combinations of the grid's values; a single empty one without a grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]


def _entries(key: str) -> Any:
    """A list of entries, each of which may be abbreviated to the value of its key: ``- saliency``."""

    def expand(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{key: item} if isinstance(item, (str, list)) else item for item in value]

    return BeforeValidator(expand)


class Plan(_Entry):
    """Models x images x methods, and the output folder."""

    out: str | None = None
    title: str | None = None
    models: Annotated[list[ModelEntry], _entries("uri"), Field(min_length=1)] = [
        ModelEntry(uri="builtin:shapes-vgg")
    ]
    images: Annotated[list[ImagesEntry], _entries("images"), Field(min_length=1)] = [
        ImagesEntry(images="builtin:scenes/4")
    ]
    methods: Annotated[list[MethodEntry], _entries("method"), Field(min_length=1)]
    #: The seed of every random method without a seed of its own, so that a plan's results are reproducible.
    seed: int = Field(default=0, ge=0)
    device: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    executor: str = "local"

    _file: Path = PrivateAttr(default=Path("plan.yaml"))
    _node: Any = PrivateAttr(default=None)

    @property
    def stem(self) -> str:
        """The name of its file without the extension."""
        return self._file.stem

    def where(self, path: DocumentPath) -> str:
        """File and line of a path in the plan: ``plan.yaml, line 7``."""
        return _where(self._file, self._node, path)


def read_plan(file: str | Path) -> Plan:
    """Read and check a plan. Raises InputError with each fault's line and the nearest valid key."""
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_duplicate_keys(file, node)
        document = None if node is None else loader.construct_document(node)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}, line {line}: invalid YAML, {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist, say
        raise InputError(f"{file} is invalid YAML: {error}") from error
    finally:
        loader.dispose()
    if document is None:
        raise InputError(f"{file} is empty; a plan needs methods: a list of their names")
    plan = read_document(Plan, document, lambda path: _where(file, node, path))
    plan._file, plan._node = file, node
    return plan


def _refuse_duplicate_keys(file: Path, node: Any) -> None:
    """Refuse duplicate keys: the YAML loader would use the last one without a warning."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise InputError(f"{file}, line {line}: {name!r} is in line {lines[name]} already")
            lines[name] = line
            _refuse_duplicate_keys(file, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(file, item)


def _where(file: Path, node: Any, path: DocumentPath) -> str:
    line = 1 if node is None else node.start_mark.line + 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return f"{file}, line {line}"


def folder_name(label: str) -> str:
    """A label as a folder name: ``pgd eps=8/255`` -> ``pgd-eps=8-255``.

    File systems limit names to 255 bytes, and the name of a checkpoint is longer than that of its folder.
    """
    name = re.sub(r"[^\w.=,+-]+", "-", label).strip("-.")[:100]
    return name.encode(errors="ignore")[:200].decode(errors="ignore") or "unnamed"


def setting_text(settings: dict[str, Any]) -> str:
    """A setting of a grid in readable form: ``eps=8/255 norm=l2``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in settings.items())
