"""Bad inputs: a sentence of Phosphene's own before work starts; what is unusual but right is accepted."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from phosphene import Model, PhospheneError, Result, load_model, methods, run
from phosphene.data import TensorDataset
from phosphene.spec import Cost, ceil, length, maximum, minimum, param, size
from phosphene.targets import Channel, Direction, Neuron

ACCEPTED = "accepted"


class Small(nn.Module):
    """A network whose output, from the call ``after`` on, is ``change(logits)``."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda z: z, *, after: int = 0, classes: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.l = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, classes)
        self.change, self.after, self.calls = change, after, 0

    def forward(self, x: Tensor) -> Any:
        logits = self.l(self.c(x).relu().mean((2, 3)))
        if len(x) > 1:  # not the one image of noise that the structure is recorded with
            self.calls += 1
            return self.change(logits) if self.calls > self.after else logits
        return logits if self.after else self.change(logits)


def images(n: int = 2, side: int = 16) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def net(change: Callable[[Tensor], Any] = lambda z: z, **options: Any) -> Model:
    return load_model(Small(change, **options), input_size=(3, 16, 16))


def saliency(x: Any = None, target: Any = 0, *, model: Any = None, **options: Any) -> Result:
    return methods["saliency"](model or net(), images() if x is None else x, target, **options)


def pgd(labels: Any = (0, 1), **options: Any) -> Result:
    return methods["pgd"](net(), images(), labels, **{"steps": 2, "seed": 0, **options})


def load(**options: Any) -> Model:
    return load_model(Small(), **{"input_size": (3, 16, 16), **options})


def named(target: Any) -> Result:
    return saliency(target=target, model=load(classes=list("abcde")))


def spoiled(value: float = math.nan) -> Model:
    network = Small()
    with torch.no_grad():
        network.c.weight[0, 0, 0, 0] = value
    return load_model(network, input_size=(3, 16, 16))


def on_spoiled(name: str, **options: Any) -> Callable[[], Result]:
    options |= {"seed": 0} if methods[name].seed else {}
    return lambda: run(name, model=spoiled(), progress=False, **options)


def one_pixel(value: float) -> Tensor:
    x = images()
    x[0, 0, 0, 0] = value
    return x


def raising(error: BaseException) -> Callable[[Tensor], Any]:
    def change(logits: Tensor) -> Any:
        raise error

    return change


def unused_layer() -> Model:
    network = Small()
    network.unused = nn.Conv2d(3, 4, 3)
    return load_model(network, input_size=(3, 16, 16))


def integer_weights() -> nn.Module:
    network = Small().requires_grad_(False)
    network.c.weight.data = network.c.weight.data.to(torch.int8)
    return network


def growing() -> Callable[[Tensor], Tensor]:
    """A network's output with one class more at each call."""
    calls: list[int] = []
    return lambda z: (calls.append(1), torch.cat([z] * len(calls), 1))[1]


def without_parameters() -> Model:
    return load_model(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), input_size=(3, 16, 16))


def segmentation(masks: Any) -> Result:
    return run("saliency_segmentation", images="builtin:scenes/2", masks=masks)


NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """An input, and a pattern of the error's message, ACCEPTED, or the caller's own exception."""

    id: str
    call: Callable[[], Any]
    expected: str | type[BaseException]
    #: The most passes through the model before the error.
    passes: int = 1


