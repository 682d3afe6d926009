"""Neural style, feature visualisation and fast style beside others' loops: ``-m tests.benchmarks.drawing``.

The plain loops are those of tutorials as good as they can be written: the network cut above the highest
layer, its parameters frozen, targets computed once, torch's Adam. They end at the same loss, which is shown.
With the whole network they run what lies above that layer, too, as loops with hooks do; lucent does, and
differentiates to all parameters. CPU time in one process, in turns, smallest of several, of STEPS further
steps; weights are random. Fast style takes a picture a step, through the bundled network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from lucent.optvis import objectives, render
from lucent.optvis import transform as lucent_transform
from torch import Tensor, nn

from phosphene import load_model, load_result, methods
from phosphene.results import TrainedNetwork

ROUNDS, STEPS, SIDE = 4, 4, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STYLE_LAYERS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1"]
CONTENT_LAYER = "relu3_1"
#: Where these layers are in torchvision's ``features``.
PLACES = [1, 6, 11, 20]


#: Takes so many steps, and gives the last one's loss or score.
Work = Callable[[int], float]


def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.vgg19(weights=None).eval()


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]
    return (images - mean) / std


def plain_style(module: nn.Module, content: Tensor, style: Tensor, *, whole: bool = False) -> Work:
    """Gatys et al. as a tutorial has it, with the relative losses of ``neural_style``."""
    layers = list(module.features[: None if whole else PLACES[-1] + 1])
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def seen(images: Tensor) -> list[Tensor]:
        x, found = normalized(images), []
        for place, layer in enumerate(layers):
            x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if place in PLACES:
                found.append(x)
        if whole:
            module.classifier(module.avgpool(x).flatten(1))
        return found

    def gram(features: Tensor) -> Tensor:
        flat = features.flatten(2)
        return flat @ flat.mT / flat.shape[2]

    def run(steps: int) -> float:
        with torch.no_grad():
            wanted, content_wanted = [gram(f) for f in seen(style)], seen(content)[2]
        images = content.clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.02)
        for _ in range(steps):
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


def plain_channel(module: nn.Module, start: Tensor, *, whole: bool = False) -> Work:
    """The mean of channel 7 of conv4_1, climbed in the pixels with L2 decay and jitter."""
    module.requires_grad_(False)
    cut = module.features[: PLACES[-1]]
    seen: list[Tensor] = []
    cut[-1].register_forward_hook(lambda layer, given, maps: seen.append(maps))
    forward = module if whole else cut

    def run(steps: int) -> float:
        grey = torch.tensor(MEAN).view(1, 3, 1, 1)
        images = start.clone().requires_grad_()
        adam = torch.optim.Adam([images], lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            adam.zero_grad()
            shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
            forward(normalized(torch.roll(images, shift, (-2, -1))))
            score = seen.pop()[:, 7].mean()
            (1e-3 * (images - grey).square().sum() - score).backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return score.item()

    return run


def by_lucent(module: nn.Module, start: Tensor) -> Work:
    """The same channel, from the same pixels, which lucent does not hold to [0, 1], with its jitter."""

    def run(steps: int) -> float:
        images = start.clone().requires_grad_()
        render.render_vis(
            module, objectives.channel(f"features_{PLACES[-1] - 1}", 7), lambda: ([images], lambda: images),
            transforms=[lucent_transform.jitter(8)], thresholds=(steps,), progress=False, show_image=False,
        )  # fmt: skip
        with torch.no_grad():
            return float(module.features[: PLACES[-1]](normalized(images))[:, 7].mean())

    return run


def plain_repainting(stylizer: TrainedNetwork, images: Tensor) -> Work:
    """The stylizer's network for its first style alone, of PyTorch's own layers."""

    def layer(styled: Any) -> nn.Sequential:
        old, channels = styled.conv, styled.conv.out_channels
        around: dict[str, Any] = {"padding": styled.padding, "padding_mode": "reflect", "bias": False}
        conv = nn.Conv2d(old.in_channels, channels, old.kernel_size, old.stride, **around)
        norm = nn.InstanceNorm2d(channels, affine=True)
        conv.weight = old.weight
        norm.weight, norm.bias = (nn.Parameter(rows[0]) for rows in (styled.norm.gamma, styled.norm.beta))
        grow = [nn.Upsample(scale_factor=styled.upsample)] if styled.upsample > 1 else []
        return nn.Sequential(*grow, conv, norm)

    known: Any = stylizer.network
    down, up = ([layer(part) for part in parts] for parts in (known.down, known.up))
    blocks = [(layer(block["first"]), layer(block["second"])) for block in known.residual]
    paint = layer(known.paint)

    @torch.no_grad()
    def run(steps: int) -> float:
        made = []
        for image in images[:steps].split(1):
            fine = down[0](image).relu()
            half = down[1](fine).relu()
            x = down[2](half).relu()
            for first, second in blocks:
                x = x + second(first(x).relu())
            x = (up[0](x) + half).relu()
            x = (up[1](x) + fine).relu()
            made.append(paint(x).sigmoid())
        return float(torch.cat(made)[-1].mean())

    return run


def rows() -> dict[str, tuple[Work, dict[str, Work]]]:
    """Each row's work, ours and the others'."""
    content, style = torch.rand(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    model = load_model(network(), mean=MEAN, std=STD, input_size=(3, SIDE, SIDE))
    look: dict[str, Any] = {"content_layer": CONTENT_LAYER, "style_layers": STYLE_LAYERS, "optimizer": "adam"}
    climb: dict[str, Any] = {"layer": "conv4_1", "channels": (7,), "parametrization": "pixels"}
    climb |= {"blur_every": 0, "seed": 0}
    paint, draw, repaint = (methods[n] for n in ("neural_style", "neuron_visualization", "fast_style"))
    stylizer = load_result("builtin:shapes-styles")
    assert isinstance(stylizer, TrainedNetwork)
    pictures = torch.rand(1 + STEPS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return {
        "neural style": (
            lambda steps: float(paint(model, content, style, steps=steps, **look).losses[-1]),
            {
                "plain": plain_style(network(), content, style),
                "the whole network": plain_style(network(), content, style, whole=True),
            },
        ),
        "feature visualisation": (
            lambda steps: float(draw(model, content, steps=steps, **climb).scores[-1]),
            {
                "plain": plain_channel(network(), content),
                "the whole network": plain_channel(network(), content, whole=True),
                "lucent": by_lucent(network(), content),
            },
        ),
        "fast style": (
            lambda steps: float(repaint(pictures[:steps], stylizer).stylized[-1].mean()),
            {"plain": plain_repainting(stylizer, pictures)},
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':24}{'':20}{'ms a step':>10}{'ratio':>8}   loss or score")
    for name, (ours, others) in rows().items():
        works = {"phosphene": ours, **others}
        best, found = {who: [float("inf")] * 2 for who in works}, dict.fromkeys(works, 0.0)
        for _ in range(ROUNDS):
            for who, work in works.items():
                for number, steps in enumerate((1, 1 + STEPS)):
                    clock = time.process_time()
                    found[who] = work(steps)
                    best[who][number] = min(best[who][number], time.process_time() - clock)
        cost = {who: 1000 * (long - short) / STEPS for who, (short, long) in best.items()}
        for who, one in cost.items():
            ratio = "" if who == "phosphene" else f"{cost['phosphene'] / one:.2f}"
            print(f"{name:24}{who:20}{one:10.0f}{ratio:>8}   {found[who]:.5g}", flush=True)
            name = ""


if __name__ == "__main__":
    main()
