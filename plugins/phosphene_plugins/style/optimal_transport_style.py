"""Style transfer by optimal transport (STROTSS): relaxed earth mover's distance and self-similarity."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, hookimpl, method
from phosphene.images import resize
from phosphene.optimize import Optimization, PixelImage, concatenate_stages, optimize_image
from phosphene.results import Stylization
from phosphene.roles import Content, Frames, LayerName, Model, Seed, Start, Styles
from phosphene.spec import Cost, PixelRange, ceil, either, minimum, param, size

from ._parameters import LongestSide, Scales, StyleScale, TotalVariation
from ._pixel_features import draw_images, load_pixel_model, pixel_features
from ._resize import coarse_to_fine, shrink_to
from ._style_loss import StyleLoss, smoothness_loss
from ._tiled_gradient import TILE_COUNT, TileSide, image_loss
from ._transport_loss import (
    cosine_distances,
    draw_positions,
    hypercolumns,
    moment_distance,
    relaxed_emd,
    self_similarity_distance,
    sliced_distance,
)

#: Steps after which new positions and directions are drawn.
REDRAW_STEPS = 20


class TransportLoss:
    """(alpha L_content + L_transport + L_colors / alpha) / (1 + alpha + 1 / alpha) of images, (N,)."""

    def __init__(
        self,
        loss_network: StyleLoss,
        content: Tensor,
        styles: Tensor,
        alpha: float,
        transport: str,
        count: int,
        generator: Generator,
    ) -> None:
        self.alpha, self.transport = alpha, transport
        self.positions = draw_positions(content.shape[2:], count, generator)
        style_positions = [draw_positions(styles.shape[2:], count, generator) for _ in styles]
        with torch.no_grad():
            self.content_features, _ = self.sample(loss_network.features(content), content, self.positions)
            samples = [
                self.sample(loss_network.features(s), s, p)
                for s, p in zip(styles.split(1), style_positions, strict=True)
            ]
        self.style_features, self.style_colors = (torch.cat(part, 1) for part in zip(*samples, strict=True))
        depth = self.style_features.shape[2]
        self.directions = F.normalize(torch.randn(depth, depth, dtype=torch.float64, generator=generator))

    def sample(self, maps: list[Tensor], images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Hypercolumns (N, n, D) and colors (N, n, 3) of images at positions."""
        style_maps = maps[:-1]
        # equivalent mutants: all maps have one precision
        return hypercolumns(style_maps, positions), hypercolumns([images], positions).to(maps[0])

    def __call__(self, maps: list[Tensor], images: Tensor) -> Tensor:
        features, colors = self.sample(maps, images, self.positions)
        if self.transport == "relaxed_emd":
            distances = cosine_distances(features, self.style_features)
            transport = relaxed_emd(distances) + moment_distance(features, self.style_features)
        else:
            scale = self.style_features.square().mean().clamp(min=1e-30)
            transport = sliced_distance(features, self.style_features, self.directions) / scale
        content = self_similarity_distance(features, self.content_features)
        palette = relaxed_emd(torch.cdist(colors, self.style_colors.expand(len(colors), -1, -1)))
        total = self.alpha * content + transport + palette / self.alpha
        return total / (1 + self.alpha + 1 / self.alpha)


def distances_by_hand() -> None:
    """Loops over vectors: cosine distances, both relaxations, moments, self-similarities, projections."""
    generator = Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 6, 3, dtype=torch.float64, generator=generator)
    z = torch.randn(1, 4, 3, dtype=torch.float64, generator=generator)

    def cosine(a: Tensor, b: Tensor) -> float:
        return 1 - float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())

    table = torch.tensor([[cosine(a, b) for b in z[0]] for a in x[0]], dtype=torch.float64)
    assert (cosine_distances(x, z)[0] - table).abs().max() < 1e-12
    for distances in (table, table.T):
        rows, columns = list(distances), list(distances.T)
        means = [sum(float(min(v)) for v in lines) / len(lines) for lines in (rows, columns)]
        assert abs(float(relaxed_emd(distances[None])) - max(means)) < 1e-12
    covariances = [v[0].T.cov(correction=0) for v in (x, z)]
    moments = (x.mean(1) - z.mean(1)).abs().mean() + (covariances[0] - covariances[1]).abs().mean()
    assert abs(float(moment_distance(x, z)) - float(moments)) < 1e-12
    own = [torch.tensor([[cosine(a, b) for b in v[0]] for a in v[0]], dtype=torch.float64) for v in (x, y)]
    shares = [t / t.sum(0) for t in own]
    assert abs(float(self_similarity_distance(x, y)) - float((shares[0] - shares[1]).abs().sum() / 6)) < 1e-9
    directions = torch.eye(3, dtype=torch.float64)[:2]
    ordered = x[0, :, :2].sort(0).values, z[0, :, :2].sort(0).values[[0, 1, 1, 2, 3, 3]]
    expected = (ordered[0] - ordered[1]).square().mean()
    assert abs(float(sliced_distance(x, z, directions)) - float(expected)) < 1e-12


