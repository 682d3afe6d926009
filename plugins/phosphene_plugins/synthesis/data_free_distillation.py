"""Data-free distillation, Yin et al. 2020: a student trained on images inverted from its teacher."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    fork_random_state,
    hookimpl,
    load_model,
    method,
)
from phosphene import Model as AnyModel
from phosphene.roles import Dataset, LayerName, Model, OtherModel, Seed
from phosphene.spec import Cost, InvariantTo, PixelRange, minimum, param, size
from phosphene.training import (
    EVALUATIONS,
    MAX_HELD_OUT,
    TrainedModel,
    linear_decay,
    train,
    trainable_copy,
)

from ._batch_norm_prior import YIN, BatchNormPrior
from .deep_inversion import InversionOptions, deep_inversion, invert_classes

#: The name of the share of images that student and teacher assign to the same class.
AGREEMENT = "agreement with the teacher"
#: Inverted images in the previews.
PREVIEWS = 9


def _classifier(*hidden: nn.Module) -> AnyModel:
    draw = torch.Generator().manual_seed(len(hidden))
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), *hidden, nn.Linear(3, 3)).double().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return load_model(network, input_size=(1, 2, 2), mean=[0.4], std=[0.5])


def training_equals_a_plain_loop() -> None:
    """Adam on T^2 KL(teacher || student) of images of ``deep_inversion``, at a rate that falls to zero."""
    teacher, student = _classifier(nn.BatchNorm1d(3), nn.Tanh()), _classifier(nn.Tanh())
    draw = torch.Generator().manual_seed(2)
    dataset = TensorDataset(torch.rand(5, 1, 2, 2, generator=draw, dtype=torch.float64))
    options: Any = {"images": 7, "inversion_steps": 2, "statistics": 0.3, "shift": 1, "seed": 3}
    result = data_free_distillation(
        teacher, dataset, student, **options, temperature=3, steps=3, batch=4, lr=0.1
    )
    shared: Any = {"steps": 2, "statistics": 0.3, "seed": 3}
    images = deep_inversion(teacher, Class((0, 1, 2, 0, 1, 2, 0)), **shared).images
    torch.testing.assert_close(result.previews, images)
    assert result.labels == tuple(f"class {n}" for n in (0, 1, 2, 0, 1, 2, 0))
    order = torch.cat([torch.randperm(7, generator=torch.Generator().manual_seed(3 + n)) for n in range(2)])
    trained, losses = student.copy(), []
    optimizer = torch.optim.Adam(trained.module.requires_grad_(True).parameters())
    for step, rows in enumerate(order[:12].split(4)):
        torch.manual_seed(3 + step)
        shifts = torch.randint(-1, 2, (4, 2))
        x = torch.stack(
            [images[r].roll((int(v), int(h)), (1, 2)) for r, (v, h) in zip(rows, shifts, strict=True)]
        )
        expected, actual = teacher(x) / 3, trained(x) / 3
        p = expected.exp() / expected.exp().sum(1, keepdim=True)
        q = actual.exp() / actual.exp().sum(1, keepdim=True)
        loss = (9 * (p * (p / q).log()).sum(1)).mean()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(result.losses, torch.stack(losses))
    torch.testing.assert_close(result.model()(dataset.images), trained(dataset.images).detach())
    same = trained(dataset.images).argmax(1) == teacher(dataset.images).argmax(1)
    torch.testing.assert_close(result.curves[AGREEMENT][-1], same.double().mean())
    # Without a student: the teacher's architecture with initial weights, and batch norms in training mode.
    own = data_free_distillation(teacher, dataset, **options, steps=1, batch=7, lr=1e-6)
    again = data_free_distillation(teacher, dataset, **options | {"seed": 4}, steps=1, batch=7, lr=1e-6)
    weights = [dict(r.network.named_parameters()) for r in (own, again)]
    assert all((weights[0][n] != w).any() for n, w in teacher.module.named_parameters())
    assert (weights[0]["1.weight"] != weights[1]["1.weight"]).all() and (weights[0]["2.weight"] > 0.99).all()
    assert float(own.network.get_buffer("2.num_batches_tracked")) == 1
    part = data_free_distillation(teacher, dataset, **options, new_layers=["4"], steps=1, batch=7, lr=1e-6)
    changes = {n: (w - dict(part.network.named_parameters())[n]).abs().max() for n, w in
               teacher.module.named_parameters()}  # fmt: skip
    assert changes.pop("4.weight") > 0.1 and changes.pop("4.bias") > 0.1 and max(changes.values()) < 1e-5
    more = data_free_distillation(teacher, dataset, **options | {"images": 11}, steps=1, batch=11, lr=1e-6)
    assert len(more.previews) == len(more.labels) == 9
    copies = [teacher.copy(), teacher.copy()]
    for n, copied in enumerate(copies):  # by the seed alone
        with fork_random_state():
            torch.manual_seed(n)
            initialize(copied, ["4"], 6)
    assert torch.equal(*(copied.module.get_parameter("4.weight") for copied in copies))
    for network, allowed in ((_Positions(), False), (nn.Linear(4, 2), True)):
        try:
            initialize(load_model(nn.Sequential(nn.Flatten(), network), input_size=(1, 2, 2)), None, 0)
        except ModelError:
            assert not allowed
        else:
            assert allowed, "a network whose weights cannot be initialized is refused"


class _Positions(nn.Module):
    """A network with a parameter of its own, which no ``reset_parameters`` initializes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@method(
    family="synthesis",
    title="Data-free distillation",
    references=[
        YIN,
        Reference(
            key="hinton2015",
            title="Distilling the Knowledge in a Neural Network",
            authors="Hinton, Vinyals, Dean",
            year=2015,
            url="https://arxiv.org/abs/1503.02531",
        ),
    ],
    invariants=[PixelRange(field="previews")],
    relations=[InvariantTo("logit_shift", fields=("losses",), tolerance=1e-6)],
    needs=["gradients", "dataset", "training"],
    cost=Cost(
        forward=param.images * (param.inversion_steps + 2)
        + 2 * param.steps * param.batch
        + (minimum(EVALUATIONS, param.steps) + 2) * minimum(MAX_HELD_OUT, size.dataset),
        backward=param.images * param.inversion_steps + param.steps * param.batch,
    ),
    batch_independent=False,
    tags=["training"],
    oracle=training_equals_a_plain_loop,
    exempt={
        "reads_the_named_layer": "the layers are initialized, and not read",
        "training_lowers_the_loss": "the student starts from initial weights, not from the teacher's",
        "images_matter": "the data set is evaluated on, and not trained on",
    },
    quick={"images": 5, "inversion_steps": 2, "steps": 2, "batch": 3},
    defaults={"model": "builtin:shapes-resnet"},
    demo={
        "dataset": "builtin:scenes/64",
        "new_layers": ["fc"],
        "images": 40,
        "inversion_steps": 60,
        "steps": 60,
        "batch": 16,
    },
)
def data_free_distillation(
    model: Model,
    dataset: Dataset,
    student: OtherModel = None,
    *,
    images: Annotated[
        int, Field(ge=1, le=1_000_000, description="inverted images, evenly of all classes")
    ] = 200,
    inversion_steps: Annotated[
        int, Field(ge=1, le=100_000, description="optimization steps of the inverted images")
    ] = 200,
    statistics: Annotated[
        float, Field(ge=0, description="weight of the distance from the stored feature statistics")
    ] = 0.1,
    temperature: Annotated[
        float, Field(ge=1, le=1000, description="softmax temperature T of teacher and student")
    ] = 3.0,
    new_layers: Annotated[
        list[LayerName] | None,
        Field(min_length=1, description="layers of the teacher's copy to initialize anew; default: all"),
    ] = None,
    shift: Annotated[
        int, Field(ge=0, le=1024, description="largest random circular shift of a training image, in pixels")
    ] = 8,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="number of training steps")] = 500,
    batch: Annotated[int, Field(ge=1, le=4096, description="images per training step")] = 32,
    lr: Annotated[
        float, Field(gt=0, le=1, description="initial learning rate, which falls linearly to zero")
    ] = 2e-3,
    seed: Seed = None,
) -> TrainedModel:
    """Data-free distillation: a student trained on images that are inverted from its teacher.

    min_G mean_i T^2 KL(softmax(F(x_i) / T) || softmax(G(x_i) / T)),   x_i by ``deep_inversion`` of F

    The teacher F is the model, whose batch norms hold the only statistics of its training images that are
    used. The student G is a copy of ``student``, trained from its weights, or by default a copy of the
    teacher with newly initialized weights, all of them or those of ``new_layers``. Adam trains all weights of
    the student, on images that are shifted at random. No image of the ``dataset`` is trained on: it measures
    how often student and teacher agree.

    Returns:
        ``model()`` is the student. ``losses`` (steps,); ``curves`` has the agreement with the teacher on the
        first images of the data set (at most 64), after ``evaluation_steps``. ``previews`` are inverted
        images with their classes.

    Raises:
        ModelError: a teacher without classes or batch norm; a student with other classes; an architecture
            whose weights cannot be initialized.
        InputError: ``new_layers`` beside a student.
        DivergenceError: the loss or a weight is not finite.

    Example::
        from phosphene import run

        options = {"images": 10, "inversion_steps": 2, "steps": 2, "batch": 5}
        result = run("data_free_distillation", model="builtin:shapes-resnet", **options)
        result.losses.shape  # (2,)

    Source:
        Yin et al. 2020, section 3 and equation 1; Hinton et al. 2015, section 2 (lecture 21.9).
    """
    if model.class_count == 0:
        raise ModelError(f"{model.name} has no classes to draw images of: load a classifier")
    prior = BatchNormPrior(model)
    base = model if student is None else student
    if base.class_count != model.class_count or base.input_size != model.input_size:
        raise ModelError(
            f"the student needs the teacher's {model.class_count} classes and images of {model.input_size}; "
            f"{base.name} has {base.class_count} and {base.input_size}"
        )
    if student is not None and new_layers is not None:
        raise InputError("new_layers are those of the teacher's copy: pass them or a student, not both")
    trained = trainable_copy(base)
    if student is None:
        initialize(trained, new_layers, seed or 0)
    labels = torch.arange(images) % model.class_count
    options = InversionOptions(statistics=statistics, steps=inversion_steps)
    inversion, _ = invert_classes(model, labels, options, prior, seed=seed)
    test_images = dataset.read(range(min(MAX_HELD_OUT, len(dataset)))).to(model.device, model.dtype)
    limit = batch_size(model)

    def predict(classifier: AnyModel) -> Tensor:
        with torch.no_grad():
            return torch.cat([classifier(part).argmax(1) for part in test_images.split(limit)])

    answers = predict(model)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        if shift:
            shifts = torch.randint(-shift, shift + 1, (len(images), 2)).tolist()
            images = torch.stack([x.roll(yx, (1, 2)) for x, yx in zip(images, shifts, strict=True)])
        with torch.no_grad():
            expected = (model(images.to(model.dtype)) / temperature).log_softmax(1)
        trained.module.train()
        logits = trained(images) / temperature
        trained.module.eval()
        divergence = F.kl_div(logits.log_softmax(1), expected.to(logits), reduction="none", log_target=True)
        return temperature**2 * divergence.sum(1)

    history = train(
        trained.module,
        TensorDataset(inversion.images),
        loss,
        torch.optim.Adam(trained.module.parameters(), lr),
        steps=steps,
        batch=batch,
        seed=seed or 0,
        max_batch=limit,
        schedule=linear_decay,
        evaluate=lambda: {AGREEMENT: float(predict(trained).eq(answers).cpu().double().mean())},
    )
    return TrainedModel.from_training(
        "synthesis.data_free_distillation",
        trained,
        base,
        history,
        previews=inversion.images[:PREVIEWS],
        labels=tuple(map(model.class_name, labels[:PREVIEWS].tolist())),
    )


def initialize(model: AnyModel, layers: Sequence[str] | None, seed: int) -> None:
    """Initialize these layers of a network, or all, anew. ModelError where a layer has no way to."""
    tops = [""] if layers is None else [model.layer_name(layer) for layer in layers]
    with fork_random_state():
        torch.manual_seed(seed)
        for name, layer in model.module.named_modules():
            if not any(not top or f"{name}.".startswith(f"{top}.") for top in tops):
                continue
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise ModelError(
                    f"layer {name or 'the network'!r} of {model.name} has weights and no reset_parameters to "
                    "initialize them; pass a network of your own, student=load_model(...)"
                )


@hookimpl
def phosphene_methods():
    return [data_free_distillation]
