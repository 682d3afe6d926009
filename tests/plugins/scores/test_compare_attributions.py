"""Comparison of attribution methods: values, resumed runs, budgets and refused inputs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from phosphene import (
    InputError,
    ProgressEvent,
    SceneDataset,
    TensorDataset,
    UnknownName,
    checkpoints,
    load_model,
    load_result,
    max_batch,
    methods,
    report_progress,
    run,
)
from phosphene.data import Batch, State, shard_state, use_shard_executor
from phosphene.testing.observation import assert_same_result
from phosphene_plugins.scores._evaluate_maps import MapScores
from phosphene_plugins.scores._score_table import Scores, means_and_errors

compare_attributions = methods["scores.compare_attributions"]
CHEAP = {"methods": ["grad_cam", "saliency"], "scores": ["mask_iou"], "seed": 0}


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return load_model("builtin:shapes-vgg")


def test_oracle() -> None:
    compare_attributions.spec.oracle()


def test_a_resumed_comparison_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    params = {"dataset": "builtin:scenes/12", "batch_size": 4, **CHEAP}
    uninterrupted = run("compare_attributions", **params)

    def cut(event: ProgressEvent) -> None:
        if event.description == "scoring saliency" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("compare_attributions", out=tmp_path / "table", progress=cut, **params)
    assert {path.name.partition(".rows-")[0] for path in tmp_path.iterdir()} == {".table.unfinished"}
    scored: list[tuple[str, int]] = []
    update = MapScores.update

    def record(self: MapScores, state: State, batch: Batch) -> State:
        scored.append((self.source.name, batch.indices[0]))
        return update(self, state, batch)

    monkeypatch.setattr(MapScores, "update", record)
    resumed = run("compare_attributions", out=tmp_path / "table", progress=False, **params)
    baselines = [(name, start) for name in ("center point", "random maps") for start in (0, 4, 8)]
    assert scored == [("saliency", 8), *baselines]
    for name in ("values", "standard_errors", "counts", "image_values", "maps"):
        assert torch.equal(getattr(resumed, name), getattr(uninterrupted, name)), name
    loaded = load_result(tmp_path / "table")
    assert isinstance(loaded, Scores)
    assert loaded.lines() == uninterrupted.lines()


def test_energy_lies_in_the_object_for_the_bundled_network_and_outside_for_the_biased_one(model) -> None:  # type: ignore[no-untyped-def]
    result = compare_attributions(
        model,
        SceneDataset(12, biased=True),
        models=["builtin:shapes-biased"],
        methods=["grad_cam", "integrated_gradients", "saliency"],
        scores=["mask_iou"],
        params={"integrated_gradients": {"steps": 10}},
        seed=0,
    )
    unbiased, biased = (
        {n: result.value(n, "energy inside", uri) for n in result.names} for uri in result.models
    )
    for name in ("grad_cam", "integrated_gradients", "saliency"):
        assert biased[name] < 0.75 * unbiased[name]
    assert unbiased["center point"] == biased["center point"]
    assert unbiased["grad_cam"] > unbiased["center point"] + 0.1
    assert unbiased["integrated_gradients"] > unbiased["center point"] + 0.1
    assert all(
        unbiased[name] > unbiased["random maps"] + 0.1 for name in ("grad_cam", "integrated_gradients")
    )


def test_the_budget_limits_the_images_of_an_expensive_method(model) -> None:  # type: ignore[no-untyped-def]
    result = compare_attributions(
        model,
        SceneDataset(9),
        methods=["grad_cam", "occlusion"],
        scores=["pointing_game"],
        params={"occlusion": {"window": 16, "stride": 16}},
        budget=60,  # grad_cam costs 3 passes per image, occlusion 17
        seed=0,
    )
    assert result.counts[0, :, 0].tolist() == [9, 3, 9, 9]
    assert any("occlusion (n=3)" in line for line in result.lines())
    assert result.image_values[0, 1, :, 3:].abs().sum() == 0


def test_there_is_one_progress_bar_for_each_source(model) -> None:  # type: ignore[no-untyped-def]
    events: list[ProgressEvent] = []
    with report_progress(events.append), max_batch(2):
        compare_attributions(model, SceneDataset(4), methods=["smooth_grad"], scores=["mask_iou"], seed=0)
    names = [name for name in ("smooth_grad", "center point", "random maps") for _ in range(2)]
    assert [event.description for event in events] == [f"scoring {name}" for name in names]
    assert [event.done for event in events] == [1, 2] * 3


@pytest.mark.parametrize("name", ["compare_attributions", "sanity_check"])
def test_scores_in_another_process_are_the_same(model, name: str) -> None:  # type: ignore[no-untyped-def]
    """Shards whose folds were pickled and loaded again, and were computed in reverse, give the same bits."""

    class Pickled:
        def states(self, fold, dataset, size, shards, seed):  # type: ignore[no-untyped-def]
            fold, dataset = pickle.loads(pickle.dumps((fold, dataset)))
            states = [shard_state(fold, dataset, size, shard, seed) for shard in reversed(shards)]
            return iter(pickle.loads(pickle.dumps(states[::-1])))

    params = {"stages": 2} if name == "sanity_check" else {"methods": ["smooth_grad"], "steps": 2}
    images, score = SceneDataset(5), methods[name]
    with max_batch(2):
        expected = score(model, images, seed=0, **params)
        with use_shard_executor(Pickled()):
            assert_same_result(score(model, images, seed=0, **params), expected)


def test_the_sanity_column_is_undefined_for_baselines(model) -> None:  # type: ignore[no-untyped-def]
    result = compare_attributions(
        model, SceneDataset(2), methods=["saliency"], scores=["sanity_check"], seed=0, examples=1
    )
    assert result.value("saliency", "sanity") is not None
    assert result.value("center point", "sanity") is None
    assert result.lines()[-1].split("|")[2].strip() == "–"


def test_means_are_over_the_counted_values() -> None:
    each = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    values, errors = means_and_errors(each, torch.tensor([2, 1, 0]))
    assert values.tolist() == [2.0, 4.0, 0.0]
    torch.testing.assert_close(errors, torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["pgd"]}, "returns no maps"),
        ({"methods": ["grad_cma"]}, "grad_cam"),
        ({"params": {"occlusion": {}}}, "params names 'occlusion'"),
        ({"params": {"grad_cam": {"layr": 1}}}, "layer"),
        ({"models": ["builtin:shapes-vg"]}, "shapes-vgg"),
        ({"scores": []}, "at least 1"),
    ],
)
def test_invalid_parameters_are_refused_before_any_work(model, changes, words: str) -> None:  # type: ignore[no-untyped-def]
    events: list[ProgressEvent] = []
    with report_progress(events.append), pytest.raises((InputError, UnknownName), match=words):
        compare_attributions(model, SceneDataset(2), **{"methods": ["grad_cam"], "seed": 0, **changes})
    assert not events


def test_models_with_another_input_size_are_refused() -> None:
    small = load_model("builtin:shapes-vgg")
    small.input_size = (3, 32, 32)
    with pytest.raises(InputError, match="take the same images"):
        compare_attributions(
            small, SceneDataset(2, size=(32, 32)), models=["builtin:shapes-vgg"], methods=["grad_cam"], seed=0
        )


def test_a_data_set_without_masks_or_labels_is_refused_with_advice(model) -> None:  # type: ignore[no-untyped-def]
    images = SceneDataset(2).read([0, 1])
    with pytest.raises(InputError, match=r"dog\.mask\.png"):
        compare_attributions(model, TensorDataset(images, ["star", "star"]), seed=0)
    with pytest.raises(InputError, match='target="predicted"'):
        compare_attributions(model, TensorDataset(images), scores=["deletion_insertion"], seed=0)
    result = compare_attributions(
        model, TensorDataset(images), methods=["saliency"], scores=["deletion_insertion"], steps=2,
        target="predicted", seed=0,
    )  # fmt: skip
    assert result.counts.min() == 2
