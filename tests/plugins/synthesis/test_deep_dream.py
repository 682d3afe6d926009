"""DeepDream: a layer's answers grow, octave by octave, by a guide or into the picture."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes
from phosphene_plugins.synthesis.deep_dream import closer, places_of

deep_dream = methods["synthesis.deep_dream"]
MODEL = load_model("builtin:shapes-vgg")
SCENES = draw_scenes(2, split="test").images


def liveliness(pictures: torch.Tensor, layer: str) -> torch.Tensor:
    return MODEL.features(pictures, layer).square().flatten(1).mean(1)


def test_its_oracle_holds() -> None:
    deep_dream.spec.oracle()


def test_a_layer_answers_the_dream_far_more_than_the_picture() -> None:
    made = deep_dream(MODEL, SCENES, layers=["features.6"], octaves=2, steps=6, seed=0)
    assert made.images.shape == SCENES.shape and made.scores.shape == (12, 2)
    assert (liveliness(made.images, "features.6") > 2 * liveliness(SCENES, "features.6")).all()


def test_a_guide_is_what_it_comes_to_look_like() -> None:
    guide = draw_scenes(1, split="test", start=7).images
    told = places_of(MODEL, MODEL.features(guide, "features.6"), guide)[0]

    def likeness(pictures: torch.Tensor) -> torch.Tensor:
        answers = places_of(MODEL, MODEL.features(pictures, "features.6"), pictures)
        return (answers @ told.T).amax(2).mean(1)

    params = {"layers": ["features.6"], "octaves": 1, "steps": 6, "seed": 0}
    guided, plain = deep_dream(MODEL, SCENES, guide, **params), deep_dream(MODEL, SCENES, **params)
    assert (likeness(guided.images) > likeness(SCENES)).all()
    assert (likeness(guided.images) > likeness(plain.images)).all()


def test_a_zoom_is_a_film_of_dreams(tmp_path) -> None:
    made = run(
        "deep_dream",
        images=SCENES[:1],
        octaves=1,
        steps=1,
        zoom=3,
        zoom_scale=1.5,
        seed=0,
        out=tmp_path / "z",
    )
    assert made.frames is not None and made.frames.shape == (4, 1, 3, 64, 64)
    assert (tmp_path / "z" / "film.gif").is_file()
    assert torch.equal((made.images * 255).round().byte(), made.frames[-1])


def test_going_closer_keeps_the_middle() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    picture[:, :, 2:6, 2:6] = 1
    assert torch.equal(closer(picture, 2), torch.ones(1, 3, 8, 8))


def test_odd_sizes_and_other_sizes_than_the_models_will_do() -> None:
    made = deep_dream(MODEL, torch.rand(1, 3, 41, 90), octaves=2, steps=1, seed=0)
    assert made.images.shape == (1, 3, 41, 90)


def test_frames_of_a_zoom_are_its_dreams() -> None:
    with pytest.raises(InputError, match="not both"):
        deep_dream(MODEL, SCENES, zoom=2, frames=2)
