"""A step of neural style and of feature visualisation, beside plain loops: ``python -m tests.benchmarks.drawing``.

The plain loops are those of tutorials as good as they can be written: the network cut above the highest
layer, its parameters frozen, targets computed once, torch's Adam. They end at the same loss, which is shown.
CPU time in one process, in turns, smallest of several; weights are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from phosphene import load_model, methods

ROUNDS, STEPS, SIDE = 3, 6, 160
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STYLE_LAYERS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1"]
CONTENT_LAYER = "relu3_1"
#: Where these layers are in torchvision's ``features``.
PLACES = [1, 6, 11, 20]


def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg19(weights=None).eval()


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]
    return (images - mean) / std


def plain_style(module: nn.Module, content: Tensor, style: Tensor) -> Callable[[], float]:
    """Gatys et al. as a tutorial has it, with the relative losses of ``neural_style``."""
    layers = list(module.features[: PLACES[-1] + 1])
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def seen(images: Tensor) -> list[Tensor]:
        x, found = normalized(images), []
        for place, layer in enumerate(layers):
            x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if place in PLACES:
                found.append(x)
        return found

    def gram(features: Tensor) -> Tensor:
        flat = features.flatten(2)
        return flat @ flat.mT / flat.shape[2]

    def run() -> float:
        with torch.no_grad():
            wanted, content_wanted = [gram(f) for f in seen(style)], seen(content)[2]
        images = content.clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.02)
        for _ in range(STEPS):
            adam.zero_grad()
            found = seen(images)
            loss = (found[2] - content_wanted).square().sum() / content_wanted.square().sum()
            for depth, (f, g) in enumerate(zip(found, wanted, strict=True)):
                loss = loss + 30 * 3.0**-depth * (gram(f) - g).square().sum() / g.square().sum()
            loss.backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return loss.item()

    return run


def plain_channel(module: nn.Module) -> Callable[[], float]:
    """The mean of channel 7 of relu4_1, climbed in the pixels with L2 decay and jitter."""
    cut = module.features[: PLACES[-1] + 1]
    for parameter in cut.parameters():
        parameter.requires_grad_(False)

    def run() -> float:
        grey = torch.tensor(MEAN).view(1, 3, 1, 1)
        images = grey.expand(1, 3, SIDE, SIDE).clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            adam.zero_grad()
            shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
            score = cut(normalized(torch.roll(images, shift, (-2, -1))))[:, 7].mean()
            (1e-3 * (images - grey).square().sum() - score).backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return score.item()

    return run


def rows() -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """Each row's work, ours and the plain loop's; both give the last step's loss or score."""
    generator = torch.Generator().manual_seed(1)
    content, style = torch.rand(2, 1, 3, SIDE, SIDE, generator=generator)
    model = load_model(network(), mean=MEAN, std=STD, input_size=(3, SIDE, SIDE))
    layers = {"content_layer": CONTENT_LAYER, "style_layers": STYLE_LAYERS}
    adam = {"optimizer": "adam", "steps": STEPS}
    climb = {"layer": "relu4_1", "channels": (7,), "parametrization": "pixels", "blur_every": 0, "seed": 0}
    return {
        "neural style": (
            lambda: float(methods["neural_style"](model, content, style, **layers, **adam).losses[-1]),
            plain_style(network(), content, style),
        ),
        "feature visualisation": (
            lambda: float(
                methods["neuron_visualization"](model, start_noise=0.0, **climb, **adam).scores[-1]
            ),
            plain_channel(network()),
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':24}{'ms a step':>10}{'plain':>10}{'ratio':>8}   loss or score, ours and the plain loop's")
    for name, pair in rows().items():
        best, found = [float("inf")] * 2, [0.0] * 2
        for _ in range(ROUNDS):
            for side, work in enumerate(pair):
                clock = time.process_time()
                found[side] = work()
                best[side] = min(best[side], time.process_time() - clock)
        ours, plain = (1000 * seconds / STEPS for seconds in best)
        told = ", ".join(f"{value:.5g}" for value in found)
        print(f"{name:24}{ours:10.0f}{plain:10.0f}{ours / plain:8.2f}   {told}")


if __name__ == "__main__":
    main()
