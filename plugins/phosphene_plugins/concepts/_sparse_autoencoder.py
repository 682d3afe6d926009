"""``SparseAutoencoder``: a dictionary of codes for a layer's activations, trained or read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Direction, InputError
from phosphene.images import charts, colorize, enlarge
from phosphene.models import read_weights
from phosphene.results import Panel, TrainedNetwork
from phosphene.spec import ParameterGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ActivationName = Literal["topk", "batch_topk", "jump_relu", "relu"]
#: The method that trains these networks and builds them again.
FIT = "concepts.sparse_autoencoder_fit"
#: Codes in the matrix of cosines.
MATRIX_CODES = 48

#: The names of the tensors in published files: encoder, its bias, decoder, bias of the layer, thresholds.
_LAYOUTS: dict[str, tuple[str, str, str, str]] = {
    "SAELens, Prisma": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "sparsify": ("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
    "dictionary_learning": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    "sparse_autoencoder": ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias"),
}
#: Names of the thresholds of a JumpReLU.
_THRESHOLDS = ("threshold", "log_threshold")
#: Tensors of published files that the codes do not depend on.
_UNUSED = ("scaling_factor", "num_batches_not_active", "step", "k", "stats_last_nonzero")


class PublishedOptions(ParameterGroup):
    """What a published file of weights does not say; the result of a fit has its own."""

    activation: Annotated[
        ActivationName | None,
        Field(description="activation of a published file; default: jump_relu where it has thresholds"),
    ] = None
    k: Annotated[
        int | None, Field(ge=1, le=100_000, description="number of active codes of a published file's TopK")
    ] = None
    centered: Annotated[
        bool | None,
        Field(description="whether a published file's bias b is subtracted before the encoder (Prisma: yes)"),
    ] = None
    normalization: Annotated[
        Literal["none", "layer_norm"] | None,
        Field(description="normalization of a published file's inputs; default: none"),
    ] = None


class AutoencoderNetwork(nn.Module):
    """Codes (..., K) of activations (..., C), and the activations that they stand for.

    z = activation(W_e (x - b) / s + b_e),  x' = s z W_d + b

    ``encoder`` W_e and ``decoder`` W_d (K, C), ``encoder_bias`` b_e (K,), ``bias`` b (C,), ``scale`` s ().
    With the normalization "layer_norm", x is (x - mean(x)) / std(x) over its channels, and x' is scaled back.
    """

    threshold: Tensor
    scale: Tensor

    def __init__(
        self, channels: int, codes: int, activation: str = "topk", k: int = 1, normalization: str = "none"
    ) -> None:
        super().__init__()
        if activation not in get_args(ActivationName) or normalization not in ("none", "layer_norm"):
            raise InputError(f"there is no activation {activation!r} of codes with {normalization!r}")
        if not all(isinstance(n, int) and n >= 1 for n in (channels, codes, k)) or k > codes:
            raise InputError(f"{k} of {codes} codes of {channels} channels cannot be active")
        self.activation, self.k, self.normalization = activation, k, normalization
        self.encoder = nn.Parameter(torch.zeros(codes, channels))
        self.decoder = nn.Parameter(torch.zeros(codes, channels))
        self.encoder_bias = nn.Parameter(torch.zeros(codes))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("threshold", torch.zeros(codes))
        self.register_buffer("scale", torch.ones(()))

    def preactivations(self, x: Tensor) -> Tensor:
        """W_e (x - b) / s + b_e, (..., K)."""
        return (self._standardized(x)[0] - self.bias) / self.scale @ self.encoder.T + self.encoder_bias

    def activate(self, values: Tensor) -> Tensor:
        """The codes of pre-activations (..., K); those that are not active are 0."""
        if self.activation == "topk":
            return largest_only(values.relu(), self.k)
        if self.activation == "relu":
            return values.relu()
        return torch.where(values > self.threshold, values, 0).relu()

    def encode(self, x: Tensor) -> Tensor:
        """The codes (..., K) of activations (..., C)."""
        return self.activate(self.preactivations(x))

    def decode(self, codes: Tensor, x: Tensor) -> Tensor:
        """The activations (..., C) that codes (..., K) stand for; ``x`` is what they were computed from."""
        _, mean, deviation = self._standardized(x)
        return (self.scale * (codes @ self.decoder) + self.bias) * deviation + mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    def _standardized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalized activations, and the mean and the deviation that were removed."""
        if self.normalization == "none":
            return x, x.new_zeros(()), x.new_ones(())
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), mean, deviation


def build_network(activation: str | None, **config: Any) -> AutoencoderNetwork:
    """The network of a saved result; that of a published file has no activation yet."""
    names = ("channels", "codes", "k", "normalization")
    config = {name: value for name, value in config.items() if name in names}
    return AutoencoderNetwork(activation=activation or "relu", **config)


