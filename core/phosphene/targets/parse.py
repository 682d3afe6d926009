"""``parse_target``: an objective from a class index, a name, a string or a callable."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, strided

from ..errors import InputError, UnknownName

if TYPE_CHECKING:
    from ..models import Model
from .objectives import Channel, Class, Custom, Layer, Neuron, Objective, Predicted


def parse_target(target: Any, model: Model) -> Objective:
    """An ``Objective`` from its short form.

    ``None`` (the predicted class), ``281``, ``"tabby"``, ``"class:tabby"``, ``"layer4"``, ``"layer4[17]"``
    (a channel), ``"layer4[17,3,5]"`` (a unit: channel, y, x), one class per image, a callable, or an
    ``Objective``.
    Raises UnknownName with the nearest classes and layers, InputError for what is none of these.
    """
    if target is None:
        return Predicted()
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
    what = type(target).__name__ if target != [] else "list without a class"
    raise InputError(
        f"a target is a class, one class per image, a layer, channel or unit, or a callable, not a {what}"
    )


def _parse_text(text: str, model: Model) -> Objective:
    if text.startswith("class:"):
        return Class(model.class_index(text.removeprefix("class:").strip()))
    if unit := re.fullmatch(r"(.+?)\s*\[(-?\d+(?:\s*,\s*-?\d+){0,2})\]", text):
        layer, indices = model.layer_name(unit[1]), [int(part) for part in unit[2].split(",")]
        if len(indices) == 2:
            raise InputError(f"{text!r}: a unit is layer[channel] or layer[channel,y,x]")
        return Neuron(layer, *indices) if len(indices) == 3 else Channel(layer, indices[0])
    if text in model.layers or text in model.vgg_layer_aliases:
        return Layer(model.layer_name(text))
    try:
        return Class(model.class_index(text))
    except UnknownName as error:
        names = [*(model.classes or ()), *model.layers]
        raise UnknownName("class or layer", text, names, "this model") from error
