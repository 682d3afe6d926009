"""Activation patching of networks with tokens, and what it refuses."""

import pytest
import torch

from phosphene import InputError, load_model, read_images, run


def test_after_the_last_attention_only_the_class_token_has_an_effect():
    model = load_model("builtin:shapes-vit", dtype=torch.float64)
    images = read_images("builtin:scenes/2", model)
    layers = [f"blocks.{n}" for n in range(4)]
    inputs = {"model": model, "images": images, "sources": images.flip(0)}
    result = run("activation_patching", **inputs, layers=layers)
    change = (result.source_scores - result.scores)[:, None].expand(-1, 4)
    torch.testing.assert_close(result.layer_effects, change)
    torch.testing.assert_close(result.token_effects[:, 3], change[:, 3])
    # Processors sum the products of a larger batch in another order.
    assert result.of_layer("blocks.3").abs().max() < 1e-12 and result.of_layer("blocks.0").abs().max() > 1e-3
    assert result.sizes == ((8, 8),) * 4
    by_channel = run("activation_patching", **inputs, layers=layers[:1], unit="channel")
    assert by_channel.of_layer("blocks.0").shape == (2, model.map_shape("blocks.0")[0])


def test_the_effect_lies_on_the_object():
    """Of scenes, the block of largest effect on the first layer is one that the object covers."""
    data = load_model("builtin:shapes-vgg")
    from phosphene.data import open_dataset

    scenes = open_dataset("builtin:scenes/6", data.transform, (64, 64))
    images = scenes.read(range(6))
    result = run("activation_patching", images=images, sources=images.roll(-1, 0), layers=["features.1"])
    masks = scenes.masks(range(6))
    blocks = torch.nn.functional.adaptive_max_pool2d(masks.float(), 8)
    best = result.of_layer("features.1").abs().flatten(1).argmax(1)
    assert int(blocks.flatten(1).gather(1, best[:, None]).sum()) >= 5


def test_sources_of_another_number_or_size_are_refused():
    images = torch.rand(3, 3, 64, 64)
    one = run("activation_patching", images=images, sources=images[:1], layers=["features.16"], grid=2)
    assert torch.equal(one.sources, images[:1].expand(3, -1, -1, -1))
    with pytest.raises(InputError, match="one source, or 3, not 2"):
        run("activation_patching", images=images, sources=images[:2])
    with pytest.raises(InputError, match="not \\(3, 32, 32\\)"):
        run("activation_patching", images=images, sources=torch.rand(1, 3, 32, 32))


def test_the_default_source_is_blank_in_a_stream_as_well(tmp_path):
    options = {"images": "builtin:scenes/3", "layers": ["features.16"], "grid": 2}
    result = run("activation_patching", **options)
    mean = result.images.mean((2, 3), keepdim=True).expand_as(result.images)
    torch.testing.assert_close(result.sources, mean)
    stream = run("activation_patching", **options, stream=True, batch_size=2, out=tmp_path / "stream")
    for n, single in enumerate(stream):
        torch.testing.assert_close(single.effects, result.effects[n : n + 1], rtol=1e-4, atol=1e-5)
