"""Class names of a model: a class by name, synonym or index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

from ..errors import InputError, UnknownName, type_name

#: Smallest share of names that are spelled as in WordNet; torchvision's are 99.8 percent.
_MIN_MATCHES = 0.9


class ClassLabel(str):
    """A label of a data set: the name of its class, with the class's ``number`` there.

    For a model without class names the number is the class.
    """

    number: int

    def __new__(cls, name: str, number: int) -> ClassLabel:
        label = super().__new__(cls, name)
        label.number = number
        return label

    def __reduce__(self) -> tuple[type[ClassLabel], tuple[str, int]]:
        return ClassLabel, (str(self), self.number)


def class_index(name: str | int, classes: Sequence[str] | None, model: str) -> int:
    """The index of a class by its name, one of its comma-separated synonyms, its number or WordNet id.

    A WordNet id such as "n01440764" is a class of ImageNet-1k, whose names the model must have. ``model`` is
    the model's name in error messages. A number is not compared with the number of classes.
    Raises UnknownName with the nearest name, InputError for what is neither a name nor an index.
    """
    if isinstance(name, str):
        if (index := _index_by_name(tuple(classes or ())).get(name.strip().lower())) is not None:
            return index
        if classes is None and isinstance(name, ClassLabel):
            return name.number
        if re.fullmatch(r"n\d{8}", name.strip()):
            return _wordnet_index(name.strip(), classes, model)
        if not name.isdecimal() and classes is None:
            raise InputError(f"{model} has no class names; pass the index instead of {name!r}")
        if not name.isdecimal():
            raise UnknownName("class", name, classes or (), model)
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, Integral):
        raise InputError(f"a class is an index or a name, not {type_name(name)}")
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


def _wordnet_index(synset: str, classes: Sequence[str] | None, model: str) -> int:
    """The ImageNet-1k class of a WordNet id. Raises InputError for a model without ImageNet's names."""
    indices, _ = _imagenet()
    if classes is None:
        raise InputError(
            f"{model} has no class names, which the WordNet id {synset!r} needs: pass classes=[...]"
        )
    if not _are_imagenet_names(tuple(classes)):
        raise InputError(f"the classes of {model} are not those of ImageNet-1k, as {synset!r} is")
    if synset not in indices:
        raise UnknownName("ImageNet-1k class", synset, indices)
    return indices[synset]


@lru_cache(maxsize=1)
def _imagenet() -> tuple[dict[str, int], list[set[str]]]:
    """The index of each WordNet id of ImageNet-1k, and the lower-case names of each class."""
    from timm.data import ImageNetInfo  # late: class names do not need it

    info = ImageNetInfo("imagenet-1k")
    names = [set(map(_plain, text.split(","))) for text in info.label_descriptions()]
    return {synset: index for index, synset in enumerate(info.label_names())}, names


@lru_cache(maxsize=16)
def _are_imagenet_names(classes: tuple[str, ...]) -> bool:
    """Whether most names are those of ImageNet-1k, in its order: libraries spell some of them differently."""
    _, names = _imagenet()
    matches = [
        not own.isdisjoint(map(_plain, name.split(","))) for own, name in zip(names, classes, strict=False)
    ]
    return len(classes) == len(names) and sum(matches) >= _MIN_MATCHES * len(names)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
