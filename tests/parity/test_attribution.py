"""Attribution against captum and pytorch-grad-cam, in float64 on small networks with ReLUs of every form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import (
    Deconvolution,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d
from zennit.attribution import Gradient as RuleGradient
from zennit.composites import LayerMapComposite, SpecialFirstLayerMapComposite
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, WSquare, ZBox, ZPlus
from zennit.types import Activation

from phosphene import Model, deconvnet, guided, load_model, methods, rewrite_backward, scores

pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU"),
]

CLASSES = [2, 3]


class ModuleNet(nn.Module):
    """ReLU modules, one of them used twice, and a GAP head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(images))))
        return self.head(self.last(self.conv3(x)).mean((2, 3)))


class FunctionalNet(ModuleNet):
    """The same network with functional ReLUs."""

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(torch.relu(self.conv1(images))))
        return self.head(F.relu_(self.conv3(x)).mean((2, 3)))


def inplace_network() -> nn.Module:
    """In-place ReLUs, max-pooling, and a head of two layers instead of GAP."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 10), nn.ReLU(inplace=True), nn.Linear(10, 4),
    )  # fmt: skip


NETWORKS = {"module": ModuleNet, "functional": FunctionalNet, "in place": inplace_network}
#: A convolutional layer or ReLU of each network.
LAYERS = {"module": "last", "functional": "conv2", "in place": "4"}


@pytest.fixture(params=NETWORKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 13, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[kind]().double().eval()


def attribute(name: str, model: Model, *inputs: object, **params: object) -> Tensor:
    return methods[f"attribution.{name}"](model, *inputs, **params).maps


def test_saliency_equals_captum(kind: str, images: Tensor) -> None:
    net = network(kind)
    theirs = Saliency(net).attribute(images.clone(), target=CLASSES, abs=True).amax(1)
    ours = attribute("saliency", load_model(net), images, CLASSES)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradient_x_input_equals_captum(kind: str, images: Tensor) -> None:
    net = network(kind)
    theirs = InputXGradient(net).attribute(images.clone(), target=CLASSES).sum(1)
    ours = attribute("gradient_x_input", load_model(net), images, CLASSES)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("baseline", "value"), [("zero", 0.0), ("gray", 0.5)])
def test_integrated_gradients_equal_captum_and_are_complete(
    kind: str, images: Tensor, baseline: str, value: float
) -> None:
    net = network(kind)
    theirs = IntegratedGradients(net).attribute(images, baselines=value, target=CLASSES, n_steps=20).sum(1)
    model = load_model(net)
    ours = attribute("integrated_gradients", model, images, CLASSES, baseline=baseline, steps=20)
    # captum stores the quadrature weights in float32.
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-9)
    fine = attribute("integrated_gradients", model, images, CLASSES, baseline=baseline, steps=1000)
    change = scores(model, images, CLASSES) - scores(model, torch.full_like(images, value), CLASSES)
    torch.testing.assert_close(fine.sum((1, 2)), change.detach(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "peer"), [("guided_backprop", GuidedBackprop), ("deconvnet", Deconvolution)]
)
@pytest.mark.parametrize("modules", ["module", "in place"])
def test_guided_backprop_and_deconvnet_equal_captum_for_relu_modules(
    name: str, peer: type, modules: str, images: Tensor
) -> None:
    net = network(modules)
    theirs = captum_gradient(peer, net, images).abs().amax(1)
    ours = attribute(name, load_model(net), images, CLASSES)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (5, 3), (3, 2), (4, 1), (13, 5), (6, 6)])
def test_occlusion_equals_captum_for_any_stride(kind: str, images: Tensor, window: int, stride: int) -> None:
    net = network(kind)
    theirs = Occlusion(net).attribute(
        images,
        sliding_window_shapes=(3, window, window),
        strides=(3, stride, stride),
        baselines=0.5,
        target=CLASSES,
    )
    ours = attribute("occlusion", load_model(net), images, CLASSES, window=window, stride=stride)
    # captum rounds to float32 twice: the sum over windows, and its quotient by their number.
    torch.testing.assert_close(ours, theirs[:, 0].double(), rtol=1.2e-7, atol=1e-15)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "composite"])
def test_lrp_equals_zennit_for_activation_modules(rule: str, images: Tensor) -> None:
    net = network("in place")
    rules = {"epsilon": (Epsilon(1e-6), Epsilon(1e-6)), "gamma": (Gamma(0.25), Gamma(0.25))}
    convolution, linear = rules.get(rule, (Gamma(0.25), Epsilon(1e-6)))
    layers = [(nn.Conv2d, convolution), (nn.Linear, linear), (Activation, Pass())]
    with RuleGradient(model=net, composite=LayerMapComposite(layers)) as peer:
        one_hot = torch.eye(4, dtype=torch.float64)[CLASSES]
        _, theirs = peer(images.clone(), lambda output: output * one_hot)
    ours = attribute("lrp", load_model(net), images, CLASSES, rule=rule)
    torch.testing.assert_close(ours, theirs.sum(1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("first", ["box", "flat", "w_square", None])
@pytest.mark.parametrize("rule", ["zplus", "alpha_beta", "alpha_beta(3)", "gamma(0.5)"])
def test_rules_of_layers_equal_zennit(rule: str, first: str | None, images: Tensor) -> None:
    net = network("in place")
    model = load_model(net, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    low, high = (model.normalize(torch.full((1, 3, 1, 1), bound, dtype=torch.float64)) for bound in (0, 1))
    inner = {"zplus": ZPlus(), "alpha_beta": AlphaBeta(), "alpha_beta(3)": AlphaBeta(3, 2)}.get(
        rule, Gamma(0.5)
    )
    layers = [(nn.Conv2d, inner), (nn.Linear, Epsilon(1e-6)), (Activation, Pass())]
    rules = {"Conv2d": rule}
    composite = LayerMapComposite(layers)
    if first is not None:
        peers = {"box": ZBox(low, high), "flat": Flat(), "w_square": WSquare()}
        composite = SpecialFirstLayerMapComposite(layers, [(nn.Conv2d, peers[first])])
        rules["0"] = first
    with RuleGradient(model=net, composite=composite) as peer:
        one_hot = torch.eye(4, dtype=torch.float64)[CLASSES]
        _, theirs = peer(model.normalize(images), lambda output: output * one_hot)
    ours = attribute("lrp", model, images, CLASSES, rules=rules)
    torch.testing.assert_close(ours, theirs.sum(1), rtol=1e-9, atol=1e-14)


def test_grad_cam_equals_captum_after_a_relu(kind: str, images: Tensor) -> None:
    net = network(kind)
    layer = LAYERS[kind]
    theirs = LayerGradCam(net, net.get_submodule(layer)).attribute(images.clone(), target=CLASSES)
    ours = attribute("grad_cam", load_model(net), images, CLASSES, layer=layer)
    torch.testing.assert_close(ours, theirs[:, 0].relu(), rtol=1e-11, atol=1e-14)


def test_grad_cam_equals_pytorch_grad_cam_in_its_convention(kind: str, images: Tensor) -> None:
    net = network(kind)
    layer = LAYERS[kind]
    raw = methods["grad_cam"](load_model(net), images, CLASSES, layer=layer)
    ours = raw.as_convention("pytorch-grad-cam").maps
    with GradCAM(model=net, target_layers=[net.get_submodule(layer)]) as cam:
        theirs = cam(input_tensor=images.clone(), targets=[ClassifierOutputTarget(c) for c in CLASSES])
    torch.testing.assert_close(ours, torch.from_numpy(theirs).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rule", "peer"), [(guided, GuidedBackprop), (deconvnet, Deconvolution)])
@pytest.mark.parametrize("modules", ["module", "in place"])
def test_rewritten_backward_equals_captum_for_relu_modules(
    rule: object, peer: type, modules: str, images: Tensor
) -> None:
    net = network(modules)
    torch.testing.assert_close(
        rewritten_gradient(net, images, rule), captum_gradient(peer, net, images), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(("rule", "peer"), [(guided, GuidedBackprop), (deconvnet, Deconvolution)])
def test_rewritten_backward_is_the_same_for_functional_relus(
    rule: object, peer: type, images: Tensor
) -> None:
    functional = network("functional")
    ours = rewritten_gradient(functional, images, rule)
    torch.testing.assert_close(ours, captum_gradient(peer, network("module"), images), rtol=1e-12, atol=1e-14)
    plain = Saliency(functional).attribute(images.clone(), target=CLASSES, abs=False)
    assert (ours - plain).abs().max() > 0.1 * plain.abs().max()


def googlenet() -> tuple[nn.Module, nn.Module]:
    """GoogLeNet, whose ReLUs are all functional, and a copy with ReLU modules."""
    torch.manual_seed(0)
    original = torchvision.models.GoogLeNet(num_classes=4, aux_logits=False, init_weights=False)
    with_modules = copy.deepcopy(original)
    for name, part in list(with_modules.named_modules()):
        if isinstance(part, BasicConv2d):
            parent, _, last = name.rpartition(".")
            setattr(with_modules.get_submodule(parent), last, nn.Sequential(part.conv, part.bn, nn.ReLU()))
    return original, with_modules


def densenet() -> tuple[nn.Module, nn.Module]:
    """DenseNet, whose last ReLU is functional and whose others are in place, and a copy with ReLU modules."""
    torch.manual_seed(0)
    original = torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=4)
    with_modules = copy.deepcopy(original)
    for part in with_modules.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    pool = nn.AdaptiveAvgPool2d(1)
    return original, nn.Sequential(
        with_modules.features, nn.ReLU(), pool, nn.Flatten(), with_modules.classifier
    )


@pytest.mark.parametrize(
    ("name", "peer"), [("guided_backprop", GuidedBackprop), ("deconvnet", Deconvolution)]
)
@pytest.mark.parametrize("make", [googlenet, densenet])
def test_every_relu_of_googlenet_and_densenet_is_rewritten(
    name: str, peer: type, make: Callable[[], tuple[nn.Module, nn.Module]]
) -> None:
    original, with_modules = (net.double().train() for net in make())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for net in (original, with_modules):
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None  # cumulative statistics, so that no signal vanishes
        with torch.no_grad():
            net(images)
        net.eval()
    torch.testing.assert_close(with_modules(images), original(images), rtol=1e-12, atol=1e-12)
    theirs = captum_gradient(peer, with_modules, images).abs().amax(1).detach()
    ours = attribute(name, load_model(original, input_size=(3, 64, 64)), images, CLASSES)
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.max()))
    # captum's map of the original network differs: it rewrites too few ReLUs.
    incomplete = captum_gradient(peer, original, images).abs().amax(1).detach()
    assert (incomplete - theirs).abs().max() > 0.1 * theirs.max()


def captum_gradient(peer: type, net: nn.Module, images: Tensor) -> Tensor:
    gradient: Tensor = peer(net).attribute(images.clone(), target=CLASSES)
    return gradient


def rewritten_gradient(net: nn.Module, images: Tensor, rule: object) -> Tensor:
    model = load_model(net, input_size=(3, 13, 17))
    pixels = images.clone().requires_grad_()
    with model.guard(), rewrite_backward(rule):  # type: ignore[arg-type]
        return torch.autograd.grad(scores(model, pixels, CLASSES).sum(), pixels)[0]
