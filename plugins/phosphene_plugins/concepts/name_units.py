"""Names of units by a model of images and texts: CLIP-Dissect, Oikarinen and Weng 2023."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    Reference,
    TensorDataset,
    at_least_float32,
    batch_size,
    hookimpl,
    load_model,
    method,
)
from phosphene import Model as ImageModel
from phosphene.data import Batch, Rows, State
from phosphene.images import resize
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, InvariantTo, ScalesWith, size

from ..embeddings._features import layer_vectors
from ._common_words import COMMON_WORDS
from ._text_model_role import TextModel

#: Units in the figure, and images of each.
MAX_UNITS, EXAMPLES = 8, 5
#: The probability that an image is one of the unit's, of the first and of the last of its images.
P_FIRST, P_LAST = 0.998, 0.97
#: The least probability of an image under a word.
LEAST_PROBABILITY = 1e-7


@dataclass(frozen=True, eq=False, kw_only=True)
class UnitNames(Result):
    """The word for every channel of a layer, and how similar each word is.

    ``similarity`` (C, W) of C units and W ``words``, zeros of a unit that is the same for all images;
    ``names``: the word of largest similarity of each unit, "" without one; ``margins`` (C,): how far it is
    above the second. ``example_units`` (U,): those in the figure, of largest margin; ``examples`` (U, E, C,
    H, W): the images that activate them most.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "similarity": "units words",
        "words": "words",
        "names": "units",
        "margins": "units",
        "example_units": "U",
        "examples": "U E C H W",
    }
    groups_per_row: ClassVar[int] = 1

    layer: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    similarity: Tensor
    margins: Tensor
    example_units: tuple[int, ...]
    examples: Tensor
    measure: str
    count: int

    def units_of(self, word: str) -> tuple[int, ...]:
        """The units that have this name. Raises InputError for a word that is not among the words."""
        if word not in self.words:
            raise InputError(f"{word!r} is not among the {len(self.words)} words")
        return tuple(unit for unit, name in enumerate(self.names) if name == word)

    def table(self) -> dict[str, list[Any]]:
        """A row for each unit: its name, the similarity and the margin."""
        return {
            "unit": list(range(len(self.names))),
            "name": list(self.names),
            "similarity": self.similarity.amax(1).tolist(),
            "margin": self.margins.tolist(),
        }

    def _title(self, unit: int) -> str:
        best = self.similarity[unit].topk(min(3, len(self.words))).indices.tolist()
        return f"unit {unit}: {', '.join(self.words[index] for index in best)}"

    def lines(self) -> list[str]:
        distinct = len({name for name in self.names if name})
        head = f"{self.layer}: {len(self.names)} units have {distinct} of {len(self.words)} names"
        head += f" ({self.measure}, {self.count} images)"
        return [head, *(self._title(unit) for unit in self.example_units)]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for unit, images in zip(self.example_units, self.examples, strict=True):
            titles = [self._title(unit)] + [""] * (len(images) - 1)
            pairs = zip(images, titles, strict=True)
            groups.append([Panel(image, title, is_output=True) for image, title in pairs])
        return groups


