"""Part importance: drops measured by removing parts, of data sets with parts of several kinds."""

import pytest
import torch
from torch import nn

from phosphene import InputError, TensorDataset, load_model, load_result, run
from phosphene.data import Parts, PartSceneDataset
from phosphene_plugins.scores.part_importance import part_importance, top_part_hits


def linear(*weights):
    """A model of images (1, 1, P) whose first logit is the weighted sum of the pixels."""
    layer = nn.Linear(len(weights), 2, bias=False)
    layer.weight.data = torch.tensor([weights, [0.0] * len(weights)])
    module = nn.Sequential(nn.Flatten(), layer)
    return load_model(module, input_size=(1, 1, len(weights)), mean=[0.0], std=[1.0])


def pixel_parts(image, count):
    masks = torch.eye(count, image.shape[-1], dtype=torch.bool)[:, None]
    return Parts(tuple("abcdefg"[:count]), masks, image * ~masks[:, None])


def test_data_set_without_parts_and_images_without_parts_are_refused():
    with pytest.raises(InputError, match="builtin:part-scenes"):
        run("part_importance", dataset="builtin:scenes/2", max_images=1)
    images = torch.ones(1, 1, 1, 3)
    empty = Parts((), torch.zeros(0, 1, 3, dtype=torch.bool), torch.zeros(0, 1, 1, 3))
    dataset = TensorDataset(images, ["0"], object_parts=[empty])
    with pytest.raises(InputError, match="image 0 has 0 parts"):
        part_importance(linear(1.0, 2.0, 3.0), dataset, seed=0)


def test_redundant_parts_have_no_drop_and_ties_count_in_part():
    images = torch.ones(2, 1, 1, 3)
    parts = [pixel_parts(image, 3) for image in images]
    dataset = TensorDataset(images, ["0", "0"], object_parts=parts)
    result = part_importance(linear(2.0, 0.0, 0.0), dataset, method="gradient_x_input", seed=0)
    assert result.drops.tolist() == [[2.0, 0.0, 0.0]] * 2
    assert result.rank_correlation[0].tolist() == pytest.approx([1.0, 1.0])
    # The logit of class 1 is 0: all drops are equal, no part ranks before another.
    other = TensorDataset(images, ["1", "1"], object_parts=parts)
    result = part_importance(linear(2.0, 0.0, 0.0), other, method="gradient_x_input", seed=0)
    assert result.drops.abs().max() == 0 and result.top_part[0].tolist() == [1.0, 1.0]
    assert top_part_hits(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])) == 0.5


def test_images_with_different_numbers_of_parts_are_scored_and_saved(tmp_path):
    images = torch.rand(5, 1, 1, 4, generator=torch.Generator().manual_seed(0)) + 0.0
    parts = [pixel_parts(image, 1 + n % 4) for n, image in enumerate(images)]
    dataset = TensorDataset(images, ["0"] * 5, object_parts=parts)
    result = run("part_importance", model=linear(1.0, -2.0, 3.0, 4.0), dataset=dataset, method="saliency",
                 max_images=4, batch_size=3, seed=0, out=tmp_path / "a")  # fmt: skip
    assert [len(names) for names in result.parts] == [1, 2, 3, 4] and result.drops.shape == (4, 4)
    expected = images[:4, 0, 0] * torch.tensor([1.0, -2.0, 3.0, 4.0])
    own = torch.arange(4) <= torch.arange(4)[:, None]
    torch.testing.assert_close(result.drops, expected * own)
    table = result.table()
    assert table["part"] == list("aababcabcd") and len(table["saliency"]) == 10
    loaded = load_result(tmp_path / "a")
    assert loaded.lines() == result.lines() and loaded.class_importance() == result.class_importance()
    assert result.png()


def test_bundled_network_needs_the_parts_of_its_objects():
    result = run("part_importance", model="builtin:parts-resnet", dataset=PartSceneDataset(3), seed=0)
    importance = result.class_importance()
    for label, names in zip(result.classes, result.parts, strict=True):
        assert list(importance[label]) == list(names)
    # Removing the most important part matters more than removing the least important one.
    for names, drops in zip(result.parts, result.drops, strict=True):
        assert drops[: len(names)].max() > drops[: len(names)].min() + 1
    assert result.rank_correlation[0].mean() > 0
