"""Time of reading JPEG files while a network runs, against the network alone and other ways of reading."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.attribution import Work
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from phosphene import FolderDataset, SceneDataset, load_model
from phosphene.images import resize

COUNT, BATCH = 64, 8


class _Files(torch.utils.data.Dataset[Tensor]):
    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.transform(self.files[index])
        return image


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """Scenes with noise, 500 x 375, about 85 KB each."""
    files = [folder / f"{number:03d}.jpg" for number in range(count)]
    for number, (file, scene) in enumerate(zip(files, SceneDataset(count).read(range(count)), strict=True)):
        noise = torch.randn(3, 375, 500, generator=torch.Generator().manual_seed(number))
        to_pil_image((resize(scene, (375, 500)) + 0.06 * noise).clamp(0, 1)).save(file, quality=90)
    return files


def reading() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    """The limit is MobileNetV2 on images that are in memory: wall time above it is time waited for images."""
    model = load_model("torchvision:mobilenet_v2")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = write_jpegs(Path(folder), COUNT)
        dataset = FolderDataset(folder, model.transform)
        ready = [batch.images for batch in dataset.batches(BATCH)]
        source: Any = _Files(files, model.transform)

        def in_the_loop() -> None:
            for start in range(0, COUNT, BATCH):
                model(torch.stack([model.transform(file) for file in files[start : start + BATCH]]))

        title = f"{COUNT} JPEG files of 500x375 through MobileNetV2 at 224"
        others: dict[str, Work] = {
            "the limit": lambda: [model(images) for images in ready],
            "decoded in the loop": in_the_loop,
            "DataLoader, 2 workers": lambda: [
                model(images) for images in DataLoader(source, BATCH, num_workers=2)
            ],
        }
        yield title, lambda: [model(batch.images) for batch in dataset.batches(BATCH)], others
        yield (
            f"{COUNT} JPEG files of 500x375, read alone",
            lambda: [*dataset.batches(BATCH)],
            {"MobileNetV2 on them": lambda: [model(images) for images in ready]},
        )
