"""Attention methods on networks of each library: windows, pooling by attention, registers, similarities."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from phosphene import InputError, Model, ModelError, attention_centers, load_model, run
from phosphene.targets import Similar

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GLOBAL = ("attention_maps", "attention_rollout", "gradient_attention", "legrad", "token_norms", "logit_lens")
ALL = (*GLOBAL, "attention_distance", "head_ablation")


def vit(**settings: Any) -> Model:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    network = timm.models.VisionTransformer(**options | {"num_classes": 5} | settings)
    return load_model(network, input_size=(3, 32, 32))


def swin() -> Model:
    torch.manual_seed(0)
    network = torchvision.models.SwinTransformer([4, 4], 12, [2], [3], [4, 4], num_classes=3)
    return load_model(network, input_size=(3, 32, 32))


@pytest.mark.parametrize("name", ALL)
def test_networks_without_attention_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="computes no attention"):
        run(name, images=IMAGES, model="builtin:shapes-vgg")


@pytest.mark.parametrize("name", GLOBAL)
def test_windows_are_refused_by_methods_that_need_all_tokens(name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"attends inside 4 windows, and {name} needs attention between all"
    ):
        run(name, images=IMAGES, model=swin())


def test_heads_inside_windows_are_ablated() -> None:
    model = swin()
    result: Any = run("head_ablation", images=IMAGES, model=model, target=1)
    assert result.drops.shape == (2, 6) and bool(result.drops.ne(0).all())
    torch.testing.assert_close(result.scores, model(IMAGES)[:, 1].detach())


def test_distances_inside_shifted_windows_are_those_in_the_image() -> None:
    model = swin()
    result: Any = run("attention_distance", images=IMAGES, model=model)
    shifted = "features.1.1.attn"
    maps, centers = model.attention(IMAGES)[shifted].detach(), attention_centers(model, shifted, (32, 32))
    assert centers is not None and maps.shape == (2, 4, 3, 16, 16)
    for head in range(3):
        expected = torch.zeros(2)
        for window, positions in enumerate(centers):
            for query in range(16):
                distances = (positions - positions[query]).norm(dim=1).float()
                expected += maps[:, window, head, query] @ distances / 64
        torch.testing.assert_close(result.distances[:, 3 + head], expected)
    # The last window joins the four corners of the image, which are far from each other.
    assert float(result.uniform[3]) > 1.5 * float(result.uniform[0])


def test_a_pooling_query_is_the_last_factor() -> None:
    model = vit(class_token=False, global_pool="map")
    first, last, pool = (a.detach() for a in model.attention(IMAGES).values())
    identity = torch.eye(16)
    rows = pool.mean(1) @ ((last.mean(1) + identity) / 2) @ ((first.mean(1) + identity) / 2)
    result: Any = run("attention_rollout", images=IMAGES, model=model)
    torch.testing.assert_close(result.maps, rows[:, 0].unflatten(1, (4, 4)))
    assert result.targets == ("pooled tokens",) * 2 and result.others.shape == (2, 0)
    with model.record_attention(lambda _, a: a if a.requires_grad else a.requires_grad_()) as recording:
        score = model(IMAGES)[:, 2].sum()
    maps = [*recording.maps.values()]
    gradients = torch.autograd.grad(score, maps)
    first, last, pool = ((a * g).relu().mean(1) for a, g in zip(maps, gradients, strict=True))
    rows = pool @ (identity + last) @ (identity + first)
    relevance: Any = run("gradient_attention", images=IMAGES, model=model, target=2)
    torch.testing.assert_close(relevance.maps, rows[:, 0].unflatten(1, (4, 4)).detach())
    assert bool((run("legrad", images=IMAGES, model=model).maps > 0).any())  # type: ignore[attr-defined]


def test_only_the_pooling_queries_that_are_read_count() -> None:
    class Pooled(torch.nn.Module):
        """Three queries attend to the tokens, and the head reads the second."""

        def __init__(self) -> None:
            super().__init__()
            self.body = vit(class_token=False, global_pool="", num_classes=0).module
            self.queries = torch.nn.Parameter(torch.randn(1, 3, 24))
            self.pool = torch.nn.MultiheadAttention(24, 2, batch_first=True)
            self.head = torch.nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.body(x)
            pooled, _ = self.pool(self.queries.expand(len(x), -1, -1), tokens, tokens)
            logits: Tensor = self.head(pooled[:, 1])
            return logits

    model = load_model(Pooled(), input_size=(3, 32, 32))
    first, last, pool = (a.detach() for a in model.attention(IMAGES).values())
    identity = torch.eye(16)
    rows = pool.mean(1) @ ((last.mean(1) + identity) / 2) @ ((first.mean(1) + identity) / 2)
    result: Any = run("attention_rollout", images=IMAGES, model=model)
    torch.testing.assert_close(result.maps, rows[:, 1].unflatten(1, (4, 4)))


def test_prompts_of_open_clip_are_targets() -> None:
    from tests.plugins.models.test_open_clip import CAT, DOG, tiny

    model = tiny("ViT-B-32")
    dog: Any = run("gradient_attention", images=IMAGES, model=model, target=DOG)
    cat: Any = run("gradient_attention", images=IMAGES, model=model, target=CAT)
    assert dog.targets == (DOG, DOG) and dog.maps.shape == (2, 4, 4)
    assert bool((dog.maps > 0).any()) and not torch.equal(dog.maps, cat.maps)
    assert run("legrad", images=IMAGES, model=model, target=DOG).targets == (DOG, DOG)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ALL)
def test_registers_are_no_patches(name: str) -> None:
    model = vit(reg_tokens=2)
    result: Any = run(name, images=IMAGES, model=model)
    if hasattr(result, "maps"):
        assert result.maps.shape[-2:] == (4, 4)
    if hasattr(result, "others"):
        assert result.others.shape[-1] == 3


@pytest.mark.parametrize("name", ALL)
def test_networks_of_transformers_and_open_clip(name: str) -> None:
    from open_clip.transformer import VisionTransformer
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=4,
    )  # fmt: skip
    result: Any = run(
        name, images=IMAGES, model=load_model(ViTForImageClassification(config), input_size=(3, 32, 32))
    )
    clip = VisionTransformer(32, 8, 16, 2, 2, 2.0, output_dim=6)
    model = load_model(clip, input_size=(3, 32, 32), task="embedding")
    if name == "logit_lens":
        with pytest.raises(ModelError, match="no logits of exclusive classes"):
            run(name, images=IMAGES, model=model)
        return
    takes_target = name in ("gradient_attention", "legrad", "head_ablation")
    target = {"target": Similar(torch.randn(6))} if takes_target else {}
    similar: Any = run(name, images=IMAGES, model=model, **target)
    for values in (result, similar):
        field = {"attention_distance": "distances", "head_ablation": "drops"}.get(name, "maps")
        if name != "logit_lens":
            assert bool(getattr(values, field).any())


def test_the_map_of_a_position_explains_its_own_row() -> None:
    model = vit()
    tokens = model.structure.layouts["blocks.0"]
    assert tokens.grid == (4, 4)
    result: Any = run("gradient_attention", images=IMAGES, model=model, target="blocks.0[3,2,1]")
    with model.record_attention(lambda _, a: a if a.requires_grad else a.requires_grad_()) as recording:
        score = model.features(IMAGES, "blocks.0")[:, 1 + 4 * 2 + 1, 3].sum()
    attention = recording.maps["blocks.0.attn"]
    (gradient,) = torch.autograd.grad(score, attention)
    expected = (attention * gradient).relu().mean(1)[:, 1 + 4 * 2 + 1, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(result.maps, expected.detach())


def test_targets_that_depend_on_no_attention_are_refused() -> None:
    with pytest.raises(ModelError, match="does not depend on the attention"):
        run("gradient_attention", images=IMAGES, model=vit(), target="patch_embed[3]")
    for target in ("blocks.0[3]", "patch_embed[3]"):
        with pytest.raises(ModelError, match="has not run|does not depend"):
            run("legrad", images=IMAGES, model=vit(), target=target)


def test_queries_and_heads_that_do_not_exist_are_refused() -> None:
    model = vit(class_token=False, global_pool="avg")
    with pytest.raises(ModelError, match="has no class token"):
        run("attention_maps", images=IMAGES, model=model, query="class")
    with pytest.raises(InputError, match="outside the image of 32x32"):
        run("attention_rollout", images=IMAGES, model=model, query=[32, 0])
    with pytest.raises(InputError, match="3 heads, so there is no number 3"):
        run("attention_maps", images=IMAGES, model=model, heads=[3])
    mean: Any = run("attention_maps", images=IMAGES, model=model)
    assert mean.query == "mean of tokens"


def test_a_single_block_is_not_the_encoder_around_it() -> None:
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)
    torch.nn.init.normal_(network.heads[0].weight)
    model = load_model(network, input_size=(3, 32, 32))
    result: Any = run("legrad", images=IMAGES, model=model, target=1)
    with model.record_attention(lambda _, a: a.requires_grad_()) as recording:
        with model.tap("encoder.layers.encoder_layer_0") as tap:
            model(IMAGES)
        tokens = tap["encoder.layers.encoder_layer_0"]
        score = network.heads(network.encoder.ln(tokens.mean(1)))[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, [*recording.maps.values()])
    torch.testing.assert_close(result.maps, gradient.relu().mean((1, 2))[:, 1:].unflatten(1, (4, 4)))


def test_centers_are_those_of_the_patches() -> None:
    result: Any = run("attention_rollout", images=IMAGES, model=vit())
    assert result.centers == ((3.5, 11.5, 19.5, 27.5),) * 2


def test_clicked_patch_is_marked_on_the_figure() -> None:
    result: Any = run("attention_maps", images=IMAGES, model=vit(), query=[20, 5], heads=[1])
    assert result.point == (20, 5) and result.query == "patch at 20, 5"
    (overlay, head), *_ = result.panels()
    for panel in (overlay, head):
        assert torch.equal(panel.image[:, 5, 20], torch.ones(3))


def test_norms_of_an_outlier_are_reported_by_image() -> None:
    model = vit()
    position = model.module.get_parameter("pos_embed")
    with torch.no_grad():
        position[0, 7] += 50
    result: Any = run("token_norms", images=IMAGES, model=model)
    assert result.images_with_high_norms()["blocks.0"] == [0, 1]
    assert bool(result.is_high()[:, 0, 1, 2].all()) and "1 high" in result.panels()[0][1].title
    assert "2 high in 2 of 2 images" in result.lines()[0]


def row_sums(maps: Tensor, others: Tensor) -> Tensor:
    return maps.sum((-2, -1)) + others.sum(-1)


def test_rows_sum_to_one() -> None:
    for name in ("attention_maps", "attention_rollout"):
        result: Any = run(name, images=IMAGES, model=vit(), query=[1, 1])
        sums = row_sums(result.maps, result.others)
        torch.testing.assert_close(sums, torch.ones_like(sums))
