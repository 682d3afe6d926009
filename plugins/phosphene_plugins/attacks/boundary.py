"""Boundary attack: a random walk along the decision boundary towards the image, from predictions alone."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import l2_norm
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed, Start
from phosphene.spec import Cost, InvariantTo, Monotone, param, size
from phosphene.testing import linear_model

from ._oracle_models import LinearCase, assert_predictions, constant_model, five_classes, two_classes
from ._parameters import IN_RANGE, MaxQueries, Targeted
from ._query_oracle import QueryOracle
from ._reference_decisions import PlainQueries, boundary_of_one_image

#: Every so many steps the point on the sphere is queried, too, to adapt ``spherical_step``.
_SPHERE_EVERY = 5
#: The number of queries after which a step length is adapted, and by which factor.
_WINDOW, _FACTOR = 10, 1.5


def equals_a_plain_walk_from_each_image() -> None:
    """Within 5 % of the nearest boundary in four dimensions; else algorithm 1 in a plain loop."""
    weight = torch.tensor([[0.0, 0, 0, 0], [1.0, -2.0, 0.5, 1.5]]).double().view(2, 1, 2, 2)
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.3, 0.6], [0.4, 0.5]]]], dtype=torch.float64)
    model = linear_model(weight, bias=[0.0, -0.9])
    gap = model(images)[:, 1].abs().detach() / weight.norm()
    result = boundary(model, images, model(images).argmax(1), max_queries=500, seed=0)
    ratio = result.distance("l2") / gap
    assert result.success.all() and ratio.min() >= 1 and ratio.max() <= 1.05, f"{ratio.tolist()} times"
    # Without a start an image takes the tries, and no queries more.
    others = two_classes().images
    result = boundary(constant_model(), others, torch.zeros(3, dtype=torch.long), max_queries=300, seed=0)
    assert torch.equal(result.adversarial, others)
    assert result.queries is not None and result.queries.tolist() == [101] * 3
    case = five_classes(3, (5, 6))
    case = replace(case, images=(6 * (case.images - 0.5) + 0.5).clamp(0, 1))
    case = replace(case, labels=case.model(case.images).argmax(1))
    _equals_plain_walks(case, False, None, 201, (0.3, 0.2))
    _equals_plain_walks(case, True, case.images.roll(1, 0), 152, (0.3, 0.2))
    small = LinearCase(model, images, model(images).argmax(1), torch.zeros_like(images))
    for max_queries in range(70, 76):  # the last query is of either kind
        _equals_plain_walks(small, False, None, max_queries, (0.49, 0.49))
    # A tenth, a fifth, two fifths and a half of ten steps succeed; the last image takes none.
    step = _AdaptiveStep(torch.zeros(5, 1, 1, 1), 0.3, target_rate=0.4, longest=0.5)
    for n in range(10):
        step.adapt(torch.arange(4), torch.tensor([n < 1, n < 2, n < 4, n < 5]))
    torch.testing.assert_close(step.lengths, torch.tensor([0.2, 0.3, 0.3, 0.45, 0.3]))
    for _ in range(10):
        step.adapt(torch.tensor([3]), torch.tensor([True]))
    torch.testing.assert_close(step.lengths, torch.tensor([0.2, 0.3, 0.3, 0.5, 0.3]))


def _equals_plain_walks(
    case: LinearCase, targeted: bool, start: Tensor | None, max_queries: int, lengths: tuple[float, float]
) -> None:
    """Each image's result and number of queries are those of algorithm 1 in a plain loop."""
    labels = case.labels.roll(1) if targeted else case.labels
    result = boundary(
        case.model, case.images, labels, start=start, max_queries=max_queries, spherical_step=lengths[0],
        source_step=lengths[1], targeted=targeted, seed=max_queries % 3,
    )  # fmt: skip
    for n, image in enumerate(case.images):
        queries = PlainQueries(
            case.model, image, int(labels[n]), norm="l2", targeted=targeted, max_queries=max_queries
        )
        first = None if start is None else start[n]
        expected = boundary_of_one_image(queries, first, *lengths, max_queries % 3)
        torch.testing.assert_close(result.adversarial[n], expected)
        assert result.queries is not None and result.queries[n] == queries.count
    assert_predictions(result, case, labels, targeted=targeted)


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
    invariants=IN_RANGE,
    relations=[
        InvariantTo("logit_shift", fields=("adversarial",)),
        InvariantTo("normalization", fields=("adversarial",)),
        InvariantTo("batch_order", fields=("adversarial",)),
        Monotone("max_queries", values=(60, 200), measure="distance", falls=True),
    ],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "labels-only", "minimum-norm"],
    oracle=equals_a_plain_walk_from_each_image,
    quick={"max_queries": 25},
    demo={"images": "builtin:scenes/2", "max_queries": 500},
)
def boundary(
    model: Model,
    images: Images,
    labels: Labels,
    start: Start = None,
    *,
    max_queries: MaxQueries = 5000,
    spherical_step: Annotated[
        float,
        Field(gt=0, le=1, description="initial step along the sphere, as a fraction of its radius"),
    ] = 0.1,
    source_step: Annotated[
        float,
        Field(gt=0, lt=1, description="initial step to the image, as a fraction of the distance"),
    ] = 0.1,
    targeted: Targeted = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Boundary attack: minimum-norm adversarial examples from predicted classes alone, by a random walk.

    y = x + r (p - x) / ||p - x||,  p = x_t + spherical_step r u

    x_(t+1) = y - source_step (y - x)  where that is adversarial, else x_t

    with r = ||x_t - x||_2 and u a random unit vector orthogonal to x_t - x. Both lengths adapt:
    ``spherical_step`` so that about half of the points y are adversarial (queried at every fifth step),
    ``source_step`` so that about a quarter of the steps succeed. The distance is l2. Every image is attacked
    independently, with the same random draws. It starts at ``start``, an image of each target class (or of
    any other class), else at random noise, moved onto the boundary. ``hop_skip_jump`` needs fewer queries.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image without a start is returned unchanged.

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W), the nearest example, a thousandth further out,
        so that rounding does not undo it; ``success`` (N,); ``queries`` (N,), the image itself included,
        never more than ``max_queries``.

    Raises:
        InputError: ``images``, ``labels`` or ``start`` do not fit the model.

    Example::
        from phosphene import run

        result = run("boundary", images="builtin:scenes/2", max_queries=50, seed=0)
        result.distance("l2")  # (2,)

    Source: Brendel, Rauber & Bethge 2018, algorithm 1 and section 2.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    oracle = QueryOracle(model, images, labels, targeted=targeted, norm="l2", max_queries=max_queries)
    points = oracle.find_start(start, seed or 0)
    active = oracle.distances.isfinite().nonzero()[:, 0]
    points[active] = oracle.bisect(points[active], active, 1e-3)

    spherical = _AdaptiveStep(images, spherical_step, target_rate=0.5, longest=0.5)
    source = _AdaptiveStep(images, source_step, target_rate=0.25, longest=0.5)
    for step in progress_bar(range(max_queries), "boundary attack"):
        active = (oracle.distances.isfinite() & (oracle.remaining() > 0)).nonzero()[:, 0]
        if not len(active):
            break
        noise = torch.randn(1, *images.shape[1:], generator=generator).to(images)
        image, delta = images[active], points[active] - images[active]
        radius = l2_norm(delta)
        # equivalent mutants: of an image that is attacked the radius is positive
        outward = delta / radius.clamp(min=torch.finfo(images.dtype).tiny)
        noise = noise - (noise * outward).sum((1, 2, 3), keepdim=True) * outward
        moved = delta + spherical.length(active) * radius * noise / l2_norm(noise).clamp(min=1e-12)
        on_sphere = (image + moved * (radius / l2_norm(moved).clamp(min=1e-12))).clamp(0, 1)
        if step % _SPHERE_EVERY == 0:
            spherical.adapt(active, oracle.query_success(on_sphere, active))
            remaining = oracle.remaining()[active] > 0
            active, image, on_sphere = active[remaining], image[remaining], on_sphere[remaining]
        # Clipping to the pixel range may have brought the point nearer already, never further away.
        nearer = on_sphere + source.length(active) * (image - on_sphere)
        success = oracle.query_success(nearer, active)
        source.adapt(active, success)
        points[active[success]] = nearer[success]
    return oracle.build_result()


