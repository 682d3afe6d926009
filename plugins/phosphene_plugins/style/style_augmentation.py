"""Style augmentation (SASSL): views of images in random styles, for self-supervised learning."""

import math
from typing import Annotated, Any, TypeAlias

import PIL.Image
import torch
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from phosphene import InputError, Reference, hookimpl, method, progress_bar
from phosphene.results import TrainedNetwork
from phosphene.roles import Images, Seed, Stylizer
from phosphene.spec import Cost, PixelRange, param, size

from ._adaptive_network import AdaptiveNetwork
from ._augmented_views import AugmentedViews
from ._pixel_features import draw_images, load_pixel_model
from ._style_network import StyleNetwork, check_images, require_style_network

#: Number of images that are stylized together, which limits the memory for large batches.
# equivalent mutants: images do not depend on each other
BATCH = 32
Strength: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class StyleAugmentation(v2.Transform):  # type: ignore[misc]
    """Random style transfer: each image is stylized with probability ``p``, in a random style and strength.

    x' = (1 - b) x + b T(x, s),   b ~ U(strength),   s ~ U(styles);   with probability 1 - p, b = 0

    with T a trained stylizer: a result of ``fast_style_fit``, with the styles it was trained on, or of
    ``adaptive_style_fit`` with ``styles`` (S, 3, H', W') in [0, 1] (default: the images of the batch). With
    ``blend`` each view is in a random blend of all styles, with weights drawn uniformly from the simplex.
    ``load_result("builtin:shapes-styles")`` and ``load_result("builtin:shapes-adaptive")`` are bundled.

    A transform of ``torchvision.transforms.v2``: images (..., 3, H, W), tensors or ``tv_tensors.Image``,
    floats in [0, 1] or bytes, keep their shape, type and dtype. Style and strength are drawn separately for
    each image of a batch, with torch's global generator. Other entries of a sample are left unchanged. No
    gradient is propagated.

    Raises InputError for PIL images (``v2.ToImage()`` converts them), for pixels outside [0, 1], and for
    images that the stylizer does not accept.

    Source: Rojas-Gomez et al. 2024 (SASSL), who use p = 0.8 and b from [0.1, 0.3].
    """

    _transformed_types = (v2.functional.is_pure_tensor, tv_tensors.Image)

    def __init__(
        self,
        stylizer: TrainedNetwork,
        p: float = 0.5,
        strength: tuple[float, float] = (0.1, 0.3),
        *,
        styles: Tensor | None = None,
        blend: bool = False,
    ) -> None:
        super().__init__()
        low, high = strength
        if not (0 <= p <= 1 and 0 <= low <= high <= 1):
            raise InputError(
                f"p must lie in [0, 1] and strength must be an interval in it, not {p} and {strength}"
            )
        if isinstance(stylizer, AdaptiveNetwork):
            self.style_statistics = None if styles is None else stylizer.style_statistics(styles)
        else:
            require_style_network(stylizer)
            if styles is not None:
                names = ", ".join(stylizer.labels)
                raise InputError(
                    f"styles are for adaptive_style_fit: a network of fast_style_fit has the styles {names}"
                )
        self.stylizer, self.p, self.strength, self.blend = stylizer, p, (low, high), blend

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse PIL images, which a transform of tensors would silently return unchanged."""
        if any(isinstance(entry, PIL.Image.Image) for entry in flat_inputs):
            raise InputError("StyleAugmentation takes tensors: put v2.ToImage() before it")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """For each image of a sample its strength b (N,), 0 for no change, and its blend weights (N, S)."""
        count = max((math.prod(entry.shape[:-3]) for entry in flat_inputs), default=0)
        if not isinstance(self.stylizer, AdaptiveNetwork):
            styles = len(self.stylizer.labels)
        else:
            styles = count if self.style_statistics is None else len(self.style_statistics[0])
        strength = torch.empty(count).uniform_(*self.strength) * (torch.rand(count) < self.p)
        if self.blend:
            weights = torch.empty(count, styles).exponential_()  # normalized, uniform on the simplex
            return {"strength": strength, "blend_weights": weights / weights.sum(1, keepdim=True)}
        style = torch.randint(max(1, styles), (count,))
        return {"strength": strength, "blend_weights": torch.eye(styles)[style]}

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Tensor]) -> Any:
        """The images of one entry, stylized with the drawn parameters."""
        tensor = inpt.as_subclass(torch.Tensor)
        images = check_images(tensor.reshape(-1, *tensor.shape[-3:]))
        if not images.is_floating_point():
            images = v2.functional.to_dtype(images, torch.float32, scale=True)
        if images.numel() and not -1e-6 <= float(images.min()) <= float(images.max()) <= 1 + 1e-6:
            raise InputError("pixels must lie in [0, 1]: put StyleAugmentation before v2.Normalize")
        views = tensor.clone().reshape(-1, *tensor.shape[-3:])
        selected = params["strength"][: len(images)].nonzero()[:, 0]
        # Splitting no rows would return one empty batch, which has no statistics for AdaIN.
        for rows in selected.split(BATCH) if len(selected) else ():
            b = params["strength"][rows, None, None, None].to(images)
            stylized = self._stylize(images, rows, params["blend_weights"][rows])
            views[rows] = v2.functional.to_dtype(images[rows].lerp(stylized, b), tensor.dtype, scale=True)
        views = views.reshape(tensor.shape)
        return tv_tensors.wrap(views, like=inpt) if isinstance(inpt, tv_tensors.Image) else views

    def _stylize(self, images: Tensor, rows: Tensor, blend_weights: Tensor) -> Tensor:
        """T(x, s) of some rows of the images (N, 3, H, W)."""
        parameter = next(self.stylizer.network.parameters())
        if isinstance(self.stylizer, AdaptiveNetwork):
            statistics = self.style_statistics
            if statistics is None:
                statistics = self.stylizer.style_statistics(images)
            return self.stylizer.stylize(images[rows], statistics, blend_weights)
        return self.stylizer.network(images[rows].to(parameter), blend_weights.to(parameter)).to(images)

    # The names of these methods before torchvision 0.21.
    _check_inputs, _get_params, _transform = check_inputs, make_params, transform


def a_view_is_the_weighted_mean_of_image_and_stylized_image() -> None:
    """With b fixed, a view is (1 - b) x + b T(x, s) for one of the styles; with p = 0 it is the image."""
    torch.manual_seed(0)
    network = StyleNetwork(styles=2, width=3, blocks=0).double()
    untrained: Any = {
        "losses": torch.empty(0),
        "previews": torch.empty(0, 3, 8, 8),
        "method": "style.fast_style_fit",
    }
    stylizer = TrainedNetwork(network=network, config={}, labels=("first", "second"), **untrained)
    images = torch.rand(3, 3, 8, 9)
    with torch.no_grad():
        stylized = torch.stack(
            [network(images.double(), torch.eye(2)[[s] * 3].double()) for s in range(2)], 1
        )
    result = style_augmentation(images, stylizer, p=1.0, strength=(0.25, 0.25), views=4, seed=1)
    style = result.blend_weights.argmax(2)
    for n in range(3):
        expected = 0.75 * images[n] + 0.25 * stylized[n, style[n]]
        assert (result.views[n] - expected).abs().max() < 1e-6, "a view is not (1 - b) x + b T(x, s)"
    assert set(style.flatten().tolist()) == {0, 1}, "one style is never drawn"
    panels = result.panels()[1]
    assert [panel.title for panel in panels] == ["image", *(f"25% {stylizer.labels[s]}" for s in style[1])]
    assert [panel.is_output for panel in panels] == [False, True, True, True, True]
    unchanged = style_augmentation(images, stylizer, p=0.0, views=5, seed=1)
    assert torch.equal(unchanged.views, images[:, None].expand_as(unchanged.views)), "p = 0 changes the image"
    assert unchanged.panels()[0][1].title == "unchanged"
    blended = style_augmentation(images, stylizer, p=0.5, strength=(0.1, 0.6), blend=True, views=20, seed=1)
    assert 0 < (blended.strength == 0).double().mean() < 1 and blended.strength.max() <= 0.6
    weights, b = blended.blend_weights[:, 0], blended.strength[:, :1, None, None]
    assert (weights.sum(1) - 1).abs().max() < 1e-6 and (weights.amax(1) < 1).all(), "a blend is one style"
    with torch.no_grad():
        expected = images.lerp(network(images.double(), weights.double()).float(), b)
    assert (blended.views[:, 0] - expected).abs().max() < 1e-5, "a blend is not that of the weights"
    assert any(panel.title.endswith("and others") for panel in blended.panels()[0])
    bytes_and_statistics_of_styles()


def bytes_and_statistics_of_styles() -> None:
    """With an encoder the styles are the batch or own images; bytes stay bytes, images keep their type."""
    images = draw_images(3, 3, 8, 9, seed=0, dtype=torch.float32)
    identity = torch.nn.Conv2d(3, 3, 1, bias=False)
    identity.weight.data = torch.eye(3)[:, :, None, None] / 2
    adaptive = AdaptiveNetwork.from_decoder(load_pixel_model(torch.float32), identity, "0")
    result = style_augmentation(images, adaptive, p=1.0, strength=(1.0, 1.0), views=2, seed=1)
    statistics = adaptive.style_statistics(images)
    for view, weights in zip(result.views.unbind(1), result.blend_weights.unbind(1), strict=True):
        stylized = adaptive.stylize(images, statistics, weights)
        assert (view - stylized).abs().max() < 1e-6, "a view is not AdaIN of an image"
    assert result.style_names == ("image 0", "image 1", "image 2")
    transform = StyleAugmentation(adaptive, 1.0, (0.5, 0.5), styles=images[:1])
    assert transform({"label": 3}) == {"label": 3}, "a sample without images changes"
    pixels = tv_tensors.Image((255 * images[:2, None]).byte())
    view = transform(pixels)
    assert isinstance(view, tv_tensors.Image) and view.dtype == torch.uint8 and view.shape == pixels.shape
    content = pixels[:, 0].as_subclass(Tensor) / 255
    stylized = adaptive.stylize(content, adaptive.style_statistics(images[:1]), torch.ones(2, 1))
    assert (view[:, 0] / 255 - (content + stylized) / 2).abs().max() < 1.5 / 255, "bytes are not scaled"


@method(
    family="style",
    references=[
        Reference(
            key="rojasgomez2024",
            title="SASSL: Enhancing Self-Supervised Learning via Neural Style Transfer",
            authors="Rojas-Gomez, Singhal, Etemad, Bijamov, Morningstar, Mansfield",
            year=2024,
            url="https://arxiv.org/abs/2312.01187",
        )
    ],
    invariants=[PixelRange(field="views")],
    cost=Cost(forward=size.images * param.views),
    batch_independent=False,
    oracle=a_view_is_the_weighted_mean_of_image_and_stylized_image,
    demo={"p": 0.8, "strength": [0.1, 0.6], "seed": 3},
)
def style_augmentation(
    images: Images,
    stylizer: Stylizer,
    *,
    p: Annotated[float, Field(ge=0, le=1, description="probability that a view is stylized")] = 0.5,
    strength: Annotated[
        tuple[Strength, Strength], Field(description="smallest and largest weight b of the stylized image")
    ] = (0.1, 0.3),
    blend: Annotated[
        bool, Field(description="whether a style is a random blend of all styles instead of one of them")
    ] = False,
    views: Annotated[int, Field(ge=1, le=1000, description="number of views of each image")] = 4,
    seed: Seed = None,
) -> AugmentedViews:
    """Style augmentation (SASSL): views of images in random styles, for self-supervised learning.

    x' = (1 - b) x + b T(x, s),   b ~ U(strength),   s ~ U(styles);   with probability 1 - p, b = 0

    with T the stylizer: a result of ``fast_style_fit``, whose styles are drawn uniformly (with ``blend``
    their blends), or of ``adaptive_style_fit``, whose styles are then the images themselves. For training
    use the torchvision transform ``phosphene_plugins.style.style_augmentation.StyleAugmentation``, which
    this method applies. Images (N, 3, H, W) are in [0, 1].

    Returns:
        ``images`` (N, 3, H, W), ``views`` (N, V, 3, H, W) in [0, 1], ``strength`` (N, V), ``blend_weights``
        (N, V, S), ``style_names`` of the S styles.

    Raises:
        InputError: a network of another method, or a smallest strength above the largest.

    Example::
        from phosphene import run

        result = run("style_augmentation", images="builtin:scenes/2", p=1.0, views=3, seed=0)
        result.views.shape  # (2, 3, 3, 64, 64)

    Source: Rojas-Gomez et al. 2024 (SASSL), section 3.
    """
    augmentation = StyleAugmentation(stylizer, p, strength, blend=blend)
    augmented, drawn = [], []
    for _ in progress_bar(range(views), "Views", views):
        drawn.append(augmentation.make_params([images]))
        augmented.append(augmentation.transform(images, drawn[-1]))
    adaptive = isinstance(stylizer, AdaptiveNetwork)
    return AugmentedViews(
        images=images,
        views=torch.stack(augmented, 1),
        strength=torch.stack([params["strength"] for params in drawn], 1).to(images),
        blend_weights=torch.stack([params["blend_weights"] for params in drawn], 1).to(images),
        style_names=tuple(f"image {n}" for n in range(len(images))) if adaptive else stylizer.labels,
    )


@hookimpl
def phosphene_methods():
    return [style_augmentation]
