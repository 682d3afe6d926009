"""docs/moving.md, executed: the other libraries' code and ours return the same numbers."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import load_model, methods

PAGE = (Path(__file__).parents[2] / "docs" / "moving.md").read_text()
BLOCK = re.compile(
    r"^```(?:\{code-block\} )?python\n(?::caption: (?P<peer>[^\n]*)\n)?(?P<code>.*?)^```",
    flags=re.DOTALL | re.MULTILINE,
)
BLOCKS = [(match["peer"], match["code"]) for match in BLOCK.finditer(PAGE)]
#: The code before the first library, and each library's code with ours that follows.
SETUP = [code for peer, code in BLOCKS[: next(n for n, (peer, _) in enumerate(BLOCKS) if peer)]]
PAIRS = [(peer, before, after) for (peer, before), (_, after) in pairwise(BLOCKS) if peer]
MODULES = {
    **{name: name for name in ("captum", "torchcam", "zennit", "torchattacks")},
    "pytorch-grad-cam": "pytorch_grad_cam",
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    execute(namespace, *SETUP)
    return namespace


def execute(namespace: dict[str, Any], *blocks: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # captum warns that it sets requires_grad
        for code in blocks:
            exec(compile(code, "docs/moving.md", "exec"), namespace)


def test_every_library_of_the_page_is_tested() -> None:
    assert {peer for peer, _, _ in PAIRS} == {*MODULES, "foolbox"}


@pytest.mark.parametrize("peer", MODULES)
def test_results_equal_those_of(peer: str, page: dict[str, Any]) -> None:
    namespace = dict(page)
    for _, before, after in (pair for pair in PAIRS if pair[0] == peer):
        namespace |= {"ours": None, "theirs": None}
        execute(namespace, before, after)
        ours, theirs = namespace["ours"], torch.as_tensor(namespace["theirs"])
        assert theirs.abs().max() > 0
        # pytorch-grad-cam computes in float32, and captum rounds an occlusion to it.
        atol = 1e-5 if theirs.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol, check_dtype=False)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pytorch_grad_cam_changes_the_model_as_documented(
    images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = small_network().train()
    with peer.GradCAM(model=network, target_layers=[network[1]]) as cam:
        cam(input_tensor=images, targets=None)
    assert not network.training and all(p.grad is not None for p in network.parameters())
    with peer.GradCAM(model=network, target_layers=[network[1]]) as cam:
        cam(input_tensor=images, targets=[ClassifierOutputTarget(99)] * 2)
    assert "IndexError" in capsys.readouterr().out
    frozen = small_network().requires_grad_(False)
    with (
        pytest.raises(RuntimeError, match="does not require grad"),
        peer.GradCAM(model=frozen, target_layers=[frozen[1]]) as cam,
    ):
        cam(input_tensor=images, targets=None)
    assert methods["grad_cam"](load_model(frozen), images, layer="1").maps.shape == (2, 6, 6)


def test_torchattacks_sets_all_modules_to_training(images: Tensor) -> None:
    import torchattacks as peer

    network = small_network().train()
    network[0].eval()
    methods["pgd"](load_model(network), images, torch.zeros(2, dtype=torch.long))
    assert network.training and not network[0].training
    peer.PGD(network, steps=1)(images, torch.zeros(2, dtype=torch.long))
    assert network[0].training


def test_captums_guided_backprop_ignores_functional_relus(images: Tensor) -> None:
    import captum.attr as peer

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small_network()

        def forward(self, images: Tensor) -> Tensor:
            maps = torch.relu(self.layers[0](images))
            return self.layers[2:](maps)

    network = Functional()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        guided = peer.GuidedBackprop(network).attribute(images.clone(), target=0)
        plain = peer.Saliency(network).attribute(images.clone(), target=0, abs=False)
    assert torch.equal(guided, plain)
    tokens = nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.Flatten(2), Tokens(), nn.LayerNorm(5), Mean())
    cam = peer.LayerGradCam(tokens, tokens[3]).attribute(images, target=0)
    assert cam.shape == (2, 1, 5)  # sixteen tokens of five channels: the tokens were summed


def test_zennit_uses_plain_gradients_where_no_rule_applies(images: Tensor) -> None:
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon
    from zennit.types import Linear

    class FunctionalConvolution(nn.Module):
        """A convolution as a function call, without a module."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 8, 8))

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.conv2d(images, self.weight).flatten(1)

    network, rules = FunctionalConvolution(), LayerMapComposite([(Linear, Epsilon(1e-6))])
    with Gradient(model=network, composite=rules) as attributor:
        _, relevance = attributor(images.clone(), torch.eye(3)[[0, 0]])
    assert torch.equal(
        relevance, network.weight[:1].detach().expand(2, -1, -1, -1)
    )  # the gradient, not a decomposition of the score
    ours = methods["lrp"](load_model(network, input_size=(3, 8, 8)), images, 0).maps
    torch.testing.assert_close(ours.sum((1, 2)), network(images)[:, 0].detach(), rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    """(N, C, positions) to (N, positions, C)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.transpose(1, 2)


class Mean(nn.Module):
    """The tokens' mean as logits."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)
