"""Data sets as people have them: torch, Hugging Face, manifests, COCO, Pascal VOC, ImageNet's layout."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler
from torch.utils.data import TensorDataset as TorchTensors
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

from phosphene import InputError, UnknownName, load_model, run
from phosphene.builtin.scenes import CLASSES, draw_scenes
from phosphene.data import (
    CocoDataset,
    FileDataset,
    FolderDataset,
    ManifestDataset,
    VocDataset,
    open_dataset,
)
from phosphene.data.annotations import decode_runs
from phosphene.images import write_png

MODEL = "builtin:shapes-resnet"
COUNT = 6
SCENES = draw_scenes(COUNT, split="test")
NAMES = [CLASSES[label] for label in SCENES.labels.tolist()]
#: The scenes with the 8 bits of a file.
IMAGES = (SCENES.images * 255).round() / 255


def opened(value: Any) -> Any:
    return open_dataset(value, load_model(MODEL).transform, (64, 64))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scenes as files of a folder, with their masks in another folder."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("masks").mkdir()
    for number in range(COUNT):
        write_png(IMAGES[number], f"images/{number}.png")
        write_png(SCENES.masks[number].float()[None], f"masks/{number}.png")
    return [f"images/{number}.png" for number in range(COUNT)]


class Items(torch.utils.data.Dataset[Any]):
    """A map-style data set of the scenes whose items are as ``build`` returns them."""

    def __init__(self, build: Any, **attributes: Any) -> None:
        self.build = build
        vars(self).update(attributes)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return self.build(index)


def pillow(index: int) -> Image.Image:
    return Image.fromarray((IMAGES[index] * 255).byte().permute(1, 2, 0).numpy())


def array(index: int) -> Any:
    return np.asarray(pillow(index))


NUMBERS = SCENES.labels.tolist()
MASKS = [mask.numpy() for mask in SCENES.masks]


def box_of(mask: Any) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


BOXES = [box_of(mask) for mask in MASKS]

TORCH_FORMS: dict[str, Any] = {
    "Pillow, number": lambda i: (pillow(i), NUMBERS[i]),
    "array, number": lambda i: (array(i), NUMBERS[i]),
    "tensor, number": lambda i: (IMAGES[i], NUMBERS[i]),
    "tensor, tensor": lambda i: (IMAGES[i], torch.tensor(NUMBERS[i])),
    "tensor, NumPy number": lambda i: (IMAGES[i], np.int64(NUMBERS[i])),
    "list": lambda i: [IMAGES[i], NUMBERS[i]],
    "tensor, name": lambda i: (IMAGES[i], NAMES[i]),
    "mapping": lambda i: {"image": pillow(i), "label": NUMBERS[i], "mask": MASKS[i], "boxes": [BOXES[i]]},
    "detection": lambda i: (IMAGES[i], {"labels": NAMES[i], "boxes": torch.tensor([BOXES[i]])}),
    "other names": lambda i: {"img": array(i), "target": NUMBERS[i], "id": i},
}


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_items_of_torch_datasets(form: str) -> None:
    named = opened(Items(TORCH_FORMS[form], classes=CLASSES))
    assert torch.equal(named.read([3, 0]), IMAGES[[3, 0]])
    assert named.labels(range(COUNT)) == tuple(NAMES)
    assert torch.equal(torch.cat([batch.images for batch in named.batches(4)]), IMAGES)
    assert torch.equal(torch.cat([batch.images for batch in named.batches(4, 2)]), IMAGES[2:])
    if form in ("mapping", "detection"):
        assert [box.tolist() for box in named.boxes([0, 1]) or ()] == [[BOXES[0]], [BOXES[1]]]
    if form == "mapping":
        assert torch.equal(named.masks([0, 5]), SCENES.masks[[0, 5]])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_is_read_in_the_data_sets_order_by_its_workers(workers: int) -> None:
    source = Items(TORCH_FORMS["tensor, number"], classes=CLASSES)
    loader = DataLoader(source, batch_size=2, shuffle=True, num_workers=workers)
    dataset = opened(loader)
    assert torch.equal(torch.cat([batch.images for batch in dataset.batches(4)]), IMAGES)
    assert dataset.labels(range(COUNT)) == tuple(NAMES)


def test_subsets_lists_and_tensor_datasets() -> None:
    subset = Subset(Items(TORCH_FORMS["Pillow, number"], classes=CLASSES), [4, 1])
    assert opened(subset).labels([0, 1]) == (NAMES[4], NAMES[1])
    assert torch.equal(opened(subset).read([0, 1]), IMAGES[[4, 1]])
    tensors = opened(TorchTensors(IMAGES, SCENES.labels))
    assert tensors.labels([2]) == (str(NUMBERS[2]),) and torch.equal(tensors.read([2]), IMAGES[[2]])
    pairs = opened([(pillow(i), NAMES[i]) for i in range(3)])
    assert pairs.labels(range(3)) == tuple(NAMES[:3])
    assert torch.equal(opened([pillow(0), array(1), IMAGES[2]]).read(range(3)), IMAGES[:3])
    batch = np.stack([array(i) for i in range(COUNT)])
    torch.testing.assert_close(opened(batch).read(range(COUNT)), IMAGES)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def refused_sources() -> dict[str, tuple[Any, str]]:
    good = Items(TORCH_FORMS["tensor, number"])
    random = Items(lambda i: torch.rand(3, 8, 8))
    return {
        "iterable": (Endless(), "can only be iterated"),
        "three parts": (Items(lambda i: (IMAGES[i], 1, i)), "has 3 parts"),
        "normalized": (Items(lambda i: IMAGES[i] * 4 - 2), "leave normalization out"),
        "bytes": (Items(lambda i: (IMAGES[i] * 255).byte()), "divide bytes by 255"),
        "random": (random, "another image each time"),
        "no image": (Items(lambda i: {"picture": 3}), "no column 'image' but 'picture'"),
        "two images": (Items(lambda i: {"image": 3, "img": 4}), "several columns"),
        "text": (Items(lambda i: 3), "is an int"),
        "sampler": (DataLoader(good, sampler=WeightedRandomSampler([1.0] * 6, 6)), "sampler"),
        "drop_last": (DataLoader(good, drop_last=True), "drop_last"),
        "collate": (DataLoader(good, collate_fn=list), "collate_fn"),
        "splits": ({"train": good, "test": good}, "'train', 'test'"),
        "number": (3, "not an int"),
        "empty class": (Items(TORCH_FORMS["tensor, number"], classes=["a"]), "none of its 1 classes"),
    }


def read_all(value: Any) -> None:
    """Open a data set and read everything of its first image."""
    dataset = opened(value)
    dataset.read([0]), dataset.labels([0, min(1, len(dataset) - 1)]), dataset.boxes([0]), dataset.masks([0])


@pytest.mark.parametrize("name", refused_sources())
def test_sources_that_are_no_data_set_are_refused(name: str) -> None:
    value, reason = refused_sources()[name]
    with pytest.raises(InputError, match=reason) as caught:
        read_all(value)
    assert "tensor(" not in str(caught.value)


class Features(dict[str, Any]):
    pass


class ClassNames:
    names = list(CLASSES)


class HuggingFace:
    """What methods use of ``datasets.Dataset``."""

    features = Features(image=object(), label=ClassNames())

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": pillow(index), "label": NUMBERS[index]}


def test_hugging_face_data_sets() -> None:
    dataset = opened(HuggingFace())
    assert dataset.labels(range(COUNT)) == tuple(NAMES) and torch.equal(dataset.read([1]), IMAGES[[1]])


def test_numbers_are_classes_of_a_model_without_names() -> None:
    """A data set's number counts only where the model has no names: the two may be ordered differently."""
    source = Items(TORCH_FORMS["tensor, number"], classes=CLASSES)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    nameless = load_model(network, input_size=(3, 64, 64))
    reversed_names = load_model(network, input_size=(3, 64, 64), classes=[*reversed(CLASSES)])
    (label,) = opened(source).labels([0]) or ()
    assert nameless.class_index(label) == NUMBERS[0]
    assert reversed_names.class_index(label) == 9 - NUMBERS[0]
    assert pickle.loads(pickle.dumps(label)).number == NUMBERS[0]