IMAGES = [
    Case("NaN pixel", lambda: saliency(one_pixel(NAN)), r"not all finite", 0),
    Case("inf pixel", lambda: saliency(one_pixel(INF)), r"pixels must lie in \[0, 1\]", 0),
    Case("-inf pixel", lambda: saliency(one_pixel(-INF)), r"pixels must lie in \[0, 1\]", 0),
    Case("bytes as floats", lambda: saliency(images() * 255), r"lie in \[0\.\d+, 25", 0),
    Case("in -1 to 1", lambda: saliency(images() * 2 - 1), r"lie in \[-", 0),
    Case("uint8", lambda: saliency((images() * 255).byte()), "divide bytes by 255", 0),
    Case("int64", lambda: saliency((images() * 255).long()), "not torch.int64", 0),
    Case("bool", lambda: saliency(images() > 0.5), "not torch.bool", 0),
    Case("complex", lambda: saliency(images().to(torch.complex64)), "not torch.complex64", 0),
    Case("float64", lambda: saliency(images().double()), ACCEPTED),
    Case("float16", lambda: saliency(images().half()), ACCEPTED),
    Case("bfloat16", lambda: saliency(images().bfloat16()), ACCEPTED),
    Case("requires grad", lambda: saliency(images().requires_grad_()), ACCEPTED),
    Case("expanded", lambda: saliency(images(1).expand(2, -1, -1, -1)), ACCEPTED),
    Case("channels last", lambda: saliency(images().to(memory_format=torch.channels_last)), ACCEPTED),
    Case("not contiguous", lambda: saliency(images(2, 32)[:, :, ::2, ::2]), ACCEPTED),
    Case("inference tensor", lambda: saliency(torch.inference_mode()(images)()), ACCEPTED),
    Case("parameter", lambda: saliency(nn.Parameter(images())), ACCEPTED),
    Case("empty batch", lambda: saliency(images(0)), "are empty", 0),
    Case("no height", lambda: saliency(images()[:, :, :0]), "are empty", 0),
    Case("three axes", lambda: saliency(images()[0]), r"add the batch axis: images\[None\]", 0),
    Case("five axes", lambda: saliency(images()[None]), r"must have shape \(N, C, H, W\)", 0),
    Case("one channel", lambda: saliency(images()[:, :1]), "takes 3 channels, the images have 1", 0),
    Case("four channels", lambda: saliency(torch.rand(2, 4, 16, 16)), "the images have 4", 0),
    Case("channels in the last axis", lambda: saliency(torch.rand(2, 16, 16, 3)), "the images have 16", 0),
    Case("numpy", lambda: saliency(images().numpy()), "must be a tensor .* not a ndarray", 0),
    Case("list", lambda: saliency(images().tolist()), "must be a tensor .* not a list", 0),
    Case("None", lambda: methods["saliency"](net(), None), "must be a tensor .* not a NoneType", 0),
    Case("text", lambda: saliency("cat.png"), "must be a tensor .* not a str", 0),
    Case("sparse", lambda: saliency(images().to_sparse()), "one dense tensor, not a sparse_coo one", 0),
    Case("meta device", lambda: saliency(images().to("meta")), "meta device and have no values", 0),
    Case("nested", lambda: saliency(torch.nested.nested_tensor(list(images()), layout=torch.jagged)),
         "dense tensor, not a nested one", 0),
    *[Case(f"shapes-vgg at {h}x{w}",
           lambda h=h, w=w: run("saliency", images=torch.rand(1, 3, h, w)), "does not take images of")
      for h, w in ((1, 1), (3, 3), (1, 500))],
    Case("too many bundled", lambda: run("saliency", images="builtin:scenes/99999999999"), "is too large", 0),
    Case("a batch too large", lambda: run("saliency", images="builtin:scenes/20000"),
         "more images than a batch can hold, at most 10,000", 0),
]  # fmt: skip

PARAMETERS = [
    Case("eps negative", lambda: pgd(eps=-0.1), r"pgd: eps=-0.1 should be greater than 0", 0),
    Case("eps 0", lambda: pgd(eps=0), "should be greater than 0", 0),
    Case("eps 1e30", lambda: pgd(eps=1e30), "should be less than or equal to 1000", 0),
    Case("eps NaN", lambda: pgd(eps=NAN), "eps=nan should be", 0),
    Case("eps inf", lambda: pgd(eps=INF), "eps=inf should be", 0),
    Case("eps text", lambda: pgd(eps="8/255"), "should be a valid number", 0),
    Case("eps True", lambda: pgd(eps=True), "eps=True should be a number, not true or false", 0),
    Case("eps NumPy's True", lambda: pgd(eps=np.True_), "should be a number, not true or false", 0),
    Case("eps a bool tensor", lambda: pgd(eps=torch.tensor(True)), "should be a number, not true", 0),
    Case("steps True", lambda: pgd(steps=True), "steps=True should be a number", 0),
    Case("a list with True", lambda: methods["top_patches"](net(), images(), channels=[True]),
         "should be a number, not true", 0),
    Case("a switch", lambda: pgd(targeted=True), ACCEPTED),
    Case("steps 0", lambda: pgd(steps=0), "should be greater than or equal to 1", 0),
    Case("steps 2.5", lambda: pgd(steps=2.5), "got a number with a fractional part", 0),
    Case("steps 1e12", lambda: pgd(steps=10**12), "less than or equal to 10000", 0),
    Case("seed -1", lambda: pgd(seed=-1), "greater than or equal to 0", 0),
    Case("seed 2**70", lambda: pgd(seed=2**70), "should be less than 9223372036854775808", 0),
    Case("norm l7", lambda: pgd(norm="l7"), "should be 'linf', 'l2' or 'l1'", 0),
    Case("no parameter", lambda: pgd(epz=0.1), "no parameter 'epz'.*did you mean 'eps'", 0),
    Case("eps a tensor", lambda: pgd(eps=torch.tensor(0.1)), ACCEPTED),
    Case("eps a NumPy number", lambda: pgd(eps=np.float64(0.1)), ACCEPTED),
    Case("steps a NumPy number", lambda: pgd(steps=np.int64(2)), ACCEPTED),
    Case("eps a list", lambda: pgd(eps=[0.1]), "eps=.0.1. should be a valid number", 0),
    Case("images twice", lambda: methods["pgd"](net(), images(), [0, 1], images=images()),
         "got images twice", 0),
    Case("too many inputs", lambda: methods["pgd"](net(), images(), [0, 1], 0.1),
         "takes 3 inputs .* not 4", 0),
    Case("no labels", lambda: methods["pgd"](net(), images()), r"pgd needs labels", 0),
    Case("top_patches k=0", lambda: methods["top_patches"](net(), images(), k=0), "k=0 should be greater", 0),
    Case("window 0", lambda: methods["occlusion"](net(), images(), window=0),
         "window=0 should be greater", 0),
    Case("window 9999", lambda: methods["occlusion"](net(), images(), window=9999), ACCEPTED),
    Case("stride above window", lambda: methods["occlusion"](net(), images(), window=4, stride=9),
         "stride=9 would skip pixels", 0),
]  # fmt: skip

