"""Sparse autoencoder of a layer's activations: TopK, BatchTopK and JumpReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    Model,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    to_float64,
)
from phosphene.data import Batch, State
from phosphene.roles import Dataset, LayerName, Seed
from phosphene.roles import Model as ModelInput
from phosphene.spec import Cost, param, size
from phosphene.training import linear_decay, single_precision, train

from ._code_statistics import CodeStatistics, map_features
from ._sparse_autoencoder import FIT, AutoencoderNetwork, SparseAutoencoder, build_network, largest_only

#: A code that was not active for this many steps counts as dead, and learns from the residual error.
DEAD_STEPS = 50
#: Width of the step at a JumpReLU's threshold whose gradient is not zero.
BANDWIDTH = 0.2
#: Share of the newest minimum in the running threshold of BatchTopK.
THRESHOLD_RATE = 0.05

GAO_2024 = Reference(
    key="gao2024",
    title="Scaling and Evaluating Sparse Autoencoders",
    authors="Gao, Dupre la Tour, Tillman, Goh, Troll, Radford, Sutskever, Leike, Wu",
    year=2024,
    url="https://arxiv.org/abs/2406.04093",
)


def _oracle() -> None:
    """Activations of few known directions are explained by codes along these; losses have a closed form."""
    draw = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(3, 3, generator=draw), dim=1)
    # Each position is a multiple of one of the three directions.
    strengths = 0.05 + 0.1 * torch.rand(12, 4, 6, 3, generator=draw)
    strengths *= torch.rand(12, 4, 6, 3, generator=draw).argsort(-1) == 0
    images = (0.5 + strengths @ directions).movedim(-1, 1)
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], input_size=(3, 4, 6))
    std = torch.tensor([0.2, 0.3, 0.25])
    data = TensorDataset(images)
    fit: Any = sparse_autoencoder_fit
    options: dict[str, Any] = {"layer": "0", "batch": 12, "seed": 0}
    result = fit(model, data, codes=3, k=1, steps=150, lr=0.02, **options)
    assert result.r2 > 0.99 and float(result.l0) <= 1 and (result.density > 0.25).all()
    cosines = F.normalize(directions / std, dim=1) @ result.network.decoder.T
    assert (cosines.amax(1) > 0.99).all(), "a direction is no code"
    # The metrics by their definitions.
    x = model.features(images, "0").movedim(1, -1).flatten(0, 2)
    z = result.network.encode(x)
    rest = (x - result.network(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert abs(float(result.r2) - (1 - float(rest))) < 1e-5
    assert abs(float(result.l0) - float((z != 0).sum(1).float().mean())) < 1e-5
    torch.testing.assert_close(result.density, (z != 0).float().mean(0))
    target = result.direction(2)
    assert target.name == "0" and torch.equal(target.vector, result.network.encoder[2] / result.network.scale)
    shifted = x @ target.vector - target.threshold
    torch.testing.assert_close(shifted, result.network.preactivations(x)[:, 2], rtol=1e-4, atol=1e-4)
    _dead_codes_explain_the_rest()
    _jump_has_the_slope_of_its_bandwidth()
    # The first loss is that of the initial weights: encoder and decoder are the same unit vectors.
    options |= {"codes": 6, "k": 2}
    first = fit(model, data, steps=1, lr=1e-12, **options)
    mean, deviation = x.mean(0), x.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(first.network.bias, mean)
    u = (x - mean) / deviation
    w = first.network.decoder
    codes = largest_only((u @ w.T).relu(), 2)
    loss = (u - codes @ w).square().sum(1).mean() / 3
    torch.testing.assert_close(first.losses[0], loss, rtol=1e-4, atol=0)
    # JumpReLU: the same with theta at first the normal quantile of 1 - 2/6, and the penalty (L0 / k - 1)^2.
    jump = fit(model, data, steps=1, lr=1e-12, activation="jump_relu", **options)
    values = u @ jump.network.decoder.T
    active = values > 0.43073
    loss = (u - (values * active) @ jump.network.decoder).square().sum(1).mean() / 3
    loss = loss + (active.sum(1).float().mean() / 2 - 1) ** 2
    torch.testing.assert_close(jump.losses[0], loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(jump.network.threshold, torch.full((6,), 0.43073), rtol=1e-4, atol=0)
    # BatchTopK: 2 codes per position on average; its threshold is the smallest of them.
    batch = fit(model, data, steps=1, lr=1e-12, activation="batch_topk", **options)
    values = (u @ batch.network.decoder.T).relu()
    smallest = values.flatten().topk(2 * len(u)).values[-1]
    torch.testing.assert_close(batch.network.threshold, smallest.expand(6), rtol=1e-4, atol=1e-6)
    assert abs(float(batch.l0) - 2) < 0.05
    for activation in ("batch_topk", "jump_relu"):
        assert fit(model, data, activation=activation, steps=100, lr=0.02, **options).r2 > 0.9


def _dead_codes_explain_the_rest() -> None:
    """Codes 3 and 4 are always the largest two; of the others, 1 and 2 have been idle for 50 steps."""
    draw = torch.Generator().manual_seed(1)
    network = AutoencoderNetwork(4, 5, "topk", 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=draw)
        network.encoder_bias.copy_(torch.tensor([1.0, 2.0, 1.5, 30.0, 40.0]))
    training, x = _Training(network), torch.rand(2, 7, 4, generator=draw)
    training.idle = torch.tensor([48.0, 49.0, 60.0, 9.0, 0.0])
    u = (x - network.bias) / network.scale
    values, dictionary = u @ network.encoder.T + network.encoder_bias, F.normalize(network.decoder, dim=1)
    rest = u - values[..., 3:] @ dictionary[3:]
    revived = rest - values[..., 1:3].relu() @ dictionary[1:3]
    expected = rest.square().mean((1, 2)) + 0.5 * revived.square().mean((1, 2)) / rest.square().mean()
    torch.testing.assert_close(training(x, 0.5), expected)
    assert training.idle.tolist() == [49, 50, 61, 0, 0]


def _jump_has_the_slope_of_its_bandwidth() -> None:
    """Two of four values lie within half a bandwidth of the threshold; the largest two are active."""
    threshold = torch.tensor(0.7, requires_grad=True)
    values = 0.7 + BANDWIDTH * torch.tensor([-1.0, -0.2, 0.3, 1.0])
    codes, active = _jump(values, threshold)
    torch.testing.assert_close(codes, values * torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(active, torch.tensor([0.0, 0, 1, 1]))
    for total, slope in ((active.sum(), -2 / BANDWIDTH), (codes.sum(), -2 * 0.7 / BANDWIDTH)):
        (gradient,) = torch.autograd.grad(total, threshold, retain_graph=True)
        torch.testing.assert_close(float(gradient), slope, rtol=1e-5, atol=0)


@method(
    family="concepts",
    title="Sparse autoencoder, training",
    references=[
        GAO_2024,
        Reference(
            key="bussmann2024",
            title="BatchTopK Sparse Autoencoders",
            authors="Bussmann, Leask, Nanda",
            year=2024,
            url="https://arxiv.org/abs/2412.06410",
        ),
        Reference(
            key="rajamanoharan2024",
            title="Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders",
            authors="Rajamanoharan, Lieberum, Sonnerat, Conmy, Varma, Kramar, Nanda",
            year=2024,
            url="https://arxiv.org/abs/2407.14435",
        ),
    ],
    needs=["dataset", "training"],
    cost=Cost(forward=size.dataset * 2 + param.steps * param.batch),
    network=build_network,
    oracle=_oracle,
    quick={"codes": 12, "k": 3, "steps": 2, "batch": 2},
    demo={"dataset": "builtin:scenes/200", "codes": 128, "k": 8, "steps": 120, "batch": 8},
)
def sparse_autoencoder_fit(
    model: ModelInput,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to explain; default: the last map")] = None,
    codes: Annotated[int, Field(ge=1, le=1_000_000, description="number of codes")] = 1024,
    k: Annotated[
        int, Field(ge=1, le=100_000, description="number of codes that are active at a position")
    ] = 16,
    activation: Annotated[
        Literal["topk", "batch_topk", "jump_relu"],
        Field(description="k codes at each position, k on average, or a threshold per code"),
    ] = "topk",
    revive: Annotated[
        float,
        Field(ge=0, le=1e3, description="weight of the loss of codes that are not active"),
    ] = 1 / 32,
    positions: Annotated[
        int, Field(ge=1, le=1_000_000, description="most positions of an image in a step, drawn at random")
    ] = 1024,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="number of training steps of Adam")] = 2000,
    batch: Annotated[int, Field(ge=1, le=4096, description="number of images per step")] = 16,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate of Adam, which falls to zero")] = 2e-3,
    seed: Seed = None,
) -> SparseAutoencoder:
    """Sparse autoencoder (SAE), trained on a layer: a dictionary of codes, few active at each position.

    min  E_x |x - x'|^2 / s^2 C,   x' = s z W_d + b,   z = activation(W_e (x - b) / s + b_e)

    with x (C,) the layer's activation at a position, b its mean at the start, s^2 its mean variance, and the
    rows of W_d of length 1. "topk": the k largest of ReLU(.). "batch_topk": the k n largest of the n
    positions of a step; afterwards all above a threshold, the running mean of the smallest of them.
    "jump_relu": those above a threshold theta of each code, which is trained with a gradient of width 0.2 at
    the step and the loss (L0 / k - 1)^2, L0 the mean number of active codes. Codes that were not active
    for 50 steps learn, with the weight ``revive``, to explain the rest x - x'. An interrupted training
    continues where it stopped.

    Returns:
        ``network``, the autoencoder; ``losses`` (steps,); on all images ``r2``, ``l0`` and the ``density``
        (K,) of the codes, 0 of those that are never active. ``direction(code)`` is a target for any method;
        of a saved result it is "concept:folder#code". ``sparse_autoencoder`` shows the codes.

    Raises:
        InputError: more active codes than codes.
        ModelError: a layer's output that is no map or vector, or that is the same everywhere.
        DivergenceError: a loss that is no longer finite.

    Example::
        from phosphene import run

        fit = run("sparse_autoencoder_fit", dataset="builtin:scenes/16", codes=64, k=4, steps=10, seed=0)
        float(fit.r2), float(fit.l0)
        run("grad_cam", images="builtin:scenes/2", target=fit.direction(7), layer="features.11")

    Source:
        Gao et al. 2024, section 2; Bussmann et al. 2024, section 2; Rajamanoharan et al. 2024, sections 3, 4.
    """
    if k > codes:
        raise InputError(f"of {codes} codes at most {codes} can be active, not k={k}")
    model = single_precision(model)
    layer = layer if layer is not None else model.last_map
    mean, deviation = _Moments(model, layer).run(dataset, batch_size(model))
    if not deviation > 0:
        raise ModelError(f"the output of layer {layer!r} is the same at all positions: there are no codes")
    network = AutoencoderNetwork(len(mean), codes, activation, k)
    with torch.no_grad():
        network.decoder.copy_(F.normalize(torch.randn(codes, len(mean)), dim=1))
        network.encoder.copy_(network.decoder)
        network.bias.copy_(mean)
        network.scale.copy_(deviation)
    trained = _Training(network).to(model.device, model.dtype)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        with torch.no_grad():
            maps = torch.cat([map_features(model, part, layer) for part in images.split(batch_size(model))])
            values = maps.flatten(2)
            rows = torch.randperm(values.shape[2])[:positions].sort().values
            values = values[:, :, rows.to(values.device)].movedim(1, 2)  # (n, P, C)
        return trained(values, revive)

    optimizer = torch.optim.Adam(trained.parameters(), lr)
    history = train(
        trained, dataset, loss, optimizer, steps=steps, batch=batch, seed=seed or 0, schedule=linear_decay
    )
    with torch.no_grad():
        network.decoder.copy_(F.normalize(network.decoder, dim=1))
        if activation != "topk":
            network.threshold.copy_(
                trained.log_threshold.exp() if activation == "jump_relu" else trained.smallest.clamp(min=0)
            )
    network.eval().requires_grad_(False)
    metrics = CodeStatistics(model, network, layer, saved=False).run(dataset, batch_size(model))
    r2, l0, density = (metrics[name].to(model.device, model.dtype) for name in ("r2", "l0", "density"))
    config = {"channels": len(mean), "codes": codes, "activation": activation, "k": k}
    return SparseAutoencoder(
        network=network,
        method=FIT,
        config=config | {"normalization": "none"},
        layer=layer,
        losses=history.losses,
        labels=(),
        previews=torch.empty(0, 3, 1, 1, device=model.device, dtype=model.dtype),
        density=density,
        r2=r2,
        l0=l0,
    )


@dataclass
class _Moments(Fold[tuple[Tensor, Tensor]]):
    """The mean (C,) of a layer's activations, and the root of their mean variance."""

    title = "mean and variance"
    saved = False  # the checkpoint is that of the training
    model: Model
    layer: str

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        values = to_float64(map_features(self.model, images, self.layer).movedim(1, -1).flatten(0, 2))
        sums = {"sum": values.sum(0).cpu(), "squares": values.square().sum(0).cpu()}
        return self.merge(state, sums | {"count": len(values)})

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        mean = state["sum"] / state["count"]
        variance = (state["squares"] / state["count"] - mean.square()).mean()
        # Below rounding errors of the squares a constant layer would have a variance.
        scale = (state["squares"] / state["count"]).mean()
        return mean, torch.where(variance > 1e-12 * scale, variance, 0).sqrt()


