"""Checks of the arguments of ``Model`` and ``load_model``, before the network runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..errors import InputError, ModelError, value_repr
from ..finite_values import all_finite
from .class_names import imagenet_class_names
from .preprocessing import CROP_MODES

#: The precisions in which torch's layers compute.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_input_size(value: Any) -> tuple[int, int, int]:
    """(C, H, W) as positive integers."""
    try:
        sides = list(value)
    except TypeError:
        sides = []
    integers = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if len(sides) != 3 or not integers or min(sides) < 1:
        text = tuple(value) if isinstance(value, (list, tuple)) else value
        raise InputError(f"input_size must be (C, H, W), not {text!r}: three integers of at least 1")
    channels, height, width = map(int, sides)
    return channels, height, width


def finite_numbers(value: Any, what: str) -> list[float]:
    """The mean or the standard deviation of the channels."""
    try:
        numbers = list(value)
        if any(isinstance(number, (str, bool)) for number in numbers):
            raise TypeError
        numbers = [float(number) for number in numbers]
    except (TypeError, ValueError):
        raise InputError(f"{what} must be one number for each channel, not {value_repr(value)}") from None
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{what} must be finite, not {numbers}")
    return numbers


def check_class_names(value: Any) -> tuple[str, ...]:
    """Class names as a tuple of text, of a list or of a name such as "imagenet"."""
    if isinstance(value, str):
        return imagenet_class_names(value)
    if not hasattr(value, "__iter__"):
        raise InputError(f"classes must be a list of names, one for each logit, not {value_repr(value)}")
    names = tuple(value)
    if not names:
        raise InputError("classes must have at least one name; leave it out where the classes have none")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise InputError(
            f"a class name must be text, not {value_repr(wrong[0], 40)}: classes=[str(name) for name in ...]"
        )
    return names


def check_preprocessing(
    crop_pct: Any, crop_mode: Any, interpolation: Any, defenses: Sequence[Any], output: Any
) -> None:
    """The other arguments of ``Model``."""
    if not _is_number(crop_pct) or not 0 < crop_pct <= 10:
        raise InputError(f"crop_pct must be a number greater than 0, usually 0.875 or 1, not {crop_pct!r}")
    if crop_mode not in CROP_MODES:
        raise InputError(f"crop_mode must be one of {', '.join(CROP_MODES)}, not {crop_mode!r}")
    names = [name.lower() for name in Image.Resampling.__members__]
    if not isinstance(interpolation, str) or interpolation.lower() not in names:
        raise InputError(f"interpolation must be one of {', '.join(names)}, not {interpolation!r}")
    check_callable(output, "output")
    for defense in defenses:
        if not (isinstance(defense, tuple) and len(defense) == 2 and callable(defense[1])):
            raise InputError(f"a defense is a name and a function of images, not {value_repr(defense)}")


def check_callable(value: Any, what: str) -> None:
    """Refuse an ``output`` that is no function."""
    if not callable(value):
        raise InputError(
            f"{what} must be a function from what the module returns to logits (N, K), "
            f"not {value_repr(value)}"
        )


def check_has_values(module: nn.Module, name: str) -> None:
    """Refuse, with ModelError, a network with a weight without values: its layers can be read, not run."""
    for weight, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"the weight {weight!r} of {name} is on the meta device and has no values; load the weights "
                "first: network.to_empty(device='cpu'), then network.load_state_dict(...)"
            )


def check_weight_types(module: nn.Module, name: str) -> None:
    """Refuse, with ModelError, a network with weights that its layers cannot compute with."""
    for part_name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if type(part) in (nn.Conv2d, nn.Linear) and weight is not None and not weight.is_floating_point():
            raise ModelError(
                f"the weights of layer {part_name!r} of {name} are {weight.dtype}, and a "
                f"{type(part).__name__} computes with floating-point numbers; load the network as it was "
                "before it was quantized"
            )


def non_finite_weight(module: nn.Module) -> str | None:
    """The name of the first weight or buffer that contains NaN or infinity."""
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not all_finite(tensor):
            return name
    return None


def check_dtype(dtype: Any) -> None:
    """Refuse a precision in which torch's layers do not compute."""
    if dtype is not None and dtype not in _DTYPES:
        allowed = ", ".join(str(kind) for kind in _DTYPES)
        raise InputError(f"dtype must be one of {allowed}, not {dtype!r}")


def check_device(device: Any) -> None:
    """Refuse what is no device; whether the device exists is known when something is moved to it."""
    if device is None or isinstance(device, torch.device):
        parsed = device
    else:
        if not isinstance(device, (str, int)) or isinstance(device, bool):
            raise InputError(f"device must be a name such as 'cpu' or 'cuda:0', not {value_repr(device)}")
        try:
            parsed = torch.device(device)
        except RuntimeError as error:
            raise InputError(f"there is no device {value_repr(device)}; torch has {_devices()}") from error
    if parsed is not None and parsed.type == "meta":
        raise InputError("the meta device has no values to compute with; choose 'cpu' or an accelerator")


def move(moved: Callable[[], Any], what: str, device: Any) -> Any:
    """The result of ``moved()``, which moves ``what`` to a device; InputError where that is impossible."""
    check_device(device)
    try:
        return moved()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that does not exist
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{what} cannot be moved to {str(device)!r}; torch has {_devices()} here. Its error: {reason}"
        ) from error


def _devices() -> str:
    """The devices that torch can use here."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return ", ".join(kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