LABELS = [
    Case("out of range", lambda: pgd([0, 5]), "class 5 does not exist: .* has 5 classes", 0),
    Case("negative", lambda: pgd([-1, 0]), "class -1 does not exist", 0),
    Case("of another length", lambda: pgd([0, 1, 2]), "2 images need one label each, not 3", 0),
    Case("fractions", lambda: pgd([1.5, 0]), "a class is an index or a name, not a float", 0),
    Case("one-hot", lambda: pgd(torch.eye(5)[:2].long()), "a class is an index or a name, not a list", 0),
    Case("bools", lambda: pgd([True, False]), "not a bool", 0),
    Case("unknown name", lambda: run("pgd", images="builtin:scenes/1", labels=["sqare"]),
         "no class 'sqare'.*did you mean 'square'", 0),
    Case("empty", lambda: pgd([]), "labels must be classes of a model", 0),
    Case("None", lambda: pgd(None), "labels must be classes of a model", 0),
    Case("scalar tensor", lambda: methods["pgd"](net(), images(1), torch.tensor(1), steps=2), ACCEPTED),
    Case("int32", lambda: pgd(torch.tensor([0, 1], dtype=torch.int32)), ACCEPTED),
    Case("meta device", lambda: pgd(torch.tensor([0, 1], device="meta")), "labels are on the meta device", 0),
    Case("sparse", lambda: pgd(torch.tensor([0, 1]).to_sparse()), "labels must be one dense tensor", 0),
]  # fmt: skip