def _oracle() -> None:
    """Channels that are colors get these colors' names; similarities are those of their equations."""
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    model = load_model(network, mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 1.0], input_size=(3, 2, 4))
    colors = {"green": 1, "red": 0, "blue": 2}
    # The embedding is the mean color, weighted more to the right and to the bottom.
    tower = nn.Sequential(nn.Conv2d(3, 3, 4, groups=3, bias=False), nn.Flatten()).double()
    with torch.no_grad():
        list(tower.parameters())[0].copy_(torch.linspace(1, 2, 16).view(4, 4) / 24)
    clip = ImageModel(
        tower, mean=[0.125] * 3, std=[1.0] * 3, input_size=(3, 4, 4), task="embedding", classes=None,
        embed_text=lambda text: 3 * torch.eye(3, dtype=torch.float64)[colors[text.split()[-1]]],
    )  # fmt: skip
    images = torch.rand(31, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = images * torch.rand(31, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call: Any = name_units
    units = model.features(images, "0").mean((2, 3))
    embeddings = tower(resize(images, (4, 4)).clamp(0, 1) - 0.125).detach()
    cosines = F.normalize(embeddings, dim=1)[:, [1, 0, 2]]
    for measure in ("soft_wpmi", "wpmi", "cosine_cubed"):
        options: dict[str, Any] = {"layer": "0", "words": list(colors), "template": "all {}", "top": 4}
        result = call(model, TensorDataset(images), clip, measure=measure, **options)
        assert result.names == ("red", "green", "blue") and result.units_of("blue") == (2,)
        expected = _by_definition(units, cosines, measure, 4)
        torch.testing.assert_close(result.similarity, expected, rtol=1e-9, atol=1e-9)
        top = expected.topk(2).values
        torch.testing.assert_close(result.margins, top[:, 0] - top[:, 1])
    assert result.examples.shape == (3, 5, 3, 2, 4)
    for unit, examples in zip(result.example_units, result.examples, strict=True):
        assert torch.equal(examples, images[units[:, unit].argsort(descending=True)[:5]])
    best = result.table()["similarity"]
    torch.testing.assert_close(torch.tensor(best).double(), result.similarity.amax(1))
    # By default the tenth of the images, rounded up.
    result = call(model, TensorDataset(images), clip, **options | {"top": None, "measure": "wpmi"})
    torch.testing.assert_close(result.similarity, _by_definition(units, cosines, "wpmi", 4))
    # Gray images are those of three equal channels.
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).double()
    one = load_model(network, mean=[0.5], std=[0.5], input_size=(1, 2, 4))
    gray = images[:, :1, :1, :1] * torch.linspace(0.1, 0.4, 8).view(2, 4)
    result = call(one, TensorDataset(gray.float()), clip, **options | {"measure": "cosine_cubed"})
    assert result.examples.dtype == torch.float64 and type(result.example_units[0]) is int
    gray = gray.float().double()
    embeddings = tower(resize(gray.expand(-1, 3, -1, -1), (4, 4)).clamp(0, 1) - 0.125).detach()
    cosines = F.normalize(embeddings, dim=1)[:, [1, 0, 2]]
    expected = _by_definition(one.features(gray, "0").mean((2, 3)), cosines, "cosine_cubed", 4)
    torch.testing.assert_close(result.similarity, expected)
    # A unit that is the same for all images has no name.
    images[:, 2] = 0.2
    result = call(model, TensorDataset(images), clip, **options)
    assert result.names[2] == "" and not result.similarity[2].any() and result.margins[2] == 0


def _by_definition(units: Tensor, cosines: Tensor, measure: str, top: int) -> Tensor:
    """Similarities (C, W) of units (N, C) and cosines (N, W), term by term."""
    count, channels = units.shape
    words = cosines.shape[1]
    if measure == "cosine_cubed":
        cubes = [(values - values.mean(0)) ** 3 for values in (units, cosines)]
        return torch.stack(
            [
                torch.stack(
                    [F.cosine_similarity(cubes[0][:, c], cubes[1][:, w], dim=0) for w in range(words)]
                )
                for c in range(channels)
            ]
        )
    likelihood = torch.zeros(channels, words, dtype=torch.float64)
    for c in range(channels):
        for rank, image in enumerate(units[:, c].argsort(descending=True)[:top].tolist()):
            share = 1.0 if measure == "wpmi" else 0.998 - (0.998 - 0.97) * rank / top
            total = sum(math.exp(10 * float(cosines[image, v])) for v in range(words))
            for w in range(words):
                probability = math.exp(10 * float(cosines[image, w])) / total
                likelihood[c, w] += math.log(1 + share * (probability - 1) + 1e-7)
    prior = [math.log(sum(math.exp(float(v)) for v in likelihood[:, w]) / channels) for w in range(words)]
    return likelihood - torch.tensor(prior, dtype=torch.float64)


@method(
    family="concepts",
    title="CLIP-Dissect",
    references=[
        Reference(
            key="oikarinen2023",
            title="CLIP-Dissect: Automatic Description of Neuron Representations in Deep Vision Networks",
            authors="Oikarinen, Weng",
            year=2023,
            url="https://arxiv.org/abs/2204.10965",
        )
    ],
    relations=[
        InvariantTo("dataset_order", fields=("similarity", "margins")),
        ScalesWith("logits", power=0, fields=("similarity",)),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset * 2),
    oracle=_oracle,
    demo={"dataset": "builtin:scenes/300"},
)
def name_units(
    model: Model,
    dataset: Dataset,
    text_model: TextModel,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to name; default: the last map")] = None,
    words: Annotated[
        Annotated[list[str], Field(min_length=2)] | Literal["common"] | None,
        Field(description="words, or a list of common ones; default: the classes of the text model"),
    ] = None,
    template: Annotated[
        str, Field(pattern=r"\{\}", description="the text of a word, {} standing for it")
    ] = "{}",
    measure: Annotated[
        Literal["soft_wpmi", "wpmi", "cosine_cubed"],
        Field(description="pointwise mutual information, soft or of the first images; or cosine of cubes"),
    ] = "soft_wpmi",
    top: Annotated[
        int | None,
        Field(ge=1, le=100_000, description="images of a unit; default: a tenth of them, at most 100"),
    ] = None,
    temperature: Annotated[
        float, Field(gt=0, le=1000, description="factor of the cosines before the softmax over the words")
    ] = 10.0,
    prior: Annotated[
        float, Field(ge=0, le=10, description="weight of a word's probability for all units")
    ] = 1.0,
) -> UnitNames:
    """CLIP-Dissect: names of a layer's channels, the words whose images activate them.

    p(w | x) = softmax_w (temperature cos(image x, text w))

    soft_wpmi_kw = l_kw - prior log mean_k exp l_kw,  l_kw = sum over B_k of log(1 + p_x (p(w | x) - 1))

    with B_k the ``top`` images with the largest mean of channel k over its positions, and p_x the probability
    that an image belongs there, from 0.998 of the first falling to 0.97. "wpmi": p_x = 1.
    "cosine_cubed": the cosine of the cubes of the channel and of cos(x, w), both minus their means, over all
    images. A name says which of the words fits best, not that one fits: read ``margins`` and the images. It
    is one of the ``words``, so that a unit for something that none of them names has a wrong name.

    ``text_model`` embeds images and texts (``open_clip:``, ``hf:`` with a CLIP or SigLIP); images are resized
    to its input size. ``words="common"`` are about 370 words of things that photographs show.

    Returns:
        ``names`` (C,), ``similarity`` (C, W), ``margins`` (C,). ``units_of(word)`` are the units of a name.

    Raises:
        InputError: fewer than two images, a word twice, or a text that the text model does not embed.
        ModelError: the layer's output does not have one row per image.

    Example::
        from phosphene import run

        result = run("name_units", dataset="builtin:scenes/64", layer="features.11")
        result.names[:5]
        result.units_of("star")

    Source:
        Oikarinen and Weng 2023, section 3 and appendix A.
    """
    layer = layer if layer is not None else model.last_map
    count = len(dataset)
    if count < 2:
        raise InputError(f"names are of units that differ between images, the data set has {count}")
    if words is None and text_model.classes is None:
        raise InputError(f"{text_model.name} has no classes as words: pass words=[...] or words='common'")
    names = COMMON_WORDS if words == "common" else tuple(words or text_model.classes or ())
    if repeated := [word for word in dict.fromkeys(names) if names.count(word) > 1]:
        raise InputError(f"the word {repeated[0]!r} is in the list twice")
    assert text_model.embed_text is not None  # the role was checked
    with torch.no_grad():
        texts = [text_model.embed_text(template.replace("{}", word)).detach().cpu() for word in names]
    # equivalent mutants: axis 1 is the default
    directions = F.normalize(torch.stack(texts).double(), dim=1)
    state = _Activations(model, text_model, layer).run(dataset, batch_size(model))
    units, images = state["units"].tensor().double(), state["images"].tensor().double()
    if images.shape[1] != directions.shape[1]:
        raise InputError(
            f"{text_model.name} embeds images as {images.shape[1]} numbers and texts as {directions.shape[1]}"
        )
    cosines = F.normalize(images, dim=1) @ directions.T
    most = min(count, top if top is not None else min(100, math.ceil(count / 10)))
    compare = _MEASURES[measure]
    similarity = compare(units, cosines, most, temperature, prior)
    # Of a channel that is the same for all images the first images are arbitrary.
    spread = units.amax(0) - units.amin(0)
    varies = spread > 1e-6 * units.abs().amax(0)
    similarity = torch.where(varies[:, None], similarity, 0)
    # equivalent mutants: axis 1 is the last
    best = similarity.topk(2, 1)
    margins = best.values[:, 0] - best.values[:, 1]
    # equivalent mutants: on the CPU every sort of torch is stable
    chosen = margins.sort(descending=True, stable=True).indices[:MAX_UNITS].tolist()
    # equivalent mutants: on the CPU every sort of torch is stable
    rows = [units[:, unit].sort(descending=True, stable=True).indices[:EXAMPLES].tolist() for unit in chosen]
    labels = [names[index] if there else "" for index, there in zip(best.indices[:, 0], varies, strict=True)]
    return UnitNames(
        layer=layer,
        words=names,
        names=tuple(labels),
        similarity=similarity.to(model.device, model.dtype),
        margins=margins.to(model.device, model.dtype),
        example_units=tuple(chosen),
        examples=torch.stack([dataset.read(row) for row in rows]).to(model.device, model.dtype),
        measure=measure,
        count=count,
    )


def _mutual_information(
    units: Tensor, cosines: Tensor, top: int, temperature: float, prior: float, *, soft: bool
) -> Tensor:
    """Weighted pointwise mutual information (C, W) of units (N, C) and words, from cosines (N, W)."""
    probabilities = (temperature * cosines).softmax(1)
    # equivalent mutants: on the CPU every sort of torch is stable
    rows = units.sort(dim=0, descending=True, stable=True).indices[:top]
    ranks = torch.arange(top, dtype=torch.float64) / top
    shares = P_FIRST - ranks * (P_FIRST - P_LAST) if soft else torch.ones_like(ranks)
    likelihood = torch.stack(
        [
            (1 + shares[:, None] * (probabilities[row] - 1) + LEAST_PROBABILITY).log().sum(0)
            for row in rows.unbind(1)
        ]
    )
    return likelihood - prior * (likelihood.logsumexp(0) - math.log(len(likelihood)))


def _cosine_cubed(units: Tensor, cosines: Tensor, top: int, temperature: float, prior: float) -> Tensor:
    """The cosine (C, W) of the cubes of units (N, C) and of cosines (N, W), minus their means."""
    first, second = ((values - values.mean(0)) ** 3 for values in (units, cosines))
    return F.normalize(first, dim=0).T @ F.normalize(second, dim=0)


_MEASURES: dict[str, Callable[..., Tensor]] = {
    "soft_wpmi": partial(_mutual_information, soft=True),
    "wpmi": partial(_mutual_information, soft=False),
    "cosine_cubed": _cosine_cubed,
}


@dataclass
class _Activations(Fold[State]):
    """The channels' means (N, C) of every image, and its embedding (N, D) by the text model."""

    title = "names"
    model: ImageModel
    text_model: ImageModel
    layer: str

    def start(self) -> State:
        return {"units": Rows(), "images": Rows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        units = layer_vectors(self.model, self.model.features(images, self.layer), images, self.layer)
        other = self.text_model
        resized = batch.images.to(other.device, other.dtype)
        if resized.shape[1] == 1:
            resized = resized.expand(-1, other.input_size[0], -1, -1)
        if resized.shape[1] != other.input_size[0]:
            raise InputError(f"{other.name} takes {other.input_size[0]} channels, not {images.shape[1]}")
        # equivalent mutants: an image of this size is resized to itself
        if resized.shape[2:] != other.input_size[1:]:
            resized = resize(resized, other.input_size[1:]).clamp(0, 1)
        state["units"].write(batch.indices[0], at_least_float32(units))
        state["images"].write(batch.indices[0], at_least_float32(other.embed(resized)))
        return state


@hookimpl
def phosphene_methods():
    return [name_units]
