"""Concepts find what a network relies on: the background, in one that was trained on biased scenes."""

import pytest
import torch

from phosphene import InputError, PhospheneError, TensorDataset, replay, run
from phosphene.builtin.scenes import BACKGROUNDS, CLASSES, draw_scenes

#: The background of each class in the scenes on which ``shapes-biased`` was trained.
BACKGROUND_OF = {"star": "leaves", "heart": "bricks", "circle": "sky"}


@pytest.fixture(scope="module")
def backgrounds():
    """Scenes of all shapes, their class the background, their mask the background's pixels."""
    scenes = draw_scenes(240, split="test", start=1000)
    names = [BACKGROUNDS[number] for number in scenes.backgrounds.tolist()]
    return TensorDataset(scenes.images, names, ~scenes.masks)


def test_tcav_finds_the_background_of_each_class_in_the_biased_network(backgrounds):
    scenes = draw_scenes(48, split="test", biased=True)
    data = TensorDataset(scenes.images, [CLASSES[number] for number in scenes.labels.tolist()])
    random = TensorDataset(draw_scenes(160, split="test", start=1240).images)
    result = run(
        "tcav",
        model="builtin:shapes-biased",
        dataset=data,
        concepts=backgrounds,
        random=random,
        target=list(BACKGROUND_OF),
        layer="features.11",
        runs=40,
        seed=0,
    )
    for n, background in enumerate(BACKGROUND_OF.values()):
        row = result.concepts.index(background)
        assert float(result.scores[n, row].mean()) > 0.9
        assert background in result.significant(n)


def test_dissection_finds_background_detectors_in_the_biased_network_only(backgrounds):
    counts = {}
    for name in ("shapes-biased", "shapes-vgg"):
        result = run("network_dissection", model=f"builtin:{name}", dataset=backgrounds, quantile=0.05)
        counts[name] = len(result.detectors(0.2))
    assert counts["shapes-biased"] >= 20 and counts["shapes-vgg"] == 0


def test_a_concept_is_a_target_of_other_methods():
    vectors = run(
        "concept_vectors",
        dataset="builtin:scenes/100",
        random="builtin:textures/32",
        layer="features.16",
        seed=0,
    )
    assert float(vectors.accuracy.min()) > 0.8
    target = vectors.direction("star")
    maps = run("hires_cam", images="builtin:scenes/1", target=target, layer="features.11").maps
    assert float(maps.max()) > 0
    concepts = run("concept_factorization", images="builtin:scenes/4", concepts=3, seed=0)
    drawn = run("class_visualization", target=concepts.direction(0), steps=30, seed=0)
    assert float(drawn.scores[-1]) > float(drawn.scores[0])


def test_a_saved_concept_is_a_target_by_its_folder_and_name(tmp_path):
    sets = {"dataset": "builtin:scenes/60", "random": "builtin:textures/16"}
    vectors = run("concept_vectors", **sets, layer="features.16", seed=0, out=tmp_path / "cav")
    text = f"concept:{tmp_path / 'cav'}#heart"
    named = run(
        "hires_cam", images="builtin:scenes/1", target=text, layer="features.11", out=tmp_path / "map"
    )
    passed = run(
        "hires_cam", images="builtin:scenes/1", target=vectors.direction("heart"), layer="features.11"
    )
    assert torch.equal(named.maps, passed.maps) and named.targets == (text,)
    assert replay(tmp_path / "map").same
    parts = run("concept_factorization", images="builtin:scenes/2", concepts=2, seed=0, out=tmp_path / "nmf")
    drawn = run("class_visualization", target=f"concept:{tmp_path / 'nmf'}#1", steps=1, seed=0)
    same = run("class_visualization", target=parts.direction(1), steps=1, seed=0)
    assert torch.equal(drawn.images, same.images)
    attack = run("pgd", images="builtin:scenes/1", labels=text, targeted=True, steps=20, eps=0.1, seed=0)
    assert attack.success.all()  # a star that has the concept
    with pytest.raises(InputError, match="criterion of success"):
        run("pgd", images="builtin:scenes/1", labels=parts.direction(0))
    for wrong, message in (
        (f"concept:{tmp_path / 'cav'}#hart", "heart"),
        (f"concept:{tmp_path / 'nmf'}#x", "numbers"),
        (f"concept:{tmp_path / 'nmf'}#7", "no number 7"),
        (f"concept:{tmp_path / 'map'}#star", "no concepts"),
        ("concept:star", "concept:folder#name"),
    ):
        with pytest.raises(PhospheneError, match=message):
            run("grad_cam", images="builtin:scenes/1", target=wrong)
