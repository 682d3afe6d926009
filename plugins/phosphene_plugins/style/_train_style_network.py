"""Training of a style network: the perceptual loss of its output, minimized by Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phosphene import Dataset, InputError, Reference, batch_size
from phosphene.optimize import gram_matrix, total_variation
from phosphene.training import TrainingHistory, train

from ._parameters import PerceptualLoss, StyleNetworkTraining
from ._resize import shrink_to
from ._style_loss import StyleLoss, StyleTargets, relative_error
from ._style_network import StyleNetwork, check_images

DUMOULIN = Reference(
    key="dumoulin2017",
    title="A Learned Representation for Artistic Style",
    authors="Dumoulin, Shlens, Kudlur",
    year=2017,
    url="https://arxiv.org/abs/1610.07629",
)

#: Longer side of the preview frames, which stay in memory until the training ends.
_FRAME_SIDE = 128


def train_style_network(
    network: StyleNetwork,
    loss_network: StyleLoss,
    dataset: Dataset,
    styles: Tensor,
    *,
    perceptual_loss: PerceptualLoss,
    training: StyleNetworkTraining,
    frames: int,
    seed: int | None,
) -> tuple[TrainingHistory, Tensor]:
    """Train those parameters of a network that require gradients, on the loss of ``fast_style_fit``.

    Returns the history, and the first content image (1, 3, H, W). Raises InputError for images without three
    channels, and for mixed precision where the model is not in float32.
    """
    model = loss_network.model
    first = check_images(dataset.read([0])).to(model.device, model.dtype)
    if training.mixed_precision and model.dtype != torch.float32:
        raise InputError(f"mixed precision is for float32, the model is in {model.dtype}")
    single = styles.new_ones(1)  # the blend weights of one style
    style_grams = [
        torch.cat(layer)
        for layer in zip(*(loss_network.style_grams(s, single) for s in styles.split(1)), strict=True)
    ]
    one_hot = torch.eye(len(styles), device=model.device, dtype=model.dtype)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        """The loss (n,) of images (n, 3, H, W), each in a style drawn at random."""
        style = torch.randint(len(styles), (len(images),)).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=training.mixed_precision):
            content_target = loss_network.content_features(images)
            stylized = network(check_images(images), one_hot[style])
            features = loss_network.features(stylized)
        # Squares and sums in full precision: bfloat16 has only three digits.
        features = [f.to(model.dtype) for f in features]
        stylized, content_target = stylized.to(model.dtype), content_target.to(model.dtype)

        targets = StyleTargets(content_target, [gram[style] for gram in style_grams])
        return weighted_loss(loss_network, perceptual_loss, stylized, features, targets)

    def draw_frame() -> Tensor:
        network.eval()
        frame = shrink_to(style_previews(network, first), _FRAME_SIDE)
        network.train()
        return frame

    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], training.lr)
    history = train(
        network, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        max_batch=batch_size(model), frames=frames, preview=draw_frame,
    )  # fmt: skip
    return history, first


def weighted_loss(
    loss_network: StyleLoss,
    weights: PerceptualLoss,
    images: Tensor,
    features: Sequence[Tensor],
    targets: StyleTargets,
) -> Tensor:
    """The perceptual loss (N,) of images (N, 3, H, W) with these features at all layers of the network."""
    *style_features, content_features = features
    style_loss = loss_network.style_loss([gram_matrix(f) for f in style_features], targets.style_grams)
    smoothness = total_variation(images) / images[0, 0].numel()
    return (
        weights.content_weight * relative_error(content_features, targets.content)
        + weights.style_weight * style_loss
        + weights.total_variation * smoothness
    )


@torch.no_grad()
def style_previews(network: StyleNetwork, image: Tensor) -> Tensor:
    """An image (1, 3, H, W) in each of the network's styles: (S, 3, H, W)."""
    return torch.cat([network(image, row[None]) for row in torch.eye(network.config["styles"]).to(image)])


def style_labels(names: list[str] | None, styles: Tensor, existing: Sequence[str] = ()) -> tuple[str, ...]:
    """The existing styles' names and then the new ones'; default: "style" and a number.

    Raises InputError where names are missing, superfluous or repeated.
    """
    numbers = range(len(existing), len(existing) + len(styles))
    labels = (*existing, *(f"style {n}" for n in numbers)) if names is None else (*existing, *names)
    if len(labels) != len(existing) + len(styles) or len(set(labels)) != len(labels):
        raise InputError(
            f"{len(existing) + len(styles)} styles need as many different names, not {', '.join(labels)}"
        )
    return labels
