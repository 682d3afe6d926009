"""``load_model``: a model from a URI (``timm:``, ``torchvision:``, ``builtin:``, a plugin's) or a module."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..builtin.networks import CLASSIFIERS, MEAN, PARTS_RESNET, STD, load_network
from ..builtin.scenes import CLASSES
from ..builtin.words import WORDS, ClassWords
from ..errors import InputError, ModelError, PhospheneError, UnknownName, type_name
from ..random_weights import has_random_weights
from ..registry.extensions import extensions
from .arguments import check_callable, check_device, check_dtype, move
from .logits import Function
from .model import Model
from .tasks import Task, check_task

#: Suffixes of weights files; their content is never unpickled.
_WEIGHTS_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

#: The entries of a training's checkpoint that are state dicts.
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")

#: What wrappers put in front of the names of weights: DataParallel, Lightning and torch.compile.
_WRAPPERS = ("module.", "model.", "_orig_mod.")

#: Whether URIs come from a file, so that none may import the user's code.
_user_code_refused: ContextVar[bool] = ContextVar("phosphene_user_code_refused", default=False)


class Loader(Protocol):
    """A URI scheme: builds networks by name and lists the names.

    ``weights`` is a name of the scheme's own. Tensors from a weights file are loaded into the network
    afterwards; a loader with ``fills = True`` gets them as ``weights``, a mapping, and loads them itself.

    A method ``saved_options(name)`` returns the names of the options that may come from a file: a saved
    result, a plan or a request, which may be a stranger's. No path belongs among them. Default: none.

    A loader with ``random_by_default = True`` builds networks with random weights where neither ``weights``
    nor ``pretrained`` is set; the command line says so.

    A loader with ``runs_user_code = True`` imports what the name says. It is not called inside
    ``refuse_user_code()``.
    """

    def load(
        self, name: str, *, weights: Any, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The network and keyword arguments for ``Model`` (``mean``, ``classes``, ``task``, ...).

        ``uri`` among them replaces ``scheme:name`` in the record of a result, for example of a relative path.
        """

    def names(self) -> Iterable[str]:
        """Every name that ``load`` accepts."""


class _Builtin:
    """The bundled trained networks; they need no download."""

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        if name not in self.names():
            raise UnknownName("bundled model", name, self.names())
        if weights is not None:
            raise InputError(f"builtin:{name} has its own weights; there are none called {weights!r}")
        if name == PARTS_RESNET:
            from ..builtin.part_scenes import PART_CLASSES, SIZE
            from ..builtin.parts_resnet import load_parts_resnet

            settings = {"mean": MEAN, "std": STD, "input_size": (3, SIZE, SIZE), "classes": PART_CLASSES}
            return load_parts_resnet(**options), settings
        settings = {"mean": MEAN, "std": STD, "input_size": (3, 64, 64), "classes": CLASSES}
        if name != WORDS:
            return load_network(name, **options), settings
        network: Any = load_network("shapes-vgg", **options)
        return network, settings | {"embed_text": ClassWords(network.classifier)}

    def names(self) -> Sequence[str]:
        return [*CLASSIFIERS, WORDS, PARTS_RESNET]


def loaders() -> dict[str, Loader]:
    """The loaders of all URI schemes, by scheme."""
    return {"builtin": _Builtin()} | extensions.gather("phosphene_model_loaders")


@contextmanager
def refuse_user_code() -> Iterator[None]:
    """Inside, a URI that would import a user's module (``module:``) raises InputError.

    It surrounds everything that loads models whose URIs come from a file: a saved result, a plan or a
    request, which may be a stranger's.
    """
    token = _user_code_refused.set(True)
    try:
        yield
    finally:
        _user_code_refused.reset(token)


