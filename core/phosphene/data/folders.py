"""``FolderDataset``: the image files of a folder and its subfolders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ..images.paths import MASK_SUFFIX, find_images
from .datasets import Dataset, stack


class FolderDataset(Dataset):
    """Every image file under a folder, sorted by path; ``transform`` reads a path as a tensor (C, H, W).

    An image's class is the name of its folder, if no image lies in the top folder. The mask of the object
    in ``dog.jpg`` is ``dog.mask.png`` beside it, white on the object.
    """

    def __init__(self, folder: str | Path, transform: Callable[[Path], Tensor]) -> None:
        self.uri = str(Path(folder).resolve())
        self._folder, self._paths, self._transform = Path(folder), find_images(folder), transform

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        return self._paths[index].relative_to(self._folder).as_posix()

    def read(self, indices: Sequence[int]) -> Tensor:
        return self._read([self._paths[i] for i in indices])

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        if any(path.parent == self._folder for path in self._paths):
            return None
        return tuple(self._paths[i].parent.name for i in indices)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        paths = [self._paths[i].with_suffix(MASK_SUFFIX) for i in indices]
        return self._read(paths).mean(1) > 0.5 if all(path.is_file() for path in paths) else None

    def _read(self, paths: Sequence[Path]) -> Tensor:
        # Decoding releases the interpreter lock, so threads decode in parallel.
        with ThreadPoolExecutor(max_workers=4) as pool:
            return stack(list(pool.map(self._transform, paths)))
