"""Checkpoints: an interrupted run resumes, and no other run uses its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phosphene import Result, checkpoints, load_result, method, resumable, run, save_progress, saved_progress
from phosphene.results import Synthesis
from phosphene.roles import Dataset, Model, Seed

#: Indices of the images that were read, and indices at which a run is interrupted once.
read: list[int] = []
cuts: list[int] = []


@method(family="activations", needs=["dataset"])
def mean_color(model: Model, dataset: Dataset, *, gain: float = 1.0, seed: Seed = None) -> Synthesis:
    """Sum the mean colors of a data set, one image at a time, and add a little noise at the end."""
    state = saved_progress() or {"done": 0, "total": torch.zeros(3)}
    for batch in dataset.batches(1, state["done"]):
        index = batch.indices[0]
        if index in cuts:
            cuts.remove(index)
            raise KeyboardInterrupt
        read.append(index)
        state = {"done": index + 1, "total": state["total"] + gain * batch.images.mean((0, 2, 3))}
        save_progress(**state)
    color = 0.9 * state["total"] / len(dataset) + 0.1 * torch.rand(3)
    return Synthesis(images=color.view(1, 3, 1, 1), scores=torch.zeros(1, 1), targets=("mean",))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {"mean_color": mean_color, mean_color.spec.name: mean_color}
    monkeypatch.setattr("phosphene.runs.prepare.methods", registry)
    monkeypatch.setattr("phosphene.runs.prepared_run.methods", registry)
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    read.clear()
    cuts.clear()


def make(out: Path | None, count: int = 5, **params: Any) -> Result:
    return run("mean_color", dataset=f"builtin:scenes/{count}", out=out, **params)


def interrupt_run(out: Path, **params: Any) -> None:
    cuts.append(3)
    with pytest.raises(KeyboardInterrupt) as caught:
        make(out, **params)
    assert "the same output folder resumes" in caught.value.__notes__[0]


def test_interrupted_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    out = tmp_path / "result"
    interrupt_run(out)
    assert [path.name for path in tmp_path.iterdir()] == [".result.unfinished"]
    again = make(out)
    assert read == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    seed = again.provenance.seed  # the seed of the interrupted run: none was passed
    assert torch.equal(make(None, seed=seed).images, load_result(out).images)


@pytest.mark.parametrize("other", [{"gain": 0.5}, {"count": 6}, {"seed": 3}])
def test_checkpoint_of_another_run_is_not_used(tmp_path: Path, other: dict[str, Any]) -> None:
    interrupt_run(tmp_path / "result")
    read.clear()
    make(tmp_path / "result", **other)
    assert read[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_damaged_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".result.unfinished").write_bytes(b"cut in the middle of writ")
    make(tmp_path / "result")
    assert read == [0, 1, 2, 3, 4]


def test_checkpoint_is_written_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 1e6)
    written: list[Path] = []
    monkeypatch.setattr(checkpoints.Checkpoint, "write", lambda self: written.append(self.file))
    make(tmp_path / "result")
    assert written == []


def test_without_output_folder_no_checkpoint_exists(tmp_path: Path) -> None:
    save_progress(done=1)
    assert saved_progress() == {}
    make(None)
    assert list(tmp_path.iterdir()) == []


def test_run_on_a_dataset_object_has_no_checkpoint(tmp_path: Path) -> None:
    cuts.append(3)
    with pytest.raises(KeyboardInterrupt):
        run("mean_color", dataset=torch.rand(5, 3, 64, 64), out=tmp_path / "result")
    assert list(tmp_path.iterdir()) == []


def test_methods_called_inside_do_not_use_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoints.Checkpoint(tmp_path / "checkpoint", "id")
    checkpoint.state = {"done": 1}
    with checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
        assert saved_progress() == {"done": 1}
        with checkpoints.claim_checkpoint():
            assert saved_progress() == {}
            save_progress(done=7)
        assert saved_progress() == {"done": 1}


def test_resumable_skips_completed_items_and_restores_the_state(tmp_path: Path) -> None:
    done: list[str] = []

    def collect(fail_at: str | None) -> dict[str, Any]:
        state: dict[str, Any] = {"letters": "", "sum": torch.zeros(1)}
        for letter in resumable("abcd", state, "letters"):
            if letter == fail_at:
                raise KeyboardInterrupt
            done.append(letter)
            state["letters"] += letter
            state["sum"] = state["sum"] + ord(letter)
        return state

    def call(checkpoint: checkpoints.Checkpoint, fail_at: str | None = None) -> list[dict[str, Any]]:
        with checkpoint, checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
            # Two loops in one call: each has a slot of its own.
            return [collect(None), collect(fail_at)]

    with pytest.raises(KeyboardInterrupt):
        call(checkpoints.Checkpoint(tmp_path / "checkpoint", "id"), fail_at="c")
    assert "".join(done) == "abcdab"
    states = call(checkpoints.Checkpoint(tmp_path / "checkpoint", "id"))
    assert "".join(done) == "abcdabcd"
    assert [(state["letters"], state["sum"].item()) for state in states] == [("abcd", 394.0)] * 2


def test_resumable_without_a_checkpoint_is_a_plain_loop() -> None:
    state = {"count": 0}
    for number in resumable([2, 3], state, "numbers"):
        state["count"] += number
    assert state == {"count": 5}
