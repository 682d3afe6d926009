"""``Model``: any vision network behind one convention - RGB in [0, 1] in, logits out, layers by name."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError, ModelError, PhospheneError, UnknownName
from ..hooks.guard import guard
from ..hooks.tap import StopForward, Tap
from ..images.io import read_image, to_pil
from .introspection import Head, Structure, record_structure
from .layer_aliases import vgg_layer_aliases
from .logits import Function, read_logits
from .optimized_copy import checksum, network_for_call
from .token_maps import as_maps, prefix_tokens

T = TypeVar("T")


#: A change of pictures (N, C, H, W) in [0, 1] before the network, and how it is written.
Defense = tuple[str, Callable[[Tensor], Tensor]]


#: How a network says that it cannot take what it is given ...
_REFUSALS = (RuntimeError, AssertionError, ValueError)


#: ... and errors of these kinds that need no translation.
_SAID_ALREADY = (PhospheneError, torch.OutOfMemoryError)


class Model:
    """A vision network and all a method needs to know about it. Wrapping changes nothing in it.

    ``model(images)`` takes (N, C, H, W) RGB pixels in [0, 1] and gives logits (N, K); the
    normalisation that the network was trained with happens inside. Of a model that gives labels alone,
    (N,) integers, the logits are 100 for the label and 0 for all other ``classes``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int, int] | None = None,
        classes: Sequence[str] | None = None,
        output: Callable[[Any], Tensor] = read_logits,
        crop_pct: float = 1.0,
        interpolation: str = "bilinear",
        defenses: Sequence[Defense] = (),
    ) -> None:
        if input_size is not None and len(input_size) != 3:
            raise InputError(f"input_size must be (C, H, W), not {tuple(input_size)}")
        # A compiled model runs its original: hooks do not reach into compiled code.
        self.module: nn.Module = getattr(module, "_orig_mod", module)
        _refuse_compiled(self.module)
        self.name = name or f"module:{type(self.module).__name__}"
        conv = next((m for m in self.module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = conv.in_channels if conv is not None else 3 if mean is None else len(mean)
        self._size_given = input_size is not None
        channels, height, width = input_size or (channels, 224, 224)
        self.input_size = (channels, height, width)
        self.mean = torch.tensor([0.0] * channels if mean is None else list(mean))
        self.std = torch.tensor([1.0] * channels if std is None else list(std))
        for what, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != channels:
                raise InputError(
                    f"{what} has {len(numbers)} numbers, but the model takes {channels} channels"
                )
        self.classes = tuple(classes) if classes is not None else None
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        #: What changes the pixels before the network sees them, outermost first; see ``defended``.
        self.defenses = tuple(defenses)
        #: How ``load_model`` can make it again; None for a module that was given as an object.
        self.source: Mapping[str, Any] | None = None
        self.output = output
        self._gives_labels = False
        #: A tuned copy of the network as it is in some state; see ``twin``.
        self._optimized_copy: tuple[Any, nn.Module | None] = (None, None)
        self._digest: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Model({self.name!r}, input_size={self.input_size})"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self._output(self._run(images, network_for_call(self)))

    def _output(self, answer: Any) -> Tensor:
        """The logits in what the network returned."""
        logits = self.output(answer)
        if logits.ndim != 1 or logits.is_floating_point():
            return logits
        self._gives_labels = True
        if self.classes is None:
            raise ModelError(
                f"{self.name} gives labels alone; say which classes there are: load_model(..., classes=[...])"
            )
        if logits.numel() and not 0 <= int(logits.min()) <= int(logits.max()) < len(self.classes):
            known = f"the classes are 0 to {len(self.classes) - 1}"
            raise ModelError(f"{self.name} gave labels from {logits.min()} to {logits.max()}, but {known}")
        return 100.0 * F.one_hot(logits.to(self.device).long(), len(self.classes)).to(self.dtype)

    def require_gradients(self) -> None:
        """Refuse, with ModelError, a model of which it is known that no gradient flows through it."""
        flows = not self._gives_labels
        if flows and isinstance(self.module, Function):
            noise = torch.rand(1, *self.input_size, generator=torch.Generator().manual_seed(0))
            try:
                with torch.enable_grad(), torch.random.fork_rng([]):
                    flows = self(noise.requires_grad_()).requires_grad
            except RuntimeError:  # as a tensor that has a gradient says that NumPy cannot have it
                flows = False
        if not flows:
            what = "gives labels alone" if self._gives_labels else "lets no gradient through"
            raise ModelError(
                f"{self.name} {what}, and this method needs gradients; one that only asks the model, such as "
                "hop_skip_jump, does not"
            )

    def _run(self, images: Tensor, network: nn.Module | None = None) -> Any:
        """What the network returns; a size that it cannot take is refused in a sentence."""
        try:
            return (self.module if network is None else network)(self.normalize(images))
        except _REFUSALS as error:
            size = tuple(images.shape[1:])
            if size == self.input_size or isinstance(error, _SAID_ALREADY):
                raise
            raise InputError(
                f"{self.name} does not take pictures of {size}, its own are {self.input_size}. "
                f"It said: {error}"
            ) from error

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std, on the model's device and in its precision, behind its defences."""
        images = images.to(self.device, self.dtype)
        for _, change in self.defenses:
            images = change(images)
        mean, std = (t.to(images)[:, None, None] for t in (self.mean, self.std))
        return (images - mean) / std

    def copy(self) -> Model:
        """The same with a network of its own, whose weights can be changed without changing this one's."""
        made = copy.copy(self)
        made.module, made.source, made._optimized_copy = copy.deepcopy(self.module), None, (None, None)
        for known in ("layers", "vgg_layer_aliases", "structure"):  # they hold this one's parts
            made.__dict__.pop(known, None)
        return made

    @property
    def settings(self) -> dict[str, Any]:
        """What ``Model(network, **settings)`` is told to feed and read another network as this one."""
        words = ("name", "input_size", "classes", "crop_pct", "interpolation", "defenses", "output")
        told: dict[str, Any] = {word: getattr(self, word) for word in words}
        return told | {"mean": tuple(self.mean.tolist()), "std": tuple(self.std.tolist())}

    def defended(self, transform: Callable[[Tensor], Tensor], name: str) -> Model:
        """The same network behind a change of the pixels, which every pass of it goes through.

        ``transform`` takes (N, C, H, W) in [0, 1] and gives the same shape; gradients pass through it, so
        that attacks on this model are adaptive (``phosphene.optimize.straight_through`` where it has no
        useful gradient of its own). One that is random draws from torch's own state. ``name`` tells it
        apart, in ``digest`` too.
        """
        made = copy.copy(self)
        made.defenses = ((name, transform), *self.defenses)
        made.name, made.source = f"{name} | {self.name}", None
        made._optimized_copy, made._digest = (None, None), None
        made.__dict__.pop("structure", None)  # as recorded, it ran without
        return made

    def tap(self, *layers: str, leaf: bool = False, replace: Callable[[Tensor], Tensor] | None = None) -> Tap:
        """Read layers during forward passes inside a ``with`` block; see ``Tap``.

        ``leaf=True`` cuts the graph there, so that a backward pass costs only what lies above.
        ``replace(output)`` gives what runs on instead of what is read, a layer's last output; its
        argument is a copy, free to be changed.
        """
        tapped = {name: self.layers[self.layer_name(name)] for name in layers}
        if replace is None:
            return Tap(tapped, leaf=leaf)
        ran = self.structure.layers
        calls = {n: ran[own].calls if (own := self.layer_name(n)) in ran else 1 for n in layers}
        return Tap(tapped, leaf=leaf, replace={name: (count, replace) for name, count in calls.items()})

    def features(self, images: Tensor, layer: str) -> Tensor:
        """The output of a layer, as it is; nothing above the layer runs."""
        return self.features_of(images, [layer])[0]

    def features_of(self, images: Tensor, layers: Sequence[str], *, inputs: bool = False) -> list[Tensor]:
        """The outputs (or first inputs) of several layers in one pass, which stops at the highest.

        A layer that runs many times (a shared ReLU) gives its last output.
        """
        layers = [self.layer_name(name) for name in layers]
        tapped = {name: self.layers[name] for name in layers}
        if "structure" not in self.__dict__:
            self.see(images)
        for name in layers:
            if name not in self.structure.layers:
                raise ModelError(f"layer {name!r} does not run in a forward pass of {self.name}")
        stop_after = {name: self.structure.layers[name].calls for name in layers}
        with Tap(tapped, inputs=inputs, stop_after=stop_after) as tap:
            with suppress(StopForward):
                self._run(images, network_for_call(self))
            return [tap[name] for name in layers]

    def input_of(self, images: Tensor, layer: str) -> Tensor:
        """What a layer is given (its first argument, at its last call); nothing above it runs."""
        return self.features_of(images, [layer], inputs=True)[0]

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features (N, D): what the classifier is given."""
        what = "linear classifier to read features before; name a layer instead"
        return self.input_of(images, self._require(self.structure.classifier, what)).flatten(1)

    def guard(self) -> AbstractContextManager[None]:
        """Eval mode and frozen parameters inside the block; everything as it was after it."""
        return guard(self.module)

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Every submodule by its dotted name."""
        return {name: module for name, module in self.module.named_modules() if name}

    @cached_property
    def vgg_layer_aliases(self) -> dict[str, str]:
        """What papers call the layers of a VGG, by their names here: ``relu3_1``, ``conv4_2``, ``pool4``."""
        return vgg_layer_aliases(self.module)

    def layer_name(self, layer: str) -> str:
        """The layer's own name, or UnknownName with the nearest; a VGG's go by the papers' names, too."""
        known = {name: name for name in self.layers} | self.vgg_layer_aliases
        if layer not in known:
            raise UnknownName("layer", layer, known, "this model")
        return known[layer]

    @cached_property
    def structure(self) -> Structure:
        """What runs, in which order and shape: one forward pass, recorded once."""
        noise = torch.rand(1, *self.input_size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.random.fork_rng([]):  # a random one draws the same, looked at or not
                found = record_structure(self.module, self.normalize(noise), self._output)
        except _REFUSALS as error:
            if isinstance(error, _SAID_ALREADY):
                raise
            raise ModelError(
                f"{self.name} does not take pictures of {self.input_size}; "
                f"say which: load_model(..., input_size=(C, H, W)). It said: {error}"
            ) from error
        if self.classes is not None and found.classes not in (0, len(self.classes)):
            raise ModelError(
                f"{self.name} gives {found.classes} logits, but has {len(self.classes)} class names"
            )
        return found

    def see(self, images: Tensor) -> None:
        """Take the size of these images for the network's own, where nobody said what it is."""
        size = tuple(images.shape[1:])
        if not self._size_given and size != self.input_size:
            self.input_size = size  # type: ignore[assignment]
            self.__dict__.pop("structure", None)

    def _require(self, part: T | None, what: str) -> T:
        if not part:
            raise ModelError(f"{self.name} has no {what}")
        return part

    @property
    def class_count(self) -> int:
        """How many logits there are."""
        return len(self.classes) if self.classes is not None else self.structure.classes

    @property
    def last_map(self) -> str:
        """The last layer with a spatial map that the logits depend on: Grad-CAM's usual choice."""
        return self._require(self.structure.last_map, "layer with a spatial map; name a layer yourself")

    @property
    def stages(self) -> tuple[str, ...]:
        """One layer for each resolution, finest first: the usual layers of textures and styles."""
        return self._require(self.structure.stages, "layer with a spatial map; name layers yourself")

    @property
    def head(self) -> Head:
        """The GAP + linear head that CAM needs."""
        what = "GAP + linear head, which CAM needs; use grad_cam, which works on any layer"
        return self._require(self.structure.head, what)

    def maps(self, features: Tensor, images: Tensor) -> Tensor:
        """A layer's output as (N, C, h, w): tokens and channels-last turned, class tokens dropped."""
        if len(features) != len(images):
            raise ModelError(
                f"an output of shape {tuple(features.shape)} is not a map per image: "
                f"it has {len(features)} rows for {len(images)} images (attention windows, perhaps)"
            )
        size = (images.shape[-2], images.shape[-1])
        return as_maps(features, size, prefix_tokens(self.module))

    def map_shape(self, layer: str) -> tuple[int, int, int]:
        """(C, h, w) of a layer's maps for one picture of the model's size; ModelError where it has none."""
        name = self.layer_name(layer)
        info = self.structure.layers.get(name)
        if info is None or info.shape is None:
            raise ModelError(f"layer {name!r} gives no tensor in a forward pass of {self.name}")
        output, picture = (torch.empty(1, *shape, device="meta") for shape in (info.shape, self.input_size))
        _, channels, height, width = self.maps(output, picture).shape
        return channels, height, width

    def transform(self, picture: str | Path | Image.Image) -> Tensor:
        """A picture file -> (C, H, W) in [0, 1]: resized and cropped as the network was trained."""
        channels, height, width = self.input_size
        if channels not in (1, 3):
            raise InputError(
                f"{self.name} takes {channels} channels: give tensors, picture files have 1 or 3"
            )
        image = picture if isinstance(picture, Image.Image) else to_pil(read_image(picture))
        image = image.convert("L" if channels == 1 else "RGB")
        # Whole pixels as torchvision and timm count them: rounded down, the crop's corner to the nearest.
        frame = [int(side / self.crop_pct + 1e-6) for side in (width, height)]
        scale = max(frame[0] / image.width, frame[1] / image.height)
        resized = (max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6)))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling[self.interpolation.upper()])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        pixels = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1).contiguous() / 255

    def class_index(self, name: str | int) -> int:
        """The index of a class given by name (any of its comma-separated synonyms) or index."""
        if isinstance(name, str):
            if (index := self._class_indices.get(name.strip().lower())) is not None:
                return index
            if not name.isdecimal() and self.classes is None:
                raise InputError(f"{self.name} has no class names; give the index instead of {name!r}")
            if not name.isdecimal():
                raise UnknownName("class", name, self.classes or (), self.name)
            name = int(name)
        if isinstance(name, bool) or not isinstance(name, Integral):
            raise InputError(f"a class is an index or a name, not a {type(name).__name__}")
        if not 0 <= name < self.class_count:
            raise InputError(f"class {name} does not exist: {self.name} has {self.class_count} classes")
        return int(name)

    def class_name(self, index: int) -> str:
        """The name of a class, or its number where the model has no names."""
        return self.classes[index] if self.classes is not None else f"class {index}"

    @cached_property
    def _class_indices(self) -> dict[str, int]:
        full = list(enumerate(self.classes or ()))
        synonyms = [(index, name) for index, several in full for name in several.split(",")]
        # Read backwards, the first one counts; and a class's own name goes before another's synonym.
        return {name.strip().lower(): index for index, name in reversed(full + synonyms)}

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def digest(self) -> str:
        """SHA-256 over names and values of all weights and buffers, and the names of its defences."""
        state = self.module.state_dict()
        key = tuple((k, checksum(v)) for k, v in state.items())  # ``.data`` changes leave no other trace
        if self._digest is None or self._digest[0] != key:
            sha = hashlib.sha256(self.name.encode() if isinstance(self.module, Function) else b"")
            for name, _ in self.defenses:
                sha.update(f"{name}|".encode())
            for name, value in state.items():
                sha.update(name.encode())
                sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._digest = (key, sha.hexdigest())
        return self._digest[1]


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        compiled = part._compiled_call_impl is not None or hasattr(part, "_orig_mod")
        if compiled or isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the module'} is compiled, and hooks do not reach into compiled code; "
                "give the model as it was before torch.compile or torch.jit"
            )