def test_methods_run_on_torch_datasets() -> None:
    source = Items(TORCH_FORMS["mapping"], classes=CLASSES)
    report = run("robust_accuracy", model=MODEL, dataset=source, attacks=["fgsm"], eps=[1 / 255], seed=0)
    folder_free = run("robust_accuracy", model=MODEL, dataset=f"builtin:scenes/{COUNT}", attacks=["fgsm"],
                      eps=[1 / 255], seed=0)  # fmt: skip
    assert torch.equal(report.correct, folder_free.correct)
    scores = run("pointing_game", model=MODEL, dataset=source, method="saliency")
    assert scores.provenance.inputs["dataset"] == "a TorchDataset given as an object"
    assert run("embed", model=MODEL, dataset=DataLoader(source)).labels == tuple(NAMES)


# ------------------------------------------------------------------ files


def text_of(box: list[int]) -> str:
    return " ".join(map(str, box))


def write_manifest(kind: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"manifest.{kind}")
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(rows[0]), *(separator.join(f"{v}" for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_manifests(kind: str, files: list[str]) -> None:
    rows = [
        {
            "image": file,
            "label": NAMES[i],
            "mask": f"masks/{i}.png",
            "box": " ".join(map(str, BOXES[i])),
            "n": i,
        }
        for i, file in enumerate(files)
    ]
    dataset = opened(write_manifest(kind, rows))
    assert isinstance(dataset, ManifestDataset) and len(dataset) == COUNT and dataset.id(2) == "images/2.png"
    assert torch.equal(dataset.read([4, 1]), IMAGES[[4, 1]]) and dataset.labels([0, 5]) == (
        NAMES[0],
        NAMES[5],
    )
    assert torch.equal(dataset.masks(range(COUNT)), SCENES.masks)
    assert [box.tolist() for box in dataset.boxes([1]) or ()] == [[BOXES[1]]]
    assert dataset.uri == str(Path(f"manifest.{kind}").resolve())


def test_parquet_holds_images_numbers_and_hugging_face_names(files: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "image": {"bytes": Path(file).read_bytes(), "path": file},
            "label": NUMBERS[i],
            "box": [BOXES[i]] * 2,
        }
        for i, file in enumerate(files)
    ]
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, "a.parquet", row_group_size=2)
    dataset = opened("a.parquet")
    assert torch.equal(torch.cat([batch.images for batch in dataset.batches(4)]), IMAGES)
    assert dataset.labels(range(COUNT)) == tuple(NAMES)
    assert [box.tolist() for box in dataset.boxes([2]) or ()] == [[BOXES[2]] * 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\na.png,1\n", "no column 'image' but 'file', 'label'"),
        ("image,img\na,b\n", "several columns that may be the image"),
        ("image,label\na.png\n", "another number of columns"),
        ("image,box\nimages/0.png,1 2 3\n", "a box is 'left top right bottom', not '1 2 3'"),
        ("image,box\nimages/0.png,5 5 5 9\n", "is empty"),
        ('image\n""\n', "row 1 .* has no image"),
        ("image\nnowhere.png\n", "no image file at .*nowhere.png"),
    ],
)
def test_faults_of_manifests(text: str, reason: str, files: list[str]) -> None:
    Path("m.csv").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_all("m.csv")