TARGETS = [
    Case("class 10", lambda: saliency(target=10), "class 10 does not exist", 0),
    Case("class -1", lambda: saliency(target=-1), "class -1 does not exist", 0),
    Case("unknown class", lambda: named("tabby"), "no class or layer 'tabby'", 0),
    Case("class name without class names",
         lambda: saliency(target="cat"), "no class names; pass the index", 0),
    Case("unknown layer", lambda: saliency(target="layer9[0]"), "no layer 'layer9'", 0),
    Case("channel out of range", lambda: saliency(target="c[9999]"), "has 4 channels, so channel 9999"),
    Case("negative channel", lambda: saliency(target="c[-1]"), "layer 'c' has no channel -1", 0),
    Case("negative row", lambda: saliency(target="c[0,-1,0]"), "layer 'c' has no row -1", 0),
    Case("negative channel as an objective", lambda: saliency(target=Channel("c", -1)), "no channel -1", 0),
    Case("negative column", lambda: saliency(target=Neuron("c", 0, 0, -1)), "no column -1", 0),
    Case("unit outside", lambda: saliency(target="c[0,99,0]"), "has 16 rows, so row 99 does not exist"),
    Case("wrong grammar", lambda: named("c[3,"), r"no class or layer 'c\[3,'", 0),
    Case("float", lambda: saliency(target=1.5), "not a float", 0),
    Case("None", lambda: saliency(target=None), ACCEPTED),
    Case("of another length", lambda: saliency(target=[0, 1, 2]), "2 images need one class each, not 3", 0),
    Case("bool", lambda: saliency(target=True), "a class is an index or a name, not a bool", 0),
    Case("text without a character", lambda: named(""), "no class or layer ''", 0),
    Case("meta tensor", lambda: saliency(target=torch.tensor(1, device="meta")), "tensor without values", 0),
    Case("NumPy integer", lambda: saliency(target=np.int64(1)), ACCEPTED),
    Case("callable of a scalar", lambda: saliency(target=lambda z: z.sum()), r"shape \(2,\), not \(\)"),
    Case("callable of None", lambda: saliency(target=lambda z: None), r"shape \(2,\), not a NoneType"),
    Case("callable that raises", lambda: saliency(target=lambda z: 1 / 0), ZeroDivisionError),
    Case("callable of NaN", lambda: saliency(target=lambda z: z[:, 0] * NAN), "target <lambda> returned NaN"),
    Case("callable of inf", lambda: saliency(target=lambda z: z[:, 0] + INF),
         "target <lambda> returned NaN or"),
    Case("callable of rows", lambda: saliency(target=lambda z: z), r"shape \(2,\), not \(2, 5\)"),
    Case("callable detached", lambda: saliency(target=lambda z: z[:, 0].detach()), "cuts the graph"),
    Case("callable of integers", lambda: saliency(target=lambda z: z.argmax(1)), "cuts the graph"),
    Case("direction of NaN", lambda: saliency(target=Direction("c", torch.full((4,), NAN))),
         "NaN or infinity", 0),
    Case("direction a list", lambda: saliency(target=Direction("c", [1, 0, 0, 0])),
         r"must be a tensor \(C,\)", 0),
    Case("grad_cam of an unknown layer", lambda: methods["grad_cam"](net(), images(), layer="layer4"),
         "no layer 'layer4'; this model has c, l", 0),
    Case("grad_cam of no layer", lambda: methods["grad_cam"](net(), images(), layer=""), "no layer ''", 0),
    Case("grad_cam of the head", lambda: methods["grad_cam"](net(), images(), layer="l"), "is not a map"),
    Case("grad_cam of a layer that does not run",
         lambda: methods["grad_cam"](unused_layer(), images(), layer="unused"),
         "does not depend on layer 'unused'"),
    Case("grad_cam of a number", lambda: methods["grad_cam"](net(), images(), layer=5),
         "should be a valid string", 0),
    Case("top_patches of channel 999",
         lambda: methods["top_patches"](net(), images(), layer="c", channels=[999]),
         "has 4 channels, so .*999"),
    Case("top_patches of channel -1",
         lambda: methods["top_patches"](net(), images(), layer="c", channels=[-1]),
         "-1"),
]  # fmt: skip

MASKS = [
    Case("of another size", lambda: segmentation(torch.ones(2, 8, 8, dtype=torch.bool)),
         "masks must have the images' shape", 0),
    Case("floats", lambda: segmentation(torch.ones(2, 64, 64)), "masks must be a bool tensor", 0),
    Case("of another count", lambda: segmentation(torch.ones(3, 64, 64, dtype=torch.bool)),
         "masks must have the images' shape", 0),
    Case("all false", lambda: segmentation(torch.zeros(2, 64, 64, dtype=torch.bool)), ACCEPTED),
    Case("on the meta device", lambda: segmentation(torch.ones(2, 64, 64, dtype=torch.bool, device="meta")),
         "masks are on the meta device", 0),
]  # fmt: skip

