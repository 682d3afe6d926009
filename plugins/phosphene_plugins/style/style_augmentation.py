"""Style augmentation: views of pictures in random styles, for learning what does not depend on style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import PIL.Image
import torch
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from phosphene import InputError, Reference, hookimpl, method, progress_bar
from phosphene.results import Panel, Result, TrainedNetwork
from phosphene.roles import Images, Seed, Stylizer
from phosphene.spec import Cost, PixelRange, param, size

from ._adaptive_network import AdaptiveNetwork
from ._style_network import StyleNetwork, network_of, paintable

#: How many pictures are painted together.
AT_ONCE = 32
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class StyleAugmentation(v2.Transform):  # type: ignore[misc]
    """Repaint a picture with probability ``p`` in a random style, as strongly as a random number says.

    x' = (1 - b) x + b T(x, s),   b ~ U(strength),   s ~ U(styles);   with probability 1 - p, b = 0

    with T a trained stylizer: what ``fast_style_fit`` gave, which knows its styles, or what
    ``adaptive_style_fit`` gave with ``styles`` (S, 3, H', W') in [0, 1] (None: the pictures of the batch
    themselves). With ``blend`` a style is a mixture of all, its shares evenly distributed.
    ``load_result("builtin:shapes-styles")`` and ``load_result("builtin:shapes-adaptive")`` are bundled.

    A transform like any of ``torchvision.transforms.v2``: pictures (..., 3, H, W), tensors or
    ``tv_tensors.Image``, floats in [0, 1] or bytes, keep shape, kind and dtype; each picture of a batch has a
    draw of its own, from torch's own state; whatever else is in a sample is left alone. No gradient passes.
    Raises InputError for PIL pictures (``v2.ToImage()`` makes tensors of them), for pixels elsewhere, and
    for what T cannot paint. Source: Rojas-Gomez et al. 2024 (SASSL), who draw p = 0.8 and b from [0.1, 0.3].
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
            raise InputError(f"p is in [0, 1] and strength a part of it, not p={p} and strength={strength}")
        if isinstance(stylizer, AdaptiveNetwork):
            self.manner = None if styles is None else stylizer.manner(styles)
        else:
            network_of(stylizer)  # which refuses any other
            if styles is not None:
                names = ", ".join(stylizer.labels)
                raise InputError(f"a network of fast_style_fit knows its styles: {names}")
        self.stylizer, self.p, self.strength, self.blend = stylizer, p, (low, high), blend

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse what would otherwise pass by unpainted."""
        if any(isinstance(given, PIL.Image.Image) for given in flat_inputs):
            raise InputError("StyleAugmentation paints tensors: put v2.ToImage() before it")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """For each picture of a sample its b (N,), 0 where it is to stay, and its style's shares (N, S)."""
        count = max((math.prod(given.shape[:-3]) for given in flat_inputs), default=0)
        if not isinstance(self.stylizer, AdaptiveNetwork):
            styles = len(self.stylizer.labels)
        else:
            styles = count if self.manner is None else len(self.manner[0])
        strength = torch.empty(count).uniform_(*self.strength) * (torch.rand(count) < self.p)
        if self.blend:
            shares = torch.empty(count, styles).exponential_()
            return {"strength": strength, "shares": shares / shares.sum(1, keepdim=True)}
        return {"strength": strength, "shares": torch.eye(styles)[torch.randint(max(1, styles), (count,))]}

    @torch.no_grad()
    def transform(self, inpt: Any, params: dict[str, Tensor]) -> Any:
        """The pictures, painted as the parameters say."""
        images = inpt.as_subclass(torch.Tensor)
        pictures = paintable(images.reshape(-1, *images.shape[-3:]))
        if not pictures.is_floating_point():
            pictures = v2.functional.to_dtype(pictures, torch.float32, scale=True)
        if pictures.numel() and not -1e-6 <= float(pictures.min()) <= float(pictures.max()) <= 1 + 1e-6:
            raise InputError("pixels must lie in [0, 1]: put StyleAugmentation before v2.Normalize")
        painted = images.clone().reshape(-1, *images.shape[-3:])
        for rows in params["strength"][: len(pictures)].nonzero()[:, 0].split(AT_ONCE):
            b = params["strength"][rows, None, None, None].to(pictures)
            mixed = pictures[rows].lerp(self._painted(pictures, rows, params["shares"][rows]), b)
            painted[rows] = v2.functional.to_dtype(mixed, images.dtype, scale=True)
        painted = painted.reshape(images.shape)
        return tv_tensors.wrap(painted, like=inpt) if isinstance(inpt, tv_tensors.Image) else painted

    def _painted(self, pictures: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        """T(x, s) of some of the pictures (N, 3, H, W)."""
        parameter = next(self.stylizer.network.parameters())
        if isinstance(self.stylizer, AdaptiveNetwork):
            manner = self.stylizer.manner(pictures) if self.manner is None else self.manner
            return self.stylizer.paint(pictures[rows], manner, shares)
        return self.stylizer.network(pictures[rows].to(parameter), shares.to(parameter)).to(pictures)

    # As torchvision called them before 0.21.
    _check_inputs, _get_params, _transform = check_inputs, make_params, transform


@dataclass(frozen=True, eq=False, kw_only=True)
class AugmentedViews(Result):
    """Views of pictures: ``images`` (N, 3, H, W), ``views`` (N, V, 3, H, W) of them, in [0, 1].

    ``strength`` (N, V) is how strongly each was repainted, 0 where it was not; ``shares`` (N, V, S) the parts
    of the styles ``names`` in its style.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "views", "strength", "shares")

    images: Tensor
    views: Tensor
    strength: Tensor
    shares: Tensor
    names: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, views, strengths, shares in zip(
            self.images, self.views, self.strength.tolist(), self.shares.tolist(), strict=True
        ):
            titles = [
                f"{b:.0%} {self._style(parts)}" if b else "as it is"
                for b, parts in zip(strengths, shares, strict=True)
            ]
            views = [Panel(view, title, is_output=True) for view, title in zip(views, titles, strict=True)]
            groups.append([Panel(image, "the picture"), *views])
        return groups

    def _style(self, shares: Sequence[float]) -> str:
        """The largest share's name, with a mark where there are others."""
        largest = max(range(len(shares)), key=shares.__getitem__)
        return self.names[largest] + (" and others" if shares[largest] < 1 else "")


def a_view_lies_between_the_picture_and_the_painted_one() -> None:
    """With b given, a view is (1 - b) x + b T(x, s) of one of the styles; without p, it is the picture."""
    torch.manual_seed(0)
    network = StyleNetwork(styles=2, width=3, blocks=0).double()
    empty: Any = {
        "losses": torch.empty(0),
        "previews": torch.empty(0, 3, 8, 8),
        "method": "style.fast_style_fit",
    }
    stylizer = TrainedNetwork(network=network, config={}, labels=("one", "other"), **empty)
    images = torch.rand(3, 3, 8, 9)
    with torch.no_grad():
        painted = torch.stack([network(images.double(), torch.eye(2)[[s] * 3].double()) for s in range(2)], 1)
    found = style_augmentation(images, stylizer, p=1.0, strength=(0.25, 0.25), views=4, seed=1)
    which = found.shares.argmax(2)
    for n in range(3):
        wanted = 0.75 * images[n] + 0.25 * painted[n, which[n]]
        assert (found.views[n] - wanted).abs().max() < 1e-6, "a view is not (1 - b) x + b T(x, s)"
    assert set(which.flatten().tolist()) == {0, 1}, "one style is never drawn"
    still = style_augmentation(images, stylizer, p=0.0, views=2, seed=1)
    assert torch.equal(still.views, images[:, None].expand_as(still.views)), "p = 0 changes the picture"


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
    oracle=a_view_lies_between_the_picture_and_the_painted_one,
    demo={"p": 0.8, "strength": [0.1, 0.6], "seed": 3},
)
def style_augmentation(
    images: Images,
    stylizer: Stylizer,
    *,
    p: Annotated[float, Field(ge=0, le=1, description="probability that a view is painted")] = 0.5,
    strength: Annotated[tuple[Share, Share], Field(description="b, at least and at most")] = (0.1, 0.3),
    blend: Annotated[bool, Field(description="mixtures of styles instead of one")] = False,
    views: Annotated[int, Field(ge=1, le=1000, description="of each picture")] = 4,
    seed: Seed = None,
) -> AugmentedViews:
    """Views of pictures in random styles, as self-supervised learning is shown them.

    x' = (1 - b) x + b T(x, s),   b ~ U(strength),   s ~ U(styles);   with probability 1 - p, b = 0

    with T the stylizer of ``fast_style_fit``, whose styles are drawn evenly (with ``blend`` their mixtures),
    or that of ``adaptive_style_fit``, whose styles are then the given pictures themselves. In a training,
    ``phosphene_plugins.style.style_augmentation.StyleAugmentation`` is the same as a transform of
    torchvision. Pictures (N, 3, H, W) in [0, 1]. Raises InputError for another kind of network and where
    strength's ends are the wrong way round. Source: Rojas-Gomez et al. 2024.
    """
    augmentation = StyleAugmentation(stylizer, p, strength, blend=blend)
    made, drawn = [], []
    for _ in progress_bar(range(views), "Views", views):
        drawn.append(augmentation.make_params([images]))
        made.append(augmentation.transform(images, drawn[-1]))
    adaptive = isinstance(stylizer, AdaptiveNetwork)
    return AugmentedViews(
        images=images,
        views=torch.stack(made, 1),
        strength=torch.stack([params["strength"] for params in drawn], 1).to(images),
        shares=torch.stack([params["shares"] for params in drawn], 1).to(images),
        names=tuple(f"picture {n}" for n in range(len(images))) if adaptive else stylizer.labels,
    )


@hookimpl
def phosphene_methods():
    return [style_augmentation]
