"""The penalised target: raise a class's score, and pay for the largest change of any pixel."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._gradients import climb, judged, unreached

#: Halvings that find the ball's radius: to 2^-30 of a pixel.
_HALVINGS = 30


def weighs_the_slope_against_the_penalty() -> None:
    """S = w . x: r grows while the |w_i| of the pixels that still have room sum to more than lambda."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[9.0, 9.0, 9.0, 9.0], [4.0, -3.0, 2.0, 1.0]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    # Their pixels have room for 0.1, 0.2, 0.3 and 0.4 the way of the weights.
    images = torch.tensor([[[[0.9, 0.2], [0.7, 0.6]]]], dtype=torch.float64)
    wanted = torch.tensor([1])
    assert model(images).argmax(1) == 0
    for strength, moves in ((11, [0, 0, 0, 0]), (5, [0.1, -0.2, 0.2, 0.2]), (0.5, [0.1, -0.2, 0.3, 0.4])):
        found = penalized_target(model, images, wanted, penalty=strength, steps=300, step_size=0.01)
        move = torch.tensor(moves, dtype=torch.float64).view(1, 1, 2, 2)
        torch.testing.assert_close(found.adversarial - images, move, rtol=0, atol=1e-2)


@method(
    family="attacks",
    title="Penalised target",
    references=[
        Reference(
            key="szegedy2014",
            title="Intriguing properties of neural networks",
            authors="Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus",
            year=2014,
            url="https://arxiv.org/abs/1312.6199",
        ),
        Reference(
            key="parikh2014",
            title="Proximal Algorithms",
            authors="Parikh, Boyd",
            year=2014,
            url="https://doi.org/10.1561/2400000003",
        ),
    ],
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    tags=["white-box", "targeted"],
    oracle=weighs_the_slope_against_the_penalty,
    quick={"steps": 4},
    demo={"images": "builtin:scenes/3", "labels": ["circle", "cross", "star"]},
)
def penalized_target(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    penalty: Annotated[
        float, Field(ge=0, le=1e9, description="lambda: logits that a pixel's full range costs")
    ] = 100.0,
    steps: Annotated[int, Field(ge=1, le=100_000, description="how many steps")] = 100,
    step_size: Annotated[
        float, Field(gt=0, le=1, description="how far the pixel with the largest gradient goes in a step")
    ] = 0.01,
) -> AdversarialExamples:
    """Raise the score of a class that is wanted, less a penalty on the largest change of any pixel.

    I* = argmax_I S_c(I) - lambda ||I - I_orig||_inf

    with S_c the logit of the class in ``labels`` (N,). Each step climbs S_c and then solves the penalty
    exactly: v = I + eta dS_c/dI, then the nearest point to v, at a price of eta lambda ||. - I_orig||_inf,
    with pixels in [0, 1]. That is v clipped to the ball whose radius r solves sum_i max(|v_i - I_i| - r, 0)
    = eta lambda. The penalty outweighs everything (and the image stays as it is) where lambda is above
    the gradient's sum of absolute values. eta is ``step_size`` over the largest gradient; the best point
    of all steps comes back. ``success`` tells whether the model takes the picture for the wanted class; an
    image of which that is true from the outset comes back as it is.

    Source: lecture 21.7.1; the step is Parikh & Boyd 2014, section 4.2.
    """
    with torch.no_grad():
        before = model(images)
    rows = unreached(before, labels, targeted=True)
    original, wanted = images[rows], labels[rows]
    x, best = original, original
    height = torch.full_like(images[rows, 0, 0, 0], -torch.inf)
    for _ in progress_bar(range(steps), "raising the score"):
        if not len(rows):
            break
        score, gradient, _ = climb(model, x, wanted, _score)
        change = (x - original).abs().amax((1, 2, 3))
        value = score - penalty * change
        best = torch.where((value > height)[:, None, None, None], x, best)
        height = torch.maximum(height, value)
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        eta = step_size / largest.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
        x = _penalised(x + eta * gradient, original, eta * penalty)
    return judged(model, images, images.index_copy(0, rows, best), labels, before, targeted=True)


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def _penalised(points: Tensor, images: Tensor, price: Tensor) -> Tensor:
    """argmin_u ||u - v||^2 / 2 + price ||u - image||_inf over pixels in [0, 1]; price (N, 1, 1, 1)."""
    delta = points - images
    room = torch.where(delta > 0, 1 - images, images)
    low, high = torch.zeros_like(price), torch.ones_like(price)
    for _ in range(_HALVINGS):
        radius = (low + high) / 2
        # What a wider ball would gain: pixels that the picture's range stops first gain nothing.
        gain = torch.where(room > radius, (delta.abs() - radius).clamp(min=0), 0).sum((1, 2, 3), keepdim=True)
        low, high = torch.where(gain > price, radius, low), torch.where(gain > price, high, radius)
    radius = torch.where(low > 0, high, 0)
    return (images + delta.clamp(-radius, radius)).clamp(0, 1)


@hookimpl
def phosphene_methods():
    return [penalized_target]
