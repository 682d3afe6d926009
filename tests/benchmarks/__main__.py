"""What a method costs beside its peers: CPU time in one process, A B A B, smallest of several.

``make bench`` prints them all; ``python -m tests.benchmarks saliency pgd`` times some rows only.
Ratios below 1 mean that Phosphene is cheaper than the peer. Weights are random.
"""

import sys
import time
from collections.abc import Callable, Iterator

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tests.benchmarks import attacks
from torch import Tensor, nn
from zennit.attribution import Gradient as ByRules
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Pass
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, Linear

from phosphene import load_model, methods
from phosphene_plugins.embeddings.features import principal_components
from phosphene_plugins.embeddings.nearest import Nearest

Work = Callable[[], object]
ROUNDS = 5
#: Seconds after which a pair is not timed again.
ENOUGH = 20


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


def gradients() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The methods that take many passes back to the pixels, or change what the passes do."""
    images = torch.rand(2, 3, 224, 224)
    model = network("resnet18")[1]

    def of_captum(kind: str, **params: object) -> Work:
        peer = getattr(captum.attr, kind)(Normalized(network("resnet18")[0]))
        return lambda: peer.attribute(images.clone(), target=3, **params)

    yield (
        "integrated_gradients, 16 steps, resnet18, 2",
        lambda: methods["integrated_gradients"](model, images, 3, steps=16),
        {
            "captum": of_captum("IntegratedGradients", n_steps=16),
            "captum, 2 at once": of_captum("IntegratedGradients", n_steps=16, internal_batch_size=2),
        },
    )
    noisy = captum.attr.NoiseTunnel(captum.attr.Saliency(Normalized(network("resnet18")[0])))
    yield (
        "smooth_grad, 10 samples, resnet18, 2",
        lambda: methods["smooth_grad"](model, images, 3, samples=10),
        {
            "captum": lambda: noisy.attribute(images, nt_samples=10, stdevs=0.15, target=3, abs=False),
            "captum, 2 at once": lambda: noisy.attribute(
                images, nt_samples=10, nt_samples_batch_size=1, stdevs=0.15, target=3, abs=False
            ),
        },
    )
    yield (
        "guided_backprop, resnet18, 2",
        lambda: methods["guided_backprop"](model, images, 3),
        {"captum": of_captum("GuidedBackprop")},
    )
    rules = [(Activation, Pass()), (Linear, Epsilon(1e-6))]
    theirs = Normalized(network("resnet18")[0])
    composite = LayerMapComposite(rules, canonizers=[ResNetCanonizer()])
    chosen = torch.eye(1000)[[3, 3]]

    def zennit() -> None:
        with ByRules(model=theirs, composite=composite) as attributor:
            attributor(images.clone(), lambda output: output * chosen)

    yield "lrp, resnet18, 2", lambda: methods["lrp"](model, images, 3), {"zennit": zennit}


def cams() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The CAM family on layer4; Score-CAM at half the size, since it takes 513 passes."""
    kinds = {
        "grad_cam": ("GradCAM", "GradCAM"),
        "grad_cam_plus_plus": ("GradCAMPlusPlus", "GradCAMpp"),
        "layer_cam": ("LayerCAM", "LayerCAM"),
        "score_cam": ("ScoreCAM", "ScoreCAM"),
    }
    for name, (of_grad_cam, of_torchcam) in kinds.items():
        count, side = (1, 112) if name == "score_cam" else (8, 224)
        model, images = network("resnet18")[1], torch.rand(count, 3, side, side)
        thawed, hooked, plain = (Normalized(network("resnet18")[0]).eval() for _ in range(3))
        by_grad_cam = getattr(pytorch_grad_cam, of_grad_cam)(thawed, [thawed.module.layer4])
        by_torchcam = getattr(torchcam.methods, of_torchcam)(
            hooked, "module.layer4", input_shape=(3, side, side)
        )
        by_captum = captum.attr.LayerGradCam(plain, plain.module.layer4)

        def pytorch_grad_cams(cam=by_grad_cam, images=images) -> None:
            cam(images, [ClassifierOutputTarget(3)] * len(images))

        def torchcams(cam=by_torchcam, hooked=hooked, images=images) -> None:
            cam(3, hooked(images))

        peers: dict[str, Work] = {"pytorch-grad-cam": pytorch_grad_cams, "torchcam": torchcams}
        if name == "grad_cam":
            peers["captum"] = lambda peer=by_captum, images=images: peer.attribute(images, target=3)
        yield (
            f"{name}, resnet18 at {side}, {count}",
            lambda name=name, model=model, images=images: methods[name](model, images, 3, layer="layer4"),
            peers,
        )