class _Training(nn.Module):
    """The autoencoder with what its training needs beside its weights."""

    idle: Tensor
    smallest: Tensor

    def __init__(self, network: AutoencoderNetwork) -> None:
        super().__init__()
        self.network = network
        codes = len(network.encoder)
        #: log theta of a JumpReLU, at first that of which a standard normal value is above with k / codes.
        quantile = 2**0.5 * torch.erfinv(torch.tensor(1 - 2 * network.k / codes))
        self.log_threshold = nn.Parameter(quantile.clamp(0.1, 10).log().expand(codes).clone())
        #: The running mean of the smallest active code of BatchTopK; below 0 before the first step.
        self.register_buffer("smallest", torch.tensor(-1.0))
        #: Steps since each code was active.
        self.register_buffer("idle", torch.zeros(codes))

    def forward(self, x: Tensor, revive: float) -> Tensor:
        """The loss (n,) of activations (n, P, C)."""
        network, dictionary = self.network, F.normalize(self.network.decoder, dim=1)
        u = (x - network.bias) / network.scale
        values = u @ network.encoder.T + network.encoder_bias
        penalty = x.new_zeros(())
        if network.activation == "topk":
            codes = largest_only(values.relu(), network.k)
        elif network.activation == "batch_topk":
            count = min(network.k * values.shape[0] * values.shape[1], values.numel())
            codes = largest_only(values.relu().flatten(), count).view_as(values)
            self._update_threshold(codes)
        else:
            codes, active = _jump(values, self.log_threshold.exp())
            penalty = (active.sum(-1).mean() / network.k - 1) ** 2
        rest = u - codes @ dictionary
        loss = rest.square().mean((1, 2)) + penalty
        with torch.no_grad():
            self.idle = torch.where((codes != 0).any(1).any(0), 0, self.idle + 1)
            dead = self.idle >= DEAD_STEPS
        if revive and dead.any():
            count = min(int(dead.sum()), max(1, x.shape[-1] // 2))
            revived = largest_only(values.relu() * dead, count) @ dictionary
            unexplained = rest.detach().square().mean().clamp(min=torch.finfo(x.dtype).tiny)
            loss = loss + revive * (rest.detach() - revived).square().mean((1, 2)) / unexplained
        return loss

    @torch.no_grad()
    def _update_threshold(self, codes: Tensor) -> None:
        active = codes[codes > 0]
        if len(active):
            rate = THRESHOLD_RATE if self.smallest >= 0 else 1.0
            self.smallest += rate * (active.min() - self.smallest)


def _jump(values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a JumpReLU, and which are active; both have a gradient for the threshold.

    d 1[v > theta] / d theta = -1[|v - theta| < w / 2] / w with the bandwidth w, and none for v.
    """
    step = ((values.detach() - threshold) / BANDWIDTH + 0.5).clamp(0, 1)
    active = (values > threshold).to(values)
    return values * active + threshold.detach() * (step - step.detach()), active + step - step.detach()


@hookimpl
def phosphene_methods():
    return [sparse_autoencoder_fit]
