"""The boundary attack: a random walk along the boundary that drifts towards the image."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed, Start
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._lp_balls import length
from ._query_oracle import Decisions

#: Every so many steps the place on the sphere is asked about, too: half of those are to succeed.
_SPHERE = 5
#: How many answers a length is judged by, and how much it is changed.
_JUDGED, _FACTOR = 10, 1.5


def walks_down_to_the_boundary_of_a_linear_model() -> None:
    """In few dimensions it ends within 5 % of the distance to the line where two classes are level."""
    weight = torch.tensor([1.0, -2.0, 0.5, 1.5])
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.3, 0.6], [0.4, 0.5]]]])

    def label(pictures: Tensor) -> Tensor:
        return ((pictures - 0.5).flatten(1) @ weight > 0.4).long()

    model = load_model(label, input_size=(1, 2, 2), classes=["below", "above"])
    nearest = ((images - 0.5).flatten(1) @ weight - 0.4).abs() / weight.norm()
    found = boundary(model, images, label(images), max_queries=1500, seed=0)
    assert found.success.all()
    ratio = found.distance("l2") / nearest
    assert ratio.min() >= 1 and ratio.max() <= 1.05, f"{ratio.tolist()} times the nearest"


@method(
    family="attacks",
    title="Boundary attack",
    references=[
        Reference(
            key="brendel2018",
            title="Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning "
            "Models",
            authors="Brendel, Rauber, Bethge",
            year=2018,
            url="https://arxiv.org/abs/1712.04248",
        )
    ],
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "labels-only", "minimum-norm"],
    oracle=walks_down_to_the_boundary_of_a_linear_model,
    quick={"max_queries": 25},
    demo={"images": "builtin:scenes/2", "max_queries": 500},
)
def boundary(
    model: Model,
    images: Images,
    labels: Labels,
    start: Start = None,
    *,
    max_queries: Annotated[
        int, Field(ge=1, le=1_000_000, description="the most pictures shown to the model for one image")
    ] = 5000,
    sideways: Annotated[
        float, Field(gt=0, le=1, description="first length of a step along the sphere, of the distance")
    ] = 0.1,
    towards: Annotated[
        float, Field(gt=0, lt=1, description="first length of a step towards the image, of the distance")
    ] = 0.1,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Walk at random along the boundary, a little nearer to the image wherever the answer allows it.

    y = x + r (p - x) / ||p - x||,  p = x_t + sideways r u

    x_(t+1) = y - towards (y - x),  where the model still says what is wanted

    with r = ||x_t - x||_2 and u a random unit vector at right angles to x_t - x. Both lengths learn:
    ``sideways`` so that about half of the places y are still taken for what is wanted (at every fifth step
    the model is asked), ``towards`` so that about a quarter of the steps succeed. ``images``
    (N, C, H, W) in [0, 1], ``labels`` (N,); the distance is L2. Each image walks alone, with the same draws.

    The walk begins at ``start``, a picture of each wanted class, or where there is none at random noise,
    moved onto the boundary; an image for which no such picture is found comes back as it is, and so does
    one that is taken for another class from the outset (targeted: for the one wanted). ``adversarial``
    is the nearest picture met, a thousandth further out, so that rounding does not take it back.
    ``queries`` (N,) counts every picture that the model was shown, never more than ``max_queries``.
    ``hop_skip_jump`` needs fewer.

    Source: Brendel, Rauber & Bethge 2018, algorithm 1 and section 2.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    found = Decisions(model, images, labels, targeted=targeted, norm="l2", most=max_queries)
    points = found.begin(start, seed or 0)
    who = found.reach.isfinite().nonzero()[:, 0]
    points[who] = found.bisect(points[who], who, 1e-3)

    along = _Length(images, sideways, 0.5, 0.5)
    down = _Length(images, towards, 0.25, 0.5)
    for step in progress_bar(range(max_queries), "walking"):
        who = (found.reach.isfinite() & (found.left() > 0)).nonzero()[:, 0]
        if not len(who):
            break
        noise = torch.randn(1, *images.shape[1:], generator=generator).to(images)
        here, delta = images[who], points[who] - images[who]
        radius = length(delta)
        outward = delta / radius.clamp(min=torch.finfo(images.dtype).tiny)
        noise = noise - (noise * outward).sum((1, 2, 3), keepdim=True) * outward
        moved = delta + along.of(who) * radius * noise / length(noise).clamp(min=1e-12)
        sphere = (here + moved * (radius / length(moved).clamp(min=1e-12))).clamp(0, 1)
        if step % _SPHERE == 0:
            along.learn(who, found.ask(sphere, who))
            left = found.left()[who] > 0
            who, here, sphere = who[left], here[left], sphere[left]
        nearer = sphere + down.of(who) * (here - sphere)
        # The clipping may have brought it nearer already, never further off.
        won = found.ask(nearer, who)
        down.learn(who, won)
        points[who[won]] = nearer[won]
    return found.examples()


class _Length:
    """A step's length for each image, a share of its distance, and how often such steps have succeeded."""

    def __init__(self, images: Tensor, first: float, wanted: float, most: float) -> None:
        self.now, self.wanted, self.most = images.new_full((len(images),), first), wanted, most
        self.tried, self.won = torch.zeros_like(self.now), torch.zeros_like(self.now)

    def of(self, who: Tensor) -> Tensor:
        """(M, 1, 1, 1) for these images."""
        return self.now[who, None, None, None]

    def learn(self, who: Tensor, won: Tensor) -> None:
        """Count these answers; after ten of them make the length fit."""
        self.tried[who] += 1
        self.won[who] += won.to(self.won)
        judged = self.tried >= _JUDGED
        share = self.won / self.tried.clamp(min=1)
        fitted = torch.where(share > self.wanted, self.now * _FACTOR, self.now)
        fitted = torch.where(share < self.wanted / 2, self.now / _FACTOR, fitted)
        self.now = torch.where(judged, fitted.clamp(1e-7, self.most), self.now)
        self.tried, self.won = self.tried.masked_fill(judged, 0), self.won.masked_fill(judged, 0)


@hookimpl
def phosphene_methods():
    return [boundary]
