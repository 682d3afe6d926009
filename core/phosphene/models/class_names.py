"""Class names of a model: a class by name, synonym, WordNet id or index; the names of ImageNet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

from ..errors import InputError, UnknownName

#: What ``classes`` may be instead of a list, with timm's name of that subset of ImageNet.
IMAGENETS = {
    "imagenet": "imagenet-1k",
    "imagenet-12k": "imagenet-12k",
    "imagenet-21k-goog": "imagenet-21k-goog",
    "imagenet-21k-miil": "imagenet-21k-miil",
    "imagenet-22k": "imagenet-22k",
    "imagenet-22k-ms": "imagenet-22k-ms",
}

#: The share of a network's class names that agree with ImageNet's where its classes are those of ImageNet;
#: torchvision spells two of 1,000 otherwise.
_AGREEING = 0.99


def imagenet_class_names(name: str) -> tuple[str, ...]:
    """The class names of ImageNet, "imagenet", or of one of its larger versions, in timm's order.

    There is no "imagenet-21k": its versions have other classes. Raises UnknownName with the nearest name.
    """
    from timm.data import ImageNetInfo

    if name not in IMAGENETS:
        raise UnknownName("list of class names", name, IMAGENETS)
    return tuple(ImageNetInfo(IMAGENETS[name]).label_descriptions())


def class_index(name: str | int, classes: Sequence[str] | None, model: str) -> int:
    """The index of a class by its name, one of its comma-separated synonyms, or its number.

    Where the classes are those of ImageNet, also by its WordNet id ("n01440764"), by which folders of images
    are called. ``model`` is the model's name in error messages. A number is not compared with the number of
    classes.
    Raises UnknownName with the nearest name, InputError for what is neither a name nor an index.
    """
    if isinstance(name, str):
        index = _index_by_name(tuple(classes or ())).get(name.strip().lower())
        if index is not None:
            return index
        if classes is not None and re.fullmatch(r"n\d{8}", name.strip()):
            index = _index_by_wordnet_id(tuple(classes)).get(name.strip())
        if index is not None:
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


@lru_cache(maxsize=16)
def _index_by_wordnet_id(classes: tuple[str, ...]) -> dict[str, int]:
    """Indices by WordNet id; empty where the classes are not those of ImageNet, in its order."""
    from timm.data import ImageNetInfo

    for subset in IMAGENETS.values():
        info = ImageNetInfo(subset)
        if info.num_classes() != len(classes):
            continue
        pairs = zip(map(_synonyms, classes), map(_synonyms, info.label_descriptions()), strict=True)
        if sum(not ours.isdisjoint(theirs) for ours, theirs in pairs) >= _AGREEING * len(classes):
            return {name: index for index, name in enumerate(info.label_names())}
    return {}


def _synonyms(name: str) -> set[str]:
    return {synonym.strip().lower() for synonym in name.split(",")}
