"""``FolderDataset`` and ``FileDataset``: image files of a folder, and files that are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..images.decode import read_image
from ..images.paths import find_images, local_path
from .items import Item, ItemDataset, Transform


class FileDataset(ItemDataset):
    """Image files in the order of a list; ``transform`` reads a path as a tensor (C, H, W).

    The mask of the object in ``dog.jpg`` is ``dog.mask.png`` beside it, white on the object.
    """

    def __init__(self, paths: Sequence[Path], transform: Transform = read_image) -> None:
        super().__init__(transform)
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        return str(self._paths[index])

    def item(self, index: int) -> Item:
        return Item(self._paths[index])


class FolderDataset(FileDataset):
    """Every image file under a folder, sorted by path; ``transform`` reads a path as a tensor (C, H, W).

    An image's class is the name of its folder, if no image lies in the top folder: a class name, a class
    number ("0" to "999"), or the WordNet id ("n01440764") of a class of an ImageNet model. The mask of the
    object in ``dog.jpg`` is ``dog.mask.png`` beside it, white on the object.
    """

    def __init__(self, folder: str | Path, transform: Transform = read_image) -> None:
        self._folder = local_path(folder)
        super().__init__(find_images(self._folder), transform)
        self.uri = str(self._folder.resolve())
        self._has_classes = all(path.parent != self._folder for path in self._paths)

    def id(self, index: int) -> str:
        return self._paths[index].relative_to(self._folder).as_posix()

    def item(self, index: int) -> Item:
        path = self._paths[index]
        return Item(path, path.parent.name if self._has_classes else None)
