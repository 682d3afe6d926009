"""DeepDream: oracle, growing activations, guide, zoom and image sizes."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.synthesis.deep_dream import enlarge_center, features_by_position

deep_dream = methods["synthesis.deep_dream"]
MODEL = load_model("builtin:shapes-vgg")
SCENES = draw_scenes(2, split="test").images


def mean_square(images: torch.Tensor, layer: str) -> torch.Tensor:
    return MODEL.features(images, layer).square().flatten(1).mean(1)


def test_oracle() -> None:
    deep_dream.spec.oracle()


def test_dream_increases_the_activations_of_its_layer() -> None:
    result = deep_dream(MODEL, SCENES, layers=["features.6"], octaves=2, steps=6, seed=0)
    assert result.images.shape == SCENES.shape and result.scores.shape == (12, 2)
    assert (mean_square(result.images, "features.6") > 2 * mean_square(SCENES, "features.6")).all()


def test_guide_raises_the_similarity_to_its_features() -> None:
    layers = ["features.6"]
    guide = draw_scenes(1, split="test", start=7).images
    guide_features = features_by_position(MODEL, layers, guide)[0][0]

    def similarity(images: torch.Tensor) -> torch.Tensor:
        features = features_by_position(MODEL, layers, images)[0]
        return (features @ guide_features.T).amax(2).mean(1)

    params = {"layers": layers, "octaves": 1, "steps": 6, "seed": 0}
    guided, plain = deep_dream(MODEL, SCENES, guide, **params), deep_dream(MODEL, SCENES, **params)
    assert (similarity(guided.images) > similarity(SCENES)).all()
    assert (similarity(guided.images) > similarity(plain.images)).all()


def test_zoom_records_every_dream_as_a_frame(tmp_path) -> None:
    result = run(
        "deep_dream",
        images=SCENES[:1],
        octaves=1,
        steps=1,
        zoom=3,
        zoom_scale=1.5,
        seed=0,
        out=tmp_path / "z",
    )
    assert result.frames is not None and result.frames.shape == (4, 1, 3, 64, 64)
    assert (tmp_path / "z" / "film.gif").is_file()
    assert torch.equal((result.images * 255).round().byte(), result.frames[-1])


def test_enlarge_center_crops_the_center() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, 2:6, 2:6] = 1
    assert torch.equal(enlarge_center(image, 2), torch.ones(1, 3, 8, 8))


def test_any_image_size() -> None:
    result = deep_dream(MODEL, torch.rand(1, 3, 41, 90), octaves=2, steps=1, seed=0)
    assert result.images.shape == (1, 3, 41, 90)


def test_frames_and_zoom_exclude_each_other() -> None:
    with pytest.raises(InputError, match="not both"):
        deep_dream(MODEL, SCENES, zoom=2, frames=2)
