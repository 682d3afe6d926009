"""Data sets: only the requested images are read; unreadable files are named."""

import pytest
import torch
from torchvision.utils import save_image

from phosphene import FolderDataset, InputError, SceneDataset, TensorDataset, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.data import open_dataset
from phosphene.images import read_image


def test_scenes_at_scattered_indices_equal_those_of_the_stream(monkeypatch):
    stream = draw_scenes(12, split="test").images
    counts = []

    def counting_draw_scenes(count, **options):
        counts.append(count)
        return draw_scenes(count, **options)

    monkeypatch.setattr("phosphene.data.bundled.draw_scenes", counting_draw_scenes)
    dataset = SceneDataset(10**6)
    assert torch.equal(dataset.read([11, 0, 3]), stream[[11, 0, 3]])
    dataset.read([0, 10**6 - 1])
    assert counts == [1] * 5
    assert torch.equal(next(dataset.batches(5)).images, stream[:5])
    assert counts[5:] == [5]


@pytest.mark.parametrize(
    "uri", ["builtin:scene", "builtin:scenes/0", "builtin:scenes/-1", "builtin:scenes/x"]
)
def test_unknown_bundled_data_set_is_refused(uri):
    with pytest.raises(InputError, match="no bundled data set"):
        open_dataset(uri, read_image, (64, 64))


def test_unreadable_folder_content_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no pictures"):
        FolderDataset(tmp_path, read_image)
    save_image(torch.rand(3, 4, 5), tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    save_image(torch.rand(3, 6, 5), tmp_path / "sub" / "b.png")
    dataset = FolderDataset(tmp_path, read_image)
    assert [dataset.id(i) for i in range(2)] == ["a.png", "sub/b.png"]
    with pytest.raises(InputError, match="pictures of different sizes cannot be one batch"):
        dataset.read([0, 1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken.png"):
        next(FolderDataset(tmp_path, read_image).batches(2))


def test_tensors_of_a_data_set_are_checked():
    model = load_model("builtin:shapes-vgg")
    images = torch.rand(1, 3, 64, 64)
    for invalid in (
        torch.full((2, 3, 64, 64), 200.0),
        torch.zeros(2, 1, 64, 64),
        torch.zeros(2, 3, 64, 64).byte(),
    ):
        with pytest.raises(InputError):
            methods["nearest_neighbors"](model, images, TensorDataset(invalid), k=1)
