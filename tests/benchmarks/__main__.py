"""What a method costs beside its peers: CPU time in one process, A B A B, smallest of several.

``make bench`` prints the table; ``python -m tests.benchmarks saliency pgd`` times some rows only.
Ratios below 1 mean that Phosphene is cheaper than the peer. Weights are random.
"""

import sys
import time
from collections.abc import Callable, Iterator

import captum.attr
import torch
import torchattacks
import torchvision
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from phosphene import TensorDataset, load_model, methods

Work = Callable[[], object]
ROUNDS = 5


class Normalized(nn.Module):
    """The network with the same normalisation that Phosphene's Model holds, for the peers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - 0.45) / 0.225)


def network(name: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    return module, load_model(module, mean=[0.45] * 3, std=[0.225] * 3, input_size=(3, 224, 224))


def saliency() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    for name in ("resnet18", "mobilenet_v2"):
        module, model = network(name)
        peer = captum.attr.Saliency(Normalized(module))
        for count in (1, 8):
            images = torch.rand(count, 3, 224, 224)
            yield (
                f"saliency, {name}, {count}",
                lambda model=model, images=images: methods["saliency"](model, images, 3),
                {
                    "captum": lambda peer=peer, images=images: peer.attribute(
                        images.clone().requires_grad_(), target=3
                    )
                },
            )


def grad_cam() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model = network("resnet18")
    images = torch.rand(8, 3, 224, 224)
    whole = Normalized(module)
    thawed = Normalized(network("resnet18")[0])
    by_captum = captum.attr.LayerGradCam(whole, whole.module.layer4)
    by_grad_cam = GradCAM(thawed, [thawed.module.layer4])
    yield (
        "grad_cam, resnet18, 8",
        lambda: methods["grad_cam"](model, images, 3, layer="layer4"),
        {
            "captum": lambda: by_captum.attribute(images, target=3),
            "pytorch-grad-cam": lambda: by_grad_cam(images, [ClassifierOutputTarget(3)] * 8),
        },
    )


def occlusion() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model = network("resnet18")
    images = torch.rand(1, 3, 112, 112)
    peer = captum.attr.Occlusion(Normalized(module))
    yield (
        "occlusion, resnet18 at 112, 16 px windows",
        lambda: methods["occlusion"](model, images, 3, window=16, stride=16),
        {"captum": lambda: peer.attribute(images, (3, 16, 16), (3, 16, 16), 0.5, target=3)},
    )


def pgd() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model = network("resnet18")
    images, labels = torch.rand(4, 3, 112, 112), torch.arange(4)
    peer = torchattacks.PGD(
        Normalized(module).eval(), eps=8 / 255, alpha=2 / 255, steps=10, random_start=False
    )
    yield (
        "pgd, 10 steps, resnet18 at 112, 4",
        lambda: methods["pgd"](model, images, labels, steps=10, random_start=False),
        {"torchattacks": lambda: peer(images, labels)},
    )


def nearest_neighbors() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4)), input_size=(3, 12, 12))
    data, queries = torch.rand(4000, 3, 12, 12), torch.rand(200, 3, 12, 12)
    peer = NearestNeighbors(n_neighbors=5, algorithm="brute")
    yield (
        "nearest_neighbors, 200 x 4000 x 432",
        lambda: methods["nearest_neighbors"](model, queries, TensorDataset(data), k=5),
        {
            "scikit-learn": lambda: peer.fit(data.flatten(1).numpy()).kneighbors(queries.flatten(1).numpy()),
        },
    )


def cpu_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    suites = {f.__name__: f for f in (saliency, grad_cam, occlusion, pgd, nearest_neighbors)}
    chosen = sys.argv[1:] or list(suites)
    table = Table(title=f"CPU seconds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("work", "phosphene", "peer", "its seconds", "ratio"):
        table.add_column(column)
    for name in chosen:
        for work, ours, peers in suites[name]():
            ours()
            for peer, theirs in peers.items():
                theirs()
                pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(ROUNDS)]
                mine, other = (min(times) for times in zip(*pairs, strict=True))
                table.add_row(work, f"{mine:.3f}", peer, f"{other:.3f}", f"{mine / other:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
