"""Transferability: adversarial examples computed on each model by MI-FGSM, evaluated on all others."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import ModelError, Reference, batch_size, hookimpl, load_model, method
from phosphene.attacks import is_adversarial
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, PixelRange, UnitRange, length, param, size
from phosphene.testing import linear_model

from ..models._ensembles import ModelURIs, load_compatible_models
from ._oracle_models import five_classes
from ._parameters import Augmentations, EotSamples, Eps, Momentum, Norm, Steps, StepSize, Targeted
from ._transfer_result import TransferTable
from .bim import bim


def examples_transfer_between_parallel_linear_models() -> None:
    """Examples of a linear model fool the same model scaled, and not one with orthogonal weights."""
    weights = ([1.0, 0.0, -1.0, 0.0], [3.0, 0.0, -3.0, 0.0], [0.0, 1.0, 0.0, -1.0])
    models = []
    for weight in weights:
        models.append(linear_model(torch.stack([torch.zeros(4), torch.tensor(weight)]).view(2, 1, 2, 2)))
    images = torch.tensor([[[[0.52, 0.52], [0.5, 0.5]]], [[[0.5, 0.52], [0.53, 0.51]]]])
    labels = models[0](images).argmax(1)
    rates, counts, _, _ = _evaluate(
        models, images, labels, targeted=False, eps=0.05, step_size=0.05, steps=1
    )  # fmt: skip
    # The third model misclassifies the first image: of its pairs only the second image counts.
    torch.testing.assert_close(rates, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert counts.tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]
    result = transfer(models[0], images, labels, eps=0.05, step_size=0.05, steps=1, augmentations=(), seed=0)
    signs = (1 - 2 * labels[:, None]) * torch.tensor(weights[0]).sign()
    torch.testing.assert_close(result.adversarial[0], images + 0.05 * signs.view_as(images))
    assert result.rates.tolist() == [[1.0]] and result.counts.tolist() == [[2]]
    wrong = transfer(models[0], images, 1 - labels, steps=1)  # no image counts
    assert wrong.rates.tolist() == [[0.0]] and wrong.counts.tolist() == [[0]]
    _is_in_eval_mode(models[0], images)
    # All parameters are those of ``bim``.
    case = five_classes(4)
    targets = case.labels.roll(1)
    params: dict[str, Any] = {"eps": 0.05, "step_size": 0.03, "steps": 3, "norm": "l2"}
    params |= {"momentum": 0.5, "augmentations": ("rotate",), "eot_samples": 2, "targeted": True, "seed": 3}
    result = transfer(case.model, case.images, targets, **params)
    expected = bim(case.model, case.images, targets, **params)
    torch.testing.assert_close(result.adversarial[0], expected.adversarial)
    eligible = case.labels != targets
    assert torch.equal(result.fooled[0, 0], expected.success & eligible) and result.fooled.any()
    assert result.rates.tolist() == [[float(result.fooled.sum() / eligible.sum())]]
    assert result.counts.tolist() == [[int(eligible.sum())]] and result.names == (case.model.name,)


def _is_in_eval_mode(model: AnyModel, images: Tensor) -> None:
    """Every model is in eval mode, and one without gradients is refused before any attack."""
    dropout = load_model(nn.Sequential(nn.Dropout(0.5), model.module), input_size=(1, 2, 2))
    black_box = load_model(lambda x: model(x).detach(), input_size=(1, 2, 2), classes=["a", "b"])
    dropout.module.eval()
    expected = dropout(images)
    dropout.module.train()
    with _in_eval_mode([model, dropout]):
        torch.testing.assert_close(dropout(images), expected)
    with suppress(ModelError), _in_eval_mode([model, black_box]):
        raise AssertionError("a model without gradients is refused at once")


@method(
    family="attacks",
    title="Transfer between models",
    references=[
        Reference(
            key="dong2018",
            title="Boosting Adversarial Attacks with Momentum",
            authors="Dong, Liao, Pang, Su, Zhu, Hu, Li",
            year=2018,
            url="https://arxiv.org/abs/1710.06081",
        ),
        Reference(
            key="xie2019",
            title="Improving Transferability of Adversarial Examples with Input Diversity",
            authors="Xie, Zhang, Zhou, Bai, Wang, Ren, Yuille",
            year=2019,
            url="https://arxiv.org/abs/1803.06978",
        ),
    ],
    invariants=[PixelRange(field="adversarial"), UnitRange(field="rates")],
    relations=[
        InvariantTo("normalization", where={"augmentations": []}, fields=("adversarial",)),
        InvariantTo("logit_shift", where={"augmentations": []}, fields=("adversarial",)),
        Monotone("eps", values=(0.001, 0.01, 0.1), measure="rates", where={"augmentations": []}),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (1 + length(param.models))
        * (param.steps * param.eot_samples + 4 + length(param.models)),
        backward=size.images * (1 + length(param.models)) * param.steps * param.eot_samples,
    ),
    tags=["black-box", "fixed-radius"],
    batch_independent=False,
    oracle=examples_transfer_between_parallel_linear_models,
    quick={"models": (), "steps": 3, "eot_samples": 1},
    demo={"models": ("builtin:shapes-resnet",), "images": "builtin:scenes/24"},
)
def transfer(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    models: ModelURIs = (),
    eps: Eps = 16 / 255,
    step_size: StepSize = 2 / 255,
    steps: Steps = 10,
    norm: Norm = "linf",
    momentum: Momentum = 1.0,
    augmentations: Augmentations = ("resize_and_pad",),
    eot_samples: EotSamples = 1,
    targeted: Targeted = False,
    seed: Seed = None,
) -> TransferTable:
    """Transferability of adversarial examples: MI-FGSM on each model, evaluated on all models.

    g <- momentum g + dL(T(x))/dx / mean|dL(T(x))/dx|;  x <- clip(P(x + step_size sign(g)))

    with L the cross-entropy of ``labels``, P the projection onto the ball and T the random ``augmentations``:
    "resize_and_pad" is the diverse inputs (DI-FGSM) of Xie et al. With ``momentum`` 0 and no augmentations
    it is ``bim``. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,) of classes that all ``models`` share;
    the models take images of one size. Gradients of every model are needed; for a black-box model,
    evaluate ``adversarial`` on it.

    Returns:
        TransferTable with ``rates`` (M, M), of examples computed on model i (row) and evaluated on model j
        (column), among the images that both classify correctly; the diagonal is the white-box attack.
        ``adversarial`` (M, N, C, H, W).

    Raises:
        InputError: a model cannot be loaded or takes images of another size.
        ModelError: a model has other classes, or no gradient flows from its logits to the images.

    Example::
        from phosphene import run

        result = run("transfer", models=["builtin:shapes-resnet"], images="builtin:scenes/4", steps=3, seed=0)
        result.rates.shape  # (2, 2)

    Source: Dong et al. 2018, algorithm 1; Xie et al. 2019, section 3.2; Papernot et al. 2016 for the idea.
    """
    all_models = [model, *load_compatible_models(model, models)]
    with _in_eval_mode(all_models):
        rates, counts, adversarial, fooled = _evaluate(
            all_models, images, labels, targeted=targeted, eps=eps, step_size=step_size, steps=steps,
            norm=norm, momentum=momentum, augmentations=augmentations, eot_samples=eot_samples, seed=seed,
        )  # fmt: skip
    return TransferTable(
        names=tuple(m.name for m in all_models),
        rates=rates,
        counts=counts,
        images=images,
        adversarial=adversarial,
        fooled=fooled,
    )


@contextmanager
def _in_eval_mode(models: Sequence[AnyModel]) -> Iterator[None]:
    """Eval mode inside the block; ModelError at once where no gradient flows through a model."""
    with ExitStack() as stack:
        for model in models:
            model.require_gradients()
            stack.enter_context(model.guard())
        yield


def _evaluate(
    models: Sequence[AnyModel], images: Tensor, labels: Tensor, *, targeted: bool, **params: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rates, counts (M, M), examples (M, N, C, H, W) and success (M, M, N) of BIM with these parameters."""
    batches = torch.arange(len(images)).split(batch_size(models[0]))

    def success(victim: AnyModel, points: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([victim.for_rows(rows)(points[rows]) for rows in batches])
        return is_adversarial(logits.to(images), labels, targeted)

    examples = []
    for surrogate in models:
        # Every batch has the same random draws, so that the batch size does not matter.
        results = [
            bim.function(surrogate.for_rows(rows), images[rows], labels[rows], targeted=targeted, **params)
            for rows in batches
        ]
        examples.append(torch.cat([result.adversarial for result in results]))
    before = torch.stack([success(victim, images) for victim in models])
    after = torch.stack([torch.stack([success(v, points) for v in models]) for points in examples])
    # Images that either model misclassifies without attack are not counted.
    eligible = ~(before[:, None] | before[None])
    fooled, counts = after & eligible, eligible.sum(2)
    rates = (fooled.sum(2) / counts.clamp(min=1)).to(images)
    return rates, counts, torch.stack(examples), fooled


@hookimpl
def phosphene_methods():
    return [transfer]
