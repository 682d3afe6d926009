"""Statistics of a sparse autoencoder's codes over a data set, in one pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phosphene import Fold, InputError, Model, at_least_float32, to_float64
from phosphene.data import Batch, State

from ._sparse_autoencoder import AutoencoderNetwork


def map_features(model: Model, images: Tensor, layer: str) -> Tensor:
    """Activations (n, C, h, w) of a layer; a vector is a map of one position."""
    features = model.features(images, layer)
    maps = model.maps(features, images, layer) if features.ndim > 2 else features[..., None, None]
    return at_least_float32(maps)


def on_model(network: AutoencoderNetwork, model: Model, layer: str) -> AutoencoderNetwork:
    """A copy of the network for the activations of a model's layer. Raises InputError for other channels."""
    shape = model.structure.layers[layer].shape if layer in model.structure.layers else None
    channels = shape[0] if shape is not None and len(shape) == 1 else model.map_shape(layer)[0]
    if channels != len(network.bias):
        raise InputError(
            f"layer {layer!r} has {channels} channels, the codes are of a layer with {len(network.bias)}"
        )
    dtype = at_least_float32(torch.empty(0, dtype=model.dtype)).dtype
    return copy.deepcopy(network).to(model.device, dtype)


def code_maps(network: AutoencoderNetwork, maps: Tensor) -> Tensor:
    """The codes (n, K, h, w) of activations (n, C, h, w)."""
    return network.encode(maps.movedim(1, -1)).movedim(-1, 1)


@dataclass
class CodeStatistics(Fold[dict[str, Any]]):
    """R2, L0, density and energy of the codes, and the ``top`` images of each by its largest value.

    ``r2`` and ``l0`` (), ``density`` and ``energy`` (K,): shares of the positions at which a code is active,
    and of the sum of all squares of a code times its direction; ``scores`` and ``images`` (K, top): the
    largest values and the images that they are of, of equal values the earlier image first.
    """

    title = "codes"
    model: Model
    network: AutoencoderNetwork
    layer: str
    top: int = 0
    saved: bool = True

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        maps = map_features(self.model, images, self.layer).movedim(1, -1)
        codes = self.network.encode(maps)
        flat = to_float64(maps - self.network.bias).flatten(0, 2)  # the bias is about the mean
        error = to_float64(maps - self.network.decode(codes, maps))
        values = codes.flatten(1, 2).amax(1).T  # (K, n)
        part: State = {
            "sum": flat.sum(0),
            "squares": flat.square().sum(),
            "errors": error.square().sum(),
            "active": (codes != 0).sum((0, 1, 2)),
            "energy": to_float64(codes * self.network.decoder.norm(dim=1)).square().sum((0, 1, 2)),
        }
        part = {name: value.cpu() for name, value in part.items()} | {"positions": len(flat)}
        if self.top:
            part["scores"] = values.cpu()
            part["images"] = torch.tensor(batch.indices).expand(len(values), -1)
        return self.merge(state, part)

    def merge(self, first: State, second: State) -> State:
        sums = [{n: v for n, v in s.items() if n not in ("scores", "images")} for s in (first, second)]
        merged = super().merge(*sums)
        if not self.top or not (parts := [state for state in (first, second) if state]):
            return merged
        scores, images = (torch.cat([part[name] for part in parts], 1) for name in ("scores", "images"))
        images, order = images.sort(dim=1)
        # equivalent mutants: axis 1 is the last
        order_of_scores = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        rows = order_of_scores.indices[:, : self.top]
        return merged | {"scores": order_of_scores.values[:, : self.top], "images": images.gather(1, rows)}

    def finish(self, state: State) -> dict[str, Any]:
        count = state["positions"]
        deviation = state["squares"] - state["sum"].square().sum() / count
        tops = {name: state[name] for name in ("scores", "images") if name in state}
        return tops | {
            "r2": 1 - state["errors"] / deviation.clamp(min=1e-300),
            "l0": state["active"].sum().double() / count,
            "density": state["active"].double() / count,
            "energy": state["energy"] / state["energy"].sum().clamp(min=1e-300),
        }
