"""``load_model``: a model from a URI (``timm:``, ``torchvision:``, ``builtin:``, a plugin's) or a module."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..builtin.networks import MEAN, NETWORKS, STD, load_network
from ..builtin.scenes import CLASSES
from ..errors import InputError, ModelError, PhospheneError, UnknownName
from ..registry.extensions import extensions
from .logits import Function
from .model import Model

#: How weights files are called; their content is never unpickled.
_WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin")


class Loader(Protocol):
    """What a URI scheme needs: making networks by name, and listing the names.

    ``weights`` is a name that the scheme knows. With a weights file the network is filled afterwards; a
    loader that must do so itself has ``fills = True`` and is given the tensors by name, as a mapping.
    """

    def load(
        self, name: str, *, weights: Any, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The network, and what ``Model`` is to know of it (``mean``, ``classes``, ...) where it is known.

        ``uri`` among it is how the model is written where ``name`` is not enough, as of a relative path.
        """

    def names(self) -> Iterable[str]:
        """Every name that ``load`` takes."""


class _Builtin:
    """Trained networks of the bundled world; they need no download."""

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        if name not in NETWORKS:
            raise UnknownName("bundled model", name, NETWORKS)
        if weights is not None:
            raise InputError(f"builtin:{name} brings its own weights; there are none called {weights!r}")
        known = {"mean": MEAN, "std": STD, "input_size": (3, 64, 64), "classes": CLASSES}
        return load_network(name, **options), known

    def names(self) -> Iterable[str]:
        return NETWORKS


def loaders() -> dict[str, Loader]:
    """Every URI scheme there is."""
    return {"builtin": _Builtin()} | extensions.gather("phosphene_model_loaders")


@torch.inference_mode(False)  # parameters made in inference mode could never be differentiated
def load_model(
    model: str | nn.Module | Callable[[Tensor], Any],
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> Model:
    """A ``Model`` from ``"scheme:name"``, from a module of your own or from a function.

    ``weights``: a safetensors or ``weights_only`` .pth file, the folder of a training's result, a state
    dict, or a name that the scheme knows ("DEFAULT"); ``pretrained=True`` is the scheme's usual choice.
    Without either a ``torchvision:`` or ``timm:`` network is randomly initialised. ``mean`` and ``std``
    (of pixels in [0, 1]), ``input_size`` (C, H, W), ``classes`` and ``output`` (what the module returns ->
    logits) go over what the scheme knows; for a module of yours nothing is assumed, and pixels go
    in as they are. A function of pictures (N, C, H, W) is told ``input_size`` and ``classes``; it may give
    logits or labels alone, (N,) integers. Other options go to the scheme's own factory. Raises InputError
    for weights or options that cannot be, ModelError for weights that do not fit or cannot be had,
    UnknownName.
    """
    of_model = {"mean": mean, "std": std, "input_size": input_size, "classes": classes, "output": output}
    asked: dict[str, Any] = {name: value for name, value in of_model.items() if value is not None}
    state, named = None, None
    if isinstance(weights, Mapping):
        state = weights
    elif weights is not None and _is_stored(Path(weights)):
        weights = str(Path(weights).resolve())  # the same file from another folder, too
        state = read_weights(weights)
    elif weights is not None:
        weights = named = str(weights)

    if isinstance(model, str):
        module, known, filled = _by_uri(model, named, state, pretrained, options)
        state, uri = None if filled else state, known.pop("uri", model)
        wrapped = Model(module, **{"name": model, **known, **asked})
        again = {"uri": uri, "weights": weights, "pretrained": pretrained, **asked, **options}
        with suppress(TypeError):  # what JSON cannot describe cannot be asked for again
            json.dumps(again)
            wrapped.source = again
    elif isinstance(model, (Model, type)) or not callable(model):
        kind = type(model).__name__
        raise InputError(f"load_model takes a URI, a torch module or a function, not a {kind}")
    elif named or pretrained or options:
        raise InputError(
            "a module is taken as it is: named or pretrained weights and factory options need a URI"
        )
    elif isinstance(model, nn.Module):
        wrapped = Model(model, **asked)
    elif input_size is None or classes is None:
        raise InputError("of a function nothing is known: say input_size=(C, H, W) and classes=[...]")
    elif state is not None:
        raise InputError("a function has no weights that could be loaded")
    else:
        named_so = getattr(model, "__name__", type(model).__name__)
        wrapped = Model(Function(model), name=f"function:{named_so}", **asked)
    if state is not None:
        fill_weights(wrapped.module, state, weights if isinstance(weights, str) else "given", wrapped.name)
    wrapped.module.to(device=device, dtype=dtype)
    return wrapped


def _by_uri(
    uri: str,
    weights: str | None,
    state: Mapping[str, Tensor] | None,
    pretrained: bool,
    options: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any], bool]:
    """The network, what is known of it, and whether ``state`` is in it already."""
    scheme, colon, name = uri.partition(":")
    schemes = loaders()
    if not colon:
        known = ", ".join(sorted(schemes))
        raise InputError(f"{uri!r} is not a model: write scheme:name, with a scheme of {known}")
    if scheme not in schemes:
        raise UnknownName("model scheme", scheme, sorted(schemes))
    loader = schemes[scheme]
    filled = state is not None and getattr(loader, "fills", False)
    given = state if filled else weights
    try:
        module, feeding = loader.load(name, weights=given, pretrained=pretrained, **options)
    except PhospheneError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{uri} cannot be built with {options}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{uri} cannot be made: {str(error) or type(error).__name__}") from error
    return module.eval(), feeding, filled


def _is_stored(path: Path) -> bool:
    return path.suffix in _WEIGHTS_FILES or path.is_file() or (path / "result.json").is_file()


def read_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file or in a .pth file that holds weights alone; else InputError.

    Of a saved result's folder it is the state of the network in it.
    """
    if (Path(path) / "result.json").is_file():
        whole = read_weights(Path(path) / "arrays.safetensors")
        found = {n.removeprefix("network."): t for n, t in whole.items() if n.startswith("network.")}
        if not found:
            raise InputError(f"the result in {path} holds no network")
        return found
    if not Path(path).is_file():
        raise InputError(f"there is no weights file {path}")
    try:
        if Path(path).suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # weights_only refuses by raising, a damaged file likewise
        raise InputError(
            f"{path} cannot be read as weights alone (pickled code is never loaded): {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds a {type(state).__name__}, not a state dict")
    # DenseNet's published files are older than the rule that no module's name has a dot in it.
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): v for k, v in state.items()}


def fill_weights(module: nn.Module, state: Mapping[str, Tensor], what: object, name: str) -> None:
    """Load a state into a network; ModelError where ``what`` does not fit ``name``."""
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        told = textwrap.shorten(str(error), 300, placeholder=" ...")  # it names every tensor, on pages
        raise ModelError(f"the weights {what} do not fit {name}: {told}") from error