def largest_only(values: Tensor, k: int) -> Tensor:
    """The k largest values of each row (..., K), and 0 elsewhere."""
    top = values.topk(k, -1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseAutoencoder(TrainedNetwork):
    """A sparse autoencoder of a layer's activations: K codes, few of which are active at a position.

    ``network`` computes the codes; ``layer`` is the layer that it was trained on, "" in a published file.
    ``density`` (K,): share of the data set's positions at which each code is active; ``r2``: share of the
    activations' squared deviation that the codes explain; ``l0``: mean number of active codes. None where
    they were not measured.
    """

    shapes: ClassVar[Mapping[str, str]] = {"losses": "steps", "previews": "P C H W", "density": "K"}

    layer: str
    density: Tensor | None = None
    r2: Tensor | None = None
    l0: Tensor | None = None

    @property
    def codes(self) -> AutoencoderNetwork:
        """The network."""
        return cast(AutoencoderNetwork, self.network)

    def direction(self, code: int) -> Direction:
        """A code as the target of other methods: attributions, drawings, patches and attacks.

        The score is the largest pre-activation over the positions, without its constant; an image has the
        code where it is active at a position (TopK: where its pre-activation is positive, which it has to
        be). Raises InputError for a number that does not exist.

        Example::
            from phosphene import run

            fit = run("sparse_autoencoder_fit", dataset="builtin:scenes/16", codes=32, k=4, steps=5, seed=0)
            run("grad_cam", images="builtin:scenes/2", target=fit.direction(7), layer="features.11")
        """
        count = len(self.codes.encoder)
        if not 0 <= code < count:
            raise InputError(f"there are {count} codes, so there is no number {code}")
        return code_direction(self.codes, self.layer, code)

    def export_network(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Raises InputError: the network's input is no image."""
        raise InputError(
            "a sparse autoencoder takes activations of a layer and not images, which export writes programs "
            "of: torch.export.export(result.network, (activations,))"
        )

    def lines(self) -> list[str]:
        count, channels = self.codes.encoder.shape
        head = f"{count} codes of {channels} channels of {self.layer or 'a layer'}: {self.codes.activation}"
        if self.density is None or self.r2 is None or self.l0 is None:
            return [head]
        dead = int((self.density == 0).sum())
        losses = self.losses.tolist()
        loss = f"loss: {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps"
        return [head, loss, f"R2 {float(self.r2):.3f}, L0 {float(self.l0):.1f}, {dead} codes never active"]

    def panels(self) -> list[list[Panel]]:
        density = self.density if self.density is not None else self.codes.decoder.norm(dim=1)
        order = density.sort(descending=True, stable=True).indices[:MATRIX_CODES]
        vectors = F.normalize(self.codes.decoder.detach()[order].float(), dim=1)
        matrix = colorize((vectors @ vectors.T).cpu() / 2 + 0.5, "RdBu_r")
        return [[Panel(enlarge(matrix, max(1, 192 // len(order))), "cosines of the most frequent codes")]]

    def draw(self) -> Figure:
        """The loss of the training, and how many codes are active at which share of the positions."""
        if self.density is None:
            return super().draw()
        figure = charts.new_figure(3.4)
        left, right = cast(Any, figure.subplots(1, 2))
        left.plot(range(1, len(self.losses) + 1), self.losses.float().tolist(), color="tab:blue", linewidth=1)
        left.set_yscale("log")
        left.set_xlabel("step", fontsize=8), left.set_title("loss", fontsize=9, loc="left")
        active = self.density[self.density > 0].double().log10().cpu().numpy()
        right.hist(active, bins=30, color="tab:blue")
        dead = int((self.density == 0).sum())
        right.set_xlabel("share of positions at which a code is active, log10", fontsize=8)
        right.set_title(f"{len(active)} codes; {dead} never active", fontsize=9, loc="left")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7, which="both")
        title = f"{self.layer}, {self.codes.activation}: {self.lines()[-1]}"
        figure.suptitle(charts.plain_label(title, 100), fontsize=8)
        return figure

    def complete(self, options: PublishedOptions, layer: str | None) -> SparseAutoencoder:
        """The autoencoder with the layer and, of a published file, the activation that it is used with.

        Raises InputError for a file whose meaning is not determined, and for options of a fit.
        """
        passed = [name for name, value in options if value is not None]
        if self.config.get("activation") is not None:
            if passed:
                raise InputError(
                    f"{passed[0]}= is for a published file; this autoencoder has its own "
                    f"{passed[0]}, {self.config.get(passed[0])!r}"
                )
            return self if layer is None else replace(self, layer=layer)
        if layer is None:
            raise InputError(
                "a published file does not name the layer that its codes are of: pass layer=, and "
                "phosphene layers lists those of the model"
            )
        activation = options.activation or ("jump_relu" if self.config.get("thresholds") else None)
        if activation is None:
            raise InputError(
                "the file has no thresholds, so that its codes are either those of a ReLU or the k largest: "
                "pass activation='relu', or activation='topk' and k="
            )
        if activation == "batch_topk" and not self.config.get("thresholds"):
            raise InputError("a BatchTopK needs the threshold of its training, which the file lacks")
        if (options.k is None) == (activation == "topk"):
            raise InputError(
                f"activation={activation!r} " + ("needs k=" if activation == "topk" else "takes no k")
            )
        if options.centered is None and self.config.get("centered") is None:
            raise InputError(
                "the file does not say whether b_dec is subtracted before the encoder: pass centered=True "
                "(Prisma) or centered=False (SAELens by default)"
            )
        count, channels = self.codes.encoder.shape
        config: dict[str, Any] = {
            "channels": channels,
            "codes": count,
            "activation": activation,
            "k": options.k or 1,
        }
        config["normalization"] = options.normalization or "none"
        network = AutoencoderNetwork(**config).to(self.codes.encoder)
        network.load_state_dict(self.codes.state_dict())
        centered = self.config.get("centered") if options.centered is None else options.centered
        if not centered:  # the network subtracts b: its contribution is added again
            with torch.no_grad():
                network.encoder_bias.add_(network.encoder @ network.bias)
        network.eval().requires_grad_(False)
        return replace(self, network=network, layer=layer, config=config)


def code_direction(network: AutoencoderNetwork, layer: str, code: int) -> Direction:
    """The encoder's row of a code, and the threshold of <row, x> at which the code is active."""
    with torch.no_grad():
        vector = network.encoder[code] / network.scale
        if network.normalization == "layer_norm":  # a positive multiple of the pre-activation
            return Direction(layer, vector - vector.mean(), pooling="max")
        threshold = network.threshold[code] - network.encoder_bias[code] + vector @ network.bias
        return Direction(layer, vector, threshold=float(threshold), pooling="max")


def read_published(path: Path) -> SparseAutoencoder:
    """The weights in a safetensors file of one of the published layouts, without its activation and layer.

    Read are ``W_enc`` (C, K), ``b_enc``, ``W_dec`` (K, C), ``b_dec`` (SAELens, Prisma); ``encoder.weight``
    (K, C), ``encoder.bias`` with ``W_dec`` (K, C) (sparsify) or ``decoder.weight`` (C, K)
    (dictionary_learning) and ``b_dec``; ``encoder.weight``, ``latent_bias``, ``decoder.weight``, ``pre_bias``
    (Gao et al.); and ``threshold`` or ``log_threshold`` (K,) beside them.

    Raises InputError for a file of other tensors.
    """
    state = dict(read_weights(path))
    layout = next((name for name, names in _LAYOUTS.items() if state.keys() >= set(names)), None)
    extra = state.keys() - set(_LAYOUTS.get(layout or "", ())) - {*_THRESHOLDS, *_UNUSED}
    if layout is None or extra:
        layouts = "; ".join(f"{', '.join(names)} ({name})" for name, names in _LAYOUTS.items())
        raise InputError(
            f"{path} holds {', '.join(sorted(state)[:8]) or 'no tensors'}, which is no layout of a sparse "
            f"autoencoder that is read: {layouts}, each with or without threshold or log_threshold"
        )
    encoder, encoder_bias, decoder, bias = (state[name].float() for name in _LAYOUTS[layout])
    channels, codes = len(bias), len(encoder_bias)
    # Square matrices are transposed by the names alone, as all others.
    encoder = encoder.T if layout == "SAELens, Prisma" else encoder
    decoder = decoder.T if _LAYOUTS[layout][2] == "decoder.weight" else decoder
    thresholds = torch.zeros(codes)
    if has_thresholds := any(name in state for name in _THRESHOLDS):
        values = state["threshold"] if "threshold" in state else state["log_threshold"].exp()
        thresholds = values.float().expand(codes) if values.numel() == 1 else values.float()
    expected = {"encoder": (codes, channels), "decoder": (codes, channels), "threshold": (codes,)}
    tensors = {"encoder": encoder, "decoder": decoder, "threshold": thresholds}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InputError(
                f"{path}: the {name} of {codes} codes and {channels} channels is {tuple(tensor.shape)}"
            )
    network = AutoencoderNetwork(channels, codes)
    network.load_state_dict(tensors | {"encoder_bias": encoder_bias, "bias": bias, "scale": torch.ones(())})
    config: dict[str, Any] = {"channels": channels, "codes": codes, "activation": None}
    config |= {"thresholds": has_thresholds, "centered": None if layout == "SAELens, Prisma" else True}
    return SparseAutoencoder(
        network=network.eval().requires_grad_(False), method=FIT, config=config, layer="",
        losses=torch.empty(0), labels=(), previews=torch.empty(0, 3, 1, 1), uri=str(path),
    )  # fmt: skip
