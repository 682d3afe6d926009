"""Carlini & Wagner: the smallest perturbation, as a trade between its size and what it does to the logits."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._gradients import climb, judged, logits_on_graph, margin, reached, unreached
from ._lp_balls import Norm, distance, drawn_back
from .deepfool import likeliest, nearest_boundary

#: How often the last picture's way back is halved, and by how much tau shrinks.
_HALVINGS, _TAU = 10, 0.9
#: The first descent begins so far beyond the nearest boundary, as shares of the way there, and so many
#: of the likeliest classes compete.
_BEYOND, _CANDIDATES = 1.02, 10
#: After a round that brought an image's example no nearer than to this share, it is done.
_NEARER = 0.999


def stays_within_three_percent_of_the_nearest_boundary_of_a_linear_model() -> None:
    """The exact minimum is min_k (z_y - z_k) / ||w_k - w_y||, in the dual norm."""
    generator = torch.Generator().manual_seed(2)
    linear = nn.Linear(48, 5).double()
    linear.weight.data = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    linear.bias.data.fill_(-100)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 4, 4))
    images = 0.5 + 0.05 * torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    logits = model(images).detach()
    labels = logits.argmax(1)
    away = linear.weight.detach() - linear.weight.detach()[labels][:, None]
    gap = logits.gather(1, labels[:, None]) - logits
    norms: list[tuple[Literal["l2", "linf"], float]] = [("l2", 2.0), ("linf", 1.0)]
    for norm, dual in norms:
        least = (gap / away.norm(dual, dim=2)).scatter(1, labels[:, None], torch.inf).amin(1)
        found = carlini_wagner(model, images, labels, norm=norm, steps=100)
        ratio = found.distance(norm) / least
        assert found.success.all() and ratio.min() > 0.9999 and ratio.max() < 1.03, ratio


@method(
    family="attacks",
    title="Carlini-Wagner",
    references=[
        Reference(
            key="carlini2017",
            title="Towards Evaluating the Robustness of Neural Networks",
            authors="Carlini, Wagner",
            year=2017,
            url="https://arxiv.org/abs/1608.04644",
        )
    ],
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.search_steps * param.steps + (_HALVINGS + 3)),
        backward=size.images * (param.search_steps * param.steps + (_CANDIDATES - 1)),
    ),
    tags=["white-box", "minimum-norm"],
    oracle=stays_within_three_percent_of_the_nearest_boundary_of_a_linear_model,
    quick={"steps": 6, "search_steps": 2},
    demo={"images": "builtin:scenes/3", "steps": 40, "search_steps": 4},
)
def carlini_wagner(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: Annotated[Literal["l2", "linf"], Field(description="what is to be small")] = "l2",
    steps: Annotated[int, Field(ge=1, le=100_000, description="how many steps of Adam for one c")] = 100,
    search_steps: Annotated[int, Field(ge=1, le=100, description="how many values of c, or of tau")] = 6,
    kappa: Annotated[float, Field(ge=0, le=1e6, description="by how much the wrong logit must lead")] = 0.0,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
) -> AdversarialExamples:
    """Find the smallest perturbation that changes the answer, weighing its size against the logits' margin.

    "l2":   min ||d||_2^2 + c f(x + d)      "linf": min sum_i max(|d_i| - tau, 0) + c f(x + d)

    f = max(z_y - max_{k != y} z_k + kappa, 0), and towards a wanted class t max_{k != t} z_k - z_t + kappa.
    In "l2" every image's c is halved on a logarithmic scale between the largest that failed and the
    smallest that led to a success; in "linf" its tau becomes 0.9 of the largest |d_i| at every success, and c
    doubles where there is none. Adam descends; an image whose loss no longer falls stops early, and in
    "l2" one is done whose last c brought nothing nearer. What was found last is drawn back towards the image
    for as long as it stays adversarial (by bisection).
    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image that is taken for another class from the
    outset (targeted: for the one wanted) comes back as it is, and one for which nothing was found, too.

    Three departures from the paper. Pixels are clipped after every step, its "projected gradient descent",
    and not squashed by tanh, under which black and white pixels hardly move. c and the step size begin where
    they would be right if the model were linear, which the first gradient g tells: c about
    2 |z_y - z_k| / ||g||^2, so that neither the logits' scale nor the picture's size matters. And the first
    descent begins just beyond the boundary that is then the nearest, DeepFool's first step, since the class
    with the second largest logit, to which a descent from the image itself leads, may lie further away.

    Source: Carlini & Wagner 2017, sections V and VI.
    """

    place = images.detach().requires_grad_()
    logits = logits_on_graph(model, place)
    before, adversarial = logits.detach(), images.clone()
    rows = unreached(before, labels, targeted)
    if len(rows) and before.shape[1] > 1:
        if len(rows) < len(images):  # a pass more costs less than the way back for those who are done
            place = images[rows].requires_grad_()
            logits = logits_on_graph(model, place)
        search = _Search(model, place, logits, labels[rows], kappa, targeted, norm)
        for _ in progress_bar(range(search_steps), "searching c"):
            search.descend(steps)
        adversarial[rows] = search.drawn_back()
    return judged(model, images, adversarial, labels, before, targeted=targeted)


class _Search:
    """The images that are attacked, each with a c of its own and the nearest example so far."""

    def __init__(
        self,
        model: Model,
        place: Tensor,
        logits: Tensor,
        labels: Tensor,
        kappa: float,
        targeted: bool,
        norm: Norm,
    ) -> None:
        self.model, self.images, self.labels, self.kappa = model, place.detach(), labels, kappa
        self.targeted, self.norm = targeted, norm
        # As if the model were linear around the images, which the graph of their ``logits`` tells.
        own, rivals = labels, likeliest(logits.detach(), labels, _CANDIDATES)
        if targeted:
            own, rivals = logits.detach().argmax(1), labels[:, None]
        boundary = nearest_boundary(logits, place, own, rivals, norm)
        self.start = (self.images + _BEYOND * boundary.step(norm)).clamp(0, 1)
        tiny = torch.finfo(place.dtype).tiny ** 0.5
        steep, size = boundary.steep[:, 0].clamp(min=tiny), place[0].numel()
        needed = (boundary.leads[:, 0] + kappa) / steep
        self.c = ((3 * needed if norm == "l2" else size) / steep).clamp(tiny, 1 / tiny)
        self.rate = (needed / math.sqrt(size if norm == "l2" else 64)).clamp(1e-7, 0.05)
        self.low, self.high = torch.zeros_like(self.c), torch.full_like(self.c, torch.inf)
        self.tau, self.done = torch.ones_like(self.c), torch.zeros_like(self.labels, dtype=torch.bool)
        self.nearest, self.best = torch.full_like(self.c, torch.inf), self.images.clone()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        lead = margin(logits, labels)
        return (self.kappa + lead if self.targeted else self.kappa - lead).clamp(min=0)

    def descend(self, steps: int) -> None:
        """One round of Adam for every image, and the c and tau of the next."""
        hit = torch.zeros_like(self.labels, dtype=torch.bool)
        rows, reach = (~self.done).nonzero()[:, 0], self.nearest.clone()
        x = self.start[rows]
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        least = marked = torch.full_like(self.c[rows], torch.inf)
        for step in range(steps if len(rows) else 0):
            value, gradient, logits = climb(self.model, x, self.labels[rows], self.loss)
            delta = x - self.images[rows]
            size, slope = self._size(delta, rows)
            far = distance(x, self.images[rows], self.norm)
            won = self._won(logits, rows)
            hit[rows] |= won & (far <= self.tau[rows]) if self.norm == "linf" else won
            closer = won & (far < self.nearest[rows])
            self.nearest[rows[closer]], self.best[rows[closer]] = far[closer], x[closer]
            least = torch.minimum(least, size + self.c[rows] * value)
            going = ~hit[rows] if self.norm == "linf" else torch.ones_like(won)
            if step % max(1, steps // 10) == 0:
                going, marked = going & (least < 0.999 * marked), least
            if not going.all():
                rows = rows[going]
                if not len(rows):
                    break
                x, mean, square, gradient, slope, least, marked = (
                    part[going] for part in (x, mean, square, gradient, slope, least, marked)
                )
            gradient = slope + _wide(self.c[rows]) * gradient
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
            spread = (square / (1 - 0.999 ** (step + 1))).sqrt() + torch.finfo(x.dtype).tiny ** 0.5
            # To nothing, like a cosine, so that the last steps settle on the boundary.
            rate = self.rate[rows] * (1 + math.cos(math.pi * step / steps)) / 2
            x = (x - _wide(rate) * (mean / (1 - 0.9 ** (step + 1))) / spread).clamp(0, 1)
        self.start = self.images  # what the model is really like there, the image's own surroundings tell
        self._next(hit)
        self.done = (self.nearest > _NEARER * reach) & self.high.isfinite()

    def _next(self, hit: Tensor) -> None:
        # Where the model is not linear enough for the first guess, longer steps.
        self.rate = torch.where(self.nearest.isinf(), 4 * self.rate, self.rate).clamp(max=0.05)
        if self.norm == "linf":
            self.tau = torch.where(hit, _TAU * self.nearest, self.tau)
            self.c = torch.where(hit, self.c, 2 * self.c)
            return
        self.high = torch.where(hit, torch.minimum(self.high, self.c), self.high)
        self.low = torch.where(hit, self.low, torch.maximum(self.low, self.c))
        between = torch.where(self.low > 0, (self.low.sqrt() * self.high.sqrt()), self.c / 2)
        self.c = torch.where(self.high.isinf(), self.c * 4, between)

    def _size(self, delta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How dear the perturbation is, and the slope of that."""
        if self.norm == "l2":
            return delta.square().sum((1, 2, 3)), 2 * delta
        over = (delta.abs() - _wide(self.tau[rows])).clamp(min=0)
        return over.sum((1, 2, 3)), delta.sign() * (over > 0)

    def _won(self, logits: Tensor, rows: Tensor) -> Tensor:
        enough = self.loss(logits, self.labels[rows]) <= 0
        return reached(logits, self.labels[rows], self.targeted) & enough

    def drawn_back(self) -> Tensor:
        """The nearest examples, inside the smallest ball that bisection finds for each."""
        rows = self.nearest.isfinite().nonzero()[:, 0]

        def holds(points: Tensor) -> Tensor:
            with torch.no_grad():
                return self._won(self.model(points), rows)

        points = drawn_back(self.best[rows], self.images[rows], self.norm, holds, _HALVINGS)
        return self.images.index_copy(0, rows, points)


def _wide(numbers: Tensor) -> Tensor:
    """One number for each picture, (N, 1, 1, 1)."""
    return numbers[:, None, None, None]


@hookimpl
def phosphene_methods():
    return [carlini_wagner]
