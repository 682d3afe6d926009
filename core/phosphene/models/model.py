"""``Model``: any vision network behind one convention: RGB in [0, 1] in, logits out, layers by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import DivergenceError, InputError, ModelError, PhospheneError, UnknownName, type_name
from ..finite_values import NotFiniteError, all_finite, check_finite
from ..hooks.attention import RecordAttention
from ..hooks.guard import REENTRANT_CHECKPOINT, guard
from ..hooks.tap import StopForward, Tap
from ..images.color import Centers
from ..images.decode import image_size, open_rgb
from ..torch_state import call_and_restore, default_device_of_caller, fork_random_state, random_lock
from .arguments import (
    check_class_names,
    check_has_values,
    check_input_size,
    check_preprocessing,
    check_weight_types,
    finite_numbers,
    non_finite_weight,
)
from .attention import AttentionLayer, attention, read_attention_layers, record_attention
from .class_names import class_index
from .detections import Detection, differentiable_values, read_detections
from .digest import state_checksums, state_digest
from .introspection import Head, Structure, linear_weights, record_structure, recording_structure
from .layer_aliases import vgg_layer_aliases
from .logits import Function, read_logits
from .module_copy import copy_without_hooks
from .optimized_copy import network_for_call
from .output_activation import (
    OutputActivation,
    may_be_probabilities,
    output_activation,
    probabilities_instead_of_logits,
    sums_to_one,
)
from .preprocessing import preprocess, resized_size
from .tasks import (
    EXCLUSIVE,
    Task,
    ambiguous_output,
    binary_logits,
    binary_names,
    check_task,
    infer_task,
    no_classes,
)
from .token_maps import Layout
from .wrappers import WITHOUT_GRADIENTS, is_exported, reason_for_type_error, reason_without_gradient, unwrap

T = TypeVar("T")


#: The last step of a network, where it can be read.
_Activation = OutputActivation | Literal["no gradient"]


#: A transform of images (N, C, H, W) in [0, 1] in front of the network, with its name.
Defense = tuple[str, Callable[[Tensor], Tensor]]


#: Height and width of the images where neither the caller nor the loader sets an input size.
DEFAULT_SIDE = 224


#: Exceptions that networks raise for images of an unsupported size, reported as InputError ...
_REFUSALS = (RuntimeError, AssertionError, ValueError)


#: ... except these subclasses, which are raised unchanged.
_UNTRANSLATED = (PhospheneError, torch.OutOfMemoryError)


@dataclass
class _Cache:
    """What was computed about a network, shared by a model and its views at other input sizes."""

    structures: dict[tuple[int, ...], Structure] = field(default_factory=dict)
    #: The state of the network that was copied, and its optimized copy; None where it cannot be used.
    optimized: tuple[Any, nn.Module | None] = (None, None)
    #: The digest, with the checksums that it belongs to.
    digest: tuple[Any, str] | None = None
    #: Whether the network returned class indices instead of logits.
    returns_labels: bool = False
    #: The function that the network ends in, read where an output looked like probabilities.
    output_activation: _Activation | None = None
    #: The number of logits of the first pass at each image size.
    class_counts: dict[tuple[int, ...], int] = field(default_factory=dict)
    #: The pixels at which the units of a layer are centered, by layer and input size; see ``unit_centers``.
    centers: dict[tuple[str, tuple[int, ...]], Centers | None] = field(default_factory=dict)
    #: The layers with attention, by input size.
    attention: dict[tuple[int, ...], dict[str, AttentionLayer]] = field(default_factory=dict)
    #: The axis of the windows of layers whose attention has five axes; see ``window_axes``.
    window_axes: dict[str, int] = field(default_factory=dict)
    #: Lock for recording a structure, so that concurrent threads record it once.
    lock: AbstractContextManager[bool] = field(default_factory=threading.RLock)

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()  # a pickled or deep-copied model starts with an empty cache

    def of_copy(self) -> _Cache:
        """What was recorded about the passes of a network, for an equal copy of it."""
        return _Cache(
            structures=dict(self.structures),
            class_counts=dict(self.class_counts),
            centers=dict(self.centers),
            attention=dict(self.attention),
            window_axes=dict(self.window_axes),
        )


class Model:
    """A vision network and all that a method needs to know about it. Wrapping does not change the network.

    ``model(images)`` takes (N, C, H, W) RGB pixels in [0, 1] and returns the logits (N, K) of classes that
    exclude each other; the normalization that the network was trained with happens inside. Where a network
    returns labels alone, (N,) integers, the logits are 100 for that class and 0 for all other ``classes``.

    ``task`` says what the network's output means. Without one, two or more columns are the logits of a
    classification; one number per image may be a logit or a regression, so ``task`` has to say which. With
    "binary", one logit z (N, 1) or (N,) is presented as the two logits (-z/2, z/2). The outputs of other
    tasks are read by ``outputs`` (multilabel, regression, embedding, segmentation) and ``detections``;
    ``model(images)`` refuses them, as they have no logits of exclusive classes.

    Every pass must return one row for each image, the same number of logits as before, and finite logits.
    A network that masks classes with -inf needs a finite number for them, as ``output=lambda z:
    z.clamp(min=-100)`` returns it.

    A network on the meta device can be wrapped and its layers be listed, but it cannot run.

    No call changes a model. ``input_size`` (C, H, W) is what was passed or what the loader defines
    (``size_known``), else (C, 224, 224). ``for_images(images)`` is the same model at another input size.

    module: the network.
    name: its name in results. Default: "module:" and its type.
    mean, std: normalization of pixels in [0, 1], one number per channel. Default: none.
    input_size: (C, H, W) of its images.
    classes: class names, one for each logit, synonyms separated by commas; or "imagenet", its 1,000 names.
    output: a function from what the module returns to logits. Default: ``read_logits``.
    task: "classification", "binary", "multilabel", "regression", "segmentation", "detection" or
        "embedding". Default: what the network's library says, else classification where the output has two
        columns or more.
    crop_pct, crop_mode, interpolation: preprocessing of image files, see ``transform``.
    defenses: transforms of the images in front of the network, see ``defended``.
    embed_text: a function from a text to a vector (D,) in the space of ``embed``, of CLIP and its kind.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int, int] | None = None,
        classes: Sequence[str] | str | None = None,
        output: Callable[[Any], Tensor] = read_logits,
        crop_pct: float = 1.0,
        crop_mode: str = "center",
        interpolation: str = "bilinear",
        defenses: Sequence[Defense] = (),
        task: Task | None = None,
        embed_text: Callable[[str], Tensor] | None = None,
    ) -> None:
        if input_size is not None:
            input_size = check_input_size(input_size)
        check_preprocessing(crop_pct, crop_mode, interpolation, defenses, output)
        self.module: nn.Module = unwrap(module)
        _refuse_compiled(self.module)
        self.name = name or f"module:{type(self.module).__name__}"
        check_weight_types(self.module, self.name)
        mean = None if mean is None else finite_numbers(mean, "mean")
        std = None if std is None else finite_numbers(std, "std")
        conv = next((m for m in self.module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = conv.in_channels if conv is not None else 3 if mean is None else len(mean)
        #: Whether ``input_size`` was passed or is the loader's; else it is the default or that of images.
        self.size_known = input_size is not None and crop_mode not in ("resize", "resize-16", "none")
        channels, height, width = input_size or (channels, DEFAULT_SIDE, DEFAULT_SIDE)
        self.input_size = (channels, height, width)
        self.mean = torch.tensor([0.0] * channels if mean is None else mean, device="cpu")
        self.std = torch.tensor([1.0] * channels if std is None else std, device="cpu")
        for what, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != channels:
                raise InputError(
                    f"{what} has {len(numbers)} numbers, but the model takes {channels} channels"
                )
        if self.std.min() <= 0:
            raise InputError(f"pixels are divided by std, which must be greater than 0, not {std}")
        #: What the output means, where that is declared; None: a classification, if its shape allows that.
        self.task = check_task(task) or infer_task(self.module)
        names = check_class_names(classes) if classes is not None else None
        self.classes = binary_names(names) if self.task == "binary" else names
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.interpolation = interpolation
        #: What changes the pixels in front of the network, outermost first; see ``defended``.
        self.defenses = tuple(defenses)
        #: The arguments with which ``load_model`` rebuilds it; None for a module passed as an object.
        self.source: Mapping[str, Any] | None = None
        self.output = output
        #: The embedding (D,) of a text, comparable with ``embed``; None for a model of images alone.
        self.embed_text = embed_text
        self._cache = _Cache()

    def __repr__(self) -> str:
        return f"Model({self.name!r}, input_size={self.input_size})"

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1].

        Raises ModelError for a network without exclusive classes, for logits that are not finite, for
        another number of rows than of images, and for another number of classes than before.
        """
        logits = self.outputs(images)
        if self.task not in EXCLUSIVE or logits.ndim != 2:
            task = None if self.task in EXCLUSIVE else self.task
            raise ModelError(no_classes(self.name, task, tuple(logits.shape)))
        if logits.shape[1] == 1 and self.task is None:
            raise ModelError(ambiguous_output(self.name))
        return logits

    def outputs(self, images: Tensor) -> Tensor:
        """The network's output: (N, K) logits, values or embeddings, or the (N, K, H, W) of a segmentation.

        As ``model(images)``, without the check that it is the logits of exclusive classes.
        """
        logits = self._logits(self._run(images, network_for_call(self)))
        self._check_shape(logits, images)
        self._check_finite("logits", logits, images)
        if self.task in ("binary", "multilabel") and (activation := self.output_activation(logits, images)):
            raise ModelError(probabilities_instead_of_logits(self.name, self.task, activation))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, K): softmax of the logits, or the sigmoid of each where several classes can be present."""
        outputs = self.outputs(images) if self.task == "multilabel" else self(images)
        return self.to_probabilities(outputs, images)

    def to_probabilities(self, outputs: Tensor, images: Tensor) -> Tensor:
        """The probabilities (N, K) of this model's ``outputs`` for ``images``: see ``probabilities``.

        Outputs that are probabilities are returned as they are: see ``output_activation``.
        """
        if self.task == "multilabel":
            return outputs.sigmoid()
        return outputs if self.output_activation(outputs, images) else outputs.softmax(1)

    def detections(self, images: Tensor) -> list[Detection]:
        """The objects that a detector finds, for each image: boxes, labels, scores, on the graph."""
        if self.task != "detection":
            raise ModelError(f"{self.name} is no detector: load_model(..., task='detection') declares one")
        output = self._run(images)
        output = output if self.output is read_logits else self.output(output)
        detections = read_detections(output, (images.shape[2], images.shape[3]), self.name)
        if len(detections) != len(images):
            raise ModelError(f"{self.name} returned {len(detections)} detections for {len(images)} images")
        for name in Detection._fields:
            values = torch.cat([getattr(detection, name).flatten() for detection in detections])
            self._check_finite(name, values, images)
        return detections

    def _check_shape(self, logits: Tensor, images: Tensor) -> None:
        """Refuse logits that do not have one row for each image, or a changed number of classes."""
        if logits.ndim == 0 or len(logits) != len(images):
            raise ModelError(
                f"{self.name} returned an output of shape {tuple(logits.shape)} for {len(images)} images of "
                f"{tuple(images.shape[1:])}, not one row for each image (a view or a reshape in the network "
                "may mix images and positions)"
            )
        if self.task == "segmentation" and logits.ndim != 4:
            raise ModelError(
                f"{self.name} returned {tuple(logits.shape)}, and a segmentation returns (N, K, H, W)"
            )
        if logits.ndim not in (2, 4):
            return  # only a callable target can read it
        count = logits.shape[1]
        if count == 0:
            raise ModelError(f"{self.name} returned no logits: their shape is {tuple(logits.shape)}")
        if self.classes is not None and count != len(self.classes):
            raise ModelError(f"{self.name} returns {count} logits, but has {len(self.classes)} class names")
        before = self._cache.class_counts.setdefault(tuple(images.shape[1:]), count)
        if before != count:
            raise ModelError(
                f"{self.name} returned {count} logits for each image, and {before} in an earlier pass; "
                "load a network that was changed again with load_model"
            )

    def _check_finite(self, what: str, values: Tensor, images: Tensor) -> None:
        """Refuse logits or features with NaN or infinity, or without values."""
        if values.is_meta:  # a part of the weights has no values
            check_has_values(self.module, self.name)
        if not self.module.training:  # a training checks its loss, and proposes another learning rate
            # Detached: an error that is raised later must not keep the graph of a pass.
            values, images = values.detach(), images.detach()
            check_finite(values, what, lambda: self._not_finite(what, values, images))

    def _not_finite(self, what: str, values: Tensor, images: Tensor) -> PhospheneError:
        """The error for logits or features that are not finite, with the cause where it can be found."""
        if not all_finite(images):
            return DivergenceError(
                f"the images passed to {self.name} are not finite; where they are optimized, a smaller "
                "learning rate or step size may help"
            )
        message = f"the {what} of {self.name} are not finite"
        if (weight := non_finite_weight(self.module)) is not None:
            return NotFiniteError(f"{message}: its weight {weight!r} contains NaN or infinity")
        if what == "logits" and values.isneginf().any() and values.amax() < torch.inf:
            return NotFiniteError(
                f"{message}: some are -inf; where the network masks classes, pass finite numbers for them: "
                "load_model(..., output=lambda logits: logits.clamp(min=-100)); where they are logarithms of "
                "probabilities, some of these are rounded to 0: return the logits instead"
            )
        hint = ""
        if self.output is torch.logit:
            hint = (
                "; probabilities that are rounded to 0 or 1 have infinite logits: return the logits instead"
            )
        if self.dtype in (torch.float16, torch.bfloat16):
            hint = f"; values may overflow in {self.dtype}: load_model(..., dtype=torch.float32)"
        return NotFiniteError(
            f"{message}: its weights are, so NaN or infinity arises in the forward pass{hint}"
        )

    def _logits(self, output: Any) -> Tensor:
        """The logits in what the network returned; of a binary network both."""
        logits = self._raw_logits(output)
        if self.task == "binary":
            return binary_logits(logits, self.name)
        return logits[:, None] if logits.ndim == 1 else logits

    def output_activation(self, outputs: Tensor, images: Tensor) -> OutputActivation:
        """The last step of a network that returns probabilities, "softmax" or "sigmoid"; "" for logits.

        ``outputs`` (N, K) are those of this model for ``images`` (N, C, H, W). Where all lie in [0, 1], the
        step is read from the graph of a pass of noise, which is run once. A network without gradients ends
        in a softmax where the outputs of each image sum to 1; its sigmoid cannot be recognized.
        """
        with torch._C.DisableTorchFunction():  # a backward rewrite concerns the network's calls, not these
            values = outputs.diff(dim=1) if self.task == "binary" else outputs  # z of (-z/2, z/2)
            if not may_be_probabilities(values):
                return ""
            cached = self._cache.output_activation
            read: _Activation = (
                call_and_restore(self._read_output_activation, images) if cached is None else cached
            )
            self._cache.output_activation = read
            if read == "no gradient":
                return "softmax" if sums_to_one(values) else ""
            return read

    def _read_output_activation(self, images: Tensor) -> _Activation:
        network = self.module
        if not isinstance(network, Function):  # taps and hooks must not see this pass
            tensors = (*network.parameters(), *network.buffers())
            network = copy_without_hooks(network, {id(tensor): tensor for tensor in tensors})
        noise = _noise(*images.shape).requires_grad_()  # an exported network takes this number of images
        try:
            with random_lock, torch.enable_grad(), fork_random_state():
                output = self._raw_logits(self._run(noise, network))
        except (RuntimeError, InputError):  # raised where a tensor that requires a gradient becomes an array
            return "no gradient"
        return output_activation(output) if output.requires_grad else "no gradient"

    def _raw_logits(self, output: Any) -> Tensor:
        """What the network returned as logits, with the network's own number of columns."""
        if self.task == "detection":
            raise ModelError(no_classes(self.name, "detection", ()))
        if self.output is read_logits:
            logits = read_logits(output, None if self.classes is None else len(self.classes))
        else:
            logits = self.output(output)
        if not isinstance(logits, Tensor):
            raise ModelError(f"output returned {type_name(logits)} for {self.name}, not logits (N, K)")
        if logits.is_complex():
            raise ModelError(f"the logits of {self.name} are complex; pass output= to make them real")
        if logits.ndim != 1 or logits.is_floating_point():
            return logits
        self._cache.returns_labels = True
        if self.classes is None:
            raise ModelError(
                f"{self.name} returns labels alone; pass the class names: load_model(..., classes=[...])"
            )
        if logits.numel() and not 0 <= int(logits.min()) <= int(logits.max()) < len(self.classes):
            allowed = f"the classes are 0 to {len(self.classes) - 1}"
            raise ModelError(
                f"{self.name} returned labels from {logits.min()} to {logits.max()}, but {allowed}"
            )
        return 100.0 * F.one_hot(logits.to(self.device).long(), len(self.classes)).to(self.dtype)

    def require_gradients(self) -> None:
        """Raise ModelError where no gradient flows through the model, as far as that can be determined."""
        has_gradient = not self._cache.returns_labels
        if has_gradient and isinstance(self.module, Function):
            noise = _noise(1, *self.input_size)
            try:
                with random_lock, torch.enable_grad(), fork_random_state():
                    has_gradient = self.outputs(noise.requires_grad_()).requires_grad
            except RuntimeError:  # raised where a tensor that requires a gradient is converted to NumPy
                has_gradient = False
        if not has_gradient:
            what = "returns labels alone" if self._cache.returns_labels else "lets no gradient through"
            raise ModelError(
                f"{self.name} {what}, and this method needs gradients; black-box methods such as "
                "hop_skip_jump do not"
            )

    def _run(self, images: Tensor, network: nn.Module | None = None) -> Any:
        """What the network returns; an image size that it does not take is refused with InputError."""
        try:
            pixels = self.normalize(images)
            with default_device_of_caller():
                return (self.module if network is None else network)(pixels)
        except TypeError as error:
            raise self._type_error(error) from error
        except _REFUSALS as error:
            if isinstance(error, _UNTRANSLATED):
                raise
            check_has_values(self.module, self.name)
            size = tuple(images.shape[1:])
            if size in self._cache.structures or (self.size_known and size == self.input_size):
                raise
            own = f"; its input size is {self.input_size}" if self.size_known else ""
            message = f"{self.name} does not take images of {size}{own}. Its error: {error}"
            raise InputError(message) from error

    def _type_error(self, error: TypeError) -> TypeError | ModelError:
        """The reason why the network cannot be called with images alone; else the error itself."""
        reason = reason_for_type_error(self.module)
        return error if reason is None else ModelError(f"{self.name} {reason}")

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std, on the model's device and in its precision, after its defenses."""
        if (device := self.device).type == "meta":
            check_has_values(self.module, self.name)
        images = images.to(device, self.dtype)
        for _, transform in self.defenses:
            images = transform(images)
        mean, std = (t.to(images)[:, None, None] for t in (self.mean, self.std))
        return (images - mean) / std

    # --- copies and views -----------------------------------------------------------------------

    def for_images(self, images: Tensor) -> Model:
        """This model at the height and width of images (N, C, H, W); itself if ``size_known``."""
        if self.size_known:
            return self
        height, width = images.shape[-2:]
        return self.at_size((self.input_size[0], height, width))

    @property
    def row_by_row(self) -> bool:
        """Whether each image of a call has a classifier of its own, ``for_rows([row])``."""
        return False

    def for_rows(self, rows: Sequence[int] | Tensor) -> Model:
        """The model for these images of a call, by their indices: itself.

        That of an objective (``phosphene.targets.ObjectiveClassifier``) differs from image to image. Methods
        on many images that pass ``model.for_rows(rows)`` on work for objectives as well.
        """
        return self

    def at_size(self, input_size: tuple[int, int, int]) -> Model:
        """A view with another input size, which shares the network and all that is cached about it."""
        if tuple(input_size) == self.input_size:
            return self
        view = copy.copy(self)
        channels, height, width = input_size
        view.input_size = (channels, height, width)
        return view

    def copy(self) -> Model:
        """A copy with a network of its own, whose weights can be changed without changing this one's."""
        duplicate = self._derive()
        duplicate.module = copy.deepcopy(self.module)
        for name in ("layers", "vgg_layer_aliases"):  # cached properties that refer to this one's modules
            duplicate.__dict__.pop(name, None)
        return duplicate

    def defended(self, transform: Callable[[Tensor], Tensor], name: str) -> Model:
        """The same network behind a transform of the images, which every pass goes through.

        ``transform`` maps (N, C, H, W) in [0, 1] to the same shape. Gradients pass through it, so that
        attacks on this model are adaptive (``phosphene.optimize.straight_through`` where it has no useful
        gradient of its own). A random one draws from torch's global generator. ``name`` is part of the
        model's name and digest.
        """
        model = self._derive()
        model.defenses = ((name, transform), *self.defenses)
        model.name = f"{name} | {self.name}"
        return model

    def _derive(self) -> Model:
        """A shallow copy without source and with an empty cache."""
        model = copy.copy(self)
        model.source, model._cache = None, _Cache()
        return model

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments with which ``Model(network, **settings)`` treats another network as this one."""
        names = ("name", "input_size", "classes", "crop_pct", "crop_mode", "interpolation", "defenses")
        settings: dict[str, Any] = {name: getattr(self, name) for name in (*names, "output", "task")}
        return settings | {"mean": tuple(self.mean.tolist()), "std": tuple(self.std.tolist())}

    # --- layers -----------------------------------------------------------------------------------

    def tap(self, *layers: str, leaf: bool = False, replace: Callable[[Tensor], Tensor] | None = None) -> Tap:
        """Read layers during forward passes inside a ``with`` block; see ``Tap``.

        ``leaf=True`` cuts the graph there, so that a backward pass costs only what lies above.
        ``replace(output)`` returns what the network continues with instead of a layer's last output; its
        argument is a copy that may be changed in place.
        """
        tapped = {name: self.layers[self.layer_name(name)] for name in layers}
        if replace is None:
            return Tap(tapped, leaf=leaf)
        ran = self.structure.layers
        calls = {n: ran[own].calls if (own := self.layer_name(n)) in ran else 1 for n in layers}
        return Tap(tapped, leaf=leaf, replace={name: (count, replace) for name, count in calls.items()})

    def features(self, images: Tensor, layer: str) -> Tensor:
        """The output of a layer, unchanged; nothing above the layer runs."""
        return self.features_of(images, [layer])[0]

    def features_of(self, images: Tensor, layers: Sequence[str], *, inputs: bool = False) -> list[Tensor]:
        """The outputs (or first inputs) of several layers in one pass, which stops at the highest.

        Of a layer that runs several times (a shared ReLU) it is the last output.
        """
        layers = [self.layer_name(name) for name in layers]
        tapped = {name: self.layers[name] for name in layers}
        ran = self.for_images(images).structure.layers
        for name in layers:
            if name not in ran:
                raise ModelError(f"layer {name!r} does not run in a forward pass of {self.name}")
        stop_after = {name: ran[name].calls for name in layers}
        with Tap(tapped, inputs=inputs, stop_after=stop_after) as tap:
            with suppress(StopForward):
                self._run(images, network_for_call(self))
            features = [tap[name] for name in layers]
        for name, values in zip(layers, features, strict=True):
            self._check_finite(f"{'inputs' if inputs else 'outputs'} of layer {name!r}", values, images)
        return features

    def input_of(self, images: Tensor, layer: str) -> Tensor:
        """The first input of a layer, at its last call; nothing above it runs."""
        return self.features_of(images, [layer], inputs=True)[0]

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features (N, D): the input of the classifier; of an embedding network its output."""
        if self.task == "embedding":
            return self.outputs(images).flatten(1)
        classifier = self.for_images(images).structure.classifier
        what = "linear classifier whose input could be read; name a layer instead"
        return self.input_of(images, self._require(classifier, what)).flatten(1)

    def attention(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Attention probabilities softmax(Q K^T / sqrt(d)) of images (N, C, H, W), by layer, in one pass.

        They are on the graph, so that they have gradients with respect to images that require them. Fused
        and unfused attention and ``torch.nn.MultiheadAttention`` are read in the same way. ``layers`` are
        names of ``attention_layers``; default: all, in the order in which they run.

        Returns:
            (N, heads, T, T) for each layer: row i is the distribution over the tokens that token i attends
            to. Of attention inside windows (N, windows, heads, T, T), T tokens in a window;
            ``phosphene.attention_centers`` are their positions in the image.

        Raises:
            ModelError: the model computes no attention.
            UnknownName: a layer computes no attention.

        Example::
            from phosphene import load_model, read_images

            model = load_model("timm:vit_tiny_patch16_224", pretrained=False)
            maps = model.attention(read_images("builtin:scenes/2", model))
            maps["blocks.0.attn"].shape  # (2, 3, 197, 197)

        Source:
            Vaswani et al. 2017, section 3.2.1.
        """
        return attention(self, images, layers)

    def record_attention(
        self, replace: Callable[[str, Tensor], Tensor] | None = None
    ) -> AbstractContextManager[RecordAttention]:
        """Record the attention of passes inside a ``with`` block, in which the model is frozen.

        ``replace(layer, probabilities)`` returns what the network continues with. See ``RecordAttention``.
        """
        return record_attention(self, replace)

    @property
    def attention_layers(self) -> dict[str, AttentionLayer]:
        """The layers that compute attention at the model's input size; recorded once, empty without any."""
        structure = self.structure  # refuses an input size that the network does not take
        with random_lock, self._cache.lock:
            if self.input_size not in self._cache.attention:
                without = is_exported(self.module) or not structure.layers
                self._cache.attention[self.input_size] = {} if without else read_attention_layers(self)
            return self._cache.attention[self.input_size]

    def guard(self) -> AbstractContextManager[None]:
        """Eval mode and frozen parameters inside the block, restored afterwards."""
        return guard(self.module)

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Every submodule by its dotted name."""
        return {name: module for name, module in self.module.named_modules() if name}

    @cached_property
    def vgg_layer_aliases(self) -> dict[str, str]:
        """Layer names of a VGG as papers write them, ``relu3_1``, ``conv4_2``, ``pool4``, and its own."""
        return vgg_layer_aliases(self.module)

    def layer_name(self, layer: str) -> str:
        """The layer's own name, also of a VGG's alias; UnknownName with the nearest names."""
        names = {name: name for name in self.layers} | self.vgg_layer_aliases
        if layer not in names:
            raise UnknownName("layer", layer, names, "this model")
        return names[layer]

    # --- structure --------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """The layers in the order they run, with shapes, at the model's input size; recorded once."""
        return self.structure_at(self.input_size)

    def structure_at(self, input_size: tuple[int, int, int]) -> Structure:
        """The structure at an input size (C, H, W), recorded in one forward pass of noise and cached."""
        if (structure := self._cache.structures.get(tuple(input_size))) is not None:
            return structure
        with random_lock, self._cache.lock:
            if (structure := self._cache.structures.get(tuple(input_size))) is None:
                structure = call_and_restore(self._record_structure, input_size)
                self._cache.structures[tuple(input_size)] = structure
        return structure

    def _record_structure(self, input_size: tuple[int, int, int]) -> Structure:
        noise = _noise(1, *input_size)

        def read(output: Any) -> Tensor:
            if self.task == "detection":
                return differentiable_values(output)
            logits = self._raw_logits(output)
            logits = logits[:, None] if logits.ndim == 1 else logits
            self._check_shape(binary_logits(logits, self.name) if self.task == "binary" else logits, noise)
            return logits

        try:
            # A network that draws random numbers must draw the same ones whether or not this pass ran.
            with fork_random_state():
                token = recording_structure.set(True)
                try:
                    structure = record_structure(self.module, self.normalize(noise), read)
                finally:
                    recording_structure.reset(token)
                if self.task == "binary":
                    structure = structure.with_two_logits()
        except TypeError as error:
            raise self._type_error(error) from error
        except _REFUSALS as error:
            if isinstance(error, _UNTRANSLATED):
                raise
            check_has_values(self.module, self.name)
            default = (self.input_size[0], DEFAULT_SIDE, DEFAULT_SIDE)
            assumed = not self.size_known and tuple(input_size) == default
            raise ModelError(
                f"{self.name} does not take images of {tuple(input_size)}"
                f"{', the default without an input size' if assumed else ''}; "
                f"pass load_model(..., input_size=(C, H, W)). Its error: {error}"
            ) from error
        return structure

    def no_gradient(self, reason: str = "") -> ModelError:
        """The error of a method that needs gradients, with the reason where the network's layers show it."""
        reason = reason_without_gradient(self.module) or reason
        colon = ": " if reason else ""
        return ModelError(
            f"no gradient flows through {self.name} to the image{colon}{reason}; {WITHOUT_GRADIENTS}"
        )

    def _require(self, part: T | None, what: str) -> T:
        if not part and is_exported(self.module):
            raise ModelError(
                f"{self.name} is an exported network, a graph without layers that could be read, so it has "
                f"no {what}; load the network as it was before torch.export"
            )
        if not part and self.structure.reentrant:
            raise ModelError(f"{self.name} {REENTRANT_CHECKPOINT}")
        if not part and reason_without_gradient(self.module) is not None:
            raise self.no_gradient()
        if not part:
            raise ModelError(f"{self.name} has no {what}")
        return part

    @property
    def class_count(self) -> int:
        """The number of logits, at each position of a segmentation."""
        if self.classes is not None:
            return len(self.classes)
        classes = self.structure.classes
        return self._cache.class_counts[self.input_size] if self.task == "segmentation" else classes

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
        """The head of global average pooling and a linear layer that CAM needs, with the current weights."""
        what = "GAP + linear head, which CAM needs; use grad_cam, which works on any layer"
        head, classifier = self._require(self.structure.head, what), self.structure.classifier
        assert classifier is not None  # where there is a head
        weight, bias = linear_weights(self.module.get_submodule(classifier))
        if self.task == "binary":  # (-z/2, z/2)
            weight, bias = (torch.cat([-0.5 * part, 0.5 * part]) for part in (weight, bias))
        return replace(head, weight=weight, bias=bias)

    def maps(self, features: Tensor, images: Tensor, layer: str | None = None) -> Tensor:
        """A layer's output as (N, C, h, w): from tokens (class tokens dropped) and channels-last layouts.

        ``features`` is the output of ``layer`` for ``images``, or a tensor of its shape, as its gradient.
        Without a ``layer`` its shape must say which layers it can belong to. Raises ModelError where it is
        not a map: a map's positions respond most to the parts of the image that they lie over.
        """
        shape = tuple(features.shape)
        if len(features) != len(images):
            raise ModelError(
                f"an output of shape {shape} is not a map per image: "
                f"it has {len(features)} rows for {len(images)} images (attention windows, perhaps)"
            )
        # Axes do not depend on the image size, but the grid of tokens does.
        sized = self if features.ndim == 4 else self.at_size((self.input_size[0], *images.shape[-2:]))
        structure = sized.structure if features.ndim in (3, 4) else self.structure
        if layer is None:
            layouts = _layouts_of_shape(structure, shape)
            what = f"an output of shape {shape}"
        else:
            layouts = {structure.layouts.get(self.layer_name(layer))}
            what = f"the output of layer {layer!r}, of shape {shape},"
        fitting = {layout for layout in layouts if layout is not None and layout.fits(features)}
        if len(fitting) > 1 or (fitting and None in layouts):
            raise ModelError(
                f"{what} is a map in some layers of {self.name} and not, or another one, in others; name its "
                "layer: model.maps(features, images, layer)"
            )
        if not fitting:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ModelError(
                f"{what} is not a map over a {size} image: neither (N, C, h, w), nor (N, h, w, C), nor "
                "tokens on a grid, with positions that respond most to the parts of the image over which "
                "they lie"
            )
        return fitting.pop().maps(features)

    def map_shape(self, layer: str) -> tuple[int, int, int]:
        """(C, h, w) of a layer's maps for one image of the model's input size; ModelError without maps."""
        name = self.layer_name(layer)
        info = self.structure.layers.get(name)
        if info is None or info.shape is None:
            raise ModelError(f"layer {name!r} returns no tensor in a forward pass of {self.name}")
        output, image = (torch.empty(1, *shape, device="meta") for shape in (info.shape, self.input_size))
        _, channels, height, width = self.maps(output, image, name).shape
        return channels, height, width

    # --- images and classes -------------------------------------------------------------------------

    def transform(self, image: str | Path | Image.Image, *, draft: bool = False) -> Tensor:
        """An image file or PIL image as (C, H, W) in [0, 1], prepared as for the training.

        ``crop_pct``, ``crop_mode`` and ``interpolation`` decide how, see ``preprocessing.preprocess``: with
        the modes "resize" and "none" the sides follow from the image's.

        ``draft``: decode JPEG files at the smallest of 1/1, 1/2, 1/4 and 1/8 of their size that covers the
        size they are resized to. Large photographs are read several times faster, with other pixels.
        """
        if (channels := self.input_size[0]) not in (1, 3):
            raise InputError(
                f"{self.name} takes {channels} channels: pass tensors, image files have 1 or 3 channels"
            )
        full_size = None
        if isinstance(image, Image.Image):
            pixels = image
        elif draft:
            full_size = image_size(image)
            crop = {"crop_pct": self.crop_pct, "crop_mode": self.crop_mode}
            pixels = open_rgb(image, resized_size(full_size, self.input_size, **crop))  # type: ignore[arg-type]
        else:
            pixels = open_rgb(image)
        return preprocess(
            pixels,
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean.tolist(),
            full_size=full_size,
        )

    def class_index(self, name: str | int) -> int:
        """The index of a class by its name, one of its comma-separated synonyms, or its index."""
        index = class_index(name, self.classes, self.name)
        if self.task == "detection" and self.classes is None and index >= 0:
            return index  # how many classes a detector has, its output does not say
        if not 0 <= index < self.class_count:
            kind = "output" if self.task == "regression" else "class"
            plural = f"{kind}{'es' if kind == 'class' else 's' if self.class_count != 1 else ''}"
            numbers = f", 0 to {self.class_count - 1}" if self.class_count > 1 else ", 0"
            raise InputError(
                f"{kind} {index} does not exist: {self.name} has {self.class_count} {plural}{numbers}"
            )
        return index

    def class_name(self, index: int) -> str:
        """The name of a class, or its number where the model has no names."""
        if self.classes is not None:
            return self.classes[index]
        return f"{'output' if self.task == 'regression' else 'class'} {index}"

    # --- the network's state --------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        weight = next(self.module.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def digest(self) -> str:
        """SHA-256 over names and values of all weights and buffers, and the names of its defenses."""
        checksums = state_checksums(self.module)
        if self._cache.digest is None or self._cache.digest[0] != checksums:
            names = [self.name] if isinstance(self.module, Function) else []
            names += [f"{name}|" for name, _ in self.defenses]
            self._cache.digest = (checksums, state_digest(self.module, names))
        return self._cache.digest[1]


def _layouts_of_shape(structure: Structure, shape: tuple[int, ...]) -> set[Layout | None]:
    """The layouts of the layers that a tensor of this shape may belong to; None for a layer without maps.

    Those are the layers with the same output shape; else, since images of another size may be passed, those
    with the same number of channels; else all with as many axes.
    """
    shapes = {name: info.shape for name, info in structure.layers.items() if info.shape is not None}
    same = [name for name, own in shapes.items() if own == shape[1:]]
    proven = {structure.layouts.get(n) for n in same if n in structure.layouts or n in structure.not_maps}
    if same:
        return proven
    channels = {
        layout
        for name, layout in structure.layouts.items()
        if len(layout.axes) == len(shape)
        and shapes[name][layout.channel_axis - 1] == shape[layout.channel_axis]
    }
    return {
        *(channels or (layout for layout in structure.layouts.values() if len(layout.axes) == len(shape)))
    }


def _noise(*shape: int) -> Tensor:
    """The same uniform noise in every call, on the CPU."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        compiled = part._compiled_call_impl is not None or hasattr(part, "_orig_mod")
        if compiled or isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the module'} is compiled, and hooks do not reach into compiled code; "
                "pass the model as it was before torch.compile or torch.jit"
            )
