"""``load_saved_model``: a model from a source in a saved result, which may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ..errors import InputError
from ..parameter_text import read_document
from .loading import load_model, loaders, refuse_user_code
from .model import Model
from .tasks import Task

#: Largest integer, list and text in a saved option, and most numbers in an image of a saved input size.
MAX_NUMBER, MAX_PIXELS = 100_000, 2**28

#: A size in a saved configuration.
Size = Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER)]

#: Means or standard deviations of a saved model, one per channel.
Statistics = Annotated[tuple[FiniteFloat, ...], Field(max_length=4096)]


#: Class names, or the name of a list of them.
ClassNames = Annotated[tuple[str, ...], Field(max_length=MAX_NUMBER)] | Annotated[str, Field(max_length=100)]


class SavedSettings(BaseModel):
    """How a saved model prepares images, its classes and what its output means."""

    model_config = ConfigDict(extra="forbid")

    mean: Statistics | None = None
    std: Statistics | None = None
    input_size: tuple[Size, Size, Size] | None = None
    classes: ClassNames | None = None
    task: Task | None = None

    @model_validator(mode="after")
    def _bound_images(self) -> SavedSettings:
        if self.input_size is not None and math.prod(self.input_size) > MAX_PIXELS:
            raise ValueError(f"images of size {self.input_size} have more than {MAX_PIXELS:,} numbers")
        return self


class SavedSource(SavedSettings):
    """The arguments of ``load_model`` that a result records; further ones are options of the scheme."""

    model_config = ConfigDict(extra="allow")

    uri: Annotated[str, Field(max_length=MAX_NUMBER)]
    weights: str | None = None
    pretrained: Annotated[bool, Field(strict=True)] = False


def saved_options(uri: str) -> Collection[str]:
    """The options that the scheme of a URI accepts from files, by its loader's ``saved_options(name)``.

    Empty for a loader without that method.
    """
    scheme, _, name = uri.partition(":")
    options: Any = getattr(loaders().get(scheme), "saved_options", None)
    return options(name) if options is not None else ()


def check_saved_options(uri: str, options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that a file must not set, such as the path of a checkpoint.

    Results, plans and requests may come from a stranger, so that only what a loader lists is passed on.
    """
    allowed = saved_options(uri)
    for name, value in options.items():
        if name not in allowed:
            scheme, names = uri.partition(":")[0], ", ".join(sorted(allowed)) or "none"
            raise InputError(
                f"{scheme}: does not accept the option {str(name)!r} from a file, only {names}: "
                "pass a model from load_model(...) instead"
            )
        _check_size(name, value)


def _check_size(name: str, value: Any) -> None:
    """Raise InputError for an option that would let a network grow without bound."""
    if isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_size(name, item)
    size = len(value) if isinstance(value, (str, Mapping, list, tuple)) else value
    if isinstance(size, (int, float)) and not abs(size) <= MAX_NUMBER:
        raise InputError(f"the option {name}={value!r:.40} is larger than {MAX_NUMBER:,}")


def load_saved_model(source: Mapping[str, Any]) -> Model:
    """The model whose source a result records, with the options that its scheme accepts from files.

    Weights are read from safetensors only, which hold nothing but tensors. Raises InputError for any other
    file of weights, for an option that is not accepted and for an invalid source.
    """
    try:
        read = read_document(SavedSource, dict(source), lambda path: "the saved source of the model")
    except InputError as error:
        raise InputError(str(error).splitlines()[0]) from None  # of several faults the first one
    check_saved_options(read.uri, read.model_extra or {})
    if read.weights is not None and _may_hold_code(Path(read.weights)):
        raise InputError(
            f"the model's weights were read from {read.weights!r:.200}, which is no safetensors file: "
            "pass the model instead"
        )
    arguments = {name: getattr(read, name) for name in read.model_fields_set}
    with refuse_user_code():
        return load_model(arguments.pop("uri"), **arguments)


def _may_hold_code(path: Path) -> bool:
    """Whether the path is a file of weights in another format than safetensors, such as a pickle."""
    return path.suffix in (".pth", ".pt", ".bin", ".ckpt") or (
        path.suffix != ".safetensors" and path.is_file()
    )
