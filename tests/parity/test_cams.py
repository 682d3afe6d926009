"""The CAM family against captum, torchcam, pytorch-grad-cam and NumPy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
import torchcam.methods
from captum.attr import GuidedGradCam, LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from phosphene import load_model, methods

pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")

CLASSES = [2, 3]


def small_network(*, scale: float = 1.0) -> nn.Module:
    """Feature maps "1" at the image's size and "3" coarser; a head of two layers, so that gradients vary."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 7 * 9, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    network[7].weight.data *= scale
    return network.double().eval()


def aligned_network() -> nn.Module:
    """As ``small_network``, for 12x16 images of which the cells of map "3" have equal shares."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 6 * 8, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    return network.double().eval()


def pooled_network() -> nn.Module:
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 4)).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 13, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ours(
    name: str, network: nn.Module, images: Tensor, *, convention: str | None = None, **params: object
) -> Tensor:
    model = load_model(network, input_size=(3, *images.shape[2:]))
    inputs = () if name == "eigen_cam" else (CLASSES,)
    result = methods[f"attribution.{name}"](model, images, *inputs, **params)
    return (result.as_convention(convention) if convention else result).maps


def torchcam_maps(kind: str, network: nn.Module, images: Tensor, layer: str, **params: object) -> Tensor:
    options = {"fc_layer": "4"} if kind == "CAM" else {}
    with getattr(torchcam.methods, kind)(network, layer, input_shape=(3, 13, 17), **options) as extractor:
        return extractor(CLASSES, network(images.clone()), **params)[0].detach()


def pytorch_grad_cam_maps(kind: str, network: nn.Module, images: Tensor, *layers: str) -> Tensor:
    modules = [network.get_submodule(layer) for layer in layers]
    with getattr(pytorch_grad_cam, kind)(model=network, target_layers=modules) as cam:
        theirs = cam(input_tensor=images.clone(), targets=[ClassifierOutputTarget(c) for c in CLASSES])
    return torch.from_numpy(theirs).double()


@pytest.mark.parametrize("convention", [None, "torchcam"])
def test_cam_equals_torchcam(convention: str | None, images: Tensor) -> None:
    network = pooled_network()
    theirs = torchcam_maps("CAM", network, images, "1", normalized=convention is not None)
    maps = ours("cam", network, images, convention=convention)
    torch.testing.assert_close(maps, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("convention", [None, "torchcam"])
@pytest.mark.parametrize("layer", ["1", "3"])
@pytest.mark.parametrize(
    ("name", "kind"), [("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM"), ("xgrad_cam", "XGradCAM")]
)
def test_gradient_cams_equal_torchcam(
    name: str, kind: str, layer: str, convention: str | None, images: Tensor
) -> None:
    network = small_network()
    theirs = torchcam_maps(kind, network, images, layer, normalized=convention is not None)
    maps = ours(name, network, images, layer=layer, convention=convention)
    assert theirs.any()
    # torchcam adds 1e-8 to XGrad-CAM's divisor.
    rtol = 1e-6 if name == "xgrad_cam" else 1e-11
    torch.testing.assert_close(maps, theirs, rtol=rtol, atol=1e-9 if name == "xgrad_cam" else 1e-13)


def test_captum_convention_equals_captum_before_the_relu(images: Tensor) -> None:
    network = small_network()
    theirs = LayerGradCam(network, network[3]).attribute(images.clone(), target=CLASSES)[:, 0]
    maps = ours("grad_cam", network, images, layer="3", convention="captum")
    assert (maps < 0).any()
    torch.testing.assert_close(maps, theirs.detach(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("layer", ["1", "3"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("grad_cam", "GradCAM"),
        ("hires_cam", "HiResCAM"),
        ("layer_cam", "LayerCAM"),
        ("xgrad_cam", "XGradCAM"),
    ],
)
def test_pytorch_grad_cam_convention_equals_pytorch_grad_cam(
    name: str, kind: str, layer: str, images: Tensor
) -> None:
    network = small_network()
    theirs = pytorch_grad_cam_maps(kind, network, images, layer)
    maps = ours(name, network, images, layer=layer, convention="pytorch-grad-cam")
    torch.testing.assert_close(maps, theirs, rtol=0, atol=1e-5)  # pytorch-grad-cam computes in float32


def test_average_over_layers_equals_pytorch_grad_cam(images: Tensor) -> None:
    network = small_network()
    theirs = pytorch_grad_cam_maps("GradCAM", network, images, "1", "3")
    maps = ours("grad_cam", network, images, layer=["1", "3"], convention="pytorch-grad-cam")
    torch.testing.assert_close(maps, theirs, rtol=0, atol=1e-5)


def test_grad_cam_plus_plus_equals_pytorch_grad_cam_where_its_epsilon_is_negligible(
    images: Tensor,
) -> None:
    network = small_network(scale=1e4)
    theirs = pytorch_grad_cam_maps("GradCAMPlusPlus", network, images, "3")
    maps = ours("grad_cam_plus_plus", network, images, layer="3", convention="pytorch-grad-cam")
    torch.testing.assert_close(maps, theirs, rtol=0, atol=1e-5)


def test_guided_grad_cam_equals_captum_with_bilinear_interpolation(images: Tensor) -> None:
    network, images = aligned_network(), images[..., :12, :16]
    theirs = GuidedGradCam(network, network[3]).attribute(
        images.clone(), target=CLASSES, interpolate_mode="bilinear"
    )
    maps = ours("guided_grad_cam", network, images, layer="3")
    assert theirs.any()
    torch.testing.assert_close(maps, theirs.abs().amax(1).detach(), rtol=1e-11, atol=1e-14)


def test_score_cam_equals_pytorch_grad_cam_and_torchcam_without_enlargement(images: Tensor) -> None:
    network = small_network()
    maps = ours("score_cam", network, images, layer="1", convention="pytorch-grad-cam")
    # pytorch-grad-cam stores the scores in float32.
    torch.testing.assert_close(
        maps, pytorch_grad_cam_maps("ScoreCAM", network, images, "1"), rtol=0, atol=1e-5
    )
    # torchcam does not scale the masks in this case, so the expected maps scale them first.
    scaled = network[:2](images)
    low, high = scaled.amin((2, 3), keepdim=True), scaled.amax((2, 3), keepdim=True)
    weights = []
    for image, masks, index in zip(images, (scaled - low) / (high - low), CLASSES, strict=True):
        weights.append(network(image * masks[:, None])[:, index].softmax(0))
    expected = torch.einsum("nk,nkhw->nhw", torch.stack(weights), scaled).relu()
    torch.testing.assert_close(ours("score_cam", network, images, layer="1"), expected.detach())


def test_score_cam_masks_normalised_images(images: Tensor) -> None:
    network, mean, std = small_network(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalized = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    theirs = pytorch_grad_cam_maps("ScoreCAM", network, normalized, "1")
    model = load_model(network, mean=mean, std=std, input_size=(3, 13, 17))
    maps = methods["score_cam"](model, images, CLASSES, layer="1").as_convention("pytorch-grad-cam").maps
    torch.testing.assert_close(maps, theirs, rtol=0, atol=1e-5)


def test_score_cam_scales_masks_after_enlarging_them(images: Tensor) -> None:
    network, images = aligned_network(), images[..., :12, :16]
    maps = network[:4](images)
    weights = []
    for image, coarse, index in zip(images, maps, CLASSES, strict=True):
        masks = F.interpolate(coarse[None], (12, 16), mode="bilinear", align_corners=False)[0]
        low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
        masks = (masks - low) / (high - low).clamp(min=1e-12)
        weights.append(network(image * masks[:, None])[:, index].softmax(0))
    expected = torch.einsum("nk,nkhw->nhw", torch.stack(weights), maps).relu()
    torch.testing.assert_close(ours("score_cam", network, images, layer="3"), expected.detach())


def test_ablation_cam_equals_a_loop_over_channels(images: Tensor) -> None:
    network = small_network()
    maps, head = network[:4](images), network[4:]
    clean = head(maps)[range(2), CLASSES]
    weights = torch.zeros(2, 8, dtype=torch.float64)
    for channel in range(8):
        without = maps.clone()
        without[:, channel] = 0
        weights[:, channel] = (clean - head(without)[range(2), CLASSES]) / clean.abs()
    expected = torch.einsum("nk,nkhw->nhw", weights, maps).relu()
    torch.testing.assert_close(
        ours("ablation_cam", network, images, layer="3"), expected.detach(), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("layer", ["1", "3"])
def test_eigen_cam_equals_numpys_first_component_and_pytorch_grad_cam_up_to_sign(
    layer: str, images: Tensor
) -> None:
    network = small_network()
    maps = ours("eigen_cam", network, images, layer=layer)
    for image, component_map in zip(images, maps, strict=True):
        vectors = network[: int(layer) + 1](image[None])[0].flatten(1).T.detach().numpy()
        centered = vectors - vectors.mean(0)
        component = torch.from_numpy(centered @ np.linalg.svd(centered, full_matrices=False)[2][0])
        component = component if component.abs().argmax() == component.argmax() else -component
        torch.testing.assert_close(component_map.flatten(), component, rtol=1e-9, atol=1e-11)
    theirs = pytorch_grad_cam_maps("EigenCAM", network, images, layer)
    of_either_sign = [
        ours("eigen_cam", network, images, layer=layer, convention="pytorch-grad-cam"),
        scale_as_pytorch_grad_cam((-maps).relu(), images),
    ]
    for n in range(2):
        assert min(float((candidate[n] - theirs[n]).abs().max()) for candidate in of_either_sign) < 1e-5


def scale_as_pytorch_grad_cam(maps: Tensor, images: Tensor) -> Tensor:
    def stretch(maps: Tensor) -> Tensor:
        maps = maps - maps.amin((1, 2), keepdim=True)
        return maps / (1e-7 + maps.amax((1, 2), keepdim=True))

    return stretch(F.interpolate(stretch(maps)[:, None], images.shape[2:], mode="bilinear")[:, 0])
