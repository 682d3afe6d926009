"""Time of attributions against captum, pytorch-grad-cam, torchcam, zennit and bare passes."""

from collections.abc import Callable, Iterator

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from zennit.attribution import Gradient as RuleGradient
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Pass
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, Linear

from phosphene import load_model, methods

Work = Callable[[], object]
#: Name of the row, Phosphene's work, and the work of the other libraries.
Rows = Iterator[tuple[str, Work, dict[str, Work]]]


class Normalized(nn.Module):
    """The network with the normalization of Phosphene's model, for the other libraries."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - 0.45) / 0.225)


def network(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    return module, load_model(module, mean=[0.45] * 3, std=[0.225] * 3, input_size=(3, 224, 224))


def frozen_network(name: str) -> nn.Module:
    """A network without parameter gradients, for the limit."""
    return Normalized(network(name)[0]).eval().requires_grad_(False)


def forward_and_backward(module: nn.Module, images: Tensor, times: int = 1) -> None:
    """``times`` forward and backward passes from a logit to the pixels."""
    for _ in range(times):
        pixels = images.clone().requires_grad_()
        torch.autograd.grad(module(pixels)[:, 3].sum(), pixels)


def forward(module: nn.Module, images: Tensor, times: int) -> None:
    """Forward pass of ``times`` images, in batches of 32."""
    with torch.no_grad():
        for batch in images[:1].expand(times, -1, -1, -1).split(32):
            module(batch.contiguous())


def saliency() -> Rows:
    for name in ("resnet18", "mobilenet_v2"):
        module, model = network(name)
        peer, bare = captum.attr.Saliency(Normalized(module)), frozen_network(name)
        for count in (1, 8, 16):
            images = torch.rand(count, 3, 224, 224)
            yield (
                f"saliency, {name}, {count}",
                lambda model=model, images=images: methods["saliency"](model, images, 3),
                {
                    "the limit": lambda bare=bare, images=images: forward_and_backward(bare, images),
                    "captum": lambda peer=peer, images=images: peer.attribute(
                        images.clone().requires_grad_(), target=3
                    ),
                },
            )


def gradients() -> Rows:
    """Methods with many gradients, or with another backward rule."""
    images = torch.rand(2, 3, 224, 224)
    model, bare = network("resnet18")[1], frozen_network("resnet18")

    def captum_work(kind: str, images: Tensor = images, **params: object) -> Work:
        peer = getattr(captum.attr, kind)(Normalized(network("resnet18")[0]))
        return lambda: peer.attribute(images.clone(), target=3, **params)

    yield (
        "integrated_gradients, 16 steps, resnet18, 2",
        lambda: methods["integrated_gradients"](model, images, 3, steps=16),
        {
            "the limit": lambda: forward_and_backward(bare, images, 16),
            "captum": captum_work("IntegratedGradients", n_steps=16),
            "captum, 2 at once": captum_work("IntegratedGradients", n_steps=16, internal_batch_size=2),
        },
    )
    noisy = captum.attr.NoiseTunnel(captum.attr.Saliency(Normalized(network("resnet18")[0])))
    yield (
        "smooth_grad, 10 samples, resnet18, 2",
        lambda: methods["smooth_grad"](model, images, 3, samples=10),
        {
            "the limit": lambda: forward_and_backward(bare, images, 10),
            "captum": lambda: noisy.attribute(images, nt_samples=10, stdevs=0.15, target=3, abs=False),
            "captum, 2 at once": lambda: noisy.attribute(
                images, nt_samples=10, nt_samples_batch_size=1, stdevs=0.15, target=3, abs=False
            ),
        },
    )
    for kind, peer in (("guided_backprop", "GuidedBackprop"), ("deconvnet", "Deconvolution")):
        for count in (1, 8):
            batch = torch.rand(count, 3, 224, 224)
            yield (
                f"{kind}, resnet18, {count}",
                lambda kind=kind, batch=batch: methods[kind](model, batch, 3),
                {
                    "the limit": lambda batch=batch: forward_and_backward(bare, batch),
                    "captum": captum_work(peer, batch),
                },
            )
    rules = [(Activation, Pass()), (Linear, Epsilon(1e-6))]
    theirs = Normalized(network("resnet18")[0])
    composite = LayerMapComposite(rules, canonizers=[ResNetCanonizer()])
    one_hot = torch.eye(1000)[[3, 3]]

    def run_zennit() -> None:
        with RuleGradient(model=theirs, composite=composite) as attributor:
            attributor(images.clone(), lambda output: output * one_hot)

    yield (
        "lrp, resnet18, 2",
        lambda: methods["lrp"](model, images, 3),
        {"the limit": lambda: forward_and_backward(bare, images), "zennit": run_zennit},
    )


def cams() -> Rows:
    """The CAM family on layer4; Score-CAM at half the size, since it runs 513 passes."""
    kinds = {
        "grad_cam": ("GradCAM", "GradCAM"),
        "grad_cam_plus_plus": ("GradCAMPlusPlus", "GradCAMpp"),
        "layer_cam": ("LayerCAM", "LayerCAM"),
        "score_cam": ("ScoreCAM", "ScoreCAM"),
    }
    bare = frozen_network("resnet18")
    below = nn.Sequential(*list(bare.module.children())[:-2])

    def tail(images: Tensor) -> None:
        """A forward pass, and a backward pass to the layer."""
        maps = below((images - 0.45) / 0.225).requires_grad_()
        logits = bare.module.fc(bare.module.avgpool(maps).flatten(1))
        torch.autograd.grad(logits[:, 3].sum(), maps)

    for name, (grad_cam_class, torchcam_class) in kinds.items():
        for count, side in ((1, 112),) if name == "score_cam" else ((1, 224), (8, 224)):
            model, images = network("resnet18")[1], torch.rand(count, 3, side, side)
            unfrozen, hooked, plain = (Normalized(network("resnet18")[0]).eval() for _ in range(3))
            grad_cam = getattr(pytorch_grad_cam, grad_cam_class)(unfrozen, [unfrozen.module.layer4])
            torchcam_extractor = getattr(torchcam.methods, torchcam_class)(
                hooked, "module.layer4", input_shape=(3, side, side)
            )
            captum_cam = captum.attr.LayerGradCam(plain, plain.module.layer4)

            def run_pytorch_grad_cam(cam=grad_cam, images=images) -> None:
                cam(images, [ClassifierOutputTarget(3)] * len(images))

            def run_torchcam(cam=torchcam_extractor, hooked=hooked, images=images) -> None:
                cam(3, hooked(images))

            peers: dict[str, Work] = {
                "the limit": lambda images=images: tail(images),
                "pytorch-grad-cam": run_pytorch_grad_cam,
                "torchcam": run_torchcam,
            }
            if name == "score_cam":
                peers["the limit"] = lambda images=images: forward(bare, images, 513)
            if name == "grad_cam":
                peers["captum"] = lambda peer=captum_cam, images=images: peer.attribute(images, target=3)
            yield (
                f"{name}, resnet18 at {side}, {count}",
                lambda name=name, model=model, images=images: methods[name](model, images, 3, layer="layer4"),
                peers,
            )


def occlusion() -> Rows:
    """16 px windows side by side; captum with one window per pass (its default), and with 16."""
    for name, side in (("resnet18", 112), ("resnet18", 224), ("vgg11", 112), ("vgg11", 224)):
        module, model = network(name)
        images = torch.rand(1, 3, side, side)
        peer, bare, windows = (
            captum.attr.Occlusion(Normalized(module)),
            frozen_network(name),
            (side // 16) ** 2,
        )

        def captum_work(windows_per_pass: int, peer=peer, images=images) -> Work:
            window = (3, 16, 16)
            return lambda: peer.attribute(
                images, window, window, 0.5, target=3, perturbations_per_eval=windows_per_pass
            )

        yield (
            f"occlusion, {name} at {side}, 16 px windows",
            lambda model=model, images=images: methods["occlusion"](model, images, 3, window=16, stride=16),
            {
                "the limit": lambda bare=bare, images=images, n=windows: forward(bare, images, n + 1),
                "captum": captum_work(1),
                "captum, 16 at once": captum_work(16),
            },
        )
