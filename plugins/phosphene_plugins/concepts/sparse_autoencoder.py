"""Codes of a sparse autoencoder: their images, maps and drawings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Direction,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps, overlay, to_display
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, PixelRange, UnitRange, length, maximum, param, size

from ..synthesis._activation_maximization import ActivationMaximization, maximize_activation
from ._autoencoder_role import Autoencoder
from ._code_statistics import CodeStatistics, code_maps, map_features, on_model
from ._published_autoencoder_oracle import published_files_have_known_codes
from ._sparse_autoencoder import (
    FIT,
    AutoencoderNetwork,
    PublishedOptions,
    SparseAutoencoder,
    code_direction,
)
from .sparse_autoencoder_fit import GAO_2024

#: Largest number of codes that are shown.
_SHOWN = maximum(length(param.codes, 0), param.count)


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseCodes(Result):
    """M codes of a sparse autoencoder, with the images on which each is largest.

    ``scores`` (M, k): the largest value of the code in each image, ``maps`` (M, k, h, w) its values at all
    positions, ``image_indices`` (M, k) the rows of ``images`` (P, C, H, W), with ``ids``; ``drawings`` (M, C,
    H, W): images that maximize the codes, or None. ``vectors`` (M, channels) and ``thresholds`` (M,): a code
    is active at a position x where <vector, x> > threshold (TopK: only there). Over the data set: ``r2``,
    ``l0``; ``density`` and ``energy`` (K,) of all K codes, shares of the positions at which they are active
    and of what they add up to.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "codes": "M",
        "scores": "M k",
        "maps": "M k h w",
        "image_indices": "M k",
        "images": "P C H W",
        "ids": "P",
        "drawings": "M C p q",
        "vectors": "M channels",
        "thresholds": "M",
        "density": "K",
        "energy": "K",
    }
    groups_per_row: ClassVar[int] = 1

    layer: str
    codes: tuple[int, ...]
    scores: Tensor
    maps: Tensor
    image_indices: Tensor
    images: Tensor
    ids: tuple[str, ...]
    vectors: Tensor
    thresholds: Tensor
    density: Tensor
    energy: Tensor
    r2: Tensor
    l0: Tensor
    count: int
    has_thresholds: bool = True
    drawings: Tensor | None = None
    centers: Centers | None = None

    def direction(self, code: int) -> Direction:
        """A code of this result as the target of other methods. Raises InputError for another one."""
        if code not in self.codes:
            numbers = ", ".join(map(str, self.codes))
            raise InputError(f"code {code} is not among those of this result: {numbers}; pass codes=[{code}]")
        row = self.codes.index(code)
        threshold = float(self.thresholds[row]) if self.has_thresholds else None
        return Direction(self.layer, self.vectors[row], threshold=threshold, pooling="max")

    def lines(self) -> list[str]:
        dead = int((self.density == 0).sum())
        metrics = f"R2 {float(self.r2):.3f}, L0 {float(self.l0):.1f}, {dead} never active"
        head = f"{self.layer}: {len(self.density)} codes on {self.count} images, {metrics}"
        return [head, *(self._title(row) for row in range(len(self.codes)))]

    def _title(self, row: int) -> str:
        code = self.codes[row]
        energy, density = float(self.energy[code]), float(self.density[code])
        return f"code {code}: {energy:.1%} of energy, active at {density:.1%}"

    def panels(self) -> list[list[Panel]]:
        """A row for each code: its drawing, and the images with its map, on one scale per code."""
        groups = []
        for row in range(len(self.codes)):
            group = []
            if self.drawings is not None:
                group.append(Panel(self.drawings[row], self._title(row), is_output=True))
            top = self.scores[row].max().clamp(min=1e-12)
            for n, index in enumerate(self.image_indices[row].tolist()):
                image, heat = self.images[index], (self.maps[row, n] / top).clamp(0, 1)[None].float()
                title = f"{self.ids[index]}: {float(self.scores[row, n]):.3g}"
                if self.drawings is None and n == 0:
                    title = self._title(row)
                if heat.numel() == 1:
                    group.append(Panel(image, title, is_output=True))
                    continue
                enlarged = enlarge_maps(heat, image.shape[1:], self.centers)[0]
                group.append(Panel(overlay(to_display(image), enlarged), title, is_output=True))
            groups.append(group)
        return groups