@torch.inference_mode(False)  # parameters created in inference mode could never be differentiated
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
    classes: Sequence[str] | str | None = None,
    output: Callable[[Any], Tensor] | None = None,
    task: Task | None = None,
    **options: Any,
) -> Model:
    """A ``Model`` from ``"scheme:name"``, from a torch module or from a function.

    model: ``"timm:resnet50"``, ``"torchvision:vgg16"``, ``"builtin:shapes-vgg"`` or a plugin's scheme; a
        module; or a function of images (N, C, H, W) that returns logits or labels alone, (N,) integers, for
        which ``input_size`` and ``classes`` are required.
    weights: a safetensors file, a ``weights_only`` .pth file or a Lightning .ckpt, the folder of a training's
        result, a state dict, or a name of the scheme's ("DEFAULT"). Default: random weights, or the scheme's
        own. Of a training's checkpoint its state dict is read; prefixes of wrappers ("module.", "model.",
        "_orig_mod.") are removed where the network has no names with them.
    pretrained: the scheme's default weights.
    mean, std: normalization of pixels in [0, 1]; of a module none by default.
    input_size: (C, H, W). Default: the scheme's; without one, a method uses the size of its images or,
        where it has none, 224x224.
    classes: class names, one for each logit, or "imagenet" for its 1,000 names. A module gets none by guess.
    output: a function from what the module returns to logits (N, K).
    task: what the output means: "classification", "binary" (one logit), "multilabel", "regression",
        "segmentation", "detection" or "embedding". Default: the scheme's, or classification.
    options: passed to the scheme's factory.

    Raises InputError for invalid weights or options, ModelError for weights that do not fit or cannot be
    downloaded, UnknownName for a name that does not exist.
    """
    check_device(device)
    check_dtype(dtype)
    if output is not None:
        check_callable(output, "output")
    if not isinstance(pretrained, bool):
        raise InputError(f"pretrained must be True or False, not {pretrained!r}")
    if weights is not None and not isinstance(weights, (str, Path, Mapping)):
        kind = type_name(weights)
        raise InputError(f"weights must be a file, a state dict or a name of the scheme's, not {kind}")
    arguments = {"mean": mean, "std": std, "input_size": input_size, "classes": classes, "output": output}
    arguments["task"] = check_task(task)
    settings: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
    state, weights_name = None, None
    if isinstance(weights, Mapping):
        state = weights
    elif weights is not None and _is_weights_file(Path(weights)):
        weights = str(Path(weights).resolve())  # absolute, so that a result can be replayed in any folder
        state = read_weights(weights)
    elif weights is not None:
        weights = weights_name = str(weights)

    if isinstance(model, str):
        module, loader_settings, filled = _by_uri(model, weights_name, state, pretrained, options)
        state, uri = None if filled else state, loader_settings.pop("uri", model)
        wrapped = Model(module, **{"name": model, **loader_settings, **settings})
        source = {"uri": uri, "weights": weights, "pretrained": pretrained, **settings, **options}
        with suppress(TypeError):  # arguments that JSON cannot hold cannot be recorded in a result
            json.dumps(source)
            wrapped.source = source
    elif isinstance(model, (Model, type)) or not callable(model):
        kind = type_name(model)
        raise InputError(f"load_model takes a URI, a torch module or a function, not {kind}")
    elif weights_name or pretrained or options:
        raise InputError(
            "a module is used as it is: named or pretrained weights and factory options need a URI"
        )
    elif isinstance(model, nn.Module):
        wrapped = Model(model, **settings)
    elif input_size is None or (classes is None and task in (None, "classification", "multilabel")):
        raise InputError("a function needs input_size=(C, H, W) and classes=[...], or another task")
    elif state is not None:
        raise InputError("a function has no weights that could be loaded")
    else:
        function_name = getattr(model, "__name__", type(model).__name__)
        wrapped = Model(Function(model), name=f"function:{function_name}", **settings)
    if state is not None:
        description = weights if isinstance(weights, str) else "passed as a state dict"
        fill_weights(wrapped.module, state, description, wrapped.name)
    move(lambda: wrapped.module.to(device=device, dtype=dtype), wrapped.name, device)
    return wrapped


def _by_uri(
    uri: str,
    weights: str | None,
    state: Mapping[str, Tensor] | None,
    pretrained: bool,
    options: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any], bool]:
    """The network, arguments for ``Model``, and whether ``state`` was loaded into it already."""
    scheme, colon, name = uri.partition(":")
    # The bundled networks need none of the plugins.
    schemes: dict[str, Loader] = {"builtin": _Builtin()} if scheme == "builtin" and colon else loaders()
    if not colon:
        names = ", ".join(sorted(schemes))
        raise InputError(f"{uri!r} is not a model: write scheme:name, with a scheme of {names}")
    if scheme not in schemes:
        raise UnknownName("model scheme", scheme, sorted(schemes))
    loader = schemes[scheme]
    if _user_code_refused.get() and getattr(loader, "runs_user_code", False):
        raise InputError(
            f"{uri} imports code, and a saved result, a plan or a request may not name what is imported: "
            f"load the model yourself, load_model({uri!r}), and pass it"
        )
    filled = state is not None and getattr(loader, "fills", False)
    try:
        source = state if filled else weights
        module, settings = loader.load(name, weights=source, pretrained=pretrained, **options)
    except PhospheneError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{uri} cannot be built with {options}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{uri} cannot be loaded: {str(error) or type(error).__name__}") from error
    is_random = getattr(loader, "random_by_default", False) and "checkpoint_path" not in options
    if is_random and state is None and weights is None and not pretrained:
        has_random_weights(uri)
    return module.eval(), settings, filled


