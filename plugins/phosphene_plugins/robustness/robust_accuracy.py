"""Robust accuracy: what attacks of growing radius leave of it, and the worst case over them."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    hookimpl,
    load_model,
    method,
    progress_bar,
    report_progress,
    save_progress,
    saved_progress,
)
from phosphene.roles import Dataset, Model, Seed

from ..attacks._lp_balls import Norm
from ..scores._evaluate_maps import Pictures, Pool, Target
from ._attack_runner import attack_of
from ._robustness_report import RobustnessReport


def is_the_share_of_margins_beyond_eps_on_a_linear_model() -> None:
    """A picture of a linear model withstands eps where (z_y - z_k) / ||w_k - w_y||_q is more."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    away = (linear.weight[1] - linear.weight[0]).detach().view(1, 1, 2, 2)
    grey = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    grey = grey - away * ((away * grey).sum() / away.square().sum())
    norms: list[tuple[Norm, float]] = [("linf", 1.0), ("l2", 2.0)]
    for norm, dual in norms:
        # By so much on the side of class 0; the last is wrong.
        margins = torch.tensor([0.01, 0.03, 0.05, 0.07, -0.01], dtype=torch.float64)[:, None, None, None]
        images = grey - away * (margins * away.norm(dual) / away.square().sum())
        found = robust_accuracy(
            model, TensorDataset(images, ["0"] * 5), attacks=["pgd", "fab"], eps=[0.02, 0.06], norm=norm,
            params={"pgd": {"step_size": 0.01}, "fab": {"steps": 5}}, seed=0,
        )  # fmt: skip
        for attack in ("pgd", "fab", None):
            assert [found.accuracy(eps, attack) for eps in (0, 0.02, 0.06)] == [0.8, 0.6, 0.2], (norm, attack)
        torch.testing.assert_close(found.radius("fab")[:4], margins[:4].flatten(), rtol=2e-3, atol=0)


