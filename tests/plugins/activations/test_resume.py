"""Work over a data set that was cut off in the middle goes on where it was, and gives the same."""

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
    def go(out):
        return run(name, dataset="builtin:scenes/10", batch_size=2, out=out, **CALLS[name])

    whole, read, straight = go(None), [], SceneDataset.batches

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        for batch in straight(self, size, start):
            if batch.indices[0] == cut:
                raise KeyboardInterrupt
            read.extend(batch.indices)
            yield batch
        if cut == len(self):  # all was read, and what comes after was not done
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SceneDataset, "batches", batches)
        patched.setattr(checkpoints, "INTERVAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "out")
    assert read == list(range(cut))

    def rest(self, size: int, start: int = 0) -> Iterator[Batch]:
        assert start == cut
        return straight(self, size, start)

    monkeypatch.setattr(SceneDataset, "batches", rest)
    again = go(tmp_path / "out")
    assert_same_result(again, whole)
