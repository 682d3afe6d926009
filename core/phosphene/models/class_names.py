"""Class names of a model: a class by name, synonym or index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

from ..errors import InputError, UnknownName


def class_index(name: str | int, classes: Sequence[str] | None, model: str) -> int:
    """The index of a class by its name, one of its comma-separated synonyms, or its number.

    ``model`` is the model's name in error messages. A number is not compared with the number of classes.
    Raises UnknownName with the nearest name, InputError for what is neither a name nor an index.
    """
    if isinstance(name, str):
        if (index := _index_by_name(tuple(classes or ())).get(name.strip().lower())) is not None:
            return index
        if not name.isdecimal() and classes is None:
            raise InputError(f"{model} has no class names; pass the index instead of {name!r}")
        if not name.isdecimal():
            raise UnknownName("class", name, classes or (), model)
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, Integral):
        raise InputError(f"a class is an index or a name, not a {type(name).__name__}")
    return int(name)


@lru_cache(maxsize=16)
def _index_by_name(classes: tuple[str, ...]) -> dict[str, int]:
    """Indices by lower-case names and synonyms.

    A class's full name takes precedence over another's synonym, then the lower index.
    """
    names = list(enumerate(classes))
    synonyms = [(index, synonym) for index, name in names for synonym in name.split(",")]
    return {name.strip().lower(): index for index, name in reversed(names + synonyms)}


#: What ``classes`` may be instead of a list, with timm's name of that version of ImageNet.
IMAGENETS = {
    "imagenet": "imagenet-1k",
    "imagenet-12k": "imagenet-12k",
    "imagenet-21k-goog": "imagenet-21k-goog",
    "imagenet-21k-miil": "imagenet-21k-miil",
    "imagenet-22k": "imagenet-22k",
    "imagenet-22k-ms": "imagenet-22k-ms",
}


def imagenet_class_names(name: str) -> tuple[str, ...]:
    """The class names of ImageNet, "imagenet", or of one of its larger versions, in timm's order.

    There is no "imagenet-21k": its versions have other classes. Raises UnknownName with the nearest name.
    """
    from timm.data import ImageNetInfo  # late: class names do not need it

    if name not in IMAGENETS:
        raise UnknownName("list of class names", name, IMAGENETS)
    return tuple(ImageNetInfo(IMAGENETS[name]).label_descriptions())
