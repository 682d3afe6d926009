"""Influence functions: the change of a loss without a training image, Koh and Liang 2017."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    to_float64,
)
from phosphene.data import Batch, State
from phosphene.hooks import Tap
from phosphene.roles import Dataset, Images, Labels, Model, Seed
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, param, size

from ._influence_result import TrainingInfluence, training_influence
from ._weight_gradients import (
    Count,
    GradientProducts,
    WeightLayers,
    copy_at,
    image_gradients,
    require_class_labels,
    weights_of,
)

#: The damping without a value of its own, in mean eigenvalues of the curvature.
RELATIVE_DAMPING = 0.1
#: The largest side of a layer's factor: its eigenvectors take as many numbers, squared.
MAX_FACTOR = 8192


def equals_the_inverse_curvature() -> None:
    """With a linear layer both approximations equal the product with the inverse of the matrix itself.

    Kronecker factors are exact where the errors are independent of the features: two classes with p = 1/2.
    """
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 2)
    network = nn.Sequential(nn.Conv2d(3, 6, (2, 1)), nn.Flatten(), linear).double()
    settings: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": (3, 2, 1)}
    model = load_model(network, **settings)
    images = torch.rand(15, 3, 2, 1, generator=draw, dtype=torch.float64)
    numbers = torch.randint(2, (12,), generator=draw)
    data, labels = TensorDataset(images[:12], [str(int(n)) for n in numbers]), torch.tensor([1, 0, 1])
    with torch.no_grad():
        features = F.pad(model.features(images, "1"), (0, 1), value=1.0)
        for zero in (False, True):
            if zero:
                linear.weight.zero_(), linear.bias.zero_()
            shares = model(images).softmax(1)
            errors = shares - torch.eye(2).double()[torch.cat([numbers, labels])]
            gradients = (errors[:, :, None] * features[:, None]).flatten(1)
            curvature = _hessian(shares[:12], features[:12]) / 12
            # Of p = 1/2 the squared norm of a gradient is that of the features, halved, for either class.
            default = 0.1 * float(features[:12].square().sum(1).mean()) / 2 / 14
            for damping in (0.05, 2.0, None) if zero else (0.05, 2.0):
                added = default if damping is None else damping
                inverse = torch.linalg.inv(curvature + added * torch.eye(14).double())
                expected = gradients[12:] @ inverse @ gradients[:12].T / 12
                for approximation in ("cg", "ekfac") if zero else ("cg",):
                    result = influence_functions(
                        model,
                        images[12:],
                        data,
                        labels,
                        approximation=approximation,
                        damping=damping,
                        layers=["2"],
                        steps=40,
                        seed=0,
                    )
                    torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=1e-9)


def _hessian(shares: Tensor, features: Tensor) -> Tensor:
    """The sum over images of the Hessian of the cross-entropy in the weights (K D, K D) of a linear layer."""
    outputs = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
    side = shares.shape[1] * features.shape[1]
    return torch.einsum("nkl,ni,nj->kilj", outputs, features, features).reshape(side, side)


def predicts_retraining() -> None:
    """At the optimum of a regularized classifier, they predict its loss after training without an image."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(210, 1, 1, 3, generator=draw, dtype=torch.float64)
    noise = 0.2 * torch.randn(210, generator=draw, dtype=torch.float64)
    numbers = (images[:, 0, 0] @ torch.tensor([1.0, -2.0, 0.5]).double() + noise > -0.25).long()
    linear = nn.Linear(3, 2)
    network = nn.Sequential(nn.Flatten(), linear).double()
    model = load_model(network, mean=[0.5], std=[0.25], input_size=(1, 1, 3))
    features = F.pad(model.normalize(images).flatten(1), (0, 1), value=1.0)
    strength = 0.05

    def optimum(rows: Tensor) -> Tensor:
        """The weights (2, 4) of least loss over some images, with an L2 penalty, by Newton's method."""
        flat = torch.zeros(8, dtype=torch.float64)
        for _ in range(12):
            shares = (features[rows] @ flat.view(2, 4).T).softmax(1)
            errors = shares - torch.eye(2).double()[numbers[rows]]
            gradient = (errors.T @ features[rows]).flatten() / 200 + strength * flat
            curvature = _hessian(shares, features[rows]) / 200 + strength * torch.eye(8).double()
            flat = flat - torch.linalg.solve(curvature, gradient)
        return flat.view(2, 4)

    trained = optimum(torch.arange(200))
    with torch.no_grad():
        linear.weight.copy_(trained[:, :3]), linear.bias.copy_(trained[:, 3])
    data = TensorDataset(images[:200], [str(int(n)) for n in numbers[:200]])
    result = influence_functions(
        model, images[200:], data, numbers[200:], approximation="cg", damping=strength, steps=30, seed=0
    )
    changes = []
    for n in range(20):
        without = optimum(torch.arange(200)[torch.arange(200) != n])
        losses = [
            F.cross_entropy(features[200:] @ w.T, numbers[200:], reduction="none") for w in (without, trained)
        ]
        changes.append(losses[0] - losses[1])
    actual, predicted = torch.stack(changes, 1), result.values[:, :20]
    # The prediction is the first order in 1/M.
    assert float((actual - predicted).norm() / actual.norm()) < 0.05