class _AdaptiveStep:
    """A step length for each image, a fraction of its distance, that adapts to how often steps succeed."""

    def __init__(self, images: Tensor, initial: float, *, target_rate: float, longest: float) -> None:
        self.lengths = images.new_full((len(images),), initial)
        self.target_rate, self.longest = target_rate, longest
        self.tried, self.succeeded = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)

    def length(self, indices: Tensor) -> Tensor:
        """(M, 1, 1, 1) for these images."""
        return self.lengths[indices, None, None, None]

    def adapt(self, indices: Tensor, success: Tensor) -> None:
        """Count these steps; after ten of an image lengthen or shorten its steps."""
        self.tried[indices] += 1
        self.succeeded[indices] += success.to(self.succeeded)
        due = self.tried >= _WINDOW
        rate = self.succeeded / self.tried
        adapted = torch.where(rate > self.target_rate, self.lengths * _FACTOR, self.lengths)
        adapted = torch.where(rate < self.target_rate / 2, self.lengths / _FACTOR, adapted)
        self.lengths = torch.where(due, adapted.clamp(1e-7, self.longest), self.lengths)
        self.tried, self.succeeded = self.tried.masked_fill(due, 0), self.succeeded.masked_fill(due, 0)


@hookimpl
def phosphene_methods():
    return [boundary]
