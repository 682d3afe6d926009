"""Writes ``docs/networks.md``: methods on networks of all kinds, compared with independent computations."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, PhospheneError, TensorDataset, load_model, run

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
HEADER = """# Networks that were tried

Each cell is one call on a network with random weights, compared with a computation of its own that uses the
torch module alone: gradients by autograd, layers by forward hooks, occlusion by passes of changed images.
"right" is agreement to a relative error of 1e-3; a number is the sentence, below the table, with which the
call was refused. Written by `python tests/networks_table.py`.

"""

#: (N,) the score of the target, from what the module returned for images of a size (H, W).
Score = Callable[[Any, tuple[int, int]], Tensor]


@dataclass
class Row:
    """A network with its target, and the same score computed from the module's output."""

    name: str
    build: Callable[[Path], Model]
    #: Of attributions; of an attack.
    target: Any = 1
    labels: Any = None
    score: Score = lambda output, size: logits(output)[:, 1]
    #: The score whose decrease the attack seeks; None: the cross-entropy of the predicted class.
    margin: Score | None = None
    size: tuple[int, int] | None = None


def logits(output: Any) -> Tensor:
    """The logits in the output of a classifier."""
    output = getattr(output, "logits", output)
    return output["out"] if isinstance(output, dict) else output


# --- the computations by hand ---------------------------------------------------------------------------


def normalized(model: Model, images: Tensor) -> Tensor:
    """(images - mean) / std."""
    return (images - model.mean[:, None, None]) / model.std[:, None, None]


def score_of(model: Model, row: Row, images: Tensor, score: Score | None = None) -> Tensor:
    """(N,) by the module alone."""
    return (score or row.score)(model.module(normalized(model, images)), (images.shape[2], images.shape[3]))


def gradient_of(model: Model, row: Row, images: Tensor, score: Score | None = None) -> Tensor:
    """The gradient of the score by the pixels."""
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score_of(model, row, leaf, score).sum(), leaf)
    return gradient


def check_saliency(model: Model, row: Row, images: Tensor) -> None:
    result = run("saliency", model=model, images=images, target=row.target)
    assert_close(result.maps, gradient_of(model, row, images).abs().amax(1))


