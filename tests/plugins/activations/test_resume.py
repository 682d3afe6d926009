"""Interrupted work over a data set resumes at the next image and returns the same result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phosphene import SceneDataset, checkpoints, run
from phosphene.data import Batch
from phosphene.testing.observation import assert_same_result

CALLS = {
    "top_patches": {"k": 3, "layer": "features.6", "channels": [3, 20]},
    "guided_patches": {"k": 2, "layer": "features.6", "channels": [5]},
    "activation_statistics": {"layer": "features.11"},
    "channel_redundancy": {"layer": "features.11", "threshold": 0.7},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cut", [4, 10])
def test_resumed_run_equals_an_uninterrupted_one(name, cut, tmp_path, monkeypatch):
    def run_method(out):
        return run(name, dataset="builtin:scenes/10", batch_size=2, out=out, **CALLS[name])

    complete, read, original_batches = run_method(None), [], SceneDataset.batches

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        for batch in original_batches(self, size, start, stop):
            if batch.indices[0] == cut:
                raise KeyboardInterrupt
            read.extend(batch.indices)
            yield batch
        if cut == len(self):  # all images are read, nothing after them is computed
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SceneDataset, "batches", batches)
        patched.setattr(checkpoints, "INTERVAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run_method(tmp_path / "out")
    assert read == list(range(cut))

    def rest(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        assert start == cut
        return original_batches(self, size, start, stop)

    monkeypatch.setattr(SceneDataset, "batches", rest)
    again = run_method(tmp_path / "out")
    assert_same_result(again, complete)
