"""``CocoDataset`` and ``VocDataset``: images with annotated objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..errors import InputError
from ..images.decode import read_image
from ..images.paths import local_path
from .items import Box, Item, ItemDataset, Transform

#: Where the images of a COCO annotation file are, relative to its folder, beside their own paths.
_COCO_FOLDERS = (".", "images", "..", "../images")

#: The border between objects in the masks of Pascal VOC.
_VOC_BORDER = 255


class CocoDataset(ItemDataset):
    """The images of a COCO annotation file (``instances_val2017.json``), with their objects' boxes and masks.

    Images are beside the file, in ``images``, in a folder named as in ``instances_NAME.json``, or one folder
    up. An image's label is the category of its objects where they have only one; its mask is the union of
    its objects, crowd regions included.

    Raises:
        InputError: a file that is no COCO annotation, or an image that is not found.
    """

    def __init__(self, path: str | Path, transform: Transform = read_image) -> None:
        super().__init__(transform)
        file = local_path(path)
        self.uri, self._file = str(file.resolve()), file
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            keys = ("id", "file_name")
            self._images = [
                (*(i[k] for k in keys), i.get("height"), i.get("width")) for i in document["images"]
            ]
            self._names = {c["id"]: c["name"] for c in document["categories"]}
            objects: dict[Any, list[Any]] = {}
            for item in document["annotations"]:
                objects.setdefault(item["image_id"], []).append(item)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise InputError(f"{file} is no COCO annotation file: {reason:.120}") from error
        self._objects = objects

    def __len__(self) -> int:
        return len(self._images)

    def id(self, index: int) -> str:
        return str(self._images[index][1])

    def item(self, index: int) -> Item:
        image, name, height, width = self._images[index]
        objects = self._objects.get(image, [])
        size = None if height is None or width is None else (int(height), int(width))
        boxes = tuple(_corners(item["bbox"]) for item in objects if "bbox" in item)
        label = _single_name([self._names[item["category_id"]] for item in objects])
        mask = None
        if size is not None and objects and all(item.get("segmentation") for item in objects):
            mask = partial(_union, objects, size)
        return Item(self._find(name), label, mask, boxes, size)

    def _find(self, name: str) -> Path:
        split = self._file.stem.rpartition("_")[2]
        for folder in (*_COCO_FOLDERS, split, f"../{split}", f"../images/{split}"):
            if (path := self._file.parent / folder / name).is_file():
                return path
        raise InputError(f"{self._file} names the image {name}, which is neither beside it nor in images")


def _union(objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> NDArray[Any]:
    """The union of the objects' segmentations, polygons or run lengths, (H, W)."""
    canvas = Image.new("1", (size[1], size[0]))
    mask = np.zeros(size, bool)
    for item in objects:
        if isinstance(item["segmentation"], Mapping):
            mask |= decode_runs(item["segmentation"])
        else:
            for polygon in item["segmentation"]:
                ImageDraw.Draw(canvas).polygon(list(polygon), fill=1)
    return mask | np.asarray(canvas)


class VocDataset(ItemDataset):
    """The images of a Pascal VOC folder: ``JPEGImages``, ``Annotations`` and ``SegmentationObject``.

    ``path`` is the folder, or a list of names in it, ``ImageSets/Main/val.txt``. An image's label is the name
    of its objects where they have only one; the mask is the union of the objects in ``SegmentationObject``.

    Raises:
        InputError: a folder without annotations, or an annotation that cannot be read.
    """

    def __init__(self, path: str | Path, transform: Transform = read_image) -> None:
        super().__init__(transform)
        file = local_path(path)
        self.uri = str(file.resolve())
        self._root = file if file.is_dir() else file.resolve().parents[2]
        folder = self._root / "Annotations"
        if file.is_dir():
            self._names = sorted(path.stem for path in folder.glob("*.xml"))
        else:
            rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
            # The lists of a class mark the images without it by -1.
            self._names = [row[0] for row in rows if row and row[1:] != ["-1"]]
        if not self._names:
            raise InputError(f"{file} has no annotations (Annotations/*.xml)")

    def __len__(self) -> int:
        return len(self._names)

    def id(self, index: int) -> str:
        return self._names[index]

    def item(self, index: int) -> Item:
        name = self._names[index]
        file = self._root / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.parse(file).getroot()
            objects = root.findall("object")
            names = [item.findtext("name", "") for item in objects]
            boxes = tuple(_voc_corners(item) for item in objects)
            size = root.find("size")
            shape = None if size is None else (int(_number(size, "height")), int(_number(size, "width")))
            image = self._root / "JPEGImages" / root.findtext("filename", f"{name}.jpg")
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise InputError(f"{file} is no Pascal VOC annotation: {error}") from error
        mask_file = self._root / "SegmentationObject" / f"{name}.png"
        mask = partial(_voc_mask, mask_file) if mask_file.is_file() else None
        return Item(image, _single_name(names), mask, boxes, shape)


def is_voc(folder: Path) -> bool:
    """Whether a folder has the layout of Pascal VOC."""
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def _single_name(names: Sequence[str]) -> str | None:
    """The name that all objects have; None for several, or without objects."""
    return names[0] if len({*names}) == 1 else None


def _corners(box: Sequence[float]) -> Box:
    """COCO's (left, top, width, height) as corners."""
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _voc_corners(item: ElementTree.Element) -> Box:
    """Corners of an object: VOC counts pixels from 1, and the last pixel is inside."""
    box = item.find("bndbox")
    if box is None:
        raise ValueError("an object has no bndbox")
    left, top, right, bottom = (_number(box, key) for key in ("xmin", "ymin", "xmax", "ymax"))
    return left - 1, top - 1, right, bottom


def _number(parent: ElementTree.Element, name: str) -> float:
    text = parent.findtext(name)
    if text is None:
        raise ValueError(f"{parent.tag} has no {name}")
    return float(text)


def _voc_mask(file: Path) -> NDArray[Any]:
    """The pixels of all objects: palette numbers but background and border."""
    with Image.open(file) as image:
        numbers = np.asarray(image)
    return (numbers != 0) & (numbers != _VOC_BORDER)


def decode_runs(segmentation: Mapping[str, Any]) -> NDArray[Any]:
    """COCO's run lengths as a mask (H, W): column by column, alternately outside and inside.

    ``counts`` are numbers, or their differences as text, 5 bits a character.
    """
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    runs = _text_runs(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if sum(runs) != height * width:
        raise InputError(f"run lengths of {sum(runs)} pixels for a mask of {height}x{width}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _text_runs(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