ARGUMENTS = [
    Case("std 0", lambda: load(std=[0, 1, 1]), "std, which must be greater than 0", 0),
    Case("std negative", lambda: load(std=[-1, 1, 1]), "std, which must be greater than 0", 0),
    Case("std below the smallest float32", lambda: load(std=[1e-60, 1, 1]), "std, which must be greater", 0),
    Case("std NaN", lambda: load(std=[NAN, 1, 1]), "std must be finite", 0),
    Case("std inf", lambda: load(std=[INF, 1, 1]), "std must be finite", 0),
    Case("mean NaN", lambda: load(mean=[NAN, 0, 0]), "mean must be finite", 0),
    Case("mean of 2", lambda: load(mean=[0.5, 0.5]), "mean has 2 numbers, but the model takes 3 channels", 0),
    Case("mean words", lambda: load(mean=["a", "b", "c"]), "mean must be one number for each channel", 0),
    Case("mean numbers as text", lambda: load(mean=["0.5"] * 3), "mean must be one number for each", 0),
    Case("mean one number", lambda: load(mean=0.5), "mean must be one number for each channel, not 0.5", 0),
    Case("mean an array", lambda: load(mean=np.full(3, 0.5), std=torch.ones(3)), ACCEPTED),
    Case("class names too few", lambda: saliency(model=load(classes=["a"])),
         "returns 5 logits, but has 1", 0),
    Case("class names numbers", lambda: load(classes=range(5)), "class name must be text, not 0", 0),
    Case("class names one text", lambda: load(classes="abcde"), "no list of class names 'abcde'", 0),
    Case("class names none", lambda: load(classes=[]), "classes must have at least one name", 0),
    Case("class names of NumPy", lambda: load(classes=np.array(list("abcde"))), ACCEPTED),
    Case("input_size 2", lambda: load(input_size=(16, 16)), r"must be \(C, H, W\), not \(16, 16\)", 0),
    Case("input_size 0", lambda: load(input_size=(3, 0, 0)), "three integers of at least 1", 0),
    Case("input_size negative", lambda: load(input_size=(3, -4, 16)), "three integers of at least 1", 0),
    Case("input_size fraction", lambda: load(input_size=(3, 16.5, 16)), "three integers of at least 1", 0),
    Case("input_size words", lambda: load(input_size="abc"), "three integers of at least 1", 0),
    Case("input_size number", lambda: load(input_size=224), "three integers of at least 1", 0),
    Case("input_size of NumPy", lambda: load(input_size=np.array([3, 16, 16])), ACCEPTED),
    Case("input_size of other channels", lambda: saliency(model=load(input_size=(1, 16, 16))),
         "takes 1 channels", 0),
    Case("output no function", lambda: load(output=3), "output must be a function", 0),
    Case("output of None", lambda: saliency(model=load(output=lambda z: None)), "output returned a NoneType"),
    Case("pretrained text", lambda: load(pretrained="yes"), "pretrained must be True or False", 0),
    Case("weights a number", lambda: load(weights=3), "weights must be a file, a state dict or a name", 0),
    Case("weights of other names", lambda: load(weights={"a": torch.ones(1)}), "do not fit module:Small", 0),
    Case("weights of words", lambda: load(weights=dict.fromkeys(Small().state_dict(), "a")), "do not fit", 0),
    Case("dtype int8", lambda: load(dtype=torch.int8), "dtype must be one of .*, not torch.int8", 0),
    Case("dtype text", lambda: load(dtype="float16"), "dtype must be one of .*, not 'float16'", 0),
    Case("dtype complex", lambda: load(dtype=torch.complex64), "dtype must be one of", 0),
    Case("device nonsense", lambda: load(device="gpuu"), "there is no device 'gpuu'; torch has cpu", 0),
    Case("device out of range", lambda: load(device="cuda:99"),
         "cannot be moved to 'cuda:99'; torch has cpu", 0),
    Case("device meta", lambda: load(device="meta"), "meta device has no values", 0),
    Case("device a list", lambda: load(device=["cpu"]), "device must be a name such as", 0),
    Case("a class", lambda: load_model(Small), "takes a URI, a torch module or a function, not a type", 0),
    Case("None", lambda: load_model(None), "takes a URI, a torch module or a function, not a NoneType", 0),
    Case("a Model", lambda: load_model(net()), "not a Model", 0),
    Case("no URI", lambda: load_model(""), "'' is not a model: write scheme:name", 0),
    Case("a name without a scheme", lambda: load_model("resnet18"), "write scheme:name", 0),
    Case("timm:resnt18", lambda: load_model("timm:resnt18"), "no timm model 'resnt18'.*did you mean", 0),
    Case("a URI for a method", lambda: saliency(model="timm:resnet18"), "needs a Model", 0),
    Case("a scripted module", lambda: load_model(torch.jit.script(nn.Sequential(nn.Flatten()))),
         "is compiled", 0),
    Case("a compiled module", lambda: load_model(torch.compile(Small()), input_size=(3, 16, 16)), ACCEPTED),
    Case("on the meta device, its layers", lambda: load_model(Small().to("meta")).layers, ACCEPTED),
    Case("on the meta device, its logits", lambda: load_model(Small().to("meta"))(images()),
         "'c.weight' .* on the meta device and has no values", 1),
    *[Case(f"on the meta device, {name}", lambda call=call: call(load_model(
        Small().to("meta"), input_size=(3, 16, 16))), "'c.weight' .* on the meta device and has no values", 0)
      for name, call in {
          "its structure": lambda model: model.structure,
          "its features": lambda model: model.features(images(), "c"),
          "a method": lambda model: saliency(model=model),
      }.items()],
    *[Case(f"on the meta device in part, {name}", lambda call=call: call(partly_on_meta()),
           "'l.weight' .* on the meta device and has no values")
      for name, call in {
          "its logits": lambda model: model(images()), "its structure": lambda model: model.structure,
          "a method": lambda model: saliency(model=model),
      }.items()],
    Case("moved to the meta device", lambda: moved_to_meta(), "on the meta device and has no values", 0),
    Case("integer weights", lambda: load_model(integer_weights()),
         "are torch.int8, and a Conv2d computes", 0),
    Case("half precision", lambda: saliency(model=load(dtype=torch.float16)), ACCEPTED),
    Case("double precision", lambda: saliency(model=load(dtype=torch.float64)), ACCEPTED),
]  # fmt: skip