def test_lists_patterns_and_uris_of_files(files: list[str]) -> None:
    for value in (files, "images/*.png", [Path("images").resolve().as_uri()]):
        dataset = opened(value)
        assert isinstance(dataset, FileDataset) and torch.equal(dataset.read(range(COUNT)), IMAGES)
    assert isinstance(opened(Path("images").resolve().as_uri()), FolderDataset)
    for bad, reason in (
        ("images/0.png", "is a file"),
        ("a.txt", "no list of Pascal VOC"),
        ("x", "no folder"),
    ):
        with pytest.raises(InputError, match=reason):
            opened(bad)


def write_coco(files: list[str], segmentation: Any) -> Path:
    document = {
        "images": [
            {"id": 10 + i, "file_name": Path(file).name, "height": 64, "width": 64}
            for i, file in enumerate(files)
        ],
        "categories": [{"id": 5 + i, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [
            {
                "id": i, "image_id": 10 + i, "category_id": 5 + NUMBERS[i],
                "bbox": [BOXES[i][0], BOXES[i][1], BOXES[i][2] - BOXES[i][0], BOXES[i][3] - BOXES[i][1]],
                "segmentation": segmentation(MASKS[i]),
            }
            for i in range(COUNT)
        ],
    }  # fmt: skip
    path = Path("instances.json")
    path.write_text(json.dumps(document))
    return path


def runs_of(mask: Any) -> dict[str, Any]:
    """Run lengths column by column, as numbers."""
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    return {"size": list(mask.shape), "counts": [int(count) for count in counts]}


def test_coco(files: list[str]) -> None:
    dataset = opened(write_coco(files, runs_of))
    assert isinstance(dataset, CocoDataset) and dataset.labels(range(COUNT)) == tuple(NAMES)
    assert torch.equal(dataset.read(range(COUNT)), IMAGES) and torch.equal(
        dataset.masks([3]), SCENES.masks[[3]]
    )
    assert [box.tolist() for box in dataset.boxes([3]) or ()] == [[BOXES[3]]]
    square = [[10, 12, 30, 12, 30, 40, 10, 40]]
    mask = opened(write_coco(files, lambda mask: square)).masks([0])[0]
    assert mask[12:41, 10:31].all() and mask.sum() == 29 * 21
    document = json.loads(Path("instances.json").read_text())
    document["annotations"][1]["image_id"] = 10
    Path("instances.json").write_text(json.dumps(document))
    two = opened("instances.json")
    assert two.labels([0]) is None or NAMES[0] == NAMES[1]
    assert len(two.boxes([0])[0]) == 2 and two.labels([1]) is None
    document["images"][0]["height"] = 63
    Path("instances.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="is 64x64, its annotation is for 63x64"):
        opened("instances.json").boxes([0])
    Path("instances.json").write_text("{}")
    with pytest.raises(InputError, match="no COCO annotation file: KeyError"):
        opened("instances.json")


def as_text(runs: list[int]) -> str:
    """COCO's compressed run lengths: from the fourth on the difference to the run two before, 5 bits each."""
    text = ""
    for number, run_length in enumerate(runs):
        value = run_length - (runs[number - 2] if number > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + (32 if more else 0) + 48)
            if not more:
                break
    return text


def test_compressed_run_lengths_of_coco() -> None:
    for seed in range(20):
        mask = np.random.default_rng(seed).random((37, 53)) > (seed + 1) / 22
        runs = runs_of(mask)
        assert np.array_equal(decode_runs(runs), mask)
        assert np.array_equal(decode_runs({**runs, "counts": as_text(runs["counts"])}), mask)
    assert as_text([6, 1, 40, 4, 5, 4, 5, 4, 21]) == "61X13mN000`0"
    with pytest.raises(InputError, match="run lengths of 5 pixels for a mask of 2x2"):
        decode_runs({"size": [2, 2], "counts": [5]})


def write_voc(files: list[str]) -> Path:
    root = Path("VOC2012")
    for name in ("Annotations", "JPEGImages", "SegmentationObject", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for i, file in enumerate(files):
        shutil.copy(file, root / "JPEGImages" / f"{i}.png")
        left, top, right, bottom = BOXES[i]
        box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        size = "<size><width>64</width><height>64</height></size>"
        thing = f"<object><name>{NAMES[i]}</name><bndbox>{box}</bndbox></object>"
        text = f"<annotation><filename>{i}.png</filename>{size}{thing}</annotation>"
        (root / "Annotations" / f"{i}.xml").write_text(text)
        numbers = np.where(MASKS[i], 1, np.where(np.arange(64) == 0, 255, 0)).astype(np.uint8)
        Image.fromarray(numbers).save(root / "SegmentationObject" / f"{i}.png")
    (root / "ImageSets" / "Main" / "val.txt").write_text("2  1\n4 -1\n0\n")
    return root


def test_pascal_voc(files: list[str]) -> None:
    root = write_voc(files)
    dataset = opened(root)
    assert isinstance(dataset, VocDataset) and dataset.labels(range(COUNT)) == tuple(NAMES)
    assert torch.equal(dataset.read([5]), IMAGES[[5]]) and torch.equal(dataset.masks([5]), SCENES.masks[[5]])
    assert [box.tolist() for box in dataset.boxes([5]) or ()] == [[BOXES[5]]]
    some = opened(root / "ImageSets" / "Main" / "val.txt")
    assert [some.id(i) for i in range(len(some))] == ["2", "0"]
    shutil.rmtree(root / "SegmentationObject")
    boxed = opened(root).masks([1])[0]
    left, top, right, bottom = BOXES[1]
    assert boxed[top:bottom, left:right].all() and boxed.sum() == (bottom - top) * (right - left)
    (root / "Annotations" / "1.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(InputError, match=r"1\.xml is no Pascal VOC annotation: an object has no bndbox"):
        opened(root).labels([1])


def test_boxes_and_masks_are_cropped_with_the_image(files: list[str]) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[10:30, 50:80] = 255
    Image.fromarray(wide).save("wide.png")
    Path("m.csv").write_text("image,box\nwide.png,50 10 80 30;0 0 20 20\n")
    dataset = opened("m.csv")  # the center 64 columns: 32 to 95
    assert dataset.boxes([0])[0].tolist() == [[18, 10, 48, 30]]
    assert torch.equal(dataset.masks([0])[0], dataset.read([0])[0, 0] > 0.5)


def test_torchvision_image_folder(files: list[str]) -> None:
    for i, name in enumerate(NAMES):
        Path("tree", name).mkdir(parents=True, exist_ok=True)
        shutil.copy(files[i], Path("tree", name))
    own = torchvision_datasets.ImageFolder("tree")
    dataset = opened(own)
    assert dataset.labels([0]) == (own.classes[own.targets[0]],) == opened("tree").labels([0])
    assert torch.equal(dataset.read([0]), opened("tree").read([0]))
    converted = torchvision_datasets.ImageFolder("tree", transforms.ToTensor())
    assert torch.equal(opened(converted).read([0]), dataset.read([0]))
    augmented = torchvision_datasets.ImageFolder("tree", transforms.Compose([
        transforms.RandomResizedCrop(32), transforms.ToTensor()]))  # fmt: skip
    with pytest.raises(InputError, match="random augmentations"):
        opened(augmented)


# ------------------------------------------------------------------ the layout of ImageNet


def imagenet_names(style: str) -> list[str]:
    if style == "torchvision":
        from torchvision.models import MobileNet_V2_Weights

        return list(MobileNet_V2_Weights.DEFAULT.meta["categories"])
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [text if style == "transformers" else text.split(",")[0] for text in info.label_descriptions()]


@pytest.mark.parametrize("style", ["torchvision", "transformers", "timm"])
def test_wordnet_ids_are_classes_of_an_imagenet_model(style: str) -> None:
    names = imagenet_names(style)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
    model = load_model(network, input_size=(3, 8, 8), classes=names)
    # crane is the name of two classes: a bird and a machine.
    ids = {"n01440764": 0, "n02012849": 134, "n03126707": 517, "n15075141": 999, "517": 517, "007": 7}
    assert {name: model.class_index(name) for name in ids} == ids
    with pytest.raises(UnknownName, match="did you mean 'n01440764'"):
        model.class_index("n01440765")
    rotated = load_model(network, input_size=(3, 8, 8), classes=[*names[1:], names[0]])
    with pytest.raises(InputError, match="are not those of ImageNet-1k"):
        rotated.class_index("n01440764")
    nameless = load_model(network, input_size=(3, 8, 8))
    with pytest.raises(InputError, match="has no class names, which the WordNet id"):
        nameless.class_index("n01440764")


@pytest.mark.parametrize("layout", ["WordNet ids", "numbers"])
def test_the_validation_layout_of_imagenet(layout: str, files: list[str]) -> None:
    ids = {"n01440764": 0, "n02012849": 134, "n03126707": 517}
    for number, (synset, index) in enumerate(ids.items()):
        folder = Path("val", synset if layout == "WordNet ids" else str(index))
        folder.mkdir(parents=True)
        shutil.copy(files[number], folder)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
    )
    model = load_model(network, input_size=(3, 64, 64), classes=imagenet_names("torchvision"))
    report = run("robust_accuracy", model=model, dataset="val", attacks=["fgsm"], eps=[1 / 255])
    assert len(report.correct) == 3
    options = {"methods": ["saliency"], "scores": ["deletion_insertion"], "target": "label"}
    table = run("compare_attributions", model=model, dataset="val", **options)
    assert table.images.shape[1:] == (3, 64, 64)


def test_a_real_model_is_right_on_imagenets_layout(assets: Path, tmp_path: Path) -> None:
    for path in sorted((assets / "images" / "imagenet").glob("*.JPEG"))[:8]:
        folder = tmp_path / path.name.split("_")[0]
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    weights = assets / "weights" / "mobilenet_v2.coral-ptq.torchvision.safetensors"
    model = load_model("torchvision:mobilenet_v2", weights=weights)
    report = run("robust_accuracy", model=model, dataset=tmp_path, attacks=["fgsm"], eps=[4 / 255])
    assert report.correct.float().mean() >= 0.6
