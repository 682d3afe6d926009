"""``parse_target``: an objective from a class index, a name, a string or a callable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, strided

from ..errors import InputError, UnknownName, type_name

if TYPE_CHECKING:
    from ..models import Model
from .boxes import Box
from .objectives import Channel, Class, Contrast, Custom, Layer, Neuron, Objective, Predicted
from .regions import Region
from .similarity import read_reference


def parse_target(target: Any, model: Model) -> Objective:
    """An ``Objective`` from its short form.

    ``None`` (the predicted class), ``281``, ``"tabby"``, ``"class:tabby"``, ``"layer4"``, ``"layer:3"``,
    ``"layer4[17]"`` (a channel), ``"layer4[17,3,5]"`` (a unit: channel, y, x), ``"contrast:tabby,lynx"``
    (z_tabby - z_lynx), ``"region:person"``, ``"region:person@120,80"`` (the pixel at x, y),
    ``"region:person@all"``, ``"box:person"``, ``"box:person@120,80"``, ``"similar:dog.png"``,
    ``"similar:text:a dog"`` (of models that embed text), one class per image, a callable, or an
    ``Objective``.

    Raises UnknownName with the nearest classes and layers, InputError for what is none of these and for
    text that names both a class and a layer.
    """
    if target is None or isinstance(target, Predicted):
        return Box() if model.task == "detection" else target or Predicted()
    if isinstance(target, Layer):
        return replace(target, name=model.layer_name(target.name))
    if isinstance(target, Class):
        target = target.index
    if isinstance(target, Objective):
        return target
    if isinstance(target, Tensor) and (target.is_meta or target.is_nested or target.layout is not strided):
        raise InputError("a target must be a class, not a tensor without values or a sparse or nested one")
    if hasattr(target, "tolist"):  # a tensor, a NumPy array or a NumPy number
        target = target.tolist()
    match target:
        case str():
            return _parse_text(target.strip(), model)
        case int():
            return Class(model.class_index(target))
        case [_, *_]:
            return Class(tuple(map(model.class_index, target)))
    if callable(target):
        return Custom(target)
    what = type_name(target) if target != [] else "a list without a class"
    raise InputError(
        f"a target is a class, one class per image, a layer, channel or unit, or a callable, not {what}"
    )


def _parse_text(text: str, model: Model) -> Objective:
    prefix, colon, rest = (part.strip() for part in text.partition(":"))
    if colon and prefix in _PREFIXES:
        return _PREFIXES[prefix](rest, model)
    if unit := re.fullmatch(r"(.+?)\s*\[(-?\d+(?:\s*,\s*-?\d+){0,2})\]", text):
        layer, indices = model.layer_name(unit[1]), [int(part) for part in unit[2].split(",")]
        if len(indices) == 2:
            raise InputError(f"{text!r}: a unit is layer[channel] or layer[channel,y,x]")
        return Neuron(layer, *indices) if len(indices) == 3 else Channel(layer, indices[0])
    is_layer = text in model.layers or text in model.vgg_layer_aliases
    try:
        index = model.class_index(text)
    except UnknownName as error:
        if is_layer:
            return Layer(model.layer_name(text))
        names = [*(model.classes or ()), *model.layers]
        raise UnknownName("class or layer", text, names, "this model") from error
    except InputError:
        if is_layer:
            return Layer(model.layer_name(text))
        raise
    if is_layer:
        raise InputError(
            f"{text!r} is a layer of {model.name} and {model.class_name(index)!r} a class: write "
            f"'class:{text}' or 'layer:{text}'"
        )
    if text.isdecimal() and int(text) != index and int(text) < model.class_count:
        raise InputError(
            f"{text!r} is the name of class {index} and the index of {model.class_name(int(text))!r}: write "
            f"'class:{text}' for the name, or pass the index as an integer"
        )
    return Class(index)


def _class(text: str, model: Model) -> Objective:
    return Class(model.class_index(text))


def _layer(text: str, model: Model) -> Objective:
    return Layer(model.layer_name(text))


def _contrast(text: str, model: Model) -> Objective:
    names = text.split(",")
    if len(names) != 2:
        raise InputError(f"a contrast names two classes, 'contrast:tabby,lynx', not {text!r}")
    first, second = (model.class_index(name.strip()) for name in names)
    return Contrast(first, second)


def _region(text: str, model: Model) -> Objective:
    name, _, where = text.rpartition("@") if "@" in text else (text, "", "")
    index = model.class_index(name.strip())
    label = model.classes[index] if model.classes is not None else ""
    if where == "all":
        return Region(index, everywhere=True, name=label)
    return Region(index, _point(where, text), name=label)


def _box(text: str, model: Model) -> Objective:
    name, _, where = text.rpartition("@") if "@" in text else (text, "", "")
    if name.strip() in ("", "*"):
        return Box(point=_point(where, text))
    index = model.class_index(name.strip())
    label = model.classes[index] if model.classes is not None else ""
    return Box(index, _point(where, text), name=label)


def _point(where: str, text: str) -> tuple[int, int] | None:
    """The pixel (x, y) in "120,80"; None without one."""
    if not where:
        return None
    numbers = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", where)
    if numbers is None:
        raise InputError(f"{text!r}: after @ stands a pixel as x,y (person@120,80), not {where!r}")
    return int(numbers[1]), int(numbers[2])


_PREFIXES: dict[str, Callable[[str, Model], Objective]] = {
    "class": _class,
    "layer": _layer,
    "contrast": _contrast,
    "region": _region,
    "box": _box,
    "similar": read_reference,
}