def pixels_as_features_have_a_closed_form() -> None:
    """Features = pixels and their means at all positions: the first loss; the style itself has none."""
    distances_by_hand()
    tested: Any = optimal_transport_style  # its result has every field here
    model, content, start = load_pixel_model(), *(draw_images(2, 3, 6, 6, seed=s) for s in (0, 1))
    styles = draw_images(2, 3, 6, 5, seed=2)

    def columns(images: Tensor) -> Tensor:
        maps = [pixel_features(images, layer) for layer in ("0", "1")]
        enlarged = F.interpolate(maps[1], images.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([maps[0], enlarged], 1).flatten(2).mT

    targets, colors = torch.cat([*columns(styles)])[None], torch.cat([*styles.flatten(2).mT])[None]
    directions = F.normalize(torch.randn(6, 6, dtype=torch.float64, generator=Generator().manual_seed(3)))

    def loss(images: Tensor, transport: str, alpha: float) -> Tensor:
        features = columns(images)
        if transport == "relaxed_emd":
            distance = relaxed_emd(cosine_distances(features, targets)) + moment_distance(features, targets)
        else:
            distance = sliced_distance(features, targets, directions) / targets.square().mean()
        total = alpha * self_similarity_distance(features, columns(content)) + distance
        color_distances = (images.flatten(2).mT[:, :, None] - colors[:, None]).square().sum(3).sqrt()
        return (total + relaxed_emd(color_distances) / alpha) / (1 + alpha + 1 / alpha)

    options: Any = {"style_layers": ["0", "1"], "seed": 3}
    for transport in ("relaxed_emd", "sliced_wasserstein"):
        for alpha in (1.0, 4.0):
            options |= {"transport": transport, "alpha": alpha}
            result = tested(model, content, styles, start, steps=1, **options)
            longer = tested(model, content, styles, start, steps=2, **options)
            for scores, candidates in ((longer.losses[0], start), (longer.losses[1], result.stylized)):
                expected = loss(candidates, transport, alpha)
                assert (scores - expected).abs().max() < 1e-9, f"{transport}: the loss differs"
            assert torch.equal(result.sources, styles) and torch.equal(result.images, content)
    # After 20 steps the loss is of new positions; the steps lower it, from the content by default.
    generator, network = Generator().manual_seed(0), StyleLoss(model, None, ["0", "1"])
    first, second = (
        TransportLoss(network, content, styles, 1.0, "relaxed_emd", 16, generator) for _ in range(2)
    )
    drawn: Any = {"style_layers": ["0", "1"], "positions": 16, "alpha": 1.0, "seed": 0}
    before = tested(model, content, styles, steps=20, **drawn)
    after = tested(model, content, styles, steps=21, frames=2, **drawn)
    torch.testing.assert_close(after.losses[0], first(network.features(content), content))
    torch.testing.assert_close(after.losses[20], second(network.features(before.stylized), before.stylized))
    assert (before.losses[19] < before.losses[0]).all() and len(after.frames) == 2
    assert (after.style, tested(model, content, styles[:1], steps=1).style) == ("in 2 styles", "in the style")
    one = tested(model, content, styles, steps=1, **drawn | {"style_layers": ["0"]})
    assert (one.losses[0] != after.losses[0]).all()
    assert tested(model, content, styles, steps=1, scales=2, **drawn).losses.shape == (2, 2)
    square = draw_images(1, 3, 6, 6, seed=4)
    itself = tested(model, square, square, square, steps=1)
    assert itself.losses.abs().max() < 1e-6, "an image has a distance from itself"


@method(
    family="style",
    references=[
        Reference(
            key="kolkin2019",
            title="Style Transfer by Relaxed Optimal Transport and Self-Similarity",
            authors="Kolkin, Salavon, Shakhnarovich",
            year=2019,
            url="https://arxiv.org/abs/1904.12785",
        ),
        Reference(
            key="heitz2021",
            title="A Sliced Wasserstein Loss for Neural Texture Synthesis",
            authors="Heitz, Vanhoey, Chambon, Belcour",
            year=2021,
            url="https://arxiv.org/abs/2006.07229",
        ),
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # Every 20 steps have targets of their own.
    cost=Cost(
        forward=param.scales
        * (
            size.images * param.steps * minimum(2, either(param.tile, 1)) * TILE_COUNT
            + ceil(param.steps / REDRAW_STEPS) * (size.images + size.styles)
        ),
        backward=param.scales * size.images * param.steps * TILE_COUNT,
    ),
    oracle=pixels_as_features_have_a_closed_form,
    quick={"steps": 3, "scales": 1, "positions": 50},
    demo={
        "images": {"files": "builtin:part-scenes/1", "size": (128, 128)},
        "styles": ["builtin:night"],
        "alpha": 2,
        "positions": 512,
        "total_variation": 4,
        "scales": 2,
        "steps": 60,
    },
)
def optimal_transport_style(
    model: Model,
    images: Content,
    styles: Styles,
    start: Start = None,
    *,
    transport: Annotated[
        Literal["relaxed_emd", "sliced_wasserstein"],
        Field(description="distance of feature distributions: relaxed earth mover's with moments, or sliced"),
    ] = "relaxed_emd",
    alpha: Annotated[
        float, Field(gt=0, le=1000, description="weight of the content; 1 / alpha: of the style's colors")
    ] = 1.0,
    style_layers: Annotated[
        list[LayerName] | None, Field(description="layers of the features; default: every stage")
    ] = None,
    positions: Annotated[
        int, Field(ge=16, le=16384, description="number of positions whose features are compared")
    ] = 1024,
    total_variation: TotalVariation = 0.0,
    style_scale: StyleScale = 1.0,
    size: LongestSide = 512,
    scales: Scales = 1,
    tile: TileSide = None,
    steps: Annotated[int, Field(ge=1, le=100_000, description="optimization steps at each scale")] = 100,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate of Adam")] = 0.02,
    frames: Frames = 0,
    seed: Seed = None,
) -> Stylization:
    """Style transfer by optimal transport (STROTSS): relaxed earth mover's distance and self-similarity.

    L(I) = (alpha L_content + L_transport + L_colors / alpha) / (1 + alpha + 1 / alpha)

    L_content = 1/n sum_pq | D_pq / sum_p D_pq - D^c_pq / sum_p D^c_pq |

    L_transport = max(1/n sum_p min_q C_pq, 1/m sum_q min_p C_pq) + |mu - mu_s|_1 / d + |S - S_s|_1 / d^2

    with D the cosine distances between the features of the image at ``positions`` p and q, C those to the
    features of the style, and mu and S means and covariances. Features are the values of all ``style_layers``
    at a position (hypercolumns). Content is preserved as relations between positions, not as features, so
    the style may change them more than a Gram matrix allows. L_colors is the relaxed distance of colors.
    ``transport`` "sliced_wasserstein" compares the features' projections on random directions instead,
    relative to the style's mean square. Positions and directions are drawn anew every 20 steps.

    Several styles are one distribution. The content (N, 3, H, W) is processed at its own size, up to
    ``size``; ``scales`` optimizes from coarse to fine. Optimization begins at ``start``, or at the content.
    ``tile`` computes the same gradient without the activations of all layers in memory, at twice the time.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N),
        ``sources`` (S, 3, H', W') the styles, ``frames`` (F, N, 3, H, W).

    Raises:
        InputError: no style layers.
        ModelError: tiles for a layer whose receptive field covers the image.

    Example::
        from phosphene import run

        result = run("optimal_transport_style", images="builtin:scenes/1", styles=["builtin:swirls"], steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Kolkin et al. 2019, section 3; Heitz et al. 2021, section 3 (sliced distance).
    """
    loss_network, content = StyleLoss(model, None, style_layers), shrink_to(images, size)
    generator = Generator().manual_seed(seed or 0)

    stages: list[Optimization] = []
    for scaled_content, scaled_styles in coarse_to_fine(content, styles, scales, style_scale):
        height, width = scaled_content.shape[2:]
        if stages:
            initial = resize(stages[-1].images, (height, width))
        else:
            initial = scaled_content if start is None else resize(start, (height, width))
        for done in range(0, steps, REDRAW_STEPS):
            end = min(steps, done + REDRAW_STEPS)
            loss = TransportLoss(
                loss_network, scaled_content, scaled_styles, alpha, transport, positions, generator
            )
            stages.append(
                optimize_image(
                    image_loss(loss_network, loss, scaled_content, tile),
                    PixelImage(initial),
                    steps=end - done,
                    lr=lr,
                    maximize=False,
                    regularizer=smoothness_loss(total_variation),
                    frames=frames * end // steps - frames * done // steps,
                )
            )
            initial = stages[-1].images
    optimization = concatenate_stages(stages)
    return Stylization(
        images=content,
        stylized=optimization.images,
        style="in the style" if len(styles) == 1 else f"in {len(styles)} styles",
        sources=shrink_to(styles, size),
        losses=optimization.scores,
        frames=optimization.frames,
    )


@hookimpl
def phosphene_methods():
    return [optimal_transport_style]
