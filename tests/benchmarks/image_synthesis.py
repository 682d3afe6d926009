"""Time of neural style, feature visualization and fast style against reference loops.

Run with ``python -m tests.benchmarks.image_synthesis``. The plain loops are efficient versions of the usual
tutorials: the network cut above the highest layer, frozen parameters, targets computed once, torch's Adam.
They reach the same loss, which is printed. "full network" also evaluates the layers above, as loops with
hooks do; so does lucent, which also differentiates with respect to all parameters. Printed is the CPU time of
STEPS further steps in one process, interleaved, minimum of several rounds; random weights. A step of fast
style is one image through the bundled network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from lucent.optvis import objectives, param, render
from lucent.optvis import transform as lucent_transform
from torch import Tensor, nn

from phosphene import load_model, load_result, methods
from phosphene.results import TrainedNetwork

ROUNDS, STEPS, SIDE = 4, 4, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STYLE_LAYERS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1"]
CONTENT_LAYER = "relu3_1"
#: Indices of these layers in torchvision's ``features``.
LAYER_INDICES = [1, 6, 11, 20]


#: Runs a number of steps and returns the last loss or score.
Work = Callable[[int], float]


def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg19(weights=None).eval()


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]
    return (images - mean) / std


def plain_style(module: nn.Module, content: Tensor, style: Tensor, *, full_network: bool = False) -> Work:
    """Neural style (Gatys et al.) as a plain loop, with the relative losses of ``neural_style``."""
    layers = list(module.features[: None if full_network else LAYER_INDICES[-1] + 1])
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def features(images: Tensor) -> list[Tensor]:
        x, outputs = normalized(images), []
        for index, layer in enumerate(layers):
            x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if index in LAYER_INDICES:
                outputs.append(x)
        if full_network:
            module.classifier(module.avgpool(x).flatten(1))
        return outputs

    def gram(maps: Tensor) -> Tensor:
        flat = maps.flatten(2)
        return flat @ flat.mT / flat.shape[2]

    def run(steps: int) -> float:
        with torch.no_grad():
            style_grams, content_features = [gram(f) for f in features(style)], features(content)[2]
        images = content.clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.02)
        for _ in range(steps):
            adam.zero_grad()
            outputs = features(images)
            difference = outputs[2] - content_features
            loss = difference.square().sum() / content_features.square().sum()
            for depth, (f, g) in enumerate(zip(outputs, style_grams, strict=True)):
                loss = loss + 30 * 3.0**-depth * (gram(f) - g).square().sum() / g.square().sum()
            loss.backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return loss.item()

    return run


def plain_channel(module: nn.Module, start: Tensor, *, full_network: bool = False) -> Work:
    """Activation maximization of the mean of channel 7 of conv4_1 in pixels, with L2 penalty and jitter."""
    module.requires_grad_(False)
    cut = module.features[: LAYER_INDICES[-1]]
    activations: list[Tensor] = []
    cut[-1].register_forward_hook(lambda layer, inputs, maps: activations.append(maps))
    forward = module if full_network else cut

    def run(steps: int) -> float:
        gray = torch.tensor(MEAN).view(1, 3, 1, 1)
        images = start.clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            adam.zero_grad()
            shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
            forward(normalized(torch.roll(images, shift, (-2, -1))))
            score = activations.pop()[:, 7].mean()
            (1e-3 * (images - gray).square().sum() - score).backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return score.item()

    return run


def lucent_channel(module: nn.Module, start: Tensor) -> Work:
    """The same channel and start with lucent, which does not clip pixels to [0, 1], and its jitter."""

    def run(steps: int) -> float:
        images = start.clone().requires_grad_()
        objective = objectives.channel(f"features_{LAYER_INDICES[-1] - 1}", 7)
        render.render_vis(
            module, objective, lambda: ([images], lambda: images),
            transforms=[lucent_transform.jitter(8)], thresholds=(steps,), progress=False, show_image=False,
        )  # fmt: skip
        with torch.no_grad():
            return float(module.features[: LAYER_INDICES[-1]](normalized(images))[:, 7].mean())

    return run


def lucent_class(module: nn.Module) -> Work:
    """A class in lucent's Fourier image with its shifts and scales; its rotations need a kornia of 2020."""
    scales = [1 + (step - 5) / 50 for step in range(11)]
    transforms = [
        lucent_transform.jitter(8),
        lucent_transform.random_scale(scales),
        lucent_transform.jitter(4),
    ]

    def run(steps: int) -> float:
        (image,) = render.render_vis(
            module, objectives.channel("labels", 7), lambda: param.image(SIDE), transforms=transforms,
            thresholds=(steps,), progress=False, show_image=False,
        )  # fmt: skip
        with torch.no_grad():
            return float(module(normalized(torch.from_numpy(image).permute(0, 3, 1, 2)))[0, 7])

    return run