def _oracle() -> None:
    """Codes that are channels of the image have its pixels as maps, and known R2, L0 and density."""
    published_files_have_known_codes()
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    model = load_model(network, mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 1.0], input_size=(3, 3, 4))
    draw = torch.Generator().manual_seed(0)
    images = 0.3 + 0.1 * torch.rand(4, 3, 3, 4, generator=draw, dtype=torch.float64)
    images[2, 0, 1, 3], images[0, 0, 2, 1], images[1, 1, 0, 0] = 0.9, 0.8, 0.95
    codes = AutoencoderNetwork(3, 4, "relu")
    with torch.no_grad():
        # Codes 1 and 2 are red above 0.6 and green above 0.6, codes 0 and 3 are never active.
        codes.encoder[1, 0], codes.encoder[2, 1] = 1.0, 1.0
        codes.encoder_bias.copy_(torch.tensor([-1.0, -0.2, -0.8, -0.1]))
        codes.decoder.copy_(codes.encoder)
        codes.decoder[0, 2] = 1.0
    config = {"channels": 3, "codes": 4, "activation": "relu", "k": 1, "normalization": "none"}
    autoencoder = SparseAutoencoder(
        network=codes, method=FIT, config=config, layer="0", losses=torch.empty(0), labels=(),
        previews=torch.empty(0, 3, 1, 1),
    )  # fmt: skip
    call: Any = sparse_autoencoder
    with max_batch(1):
        result = call(model, TensorDataset(images), autoencoder, top=2, count=2, steps=0)
    normalized = (images - model.mean[:, None, None]) / model.std[:, None, None]
    expected = torch.stack([(normalized[:, 0] - 0.2).relu(), (normalized[:, 1] - 0.8).relu()], 1)
    assert result.drawings is None and set(result.codes) == {1, 2} and result.count == 4
    for row, code in enumerate(result.codes):
        values = expected[:, code - 1]
        order = values.amax((1, 2)).sort(descending=True, stable=True)
        assert result.image_indices[row].tolist() == [
            result.ids.index(str(n)) for n in order.indices[:2].tolist()
        ]
        torch.testing.assert_close(result.scores[row], order.values[:2])
        torch.testing.assert_close(result.maps[row], values[order.indices[:2]])
        torch.testing.assert_close(result.density[code], (values > 0).double().mean())
    energy = expected.square().sum((0, 2, 3))
    torch.testing.assert_close(result.energy[1:3], energy / energy.sum())
    assert result.energy.argsort(descending=True)[:2].tolist() == list(result.codes)
    x = normalized.movedim(1, -1).flatten(0, 2)
    rebuilt = torch.cat([expected.movedim(1, -1).flatten(0, 2), torch.zeros(48, 1).double()], 1)
    r2 = 1 - (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(result.r2, r2)
    assert abs(float(result.l0) - float((expected > 0).double().mean()) * 2) < 1e-9
    # The score of a code is its largest pre-activation without the constant, an image has it above that.
    target = result.direction(1)
    torch.testing.assert_close(target.evaluate(model, images), normalized[:, 0].amax((1, 2)))
    has_code = target.margin(model, images) > 0
    assert has_code.tolist() == (expected[:, 0].amax((1, 2)) > 0).tolist()
    # A drawing raises the code's largest pre-activation above that of the mean color, which is 0.
    options: dict[str, Any] = {"top": 1, "codes": [1], "steps": 12, "seed": 0}
    drawing = call(model, TensorDataset(images), autoencoder, **options).drawings
    assert result.centers == ((0, 1, 2), (0, 1, 2, 3))
    few = call(model, TensorDataset(images.float()), autoencoder, **options | {"steps": 2})
    assert few.images.dtype == torch.float64 and not torch.equal(few.drawings, drawing)
    same = call(model, TensorDataset(images), autoencoder, **options | {"steps": 2})
    assert torch.equal(few.drawings, same.drawings), "the drawings do not depend on the seed alone"
    # A code of standardized activations has no threshold.
    standardized = AutoencoderNetwork(3, 4, "relu", normalization="layer_norm")
    standardized.load_state_dict(codes.state_dict())
    without = dataclasses.replace(autoencoder, network=standardized)
    result = call(model, TensorDataset(images), without, top=1, codes=[1, 2], steps=0)
    assert not result.has_thresholds and result.thresholds.tolist() == [0, 0]
    other = call(model, TensorDataset(images), autoencoder, **options | {"steps": 2, "seed": 3})
    assert not torch.equal(few.drawings, other.drawings)
    assert target.threshold is not None and abs(target.threshold - 0.2) < 1e-6
    pooled = call(model, TensorDataset(images), autoencoder, layer="1", top=1, count=2, steps=0)
    assert pooled.layer == "1" and pooled.centers is None
    message = ""
    try:
        pooled.direction(3)
    except InputError as error:
        message = str(error)
    assert f"{pooled.codes[0]}, {pooled.codes[1]}" in message
    assert float(target.evaluate(model, drawing)) > 0.1


@method(
    family="concepts",
    references=[
        GAO_2024,
        Reference(
            key="joseph2025",
            title="Prisma: An Open Source Toolkit for Mechanistic Interpretability in Vision and Video",
            authors="Joseph, Suresh, Hufe, Stevinson, Graham, Vadi, Bzdok, Lapuschkin, Sharkey, Richards",
            year=2025,
            url="https://arxiv.org/abs/2504.19475",
        ),
    ],
    invariants=[UnitRange(field="density"), UnitRange(field="energy"), PixelRange(field="drawings")],
    relations=[InvariantTo("dataset_order", fields=("density", "energy", "r2", "l0", "scores"))],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=size.dataset + _SHOWN * (param.top + param.steps + 8), backward=_SHOWN * (param.steps + 8)
    ),
    oracle=_oracle,
    quick={"count": 2, "top": 2, "steps": 2},
    demo={"dataset": "builtin:scenes/200", "count": 5, "top": 4},
)
def sparse_autoencoder(
    model: Model,
    dataset: Dataset,
    autoencoder: Autoencoder,
    *,
    layer: Annotated[
        LayerName | None, Field(description="layer that is encoded; default: that of the training")
    ] = None,
    codes: Annotated[
        list[int] | None, Field(min_length=1, description="codes to show; default: those of most energy")
    ] = None,
    count: Annotated[int, Field(ge=1, le=1000, description="number of codes, without ``codes``")] = 6,
    top: Annotated[int, Field(ge=1, le=100, description="number of images per code")] = 4,
    steps: Annotated[
        int, Field(ge=0, le=100_000, description="optimization steps of the drawings; 0: none")
    ] = 64,
    published: PublishedOptions = PublishedOptions(),
    seed: Seed = None,
) -> SparseCodes:
    """Sparse autoencoder (SAE): the codes of a layer, each with its images, its map and its drawing.

    z (x) = activation(W_e (x - b) / s + b_e),  x' = s z W_d + b

    R2 = 1 - sum_x |x - x'|^2 / sum_x |x - mean x|^2,  L0 = mean number of active codes

    with x the layer's activation at each position of each image. Shown are the codes of most energy, sum_x
    z_k(x)^2 |row k of W_d|^2, each with the ``top`` images in which its largest value is largest, with the
    map of its values, and an image that maximizes its largest pre-activation (activation maximization, with
    the defaults of ``neuron_visualization``).

    ``autoencoder`` is a result of ``sparse_autoencoder_fit``, its folder, or a published ``.safetensors``
    file with the tensors W_enc, b_enc, W_dec, b_dec (SAELens, Prisma), or those of sparsify,
    dictionary_learning and Gao et al. Such a file does not say which ``layer`` it is of, nor its
    ``activation``, ``k``, whether b is subtracted (``centered``) and whether inputs were normalized
    (``normalization``); its model card does. Class tokens are no positions of a map: R2 is of the patches.

    Returns:
        ``codes`` (M,), ``scores`` (M, top), ``maps`` (M, top, h, w), ``drawings`` (M, C, H, W), ``r2``,
        ``l0``, and ``density`` and ``energy`` of all codes. ``direction(code)`` is a target for any method.

    Raises:
        InputError: a layer of other channels, a code that does not exist, a file of another layout, or one
            whose activation is not determined.
        DivergenceError: a drawing without a gradient at its start; try another seed, or steps=0.

    Example::
        from phosphene import run

        fit = run("sparse_autoencoder_fit", dataset="builtin:scenes/16", codes=64, k=4, steps=20, seed=0)
        result = run("sparse_autoencoder", dataset="builtin:scenes/32", autoencoder=fit, count=3, steps=4)
        run("grad_cam", images="builtin:scenes/2", target=result.direction(result.codes[0]))

    Source:
        Gao et al. 2024, sections 2 and 4.
    """
    autoencoder = autoencoder.complete(published, layer)
    layer = model.layer_name(autoencoder.layer)
    network = on_model(autoencoder.codes, model, layer)
    total = len(network.encoder)
    if codes is not None and (wrong := [code for code in codes if not 0 <= code < total]):
        raise InputError(f"there are {total} codes, so there is no number {wrong[0]}")
    statistics = CodeStatistics(model, network, layer, top).run(dataset, batch_size(model))
    # equivalent mutants: on the CPU every sort of torch is stable
    by_energy = statistics["energy"].sort(descending=True, stable=True).indices
    selected = codes or by_energy[:count].tolist()
    units = statistics["images"][selected]
    distinct = sorted(set(units.flatten().tolist()))
    row_of = {index: row for row, index in enumerate(distinct)}
    step = batch_size(model)
    parts = [
        dataset.read(distinct[n : n + step]).to(model.device, model.dtype)
        for n in range(0, len(distinct), step)
    ]
    with torch.no_grad():
        values = torch.cat(
            [code_maps(network, map_features(model, part, layer))[:, selected] for part in parts]
        )
    rows = torch.tensor([[row_of[index] for index in line] for line in units.tolist()])
    images = torch.cat(parts)
    directions = [code_direction(network, layer, code) for code in selected]
    thresholds = [target.threshold for target in directions]

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(model.device, model.dtype)

    return SparseCodes(
        layer=layer,
        codes=tuple(selected),
        scores=convert(statistics["scores"][selected]),
        maps=convert(torch.stack([values[line, m] for m, line in enumerate(rows)])),
        image_indices=rows.to(model.device),
        images=images,
        ids=tuple(dataset.id(index) for index in distinct),
        vectors=convert(torch.stack([target.vector for target in directions])),
        thresholds=convert(torch.tensor([value or 0.0 for value in thresholds])),
        has_thresholds=None not in thresholds,
        density=convert(statistics["density"]),
        energy=convert(statistics["energy"]),
        r2=convert(statistics["r2"]),
        l0=convert(statistics["l0"]),
        count=len(dataset),
        drawings=_drawings(model, directions, steps, seed) if steps else None,
        centers=unit_centers(model, layer, images.shape[2:])
        if values.ndim == 4 and values[0, 0].numel() > 1
        else None,
    )


def _drawings(model: Model, directions: list[Direction], steps: int, seed: int | None) -> Tensor:
    """Images (M, C, H, W) that maximize the largest pre-activation of each code."""
    params = ActivationMaximization(start_noise=0.1, steps=steps)

    def score(images: Tensor, chosen: list[Direction]) -> Tensor:
        maps = map_features(model, images, chosen[0].name)
        return torch.cat([target.score(row) for target, row in zip(chosen, maps.split(1), strict=True)])

    drawings = []
    for start in range(0, len(directions), batch_size(model)):
        chosen = directions[start : start + batch_size(model)]
        result = maximize_activation(
            model, partial(score, chosen=chosen), len(chosen), None, params, seed=seed
        )
        drawings.append(result.images)
    return torch.cat(drawings)


@hookimpl
def phosphene_methods():
    return [sparse_autoencoder]
