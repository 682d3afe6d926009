"""Data sets: only the requested images are drawn, errors name the file, loops resume at the right image."""

import pytest
import torch
from torchvision.utils import save_image

from phosphene import (
    FolderDataset,
    InputError,
    SceneDataset,
    TensorDataset,
    checkpoints,
    load_model,
    methods,
    resumable_batches,
)
from phosphene.builtin.part_scenes import PARTS, draw_part_scenes
from phosphene.builtin.scenes import draw_scenes
from phosphene.data import bundled, open_dataset
from phosphene.images import read_image


def test_scattered_indices_read_the_same_scenes_as_consecutive_ones(monkeypatch):
    stream = draw_scenes(12, split="test").images
    counts = []

    def counting_draw_scenes(count, **options):
        counts.append(count)
        return draw_scenes(count, **options)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", counting_draw_scenes)
    bundled._cached_test_scenes.cache_clear()  # another test may have read the same batch
    dataset = SceneDataset(10**6)
    assert torch.equal(dataset.read([11, 0, 3]), stream[[11, 0, 3]])
    dataset.read([0, 10**6 - 1])
    assert counts == [1] * 5
    assert torch.equal(next(dataset.batches(5)).images, stream[:5])
    assert counts[5:] == [5]


def test_part_scenes_have_labels_masks_boxes_and_images_without_each_part():
    dataset = open_dataset("builtin:part-scenes/9", read_image, (128, 128))
    scenes = draw_part_scenes(2, split="test", start=3)
    assert len(dataset) == 9 and dataset.uri == "builtin:part-scenes/9"
    assert torch.equal(dataset.read([4, 3]), scenes.images[[1, 0]])
    assert torch.equal(dataset.masks([3, 4]), scenes.masks)
    (parts,), (label,), (box,) = dataset.parts([3]), dataset.labels([3]), dataset.boxes([3])
    assert parts.names == PARTS[label] == scenes.parts(0)
    assert torch.equal(parts.masks, scenes.part_masks(0))
    bare = draw_part_scenes(1, split="test", start=3, remove=[parts.names[1]])
    assert torch.equal(parts.without[1], bare.images[0])
    left, top, right, bottom = box[0].int().tolist()
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert (
        not (scenes.masks[0] & ~inside).any()
        and scenes.masks[0][top].any()
        and scenes.masks[0][:, left].any()
    )
    small = open_dataset("builtin:part-scenes/9", read_image, (64, 96))
    assert small.read([3]).shape == (1, 3, 64, 96) and small.masks([3]).shape == (1, 64, 96)
    assert small.parts([3])[0].without.shape == (len(parts.names), 3, 64, 96)
    assert open_dataset("builtin:scenes/2", read_image, (64, 64)).parts([0]) is None


@pytest.mark.parametrize(
    "uri",
    ["builtin:part-textures", "builtin:scene", "builtin:scenes/0", "builtin:scenes/-1", "builtin:scenes/x"],
)
def test_unknown_bundled_data_set_is_refused(uri):
    with pytest.raises(InputError, match="no bundled data set"):
        open_dataset(uri, read_image, (64, 64))


def test_a_bundled_painting_is_no_data_set():
    with pytest.raises(InputError, match=r"builtin:night is a bundled painting.* as styles or texture"):
        open_dataset("builtin:night", read_image, (64, 64))


def test_folder_error_names_the_unreadable_file(tmp_path):
    with pytest.raises(InputError, match="contains no images"):
        FolderDataset(tmp_path, read_image)
    save_image(torch.rand(3, 4, 5), tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    save_image(torch.rand(3, 6, 5), tmp_path / "sub" / "b.png")
    dataset = FolderDataset(tmp_path, read_image)
    assert [dataset.id(i) for i in range(2)] == ["a.png", "sub/b.png"]
    with pytest.raises(InputError, match="images of different sizes cannot be one batch"):
        dataset.read([0, 1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken.png"):
        next(FolderDataset(tmp_path, read_image).batches(2))


def test_images_of_a_tensor_data_set_are_checked():
    model = load_model("builtin:shapes-vgg")
    images = torch.rand(1, 3, 64, 64)
    for invalid in (
        torch.full((2, 3, 64, 64), 200.0),
        torch.zeros(2, 1, 64, 64),
        torch.zeros(2, 3, 64, 64).byte(),
    ):
        with pytest.raises(InputError):
            methods["nearest_neighbors"](model, images, TensorDataset(invalid), k=1)


@pytest.mark.parametrize("size", [2, 3])
def test_resumed_batches_start_at_the_first_unread_image_with_any_batch_size(size, tmp_path, monkeypatch):
    dataset = TensorDataset(torch.arange(7.0)[:, None, None, None])

    def add(size, stop=None):
        state = {"total": torch.zeros(1)}
        for batch in resumable_batches(dataset, size, state, "sum"):
            if batch.indices[0] == stop:
                raise KeyboardInterrupt
            state["total"] = state["total"] + batch.images.sum()
        return state["total"].item()

    def call(size, stop=None):
        checkpoint = checkpoints.Checkpoint(tmp_path / "checkpoint", "id")
        with checkpoint, checkpoints.use_checkpoint(checkpoint), checkpoints.claim_checkpoint():
            return add(size, stop)

    with pytest.raises(KeyboardInterrupt):
        call(2, stop=4)
    starts = []
    monkeypatch.setattr(
        TensorDataset, "read", lambda self, rows: starts.append(rows[0]) or self.images[[*rows]]
    )
    assert call(size) == 21
    assert starts[0] == 4