def occlusion() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """16 px windows side by side; captum with one window a pass, as it is used unless told, and with 16."""
    for name, side in (("resnet18", 112), ("resnet18", 224), ("vgg11", 112), ("vgg11", 224)):
        module, model = network(name)
        images = torch.rand(1, 3, side, side)
        peer = captum.attr.Occlusion(Normalized(module))

        def captums(at_once: int, peer=peer, images=images) -> Work:
            window = (3, 16, 16)
            return lambda: peer.attribute(
                images, window, window, 0.5, target=3, perturbations_per_eval=at_once
            )

        yield (
            f"occlusion, {name} at {side}, 16 px windows",
            lambda model=model, images=images: methods["occlusion"](model, images, 3, window=16, stride=16),
            {"captum": captums(1), "captum, 16 at once": captums(16)},
        )


def nearest_neighbors() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The search alone: the features are given on both sides."""
    data, queries = torch.rand(20_000, 512), torch.rand(1000, 512)
    nobody = torch.zeros(1000, 32, dtype=torch.bool)
    peer = NearestNeighbors(n_neighbors=5, algorithm="brute")

    def ours() -> None:
        search = Nearest(queries, 5)
        for start in range(0, len(data), 32):
            search.meet(data[start : start + 32], tuple(range(start, start + 32)), nobody)
        search.found()

    def at_once() -> None:
        torch.addmm(data.square().sum(1), queries, data.T, alpha=-2).topk(5, largest=False)

    theirs: dict[str, Work] = {
        "the product alone": lambda: queries @ data.T,
        "addmm + topk": at_once,
        "scikit-learn": lambda: peer.fit(data.numpy()).kneighbors(queries.numpy()),
    }
    yield "nearest of 20000 x 512 to 1000, in batches of 32", ours, theirs


def pca() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The components alone; the limit is the covariance and its eigenvectors."""
    features = torch.rand(5000, 512)
    by_covariance = PCA(50, svd_solver="covariance_eigh")
    yield (
        "principal components, 5000 x 512 -> 50",
        lambda: principal_components(features, 50),
        {
            "covariance + eigh": lambda: torch.linalg.eigh(features.T @ features),
            "scikit-learn": lambda: PCA(50).fit_transform(features.numpy()),
            "scikit-learn, by covariance": lambda: by_covariance.fit_transform(features.numpy()),
        },
    )


def cpu_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    suites = {
        f.__name__: f
        for f in (
            *(saliency, gradients, cams, occlusion),
            *(attacks.fgsm, attacks.pgd, attacks.carlini_wagner, attacks.deepfool),
            *(attacks.hop_skip_jump, attacks.universal, nearest_neighbors, pca),
        )
    }
    chosen = sys.argv[1:] or list(suites)
    print(f"CPU seconds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'work':<58}{'phosphene':>10}  {'peer':<28}{'seconds':>8}{'ratio':>7}")
    for name in chosen:
        for work, ours, peers, *subject in suites[name]():
            for who, known in {"phosphene": ours, **peers}.items():
                if subject:  # what it finds for how many passes
                    print(f"    {who}: {subject[0].account(known)}", flush=True)
                else:
                    known()
            ours()
            for peer, theirs in peers.items():
                pairs: list[tuple[float, float]] = []
                while len(pairs) < ROUNDS and sum(map(sum, pairs)) < ENOUGH:
                    pairs.append((cpu_seconds(ours), cpu_seconds(theirs)))
                mine, other = (min(times) for times in zip(*pairs, strict=True))
                print(f"{work:<58}{mine:>10.3f}  {peer:<28}{other:>8.3f}{mine / other:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
