"""``load_model``: a model from a URI (``timm:``, ``torchvision:``, ``builtin:``, a plugin's) or a module."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, ModelError, UnknownName
from ..hookspecs import hookimpl
from ..registry import extensions
from .model import Model


class Loader(Protocol):
    """What a URI scheme needs: making models by name, and listing the names."""

    def load(self, name: str, *, weights: str | None, pretrained: bool, **options: Any) -> Model:
        """The model; ``options`` are handed to ``Model`` over what the scheme knows itself."""

    def names(self) -> Sequence[str]:
        """Every name that ``load`` takes."""


@hookimpl
def phosphene_model_loaders() -> dict[str, Loader]:
    from .builtin import BuiltinLoader
    from .timm import TimmLoader
    from .torchvision import TorchvisionLoader

    return {"builtin": BuiltinLoader(), "timm": TimmLoader(), "torchvision": TorchvisionLoader()}


def loaders() -> dict[str, Loader]:
    """Every URI scheme there is."""
    return extensions.gather("phosphene_model_loaders")


@torch.inference_mode(False)  # parameters made in inference mode could never be differentiated
def load_model(
    model: str | nn.Module,
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
    """A ``Model`` from ``"scheme:name"`` or from a module of your own.

    ``weights``: a safetensors or ``weights_only`` .pth file, a state dict, or a name that the
    scheme knows ("DEFAULT"); ``pretrained=True`` is the scheme's usual choice. Without either a
    ``torchvision:`` or ``timm:`` network is randomly initialised. ``mean`` and ``std`` (of pixels
    in [0, 1]), ``input_size`` (C, H, W), ``classes`` and ``output`` (what the module returns ->
    logits) go over what the scheme knows; for a module of yours nothing is assumed, and pixels go
    in as they are. Other options go to the scheme's own factory. Raises InputError for weights or
    options that cannot be, ModelError for weights that do not fit or cannot be had, UnknownName.
    """
    if not isinstance(model, (str, nn.Module)):
        raise InputError(f"load_model takes a URI or a torch module, not a {type(model).__name__}")
    known = {"mean": mean, "std": std, "input_size": input_size, "classes": classes, "output": output}
    options |= {name: value for name, value in known.items() if value is not None}
    state = _read_state(weights)
    named = str(weights) if weights is not None and state is None else None
    if isinstance(model, nn.Module):
        if named or pretrained or options.keys() - known:
            raise InputError(
                "a module is taken as it is: named or pretrained weights and factory options need a URI"
            )
        wrapped = Model(model, **options)
    else:
        wrapped = _from_uri(model, named, pretrained, options)
        if isinstance(weights, (str, Path)):
            # Absolute, so that it is the same file from another folder, too.
            named = named or str(Path(weights).resolve())
        asked = {"uri": model, "weights": named, "pretrained": pretrained, **options}
        repeatable = not isinstance(weights, Mapping) and _is_json(asked)
        wrapped.source = asked if repeatable else None
    if state is not None:
        fill(wrapped.module, state, weights, wrapped.name)
    wrapped.module.to(device=device, dtype=dtype)
    return wrapped


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _from_uri(uri: str, weights: Any, pretrained: bool, options: dict[str, Any]) -> Model:
    scheme, colon, name = uri.partition(":")
    schemes = loaders()
    if not colon:
        known = ", ".join(sorted(schemes))
        raise InputError(f"{uri!r} is not a model: write scheme:name, with a scheme of {known}")
    if scheme not in schemes:
        raise UnknownName("model scheme", scheme, sorted(schemes))
    loaded = schemes[scheme].load(name, weights=weights, pretrained=pretrained, **options)
    loaded.module.eval()
    return loaded


#: How weights files are called; their content is never unpickled.
WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin")
#: Options that go to ``Model``; the rest goes to the scheme's own factory.
OF_MODEL = ("mean", "std", "input_size", "classes", "output", "crop_pct", "interpolation")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file or in a .pth file that holds weights alone."""
    if not path.is_file():
        raise InputError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
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


def fetch_weights(url: str) -> Path:
    """The file behind ``url`` in torch's cache, downloaded if it is not there.

    Its SHA-256 is checked against the part of it that the file's name carries, cached or not:
    torch itself checks only what it has just downloaded.
    """
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    digest = "".join(re.findall(r"-([0-9a-f]{8,})\.", name))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, HTTPException, RuntimeError) as error:
            raise unavailable(f"{name} (looked for in {path.parent})", error) from error
    elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise ModelError(
            f"{path} is damaged: its SHA-256 does not begin with {digest}; delete it to fetch it again"
        )
    return path


def unavailable(weights: str, error: Exception) -> ModelError:
    """What to say where weights are neither cached nor to be had from the network."""
    return ModelError(
        f"the weights {weights} are not in the cache and cannot be downloaded ({error}): "
        "give weights='a local file', weights=None for a random network, "
        "or take a bundled one, builtin:shapes-vgg"
    )


def _read_state(weights: Any) -> Mapping[str, Tensor] | None:
    """A state dict from a file or as given; None where ``weights`` is a name for the scheme."""
    if weights is None or isinstance(weights, Mapping):
        return weights
    path = Path(weights)
    if path.suffix in WEIGHTS_FILES:
        return read_weights(path)
    if path.exists():
        raise InputError(f"weights files are {', '.join(WEIGHTS_FILES)}, not {path.name!r}")
    return None


def fill(module: nn.Module, state: Mapping[str, Tensor], weights: Any, name: str) -> None:
    """Load a state into a network; ModelError where it does not fit."""
    where = "in the given state" if isinstance(weights, Mapping) else weights
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ModelError(f"the weights {where} do not fit {name}: {error}") from error