def partly_on_meta() -> Model:
    network = Small()
    network.l.to("meta")
    return load_model(network, input_size=(3, 16, 16))


def moved_to_meta() -> Result:
    model = net()
    model.module.to("meta")
    return saliency(model=model)


def quantized(name: str) -> Callable[[], Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = quantize_dynamic(Small(), {nn.Linear}, dtype=torch.qint8)
    model = load_model(network, input_size=(3, 16, 16))
    return lambda: run(name, model=model, images=images(), target=0, progress=False)


def black_box(function: Callable[[Tensor], Any]) -> Callable[[], Result]:
    model = load_model(function, input_size=(3, 16, 16), classes=list("abc"))
    return lambda: methods["occlusion"](model, images())


def returning(change: Callable[[Tensor], Any], **options: Any) -> Callable[[], Result]:
    return lambda: saliency(model=net(change, **options), target=options.pop("target", None))


NO_LOGITS = "without recognizable logits"
OUTPUTS = [
    Case("None", returning(lambda z: None), f"returns a NoneType {NO_LOGITS}"),
    Case("list", returning(lambda z: [z]), ACCEPTED),
    Case("list of lists", returning(lambda z: z.tolist()), f"returns a list {NO_LOGITS}"),
    Case("mapping with logits", returning(lambda z: {"logits": z}), ACCEPTED),
    Case("mapping of numbers", returning(lambda z: {"a": 1}), f"returns a dict {NO_LOGITS}"),
    Case("text", returning(lambda z: "a"), f"returns a str {NO_LOGITS}"),
    Case("NaN", returning(lambda z: z * NAN), "logits of module:Small are not finite: its weights are"),
    Case("inf", returning(lambda z: z + INF), "logits of module:Small are not finite"),
    Case("-inf for other classes", returning(lambda z: torch.cat([z[:, :1], z[:, 1:] - INF], 1)),
         r"some are -inf; .*output=lambda logits: logits.clamp\(min=-100\)"),
    Case("-inf made finite", lambda: saliency(model=load_model(
        Small(lambda z: torch.cat([z[:, :1], z[:, 1:] - INF], 1)), input_size=(3, 16, 16),
        output=lambda z: z.clamp(min=-100))), ACCEPTED),
    Case("complex", returning(lambda z: z * 1j), "logits of module:Small are complex"),
    Case("one row", returning(lambda z: z[:1]), r"shape \(1, 5\) for 2 images of \(3, 16, 16\), not one row"),
    Case("three rows", returning(lambda z: z[[0, 0, 0]]), r"shape \(3, 5\) for 1 images"),
    Case("no classes", returning(lambda z: z[:, :0]), r"returned no logits: their shape is \(1, 0\)"),
    Case("no class axis", returning(lambda z: z[:, 0]), r"task='binary'.* or task='regression'"),
    Case("four axes", returning(lambda z: z[:, :, None, None]), r"\(2, 5, 1, 1\), not logits \(N, K\)"),
    Case("scalar", returning(lambda z: z.sum()), r"shape \(\) for 1 images"),
    Case("detached", returning(lambda z: z.detach()), "no gradient flows through module:Small"),
    Case("integers", returning(lambda z: z.argsort()), "no gradient flows through module:Small"),
    Case("numpy", returning(lambda z: z.detach().numpy()), "no gradient flows through module:Small"),
    Case("without the image", returning(lambda z: torch.ones_like(z, requires_grad=True) * 1),
         "no gradient flows through module:Small to the image"),
    Case("another number of classes at each call", returning(growing()),
         "logits for each image, and 5 in an earlier"),
    Case("NaN at the second call", lambda: pgd_on(lambda z: z * NAN, after=1), "logits .* are not finite", 2),
    Case("one row at the second call", lambda: pgd_on(lambda z: z[:1], after=1),
         "not one row for each image", 2),
    Case("three classes at the second call", lambda: pgd_on(lambda z: z[:, :3], after=1),
         "returned 3 logits for each image, and 5 in an earlier pass", 2),
    Case("RuntimeError at the second call",
         lambda: pgd_on(raising(RuntimeError("boom")), after=1), RuntimeError, 2),
    Case("KeyError at the second call", lambda: pgd_on(raising(KeyError("k")), after=1), KeyError, 2),
    Case("ValueError always", lambda: saliency(model=load_model(Small(raising(ValueError("no"))))),
         "does not take images of .* Its error: no"),
    Case("StopIteration", returning(raising(StopIteration())), StopIteration),
    Case("SystemExit", returning(raising(SystemExit(3))), SystemExit),
    *[Case(f"NaN in {name}", lambda name=name, options=options: run(
        name, model=net(lambda z: z * NAN), progress=False, **options), "logits .* are not finite")
      for name, options in {
          "pgd": {"images": images(), "labels": [0, 1], "seed": 0}, "occlusion": {"images": images()},
          "grad_cam": {"images": images()}, "class_visualization": {"target": [0, 1], "seed": 0},
      }.items()],
    *[Case(f"a NaN weight in {name}", on_spoiled(name, **options),
           "(logits|inputs of layer|outputs of layer).* not finite: its weight 'c.weight' contains NaN")
      for name, options in {
          "saliency": {"images": images()}, "pgd": {"images": images(), "labels": [0, 1]},
          "grad_cam": {"images": images()}, "occlusion": {"images": images()},
          "integrated_gradients": {"images": images()}, "class_visualization": {"target": [0, 1]},
          "embed": {"dataset": TensorDataset(images(4))},
          "top_patches": {"dataset": TensorDataset(images(4)), "layer": "c"},
          "activation_maps": {"images": images(), "layer": "c"},
          "feature_inversion": {"images": images(), "layers": ["c"]},
      }.items()],
    Case("no parameters", lambda: saliency(model=without_parameters()), ACCEPTED),
    Case("black box of NumPy", black_box(lambda x: x.mean((2, 3)).numpy()), ACCEPTED),
    Case("black box of labels", black_box(lambda x: x.mean((2, 3)).argmax(1)), ACCEPTED),
    Case("black box of one row", black_box(lambda x: x.mean((2, 3))[:1]), "not one row for each image"),
    Case("black box of two classes", black_box(lambda x: x.mean((2, 3))[:, :2]),
         "returns 2 logits, but has 3"),
    Case("black box of NaN", black_box(lambda x: x.mean((2, 3)) * NAN),
         "logits of function:<lambda> are not finite"),
    Case("a quantized head for a black box", quantized("occlusion"), ACCEPTED),
    Case("a quantized head for gradients", quantized("saliency"), "no gradient flows"),
]  # fmt: skip


def pgd_on(change: Callable[[Tensor], Any], **options: Any) -> Result:
    return methods["pgd"](net(change, **options), images(), [0, 1], steps=3, seed=0)


def run_pgd(**options: Any) -> Result:
    return run("pgd", model=net(), images=images(), labels=[0, 1], steps=2, seed=0, **options)


RUN = [
    Case("device nonsense", lambda: run_pgd(device="gpuu"), "there is no device 'gpuu'", 0),
    Case("batch_size 0", lambda: run_pgd(batch_size=0), "must be at least 1, not 0", 0),
    Case("batch_size -3", lambda: run_pgd(batch_size=-3), "must be at least 1, not -3", 0),
    Case("batch_size 1.5", lambda: run_pgd(batch_size=1.5), "batch size must be an integer, not 1.5", 0),
    Case("batch_size True", lambda: run_pgd(batch_size=True), "batch size must be an integer, not True", 0),
    Case("batch_size of NumPy", lambda: run_pgd(batch_size=np.int64(1)), ACCEPTED),
    Case("no executor", lambda: run_pgd(executor="x"), "no executor 'x'; there is local", 0),
    Case("executor a number", lambda: run_pgd(executor=3), "no executor '3'", 0),
    Case("executor a list", lambda: run_pgd(executor=[]), "no executor", 0),
    Case("no method", lambda: run("salency"), "no method 'salency'", 0),
    Case("a number for a method", lambda: run(3),
         "a method is a name such as 'pgd' or a Method, not an int", 0),
    Case("progress 3", lambda: run_pgd(progress=3), "progress must be True, False, None or a function", 0),
    Case("progress text", lambda: run_pgd(progress="no"), "progress must be True, False", 0),
    Case("progress True", lambda: run_pgd(progress=True), ACCEPTED),
    Case("data set of 0", lambda: run("embed", dataset="builtin:scenes/0"), "no bundled data set", 0),
    Case("data set of -1", lambda: run("embed", dataset="builtin:scenes/-1"), "no bundled data set", 0),
    Case("data set of 5000 digits", lambda: run("embed", dataset="builtin:scenes/" + "9" * 5000),
         "is too large", 0),
    Case("data set a number", lambda: run("embed", dataset=3), "a data set is a folder", 0),
]  # fmt: skip

_PRINTED = [
    "9**9**9", "'a'*10**10", "'a'*9999999999", "images.__class__", "(lambda:1)()", "[1 for _ in images]",
    "max(images)", "images if 1 else 2", "ceil(1e400)", "1/0", "len('a'*3000000000)", "9" * 5000,
    "+".join(["1"] * 10_000), "max", "images(3)", "ceil(ceil)", "'x'", "max(1,2,key=len)", "f'{images}'",
    "1e308*10", "__import__('os')", "min()", "steps*steps*steps", "(" * 200 + "1" + ")" * 200,
]  # fmt: skip


def cost(expression: Any, **params: Any) -> Callable[[], Any]:
    return lambda: Cost(forward=expression()).evaluate({"steps": 10, "norm": "a", **params}, images=3)


CANNOT = "cannot be evaluated"
COSTS = [
    *[Case(f"text {text[:20]}", cost(lambda text=text: text),
         "is the printed form of a cost") for text in _PRINTED],
    Case("text times a number", cost(lambda: param.norm * 10_000_000_000), "needs numbers, not 'a'"),
    Case("list times a number", cost(lambda: param.layers * 10_000_000_000, layers=[1]),
         "needs numbers, not"),
    Case("division by 0", cost(lambda: size.images / 0), CANNOT),
    Case("infinite", cost(lambda: size.images * 2.0**62 * (param.big * param.big), big=1e300), CANNOT),
    Case("ceil of infinity", cost(lambda: ceil(param.big), big=INF), CANNOT),
    Case("NaN", cost(lambda: param.big * 1, big=NAN), CANNOT),
    Case("infinite constant", cost(lambda: size.images + INF), "must lie between"),
    Case("constant of 5000 digits", cost(lambda: size.images + 10**5000), "must lie between"),
    Case("length of a number", cost(lambda: length(param.steps)), CANNOT),
    Case("maximum of nothing", cost(lambda: maximum()), CANNOT),
    Case("maximum of text", cost(lambda: maximum(param.norm, 1)), CANNOT),
    Case("None", cost(lambda: param.steps * 1, steps=None), "needs numbers, not None"),
    Case("a size that is missing", cost(lambda: size.channels * 1), "'channels' is needed"),
    Case("a parameter that is missing", cost(lambda: param.absent * 1), "'absent' is needed"),
    Case("10,000 operations", cost(lambda: sum([size.images] * 10_000)), "at most 200 nested operations"),
    Case("cubed", cost(lambda: param.steps * param.steps * param.steps), ACCEPTED),
    Case("minimum", cost(lambda: minimum(param.steps, size.images)), ACCEPTED),
]  # fmt: skip

GROUPS = {
    "images": IMAGES, "parameters": PARAMETERS, "labels": LABELS, "targets": TARGETS, "masks": MASKS,
    "arguments": ARGUMENTS, "outputs": OUTPUTS, "run": RUN, "costs": COSTS,
}  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each pass of images through a model."""
    counted: list[int] = []
    call = Model.__call__

    def counting(model: Model, x: Tensor) -> Tensor:
        counted.append(len(x))
        return call(model, x)

    monkeypatch.setattr(Model, "__call__", counting)
    return counted


@pytest.mark.filterwarnings("ignore")  # of torch, about nested and quantized tensors
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{group}-{case.id}") for group, cases in GROUPS.items() for case in cases]
)
def test_bad_input_is_refused_before_work_and_good_input_accepted(case: Case, passes: list[int]) -> None:
    if case.expected == ACCEPTED:
        case.call()
        return
    error = PhospheneError if isinstance(case.expected, str) else case.expected
    with pytest.raises(error) as caught:
        case.call()
    assert isinstance(case.expected, type) or re.search(case.expected, str(caught.value)), caught.value
    assert len(passes) <= case.passes


def test_every_bad_input_has_a_name_of_its_own() -> None:
    for cases in GROUPS.values():
        assert len({case.id for case in cases}) == len(cases)