def _is_weights_file(path: Path) -> bool:
    return path.suffix in _WEIGHTS_FILES or path.is_file() or (path / "result.json").is_file()


def read_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a safetensors file, in a .pth file of weights only, or in a saved result's folder.

    Raises InputError where there is none; pickled code is never executed.
    """
    if (Path(path) / "result.json").is_file():
        arrays = read_weights(Path(path) / "arrays.safetensors")
        weights = {n.removeprefix("network."): t for n, t in arrays.items() if n.startswith("network.")}
        if not weights:
            raise InputError(f"the result in {path} contains no network")
        return weights
    if not Path(path).is_file():
        raise InputError(f"there is no weights file {path}")
    try:
        if Path(path).suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickled code is refused by an UnpicklingError, damaged files raise others
        raise InputError(
            f"{path} cannot be read as weights alone (pickled code is never loaded): "
            f"{_pickled_types(path) or _reading_failure(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} contains {type_name(state)}, not a state dict")
    state = _state_dict(state, path)
    # DenseNet's published files have module names with dots ("norm.1"), which torch no longer allows.
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): v for k, v in state.items()}


def _state_dict(checkpoint: Mapping[str, Any], path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a training's checkpoint; a state dict itself is returned unchanged."""
    entries = [name for name in _STATE_DICTS if isinstance(checkpoint.get(name), Mapping)]
    if len(entries) > 1:
        raise InputError(
            f"{path} contains {len(entries)} state dicts, {' and '.join(entries)}; choose one: "
            f"weights=torch.load({str(path)!r}, weights_only=True)[{entries[0]!r}]"
        )
    if entries:
        return checkpoint[entries[0]]
    if checkpoint and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise InputError(
            f"{path} contains no state dict: none of its entries {', '.join(map(str, checkpoint))} is one of "
            f"{', '.join(_STATE_DICTS)}, and none is a tensor"
        )
    return checkpoint


def _reading_failure(error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to load it with weights_only=False.

    Of a file that is no pickle, unpickling raises a KeyError, an EOFError or "Unsupported operand".
    """
    text = str(error)
    if reason := re.search(r"WeightsUnpickler error:(.*?)(?:Check the documentation|$)", text, re.DOTALL):
        text = reason[1].strip()
    if isinstance(error, (LookupError, EOFError)) or text.startswith("Unsupported operand"):
        return "it is no file that torch.save or safetensors wrote"
    return text


def _pickled_types(path: str | Path) -> str:
    """A sentence about the types in a file that torch refuses to unpickle; "" where they cannot be listed."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip file of torch's: the error of the reading itself says what is wrong
        return ""
    if not names:
        return ""
    return (
        f"beside tensors it contains objects of {', '.join(sorted(names)[:5])}, such as hyper-parameters "
        "that Lightning saves; where you trust the file, save its weights alone, "
        "torch.save(network.state_dict(), path)"
    )


def _without_wrappers(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The state without the prefixes of wrappers, where more of the network's ``names`` fit without them."""
    state, names = dict(state), set(names)
    if all(name == "n_averaged" or name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # torch's AveragedModel counts its updates
    while prefix := next((p for p in _WRAPPERS if state and all(name.startswith(p) for name in state)), None):
        shorter = {name.removeprefix(prefix): value for name, value in state.items()}
        if names & state.keys() and len(names & shorter.keys()) <= len(names & state.keys()):
            break
        state = shorter
    return state


def fill_weights(
    module: nn.Module, state: Mapping[str, Tensor], what: object, name: str, *, assign: bool = False
) -> None:
    """Load a state dict into a network; ``what`` and ``name`` describe the two in the ModelError.

    Prefixes of wrappers, such as "module.", are removed where the network has no names with them.
    ``assign`` replaces the network's tensors, so that it has the precision of the state dict.
    """
    try:
        module.load_state_dict(_without_wrappers(state, module.state_dict().keys()), assign=assign)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch's message lists every tensor
        raise ModelError(f"the weights {what} do not fit {name}: {reason}") from error