def check_grad_cam(model: Model, row: Row, images: Tensor) -> None:
    result = run("grad_cam", model=model, images=images, target=row.target)
    layer = model.for_images(images).last_map
    outputs: list[Tensor] = []
    hook = model.module.get_submodule(layer).register_forward_hook(
        lambda module, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        with torch.enable_grad():
            leaf = images.clone().requires_grad_()
            score = score_of(model, row, leaf)
        (gradient,) = torch.autograd.grad(score.sum(), outputs[-1])
    finally:
        hook.remove()
    height, width = result.maps.shape[1:]
    first = model.for_images(images).structure.layouts[layer].before
    maps, slopes = (as_maps(value.detach(), (height, width), first) for value in (outputs[-1], gradient))
    weights = slopes.mean((2, 3), keepdim=True)
    assert_close(result.maps, (weights * maps).sum(1).relu())


def as_maps(values: Tensor, grid: tuple[int, int], first: int) -> Tensor:
    """A layer's output as (N, C, h, w); ``first`` is the index of the first patch token."""
    if values.ndim == 4:
        return values if values.shape[2:] == grid else values.permute(0, 3, 1, 2)
    return values[:, first : first + math.prod(grid)].transpose(1, 2).unflatten(2, grid)


def check_occlusion(model: Model, row: Row, images: Tensor) -> None:
    height, width = images.shape[2:]
    side = min(height, width) // 2
    result = run("occlusion", model=model, images=images, target=row.target, window=side, stride=side)
    with torch.no_grad():
        occluded = images.clone()
        occluded[:, :, :side, :side] = 0.5
        drop = score_of(model, row, images) - score_of(model, row, occluded)
    assert_close(result.maps[:, 0, 0], drop)


def check_fgsm(model: Model, row: Row, images: Tensor) -> None:
    # An objective that does not hold from the outset is brought about instead.
    with torch.no_grad():
        targeted = row.margin is not None and bool((score_of(model, row, images, row.margin) < 0).all())
    result = run("fgsm", model=model, images=images, labels=row.labels, eps=2 / 255, targeted=targeted)
    if row.margin is None:
        with torch.no_grad():
            predicted = logits(model.module(normalized(model, images))).argmax(1)

        def loss(output: Any, size: tuple[int, int]) -> Tensor:
            return F.cross_entropy(logits(output), predicted, reduction="none")

        direction = gradient_of(model, row, images, loss).sign()
    else:
        direction = (1 if targeted else -1) * gradient_of(model, row, images, row.margin).sign()
    moved = result.adversarial != images
    expected = (images + 2 / 255 * direction).clamp(0, 1)
    attacked = moved.flatten(1).any(1)  # others are adversarial already
    agreement = ((result.adversarial - expected).abs() < 1e-4)[attacked].float()
    # Signs of gradients near zero may differ.
    assert attacked.any() and agreement.mean() > 0.99, "another step"


def check_activations(model: Model, row: Row, images: Tensor) -> None:
    convolutions = [name for name, part in model.module.named_modules() if isinstance(part, nn.Conv2d)]
    layer = next(iter(convolutions), None)
    result = run("activation_maps", model=model, images=images, layer=layer)
    assert layer is not None
    outputs: list[Tensor] = []
    hook = model.module.get_submodule(layer).register_forward_hook(
        lambda module, args, output: outputs.append(output.clone())  # before an activation in place
    )
    try:
        with torch.no_grad():
            model.module(normalized(model, images))
    finally:
        hook.remove()
    assert_close(result.maps, outputs[-1][:, list(result.channels)])


def check_embed(model: Model, row: Row, images: Tensor) -> None:
    result = run("embed", model=model, dataset=TensorDataset(images))
    inputs: list[Tensor] = []
    structure = model.for_images(images).structure
    hooks = []
    if structure.classifier is not None and model.task != "embedding":
        part = model.module.get_submodule(structure.classifier)
        hooks.append(part.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
    try:
        with torch.no_grad():
            output = model.module(normalized(model, images))
    finally:
        for hook in hooks:
            hook.remove()
    expected = inputs[-1] if inputs else getattr(output, "pooler_output", output)
    assert_close(result.features, expected.flatten(1))


def check_jpeg(model: Model, row: Row, images: Tensor) -> None:
    result = run("jpeg", model=model, images=images, quality=40)
    with torch.no_grad():
        output = logits(model.module(normalized(model, result.transformed)))
    if output.shape[1] == 1:
        output = torch.cat([-output / 2, output / 2], 1)
    probabilities = output.softmax(1)
    assert_close(result.confidence_after, probabilities.amax(1))


def assert_close(values: Tensor, expected: Tensor) -> None:
    """To a relative error of 1e-3 of the largest value."""
    scale = float(expected.abs().max()) or 1.0
    assert values.shape == expected.shape, f"{tuple(values.shape)} is not {tuple(expected.shape)}"
    assert float((values - expected).abs().max()) <= 1e-3 * scale, "other values"


CHECKS: dict[str, Callable[[Model, Row, Tensor], None]] = {
    "saliency": check_saliency,
    "Grad-CAM": check_grad_cam,
    "occlusion": check_occlusion,
    "FGSM": check_fgsm,
    "activation maps": check_activations,
    "embedding": check_embed,
    "JPEG defense": check_jpeg,
}


# --- the networks ---------------------------------------------------------------------------------------


def timm_row(name: str, **options: Any) -> Row:
    """A network of timm."""
    size = options.pop("size", None)
    return Row(f"`timm:{name}`", lambda folder: load_model(f"timm:{name}", **options), size=size)


def transformer(name: str, kind: str, config: dict[str, Any], **row: Any) -> Row:
    """A tiny network of transformers, saved to a folder and loaded from it."""

    def build(folder: Path) -> Model:
        import transformers

        network = getattr(transformers, name)
        path = folder / name
        network(getattr(transformers, kind)(**config)).save_pretrained(path)
        return load_model(f"hf:{path}")

    return Row(f"`hf:` {name}", build, **row)


def torchvision_row(name: str, **row: Any) -> Row:
    """A network of torchvision."""
    options = row.pop("options", {})
    return Row(f"`torchvision:{name}`", lambda folder: load_model(f"torchvision:{name}", **options), **row)


def body(columns: int) -> nn.Sequential:
    """A small convolutional network."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, columns)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), *head
    )


def onnx_row() -> Row:
    """An ONNX file, which has no gradients."""

    def build(folder: Path) -> Model:
        file = folder / "network.onnx"
        torch.onnx.export(body(5).eval(), (torch.rand(1, 3, 32, 32),), file, dynamo=False, verbose=False)
        return load_model(f"onnx:{file}")

    return Row("`onnx:`", build)


def lightning_row() -> Row:
    """A checkpoint as Lightning writes it."""

    def build(folder: Path) -> Model:
        file = folder / "last.ckpt"
        state = {f"model.{name}": value for name, value in body(5).state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.4"}, file)
        return load_model(body(5), weights=file, input_size=(3, 32, 32))

    return Row("Lightning `.ckpt`", build)


def private_row() -> Row:
    """A factory in a module of one's own."""

    def build(folder: Path) -> Model:
        layers = "nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)"
        code = f"from torch import nn\n\n\ndef build():\n    return nn.Sequential({layers})\n"
        (folder / "private_networks.py").write_text(code)
        sys.path.insert(0, str(folder))
        try:
            return load_model("module:private_networks:build", input_size=(3, 32, 32))
        finally:
            sys.path.remove(str(folder))

    return Row("`module:` own factory", build)


def module_row(name: str, columns: int, task: Any, **row: Any) -> Row:
    """A module with a declared task."""
    return Row(name, lambda folder: load_model(body(columns), input_size=(3, 32, 32), task=task), **row)


def region(index: int, *, difference: bool) -> Score:
    """The mean logit of a class over all pixels, less the largest other one for ``difference``."""

    def score(output: Any, size: tuple[int, int]) -> Tensor:
        values = logits(output)
        if values.shape[2:] != size:
            values = F.interpolate(values, size, mode="bilinear")
        own = values[:, index]
        others = torch.cat([values[:, :index], values[:, index + 1 :]], 1).amax(1)
        return (own - others if difference else own).mean((1, 2))

    return score


def best_box(output: Any, size: tuple[int, int]) -> Tensor:
    """The score of each image's best detection."""
    return torch.stack([boxes["scores"].max() for boxes in output])


VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
SEGMENT = {"target": "region:1@all", "labels": "region:1@all", "score": region(1, difference=False)}
DETECT = {"target": None, "score": best_box, "margin": best_box}

ROWS = [
    transformer("ViTForImageClassification", "ViTConfig", VIT),
    transformer("DeiTForImageClassification", "DeiTConfig", VIT),
    transformer("BeitForImageClassification", "BeitConfig", VIT),
    transformer("Dinov2ForImageClassification", "Dinov2Config", VIT),
    transformer("SwinForImageClassification", "SwinConfig", SWIN | {"patch_size": 2, "num_labels": 5}),
    transformer("Swinv2ForImageClassification", "Swinv2Config", SWIN | {"patch_size": 2, "num_labels": 5}),
    transformer("ConvNextForImageClassification", "ConvNextConfig",
                {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "image_size": 64, "num_labels": 5}),
    transformer("ResNetForImageClassification", "ResNetConfig",
                {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
                 "num_labels": 5}, size=(64, 64)),
    transformer("SegformerForSemanticSegmentation", "SegformerConfig",
                {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4,
                 "decoder_hidden_size": 8, "num_labels": 3}, size=(64, 64), **SEGMENT,
                margin=region(1, difference=True)),
    transformer("YolosForObjectDetection", "YolosConfig",
                VIT | {"image_size": [32, 32], "num_detection_tokens": 5}, **DETECT),
    timm_row("resnet18", size=(96, 96)),
    timm_row("vit_tiny_patch16_224"),
    timm_row("convnext_atto", size=(96, 96)),
    timm_row("efficientnet_b0", size=(96, 96)),
    timm_row("mobilenetv3_small_050", size=(96, 96)),
    timm_row("regnetx_002", size=(96, 96)),
    timm_row("densenet121", size=(96, 96)),
    timm_row("mixer_s16_224"),
    timm_row("swin_tiny_patch4_window7_224"),
    Row("`timm:vit_tiny_patch16_224` without a head",
        lambda folder: load_model("timm:vit_tiny_patch16_224", num_classes=0),
        target=lambda features: features[:, 3], score=lambda output, size: output[:, 3]),
    torchvision_row("squeezenet1_1", size=(96, 96)),
    torchvision_row("vgg11", size=(96, 96)),
    torchvision_row("quantized_mobilenet_v2", size=(96, 96)),
    torchvision_row("lraspp_mobilenet_v3_large", size=(96, 96), **SEGMENT, margin=region(1, difference=True)),
    torchvision_row("deeplabv3_mobilenet_v3_large", size=(96, 96), **SEGMENT,
                    margin=region(1, difference=True)),
    torchvision_row("ssdlite320_mobilenet_v3_large", size=(96, 96), **DETECT),
    onnx_row(),
    lightning_row(),
    private_row(),
    module_row("one logit", 1, "binary", score=lambda output, size: output[:, 0] / 2,
               margin=lambda output, size: output[:, 0] * output.detach()[:, 0].sign()),
    module_row("regression", 1, "regression", target=0, score=lambda output, size: output[:, 0]),
    module_row("several labels", 4, "multilabel", labels=[1, 1], margin=lambda output, size: output[:, 1]),
    module_row("one number, no task declared", 1, None, target=None, score=lambda output, size: output[:, 0]),
]  # fmt: skip


def spread(network: nn.Module, images: Tensor) -> None:
    """Weights with which outputs differ: no heads of zeros, and batch norms that fit the images."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.1)
        for norm in norms:
            norm.momentum = None
            norm.train()
        network(images)
        for norm in norms:
            norm.eval()


def cell(
    check: Callable[[Model, Row, Tensor], None], model: Model, row: Row, images: Tensor, folder: str
) -> str:
    """ "right", the sentence of a refusal, or "WRONG" with the reason."""
    try:
        check(model, row, images)
    except PhospheneError as error:
        return str(error).replace(f"{folder}/", "")
    except Exception as error:
        return f"WRONG: {type(error).__name__} {str(error)[:150]}"
    return "right"


def main() -> int:
    """Write the page; the number of cells that are neither right nor refused."""
    table, sentences, wrong = [], {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            torch.manual_seed(0)
            model = row.build(Path(folder))
            model.module.eval()
            channels, height, width = model.input_size
            generator = torch.Generator().manual_seed(1)
            images = torch.rand(2, channels, *(row.size or (height, width)), generator=generator)
            spread(model.module, normalized(model, images))
            if row.size is not None and model.size_known:
                model = model.at_size((channels, *row.size))
            cells = []
            for name, check in CHECKS.items():
                outcome = cell(check, model, row, images, folder)
                print(f"{row.name} | {name} | {outcome}", flush=True)
                wrong += outcome.startswith("WRONG")
                if outcome != "right":
                    outcome = outcome.replace(f"{folder}/", "")
                    outcome = str(sentences.setdefault(outcome, len(sentences) + 1))
                cells.append(outcome)
            table.append(f"| {row.name} | {' | '.join(cells)} |\n")
    columns = ["network", *CHECKS]
    lines = [f"| {' | '.join(columns)} |\n", f"| {' | '.join('---' for _ in columns)} |\n", *table]
    notes = [f"{number}. {sentence}\n" for sentence, number in sentences.items()]
    PAGE.write_text(HEADER + "".join(lines) + "\nRefused with:\n\n" + "".join(notes), encoding="utf-8")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
