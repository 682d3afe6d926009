"""Top-k classes: the most probable classes of an image, in a result type of its own."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from phosphene_descending import Descending
from pydantic import Field
from torch import Tensor, nn

from phosphene import Cost, hookimpl, load_model, method
from phosphene.results import Panel, Result
from phosphene.roles import Images, Model
from phosphene.spec import UnitRange, size


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions(Result):
    """The k most probable classes of each image: ``probabilities``, ``classes`` (N, k) and ``names``."""

    per_image: ClassVar[tuple[str, ...]] = ("images", "probabilities", "classes", "names")
    groups_per_row: ClassVar[int] = 4

    images: Tensor
    probabilities: Tensor
    classes: Tensor
    names: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """The text that is printed after a run: all k classes of each image."""
        rows = [zip(*both, strict=True) for both in zip(self.names, self.probabilities.tolist(), strict=True)]
        return [", ".join(f"{name} {share:.0%}" for name, share in row) for row in rows]

    def panels(self) -> list[list[Panel]]:
        """Each image, with its most probable class as the title."""
        titles = [line.partition(",")[0] for line in self.lines()]
        return [[Panel(image, title)] for image, title in zip(self.images, titles, strict=True)]


def constant_network_oracle() -> None:
    """A network whose logits are the logarithms of fixed probabilities, for any image."""
    linear = nn.Linear(12, 3)
    linear.weight.data.zero_()
    linear.bias.data = torch.tensor([0.2, 0.7, 0.1]).log()
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2), classes=["a", "b", "c"])
    result = top_classes(model, torch.rand(2, 3, 2, 2), k=2)
    assert result.names == (("b", "a"), ("b", "a"))
    torch.testing.assert_close(result.probabilities, torch.tensor([[0.7, 0.2]] * 2))


@method(
    family="predictions",
    invariants=[Descending(field="probabilities"), UnitRange(field="probabilities")],
    cost=Cost(forward=size.images),
    oracle=constant_network_oracle,
)
def top_classes(
    model: Model,
    images: Images,
    *,
    k: Annotated[int, Field(ge=1, le=100, description="number of classes; all if the model has fewer")] = 3,
) -> Predictions:
    """Top-k classes: the classes with the highest softmax probabilities.

    p = softmax(logits), sorted

    Returns:
        ``Predictions``; ``probabilities``, ``classes`` (N, k), in descending order.

    Example::
        from phosphene import run

        run("top_classes", images="builtin:scenes/2", k=2).names
    """
    ranked = model(images).softmax(1).sort(dim=1, descending=True, stable=True)
    probabilities, classes = ranked.values[:, :k], ranked.indices[:, :k]
    names = tuple(tuple(map(model.class_name, row)) for row in classes.tolist())
    return Predictions(images=images, probabilities=probabilities, classes=classes, names=names)


@hookimpl
def phosphene_methods():
    return [top_classes]
