"""Style augmentation: unchanged inputs, distributions of strength and style, and all types of images."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from phosphene import InputError, load_model, load_result, methods, run
from phosphene.results import TrainedNetwork
from phosphene_plugins.style._adaptive_network import AdaptiveNetwork
from phosphene_plugins.style._style_network import StyleNetwork
from phosphene_plugins.style.style_augmentation import StyleAugmentation

style_augmentation = methods["style.style_augmentation"]


def fast(styles: int = 3) -> TrainedNetwork:
    torch.manual_seed(0)
    network = StyleNetwork(styles=styles, width=3, blocks=1).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("beta"):  # otherwise all styles are equal
            nn.init.normal_(parameter)
    return TrainedNetwork(
        network=network, method="style.fast_style_fit", config={}, losses=torch.empty(0),
        labels=tuple(f"style {n}" for n in range(styles)), previews=torch.empty(0, 3, 1, 1),
    )  # fmt: skip


STYLIZER = fast()


def adaptive() -> AdaptiveNetwork:
    torch.manual_seed(0)
    encoder = load_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), input_size=(3, 12, 12))
    return AdaptiveNetwork.from_decoder(encoder, nn.Conv2d(4, 3, 3, padding=1), "1")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def stylize(images: Tensor, style: int) -> Tensor:
    with torch.no_grad():
        result: Tensor = STYLIZER.network(images, torch.eye(3)[[style] * len(images)])
    return result


def changed(before: Tensor, after: Tensor) -> Tensor:
    return (before != after).flatten(1).any(1)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(3, 8, 9), (1, 3, 10, 8), (4, 3, 8, 8), (2, 2, 3, 8, 8), (0, 3, 8, 8)]),
    st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.float16]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 1000),
)
def test_shape_type_and_dtype_are_preserved(
    shape: tuple[int, ...], dtype: torch.dtype, marked: bool, p: float, seed: int
) -> None:
    images = v2.functional.to_dtype(draw(*shape, seed=seed), dtype, scale=True)
    inputs = tv_tensors.Image(images) if marked else images
    before = images.clone()
    torch.manual_seed(seed)
    result = StyleAugmentation(STYLIZER, p, (0.5, 1.0))(inputs)
    assert type(result) is type(inputs) and result.shape == images.shape and result.dtype == dtype
    assert torch.equal(images, before), "the input was changed"
    rows = changed(images.reshape(-1, 3, *shape[-2:]), result.reshape(-1, 3, *shape[-2:]))
    if p == 0:
        assert not rows.any()
    if p == 1:
        assert rows.all()
    floats = result.as_subclass(torch.Tensor).double() / (255 if dtype == torch.uint8 else 1)
    assert not result.numel() or (floats.min() >= 0 and floats.max() <= 1)


def test_strength_zero_is_the_image_and_strength_one_the_stylized_image() -> None:
    images = draw(5, 3, 9, 8)
    assert torch.equal(StyleAugmentation(STYLIZER, 1.0, (0.0, 0.0))(images), images)
    result = StyleAugmentation(STYLIZER, 1.0, (1.0, 1.0))(images)
    for before, after in zip(images.split(1), result.split(1), strict=True):
        assert min(float((after - stylize(before, s)).abs().max()) for s in range(3)) < 1e-6
    bytes_ = (255 * images).round().to(torch.uint8)
    assert torch.equal(StyleAugmentation(STYLIZER, 1.0, (0.0, 0.0))(bytes_), bytes_)
    (one,) = StyleAugmentation(fast(1), 1.0, (1.0, 1.0))(bytes_[:1])
    with torch.no_grad():
        expected = fast(1).network(bytes_[:1] / 255, torch.ones(1, 1))[0]
    assert (one / 255 - expected).abs().max() <= 1 / 255 + 1e-6


def test_each_image_has_its_own_draw() -> None:
    torch.manual_seed(0)
    params = StyleAugmentation(STYLIZER, 0.3, (0.2, 0.6)).make_params([draw(4000, 3, 1, 1)])
    b, style = params["strength"], params["blend_weights"].argmax(1)
    styled = b > 0
    assert abs(styled.double().mean() - 0.3) < 0.03
    assert 0.2 <= b[styled].min() < 0.22 and 0.58 < b[styled].max() <= 0.6
    assert abs(b[styled].mean() - 0.4) < 0.02
    assert (style.bincount(minlength=3) / 4000 - 1 / 3).abs().max() < 0.03
    assert torch.equal(params["blend_weights"].sum(1), torch.ones(4000))


def test_blend_weights_are_uniform_on_the_simplex() -> None:
    torch.manual_seed(0)
    weights = StyleAugmentation(STYLIZER, 1.0, blend=True).make_params([draw(4000, 3, 1, 1)])["blend_weights"]
    torch.testing.assert_close(weights.sum(1), torch.ones(4000))
    # Dirichlet(1, 1, 1): means 1/3, variances 1/18.
    assert (weights.mean(0) - 1 / 3).abs().max() < 0.02 and (weights.var(0) - 1 / 18).abs().max() < 0.005


def test_torchs_seed_is_used() -> None:
    transform, images = StyleAugmentation(STYLIZER, 0.5, (0.1, 0.9)), draw(6, 3, 8, 8)
    torch.manual_seed(4)
    first, second = transform(images), transform(images)
    torch.manual_seed(4)
    again = transform(images)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_it_composes_and_leaves_other_entries_unchanged() -> None:
    chain = v2.Compose([StyleAugmentation(STYLIZER, 1.0, (1.0, 1.0)), v2.RandomHorizontalFlip(1.0)])
    mask = tv_tensors.Mask(torch.arange(64).reshape(1, 8, 8))
    sample = {"image": tv_tensors.Image(draw(3, 8, 8)), "mask": mask, "label": torch.tensor([2.0])}
    result = chain(sample)
    assert torch.equal(result["mask"], mask.flip(2)) and torch.equal(result["label"], sample["label"])
    assert not torch.equal(result["image"], sample["image"].flip(2))
    image, label = StyleAugmentation(STYLIZER, 1.0, (1.0, 1.0))(draw(3, 8, 8), torch.tensor(1))
    assert changed(image[None], draw(1, 3, 8, 8)).all() and label == 1
    assert not image.requires_grad and chain(draw(3, 8, 8).requires_grad_()).requires_grad is False


class Images(TorchDataset[Tensor]):
    def __init__(self, transform: StyleAugmentation) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(draw(3, 8, 8, seed=index))


@pytest.mark.parametrize("stylizer", [fast, adaptive], ids=["fast", "adaptive"])
def test_it_can_be_pickled(stylizer: Any) -> None:
    styles = {"styles": draw(2, 3, 9, 9)} if stylizer is adaptive else {}
    transform = StyleAugmentation(stylizer(), 1.0, (0.5, 1.0), **styles)
    again = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(1)
    first = transform(draw(2, 3, 8, 8))
    torch.manual_seed(1)
    assert torch.equal(again(draw(2, 3, 8, 8)), first)


def test_workers_use_the_seed_of_the_loader() -> None:
    data = Images(StyleAugmentation(STYLIZER, 1.0, (0.5, 1.0)))

    def batch() -> Tensor:
        (result,) = DataLoader(data, batch_size=4, num_workers=1, generator=torch.Generator().manual_seed(3))
        return result

    first = batch()
    assert torch.equal(first, batch())
    assert changed(first, torch.stack([draw(3, 8, 8, seed=n) for n in range(4)])).all()


def test_an_adaptive_network_uses_styles_or_the_images_of_the_batch() -> None:
    stylizer, images, styles = adaptive(), draw(4, 3, 12, 11), draw(2, 3, 9, 9, seed=5) ** 2
    with_styles = StyleAugmentation(stylizer, 1.0, (1.0, 1.0), styles=styles)(images)
    own = StyleAugmentation(stylizer, 1.0, (1.0, 1.0))(images)
    for result, sources in ((with_styles, styles), (own, images)):
        expected = [methods["adaptive_style"](images, s, stylizer).stylized for s in sources.split(1)]
        for n in range(4):
            assert min(float((result[n] - e[n]).abs().max()) for e in expected) < 1e-6


def test_an_adaptive_network_can_leave_a_batch_unchanged() -> None:
    images = draw(2, 3, 12, 11)
    assert torch.equal(StyleAugmentation(adaptive(), 0.0)(images), images)


def test_views_equal_the_transform_with_its_random_parameters() -> None:
    images = draw(3, 3, 9, 8)
    result = style_augmentation(images, STYLIZER, p=0.5, strength=(0.2, 0.8), views=5, seed=2)
    assert result.views.shape == (3, 5, 3, 9, 8) and result.strength.shape == (3, 5)
    for n in range(3):
        for v in range(5):
            b, style = result.strength[n, v], int(result.blend_weights[n, v].argmax())
            expected = images[n] + b * (stylize(images[n : n + 1], style)[0] - images[n])
            torch.testing.assert_close(result.views[n, v], expected, atol=1e-6, rtol=0)
    titles = [panel.title for panel in result.panels()[0]]
    assert titles[0] == "image" and len(titles) == 6
    assert ("unchanged" in titles) == bool((result.strength[0] == 0).any())
    result = run("style_augmentation", images=images, stylizer="builtin:shapes-styles", views=2, seed=2)
    assert result.style_names == ("bricks", "swirls", "mosaic", "waves")


def test_bad_input_is_refused() -> None:
    for wrong in ({"p": 1.5}, {"strength": (0.5, 0.2)}, {"strength": (-0.1, 0.2)}):
        with pytest.raises(InputError, match="strength must be an interval"):
            StyleAugmentation(STYLIZER, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has the styles style 0"):
        StyleAugmentation(STYLIZER, styles=draw(1, 3, 8, 8))
    transform = StyleAugmentation(load_result("builtin:shapes-styles"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ToImage"):
        transform(PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(InputError, match="before v2.Normalize"):
        transform(draw(3, 8, 8) - 0.5)
    with pytest.raises(InputError, match="8 pixels a side"):
        transform(draw(1, 8, 8))