def inverse_curvature_and_retraining() -> None:
    """Equal to the formula with the inverse matrix, and predicts the loss after training without an image."""
    equals_the_inverse_curvature()
    predicts_retraining()
    rows_times_weights_are_outputs()
    classes_are_drawn_by_their_probability()


def rows_times_weights_are_outputs() -> None:
    """The rows of a layer's inputs times its weights are its outputs, for each group of a convolution."""
    draw = torch.Generator().manual_seed(2)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    layers: list[tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]] = [
        (nn.Conv2d(4, 6, (2, 3), **options), (2, 4, 5, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2), bias=False), (2, 4, 5, 7)),
        (nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 4, 3)),
        (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 2, 4, 5)),
        (nn.Linear(3, 2), (2, 5, 3)),
    ]
    for layer, shape in layers:
        values = torch.randn(shape, generator=draw)
        flat = torch.cat([weight.detach().flatten() for weight in layer.parameters()])[None]
        matrices = _as_matrices(layer, flat)
        assert matrices.shape[2:] == _sides(layer) and torch.equal(_flatten(layer, matrices), flat)
        with torch.no_grad():
            outputs = _outputs(layer, layer(values))
        torch.testing.assert_close(_inputs(layer, values) @ matrices.mT, outputs, rtol=1e-4, atol=1e-5)
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    network = nn.Sequential(inner, nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2))
    model = load_model(network, input_size=(3, 1, 2))
    assert _factored_layers(model, None) == ["0.0", "2", "3"]
    assert _factored_layers(model, ["0", "3"]) == ["0.0", "3"]
    # In the basis of the unit vectors, the parts of the layers are those of the flattened gradient.
    parts = {name: model.layers[name] for name in ("0.0", "2", "3")}
    flat = torch.arange(sum(w.numel() for part in parts.values() for w in part.parameters())).double()[None]
    bases = {name: tuple(map(torch.eye, _sides(part))) for name, part in parts.items()}  # type: ignore[arg-type]
    rotated = _rotated(model, [*parts], flat, bases)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([_flatten(parts[name], rotated[name]) for name in parts], 1), flat)  # type: ignore[arg-type]


def classes_are_drawn_by_their_probability() -> None:
    """Of 600 images, within four standard errors, and the same classes in any batch."""
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().expand(600, 3)
    drawn = _draw_classes(logits, range(600), 4)
    shares = torch.bincount(drawn, minlength=3) / 600
    assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / 600).sqrt()).all()
    assert torch.equal(_draw_classes(logits[:9], range(90, 99), 4), drawn[90:99])
    assert not torch.equal(_draw_classes(logits, range(600), 5), drawn)