@method(
    family="robustness",
    references=[
        Reference(
            key="carlini2019",
            title="On Evaluating Adversarial Robustness",
            authors="Carlini, Athalye, Papernot, Brendel, Rauber, Tsipras, Goodfellow, Madry, Kurakin",
            year=2019,
            url="https://arxiv.org/abs/1902.06705",
        )
    ],
    needs=["dataset"],
    oracle=is_the_share_of_margins_beyond_eps_on_a_linear_model,
    quick={
        "attacks": ["pgd", "fgsm"],
        "eps": [0.05, 0.5],
        "params": {"pgd": {"steps": 2}},
        "pictures": 3,
        "budget": 100,
        "examples": 2,
    },
    demo={
        "attacks": ["fgsm", "pgd", "fab"],
        "eps": [0.5 / 255, 1 / 255, 2 / 255, 4 / 255],
        "params": {"fab": {"steps": 6, "candidates": 3}},
        "pictures": 16,
    },
)
def robust_accuracy(
    model: Model,
    dataset: Dataset,
    *,
    attacks: Annotated[
        list[str], Field(min_length=1, description="by name: any with a fixed radius or of the least norm")
    ] = ["fgsm", "pgd", "apgd"],  # noqa: B006
    eps: Annotated[
        list[Annotated[float, Field(gt=0, le=1000)]],
        Field(min_length=1, max_length=100, description="radii of the balls, pixels in [0, 1]"),
    ] = [1 / 255, 2 / 255, 4 / 255, 8 / 255],  # noqa: B006
    norm: Annotated[Norm, Field(description="what the balls are measured in")] = "linf",
    params: Annotated[
        dict[str, dict[str, Any]], Field(description="parameters of the attacks, by an attack's name")
    ] = {},  # noqa: B006
    target: Annotated[
        Target, Field(description="what is right: the class that is known, or what the model says")
    ] = "label",
    pictures: Pictures = 200,
    budget: Annotated[
        int, Field(ge=1, description="passes of one attack; an expensive one sees fewer pictures")
    ] = 100_000,
    examples: Annotated[int, Field(ge=1, le=20, description="pictures that are shown")] = 3,
    seed: Seed = None,
) -> RobustnessReport:
    """Measure accuracy against eps under several attacks, and under the worst of them for each picture.

    accuracy(eps) = share of pictures with r > eps,  r = min over the attacks of ||x' - x||, 0 if f(x) != y

    x' being the examples found. An attack with an ``eps`` of its own is run at each radius, from the
    smallest on, and only on what it has not broken yet: an example in a ball is one in every larger ball, so
    that accuracy never rises. One without (``deepfool``, ``carlini_wagner``, ``fab``) seeks the nearest
    example, and from one run tells all radii. The attacks are told ``norm``, the seed and nothing else
    but ``params``, as ``{"apgd": {"steps": 20}}``; ``auto_attack`` is one of them, too. Pixels in [0, 1].

    Every figure is of what was found: accuracy under a better attack may be lower. An attack sees as many
    pictures as ``budget`` pays for, at least one, and the table tells how many; the worst case is over
    all pictures. Given an ``out``, a run that was cut off goes on where it was.

    Raises InputError, before any work, where the data set knows no classes, for a method that is no such
    attack, for a norm that it does not know and for params of what is not run.

    Source: Carlini et al. 2019, sections 4 and 5.
    """
    assert seed is not None
    names, radii = tuple(dict.fromkeys(attacks)), tuple(sorted({*eps}))
    if strangers := params.keys() - {*names}:
        raise InputError(f"params speaks of {sorted(strangers)[0]!r}, which is not among attacks={attacks}")
    pool = Pool(model, dataset, pictures, target, needs_masks=False)
    chosen = [attack_of(name, params.get(name, {}), radii, norm, seed, model) for name in names]
    first, _ = pool.read(range(1))
    costs = [attack.passes(model, first) or 0 for attack in chosen]
    counts = tuple(max(1, min(pool.count, budget // max(1, cost))) for cost in costs)
    some, _ = pool.read(range(min(examples, pool.count)))
    state = saved_progress() or {
        "done": 0,
        "right": torch.zeros(pool.count, dtype=torch.bool),
        "found": torch.zeros(len(chosen), pool.count, dtype=torch.bool),
        "radii": first.new_zeros(len(chosen), pool.count),
        "adversarial": some.clone(),
        "by": torch.full((len(some),), -1),
    }
    parts = ("right", "found", "radii", "adversarial", "by")
    right, found, far, adversarial, by = (state[name].to(first.device) for name in parts)
    work = [(p, a, r) for p in pool.batches() for a, attack in enumerate(chosen) for r in attack.radii]
    read: tuple[range, Tensor, Tensor] | None = None
    for step, (places, a, radius) in enumerate(progress_bar(work, "attacking"), start=1):
        if step <= state["done"]:
            continue
        if read is None or read[0] != places:
            images, _ = pool.read(places)
            labels = torch.tensor(pool.classes(model, images, places).index, device=first.device)
            read = (places, images, labels)
            right[places.start : places.stop] = model(images).argmax(1).eq(labels)
        rows = torch.arange(pool.count, device=first.device)[places.start : min(places.stop, counts[a])]
        rows = rows[right[rows] & ~found[a, rows]]
        if len(rows):
            inside = rows - places.start
            with report_progress(False):  # one count for all, not one for each attack
                result = chosen[a].run(model, read[1][inside], read[2][inside], radius)
            reach = result.distance(norm)
            # An example may lie outside by a rounding.
            won = result.success & (reach <= radius * (1 + 1e-5))
            found[a, rows[won]], far[a, rows[won]] = True, reach[won].clamp(max=radius)
            for n, example in zip(rows[won].tolist(), result.adversarial[won], strict=True):
                if n < len(by) and (by[n] < 0 or far[a, n] < far[by[n], n]):
                    by[n], adversarial[n] = a, example
        save_progress(done=step, right=right, found=found, radii=far, adversarial=adversarial, by=by)
    return RobustnessReport(
        model=model.name,
        attacks=tuple(attack.name for attack in chosen),
        norm=norm,
        eps=radii,
        right=right,
        found=found,
        radii=far,
        counts=counts,
        images=some,
        adversarial=adversarial,
        broken_by=tuple(chosen[a].name if a >= 0 else "" for a in by.tolist()),
    )


@hookimpl
def phosphene_methods():
    return [robust_accuracy]
