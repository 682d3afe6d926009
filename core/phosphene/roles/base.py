"""``InputRole``: everything about one kind of input (images, a target, a data set, ...) in one object."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.datasets import Dataset
from ..errors import InputError, type_name
from ..models import Model
from ..models.digest import checksum
from ..results import Result

#: How the record of an input ends that cannot be read again from what is saved.
AS_OBJECT = "given as an object"


@dataclass(frozen=True)
class InputContext:
    """What a role may use to read or check a value.

    ``model``: the call's model, where the method takes one. ``inputs``: the inputs declared before this one,
    checked, by name. ``load_result``: loads a saved result; None while inputs are only checked.
    """

    model: Model | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    load_result: Callable[[str | os.PathLike[str]], Result] | None = None

    def result(self, folder: str | os.PathLike[str]) -> Result:
        """The result saved in a folder."""
        if self.load_result is None:
            raise InputError(f"{folder} has to be loaded first: load_result({str(folder)!r})")
        return self.load_result(folder)

    def need_one_each(self, values: Sequence[Any], what: str) -> None:
        """Refuse, with InputError, another number of values than of images."""
        images = self.inputs.get("images")
        if images is not None and len(values) != len(images):
            raise InputError(f"{len(images)} images need one {what} each, not {len(values)}")


@dataclass(frozen=True, kw_only=True)
class SampleRequest(InputContext):
    """What a conformance case asks a role for: a value for ``count`` images of ``size`` (height, width).

    ``draw(count, channels)`` returns the case's images (count, channels, H, W) in [0, 1]. ``target`` is the
    case's target, ``dataset_size`` how many images a data set holds, ``classes`` how many of the model's
    classes the case uses. ``required``: whether the value must not be None.
    """

    model: Model
    count: int
    size: tuple[int, int]
    draw: Callable[[int, int], Tensor]
    target: Any = None
    dataset_size: int = 6
    classes: int = 3
    required: bool = True


class InputRole(ABC):
    """One kind of input: how it is written, read, checked, recorded and tested.

    Subclass it in a file of its own, with the annotation beside it, and return an instance from the hook
    ``phosphene_roles``::

        class CaptionsRole(InputRole):
            name, value_type = "captions", tuple
            ...

        Captions = Annotated[tuple[str, ...], Role("captions")]
    """

    #: The name in ``Role(name)`` and ``Input.role``.
    name: ClassVar[str]
    #: The type that ``read`` returns; a value of it is not read again.
    value_type: ClassVar[type]
    #: The value that is read by default; None where ``read`` itself supplies a default.
    default: ClassVar[Any] = None
    #: Whether an optional input that is not passed is None, instead of the default.
    optional_is_none: ClassVar[bool] = False
    #: Whether row i belongs to image i, so that a large call can be split into batches.
    per_image: ClassVar[bool] = False
    #: The size of a cost expression that the value's length adds to ("dataset", "styles", "frames", ...).
    size_name: ClassVar[str | None] = None
    #: What a Python caller passes, a phrase that stands alone; ``help(method)`` shows it.
    description: ClassVar[str] = ""
    #: The placeholder on the command line, and its help text.
    metavar: ClassVar[str] = "TEXT"
    help: ClassVar[str] = ""

    def make(self, value: Any, context: InputContext) -> Any:
        """A value of ``value_type`` unchanged, anything else read; ``default`` for None."""
        if isinstance(value, self.value_type):
            return value
        return self.read(self.default if value is None else value, context)

    @abstractmethod
    def read(self, value: Any, context: InputContext) -> Any:
        """Convert a path, name, URI or list to a value of ``value_type``; ``check`` then validates it."""

    @abstractmethod
    def check(self, value: Any, context: InputContext) -> Any:
        """The value on the model's device and in its precision. Raises InputError for an invalid one."""

    def parse_option(self, texts: Sequence[str]) -> Any:
        """The value of a repeatable command-line option."""
        return texts[0] if len(texts) == 1 else list(texts)

    def select(self, value: Any, rows: range) -> Any:
        """The value for a batch of consecutive images."""
        return value[rows.start : rows.stop] if self.per_image and value is not None else value

    def image_count(self, value: Any) -> int | None:
        """How many images the value is for; None where it does not determine it."""
        return len(value) if isinstance(value, Tensor) and value.ndim == 4 else None

    def cost_sizes(self, value: Any) -> dict[str, int]:
        """Sizes for the cost expression; see ``phosphene.Cost``."""
        sizes: dict[str, int] = {}
        if isinstance(value, Tensor) and value.ndim == 4:
            count, _, height, width = value.shape
            sizes |= {"images": count, "height": height, "width": width}
        return sizes | ({self.size_name: len(value)} if self.size_name else {})

    def record(self, value: Any) -> Any:
        """The value as a result saves it: a tensor, or what ``read`` reads again, as JSON."""
        if value is None or isinstance(value, Tensor):
            return value
        return getattr(value, "uri", None) or f"{type_name(value)} {AS_OBJECT}"

    def is_identified(self, value: Any) -> bool:
        """Whether ``record`` differs from that of every other value."""
        return not str(self.record(value)).endswith(AS_OBJECT)

    def fingerprint(self, value: Any) -> Any:
        """JSON that differs between different values, for the digest of a run."""
        recorded = self.record(value)
        return checksum(recorded) if isinstance(recorded, Tensor) else recorded

    def sample(self, request: SampleRequest) -> Any:
        """A valid value for a conformance case; the default one unless overridden."""
        return self.make(None, request)

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        """Values that ``check`` must refuse, each with a phrase that describes it."""
        yield "a path", "somewhere"


def image_count(inputs: Mapping[str, Any]) -> int | None:
    """How many images a call is for: the images passed in, or one per class of a target; None if neither."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return len(value)
        if isinstance(index := getattr(value, "index", None), tuple):
            return len(index)
    return None


def model_for_inputs(model: Model, inputs: Mapping[str, Any]) -> Model:
    """The model at the size of the first images among the inputs, where it has no input size of its own."""
    if model.size_known:
        return model
    for value in inputs.values():
        images = value.read([0]) if isinstance(value, Dataset) and len(value) else value
        if isinstance(images, Tensor) and images.ndim == 4:
            return model.for_images(images)
    return model


def check_type(value: Any, kind: type, hint: str) -> Any:
    """The value, or InputError where it is of another type; ``hint`` says how to create one."""
    if not isinstance(value, kind):
        raise InputError(f"needs a {kind.__name__}, {hint}, not {type_name(value)}")
    return value


def check_dense(tensor: Tensor, what: str) -> None:
    """Refuse, with InputError, a tensor that is sparse or nested, or that has no values."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{what} must be one dense tensor, not a {kind} one; try .to_dense() or torch.stack")
    if tensor.is_meta:
        raise InputError(f"{what} are on the meta device and have no values")