def plain_fast_style(stylizer: TrainedNetwork, images: Tensor) -> Work:
    """The stylizer's network for its first style alone, built from PyTorch layers."""

    def layer(styled: Any) -> nn.Sequential:
        old, channels = styled.conv, styled.conv.out_channels
        padding: dict[str, Any] = {"padding": styled.padding, "padding_mode": "reflect", "bias": False}
        conv = nn.Conv2d(old.in_channels, channels, old.kernel_size, old.stride, **padding)
        norm = nn.InstanceNorm2d(channels, affine=True)
        conv.weight = old.weight
        norm.weight, norm.bias = (nn.Parameter(rows[0]) for rows in (styled.norm.gamma, styled.norm.beta))
        upsample = [nn.Upsample(scale_factor=styled.upsample)] if styled.upsample > 1 else []
        return nn.Sequential(*upsample, conv, norm)

    net: Any = stylizer.network
    down, up = ([layer(part) for part in parts] for parts in (net.down, net.up))
    blocks = [(layer(block["first"]), layer(block["second"])) for block in net.residual]
    last = layer(net.paint)

    @torch.no_grad()
    def run(steps: int) -> float:
        outputs = []
        for image in images[:steps].split(1):
            fine = down[0](image).relu()
            half = down[1](fine).relu()
            x = down[2](half).relu()
            for first, second in blocks:
                x = x + second(first(x).relu())
            x = (up[0](x) + half).relu()
            x = (up[1](x) + fine).relu()
            outputs.append(last(x).sigmoid())
        return float(torch.cat(outputs)[-1].mean())

    return run


def rows() -> dict[str, tuple[Work, dict[str, Work]]]:
    """Workloads of each row of the table: Phosphene's and the references'."""
    content, style = torch.rand(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    model = load_model(network(), mean=MEAN, std=STD, input_size=(3, SIDE, SIDE))
    style_params: dict[str, Any] = {
        "content_layer": CONTENT_LAYER,
        "style_layers": STYLE_LAYERS,
        "optimizer": "adam",
    }
    channel_params: dict[str, Any] = {"layer": "conv4_1", "channels": (7,), "parametrization": "pixels"}
    channel_params |= {"blur_every": 0, "seed": 0}
    neural_style, neuron_visualization, fast_style = (
        methods[name] for name in ("neural_style", "neuron_visualization", "fast_style")
    )
    resnet = torchvision.models.resnet18(weights=None).eval()
    class_model = load_model(resnet, mean=MEAN, std=STD, input_size=(3, SIDE, SIDE))
    class_visualization = methods["class_visualization"]
    stylizer = load_result("builtin:shapes-styles")
    assert isinstance(stylizer, TrainedNetwork)
    images = torch.rand(1 + STEPS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return {
        "neural style": (
            lambda steps: float(neural_style(model, content, style, steps=steps, **style_params).losses[-1]),
            {
                "plain": plain_style(network(), content, style),
                "full network": plain_style(network(), content, style, full_network=True),
            },
        ),
        "feature visualization": (
            lambda steps: float(
                neuron_visualization(model, content, steps=steps, **channel_params).scores[-1]
            ),
            {
                "plain": plain_channel(network(), content),
                "full network": plain_channel(network(), content, full_network=True),
                "lucent": lucent_channel(network(), content),
            },
        ),
        "class visualization": (
            lambda steps: float(class_visualization(class_model, 7, steps=steps, seed=0).scores[-1]),
            {"lucent": lucent_class(copy.deepcopy(resnet))},
        ),
        "fast style": (
            lambda steps: float(fast_style(images[:steps], stylizer).stylized[-1].mean()),
            {"plain": plain_fast_style(stylizer, images)},
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':24}{'':20}{'ms a step':>10}{'ratio':>8}   loss or score")
    for name, (ours, others) in rows().items():
        works = {"phosphene": ours, **others}
        best, values = {library: [float("inf")] * 2 for library in works}, dict.fromkeys(works, 0.0)
        for _ in range(ROUNDS):
            for library, work in works.items():
                for number, steps in enumerate((1, 1 + STEPS)):
                    start = time.process_time()
                    values[library] = work(steps)
                    best[library][number] = min(best[library][number], time.process_time() - start)
        cost = {library: 1000 * (long - short) / STEPS for library, (short, long) in best.items()}
        for library, one in cost.items():
            ratio = "" if library == "phosphene" else f"{cost['phosphene'] / one:.2f}"
            print(f"{name:24}{library:20}{one:10.0f}{ratio:>8}   {values[library]:.5g}", flush=True)
            name = ""


if __name__ == "__main__":
    main()