def products_over_damping(calls: Calls) -> Tensor:
    """Gradient products / (M lambda): the limit for a damping lambda above all eigenvalues."""
    copied, data = calls.model.copy(), calls.inputs["dataset"]
    copied.module.requires_grad_(True)
    parts = [copied.module]
    if calls.params["approximation"] == "ekfac":
        parts = [layer for layer in copied.layers.values() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    weights = [weight for part in parts for weight in part.parameters()]
    rows = []
    for image, label in (
        *zip(calls.inputs["images"], calls.inputs["labels"].tolist(), strict=True),
        *zip(data.images, map(int, data.classes), strict=True),
    ):
        with torch.enable_grad():
            loss = -copied(image[None]).log_softmax(1)[0, label]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    gradients, count = torch.stack(rows), len(calls.inputs["images"])
    return gradients[:count] @ gradients[count:].T / len(data) / calls.params["damping"]


@method(
    family="influence",
    references=[
        Reference(
            key="koh2017",
            title="Understanding Black-box Predictions via Influence Functions",
            authors="Koh, Liang",
            year=2017,
            url="https://arxiv.org/abs/1703.04730",
        ),
        Reference(
            key="george2018",
            title="Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
            authors="George, Laurent, Bouthillier, Ballas, Vincent",
            year=2018,
            url="https://arxiv.org/abs/1806.03884",
        ),
        Reference(
            key="grosse2023",
            title="Studying Large Language Model Generalization with Influence Functions",
            authors="Grosse, Bae, Anil, et al.",
            year=2023,
            url="https://arxiv.org/abs/2308.03296",
        ),
    ],
    relations=[
        Agrees(
            products_over_damping,
            fields=("values",),
            where={"damping": 1e12, "approximation": "ekfac"},
        ),
        Agrees(
            products_over_damping,
            fields=("values",),
            where={"damping": 1e12, "approximation": "cg"},
        ),
        InvariantTo("logit_shift", fields=("values",)),
    ],
    needs=["gradients", "dataset"],
    # Of the two the larger: three passes over the data set, or two and one for each step.
    cost=Cost(
        forward=size.images + size.dataset * (3 + param.steps),
        backward=size.images + size.dataset * (3 + param.steps) * (3 * size.images + 1),
    ),
    oracle=inverse_curvature_and_retraining,
    quick={"k": 2, "steps": 2, "approximation": "cg"},
    demo={"dataset": "builtin:scenes/400"},
)
def influence_functions(
    model: Model,
    images: Images,
    dataset: Dataset,
    labels: Labels,
    *,
    approximation: Annotated[
        Literal["ekfac", "cg"],
        Field(description="Kronecker factors of each layer, or conjugate gradients with the exact matrix"),
    ] = "ekfac",
    damping: Annotated[
        float | None,
        Field(gt=0, le=1e12, description="lambda; default: a tenth of the curvature's mean eigenvalue"),
    ] = None,
    layers: WeightLayers = None,
    steps: Annotated[
        int,
        Field(ge=1, le=10_000, description="most steps of conjugate gradients, a pass over the data each"),
    ] = 20,
    k: Count = 5,
    seed: Seed = None,
) -> TrainingInfluence:
    """Influence functions: the predicted rise of a loss if a training image is left out.

    values = 1/M  dL(x, y)/dw . (G + lambda I)^-1 dL(x_i, y_i)/dw

    G = 1/M sum_i J_i' (diag(p_i) - p_i p_i') J_i,  J_i = dz_i / dw

    with L the cross-entropy, (x, y) the explained image and its label, and G the Gauss-Newton matrix of the M
    training images, which is their Hessian for a linear model. Proponents reduce the loss of the explained
    image. ``lambda`` is the weight of the L2 penalty in training, or a larger number: directions in which the
    loss is flat have tiny eigenvalues, and the inverse amplifies their errors.

    "ekfac" replaces G by a matrix for each linear layer and convolution, with the eigenvectors of two
    Kronecker factors: second moments of the layer's inputs and of the gradients at its outputs. Other weights
    (norms, tokens), and layers that run several times, do not count. Three passes over the data set. "cg"
    solves with G itself by conjugate gradients, for all ``layers``. G, and its mean eigenvalue, are estimated
    from one class for each training image, drawn from its prediction; "cg" draws them for its default damping
    alone.

    Returns:
        ``values`` (N, M) of M training images; ``proponents`` and ``opponents`` (N, k), their indices.

    Raises:
        InputError: a data set without classes; a layer too wide for its Kronecker factors.
        UnknownName: a class of the data set that is no class of the model.
        ModelError: ``layers`` without weights; none of them linear or a convolution, with "ekfac".

    Example::
        from phosphene import run

        data = {"images": "builtin:scenes/2", "dataset": "builtin:scenes/24"}
        result = run("influence_functions", **data, layers=["classifier"], k=3, seed=0)
        result.values.shape  # (2, 24)

    Source:
        Koh and Liang 2017, section 2.1, with G for the Hessian; EK-FAC: George et al. 2018, section 3.1,
        Grosse et al. 2023, section 2.2; of convolutions: Grosse and Martens 2016, section 3.
    """
    require_class_labels(model, dataset)
    network, batch = copy_at(model, None), batch_size(model)
    assert isinstance(seed, int)  # the call drew one
    if approximation == "ekfac":
        layers = _factored_layers(model, layers)
        bases = _eigenbases(_Factors(network, layers, seed).run(dataset, batch))
        eigenvalues = _Eigenvalues(network, layers, bases, seed).run(dataset, batch)
        gradients = torch.stack([*image_gradients(network, weights_of(network, layers), images, labels)])
        solved = _divide(network, layers, gradients, bases, eigenvalues, damping)
    else:
        weights = weights_of(network, layers)
        gradients = torch.stack([*image_gradients(network, weights, images, labels)])
        if damping is None:
            # equivalent mutants: the batch size does not change the result
            squares = _SquaredNorms(network, layers, seed).run(dataset, batch)
            damping = RELATIVE_DAMPING * float(squares) / gradients.shape[1]

        def curvature(vectors: Tensor) -> Tensor:
            return _CurvatureProducts(network, layers, vectors).run(dataset, batch)

        solved = _conjugate_gradients(curvature, gradients, damping, steps)
    products = GradientProducts(network, layers, solved.to(gradients)).run(dataset, batch)
    values = products["products"].tensor().T / len(dataset)
    classes = products["classes"].labels()
    return training_influence(model, images, labels, dataset, classes, values, k, "influence function")


# --- the class that is drawn for each image --------------------------------------------------------------


def _draw_classes(logits: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """One class for each image, drawn from its probabilities: the same in any batch."""
    uniform = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed + 1_000_003 * index) % 2**63)
        torch.rand((), generator=generator)  # the first number of neighboring seeds is correlated
        uniform.append(torch.rand((), generator=generator, dtype=torch.float64))
    # equivalent mutants: classes have no gradient
    cumulative = to_float64(logits.detach()).cpu().softmax(1).cumsum(1)
    # equivalent mutants: a draw is never equal to a sum of probabilities
    drawn = (cumulative < torch.stack(uniform)[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
    return drawn.to(logits.device)


# --- Kronecker factors -----------------------------------------------------------------------------------


def _factored_layers(model: Model, layers: Sequence[str] | None) -> list[str]:
    """The linear layers and convolutions that run once, among ``layers`` or what they contain.

    Not those with other weights than weight and bias, or with weights of a layer before them.
    """
    weights_of(model, layers)  # refuses layers without weights
    ran = model.structure.layers
    names, used = [], set[int]()
    for name, layer in model.layers.items():
        chosen = layers is None or any(name == own or name.startswith(f"{own}.") for own in layers)
        once = name in ran and ran[name].calls == 1
        if not (chosen and once and isinstance(layer, (nn.Linear, nn.Conv2d))):
            continue
        weights = dict(layer.named_parameters())
        own_weights = ["weight"] if layer.bias is None else ["weight", "bias"]
        if list(weights) != own_weights or used & set(map(id, weights.values())):
            continue
        if (side := max(_sides(layer))) > MAX_FACTOR:
            raise InputError(
                f"the Kronecker factor of layer {name!r} has {side:,} rows, more than {MAX_FACTOR:,}: "
                "name other layers, layers=[...]"
            )
        used |= set(map(id, weights.values()))
        names.append(name)
    if not names:
        among = "" if layers is None else f" among {', '.join(layers)}"
        raise ModelError(
            f"{model.name} has no linear layer or convolution{among} with Kronecker factors (it runs once, "
            "with weight and bias alone): use approximation='cg'"
        )
    return names


def _sides(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """The sides of a layer's factors: of its outputs and of its inputs, with one for a bias, per group."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    # equivalent mutants: all outputs have as many weights
    inputs = layer.weight[0].numel() + (layer.bias is not None)
    return len(layer.weight) // groups, inputs


def _as_matrices(layer: nn.Linear | nn.Conv2d, gradients: Tensor) -> Tensor:
    """Flattened gradients (n, P) of weight and bias as matrices (n, groups, outputs, inputs)."""
    count, outputs = len(gradients), len(layer.weight)
    weight = gradients[:, : layer.weight.numel()].view(count, outputs, -1)
    if layer.bias is not None:
        weight = torch.cat([weight, gradients[:, layer.weight.numel() :, None]], 2)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.unflatten(1, (groups, outputs // groups))


def _flatten(layer: nn.Linear | nn.Conv2d, matrices: Tensor) -> Tensor:
    """The inverse of ``_as_matrices``."""
    matrices = matrices.flatten(1, 2)
    if layer.bias is None:
        return matrices.flatten(1)
    return torch.cat([matrices[:, :, :-1].flatten(1), matrices[:, :, -1]], 1)


def _inputs(layer: nn.Linear | nn.Conv2d, values: Tensor) -> Tensor:
    """What a layer's weights are multiplied by: (n, groups, positions, inputs), with 1 for a bias."""
    if isinstance(layer, nn.Linear):
        rows = values.reshape(len(values), 1, -1, values.shape[-1])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = F.unfold(
            F.pad(values, _padding(layer), mode=mode),
            layer.kernel_size,
            dilation=layer.dilation,
            stride=layer.stride,
        )
        rows = patches.unflatten(1, (layer.groups, -1)).transpose(2, 3)
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def _padding(layer: nn.Conv2d) -> list[int]:
    """The padding of a convolution: left, right, top, bottom."""
    sides: list[int] = []
    for axis in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            width = 0 if isinstance(layer.padding, str) else int(layer.padding[axis])
            sides += [width, width]
    return sides


def _outputs(layer: nn.Linear | nn.Conv2d, gradients: Tensor) -> Tensor:
    """Gradients at a layer's outputs: (n, groups, positions, outputs)."""
    if isinstance(layer, nn.Linear):
        return gradients.reshape(len(gradients), 1, -1, gradients.shape[-1])
    return gradients.flatten(2).unflatten(1, (layer.groups, -1)).transpose(2, 3)


@dataclass
class _Factors(Fold[State]):
    """Second moments of each layer's inputs and of the gradients at its outputs."""

    model: Model
    layers: Sequence[str]
    seed: int
    title: str = "factors"

    def update(self, state: State, batch: Batch) -> State:
        parts = {name: self.model.layers[name] for name in self.layers}
        with torch.enable_grad(), Tap(parts, inputs=True) as inputs, Tap(parts) as outputs:
            logits = self.model(batch.images.to(self.model.device))
            drawn = _draw_classes(logits, batch.indices, self.seed)
            loss = F.cross_entropy(logits, drawn, reduction="sum")
            ends = [outputs[name] for name in self.layers]
            gradients = torch.autograd.grad(loss, ends, allow_unused=True)
        moments: State = {}
        for name, end, gradient in zip(self.layers, ends, gradients, strict=True):
            layer = parts[name]
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            # equivalent mutants: moments are detached
            rows = _inputs(layer, inputs[name].detach())
            errors = _outputs(layer, torch.zeros_like(end) if gradient is None else gradient)
            for kind, values in (("inputs", rows), ("outputs", errors)):
                moments[f"{kind}.{name}"] = torch.einsum("ngti,ngtj->gij", values, values).cpu().double()
        return self.merge(state, moments)


#: The eigenvectors of a layer's two factors, as columns: of its outputs and of its inputs.
_Bases = dict[str, tuple[Tensor, Tensor]]


def _eigenbases(moments: State) -> _Bases:
    names = [name.removeprefix("inputs.") for name in moments if name.startswith("inputs.")]
    return {
        name: (
            torch.linalg.eigh(moments[f"outputs.{name}"]).eigenvectors,
            torch.linalg.eigh(moments[f"inputs.{name}"]).eigenvectors,
        )
        for name in names
    }


@dataclass
class _Eigenvalues(Fold[dict[str, Tensor]]):
    """The mean square of the drawn gradient in each layer's eigenbasis (groups, outputs, inputs)."""

    model: Model
    layers: Sequence[str]
    bases: _Bases
    seed: int
    title: str = "eigenvalues"

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device)
        with torch.no_grad():
            drawn = _draw_classes(self.model(images), batch.indices, self.seed)
        sums: State = {"count": len(images)}
        weights = weights_of(self.model, self.layers)
        for gradient in image_gradients(self.model, weights, images, drawn):
            for name, matrices in _rotated(self.model, self.layers, gradient[None], self.bases).items():
                squares = matrices[0].square().cpu()
                sums[name] = sums[name] + squares if name in sums else squares
        return self.merge(state, sums)

    def finish(self, state: State) -> dict[str, Tensor]:
        return {name: state[name] / state["count"] for name in self.layers}


def _rotated(model: Model, layers: Sequence[str], gradients: Tensor, bases: _Bases) -> dict[str, Tensor]:
    """Flattened gradients (n, P) of all layers in the eigenbasis of each: (n, groups, outputs, inputs)."""
    rotated, start = {}, 0
    for name in layers:
        layer = model.layers[name]
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        width = sum(weight.numel() for weight in layer.parameters())
        matrices = _as_matrices(layer, to_float64(gradients[:, start : start + width]))
        outputs, inputs = (basis.to(matrices) for basis in bases[name])
        rotated[name] = outputs.mT @ matrices @ inputs
        start += width
    return rotated


def _divide(
    model: Model,
    layers: Sequence[str],
    gradients: Tensor,
    bases: _Bases,
    eigenvalues: dict[str, Tensor],
    damping: float | None,
) -> Tensor:
    """(G + lambda I)^-1 g for flattened gradients (n, P), layer by layer."""
    parts = []
    for name, matrices in _rotated(model, layers, gradients, bases).items():
        layer = model.layers[name]
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        values = eigenvalues[name].to(matrices)
        added = RELATIVE_DAMPING * float(values.mean()) if damping is None else damping
        # A layer without gradients has no curvature, and nothing to divide.
        quotients = matrices / (values + (added or 1.0))
        outputs, inputs = (basis.to(matrices) for basis in bases[name])
        parts.append(_flatten(layer, outputs @ quotients @ inputs.mT))
    return torch.cat(parts, 1)


# --- conjugate gradients ---------------------------------------------------------------------------------


@dataclass
class _SquaredNorms(Fold[Tensor]):
    """The mean squared norm of the drawn gradient: the trace of G."""

    model: Model
    layers: Sequence[str] | None
    seed: int
    title: str = "curvature"

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device)
        with torch.no_grad():
            drawn = _draw_classes(self.model(images), batch.indices, self.seed)
        total = torch.zeros((), dtype=torch.float64)
        for gradient in image_gradients(self.model, weights_of(self.model, self.layers), images, drawn):
            total = total + to_float64(gradient).square().sum().cpu()
        return self.merge(state, {"total": total, "count": len(images)})

    def finish(self, state: State) -> Tensor:
        mean: Tensor = state["total"] / state["count"]
        return mean


@dataclass
class _CurvatureProducts(Fold[Tensor]):
    """G v for vectors (Q, P), in double precision."""

    model: Model
    layers: Sequence[str] | None
    vectors: Tensor
    title: str = "curvature"
    saved = False

    def update(self, state: State, batch: Batch) -> State:
        weights = weights_of(self.model, self.layers)
        images, sums = batch.images.to(self.model.device), []
        # The backward pass of fused attention cannot be differentiated, that of its plain form can.
        with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            logits = self.model(images)
            ones = torch.ones_like(logits, requires_grad=True)
            linear = _weight_products(logits, weights, ones, create_graph=True)
            # equivalent mutants: the products of both passes are detached
            shares = logits.detach().softmax(1)
            for vector in self.vectors:
                parts = vector.to(logits).split([w.numel() for w in weights])
                inner = sum((g.flatten() * v).sum() for g, v in zip(linear, parts, strict=True))
                # d(u' J v) / du = J v, the change of the logits along v.
                (change,) = torch.autograd.grad(inner, ones, retain_graph=True)
                weighted = shares * change - shares * (shares * change).sum(1, keepdim=True)
                product = _weight_products(logits, weights, weighted)
                sums.append(torch.cat([part.detach().flatten() for part in product]).cpu().double())
        return self.merge(state, {"sum": torch.stack(sums), "count": len(images)})

    def finish(self, state: State) -> Tensor:
        mean: Tensor = state["sum"] / state["count"]
        return mean


def _weight_products(
    logits: Tensor, weights: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool = False
) -> list[Tensor]:
    """J' u for each weight."""
    gradients = torch.autograd.grad(
        logits, list(weights), cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, damping: float, steps: int
) -> Tensor:
    """(G + lambda I)^-1 b for each row b of ``right`` (Q, P), all rows in step."""
    right = right.cpu().double()
    solution, residual, direction = torch.zeros_like(right), right, right
    squares = residual.square().sum(1)
    least = 1e-20 * squares  # a relative error of the residual of 1e-10
    for _ in progress_bar(range(steps), "conjugate gradients", steps):
        active = squares > least
        if not active.any():
            break
        image = product(direction) + damping * direction
        curvature = (direction * image).sum(1)
        step = torch.where(active, squares / torch.where(active, curvature, 1), 0)[:, None]
        solution, residual = solution + step * direction, residual - step * image
        after = residual.square().sum(1)
        direction = (
            residual + torch.where(active, after / torch.where(active, squares, 1), 0)[:, None] * direction
        )
        squares = torch.where(active, after, squares)
    return solution


@hookimpl
def phosphene_methods():
    return [influence_functions]
