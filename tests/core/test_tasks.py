"""What a network's output means: one logit, several labels, values, positions, boxes, embeddings."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene import (
    InputError,
    Model,
    ModelError,
    TensorDataset,
    UnknownName,
    load_model,
    load_result,
    methods,
    run,
)
from phosphene.finite_values import NotFiniteError
from phosphene.models.detections import box_iou
from phosphene.targets import Box, Class, Contrast, Region, Similar, input_gradient, parse_target, scores

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
#: Attacks with a quick setting each; the last two query the model without gradients.
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {"eps": 0.1},
    "bim": {"eps": 0.1},
    "pgd": {"eps": 0.1, "step_size": 0.02, "seed": 0},
    "apgd": {"eps": 0.1, "steps": 10, "seed": 0},
    "deepfool": {},
    "carlini_wagner": {"steps": 30, "search_steps": 3},
    "fab": {"steps": 10, "seed": 0},
    "square": {"eps": 0.1, "max_queries": 60, "seed": 0},
    "hop_skip_jump": {"max_queries": 200, "seed": 0},
}


def body(columns: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, columns))


def one_and_two_logits(*, flat: bool) -> tuple[Model, Model]:
    """A network with one logit z, slightly positive, and the same with the two logits (-z/2, z/2)."""
    one, two = body(1), body(2)
    weight, bias = one[4].weight.detach(), one[4].bias.detach()
    one[4].bias.data -= one(IMAGES).mean().detach() - 1e-2
    bias = one[4].bias.detach()
    two[4].weight.data, two[4].bias.data = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    network = nn.Sequential(one, nn.Flatten(0)) if flat else one
    return load_model(network, input_size=(3, 16, 16), task="binary"), load_model(two, input_size=(3, 16, 16))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_one_logit_equal_those_on_two(name: str, flat: bool) -> None:
    one, two = (run(name, model=m, images=IMAGES, **ATTACKS[name]) for m in one_and_two_logits(flat=flat))
    assert one.success.all() or name in ("square", "hop_skip_jump")
    assert torch.equal(one.success, two.success)
    torch.testing.assert_close(one.confidence_before, two.confidence_before)
    torch.testing.assert_close(one.distance("l2"), two.distance("l2"), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["lipschitz", "interval_bounds", "randomized_smoothing"])
def test_certificates_of_one_logit_equal_those_of_two(name: str, flat: bool) -> None:
    settings = {"seed": 0, "samples": 200} if name == "randomized_smoothing" else {}
    one, two = (run(name, model=m, images=IMAGES, **settings) for m in one_and_two_logits(flat=flat))
    torch.testing.assert_close(one.radius, two.radius, rtol=1e-4, atol=1e-7)
    assert one.radius.max() < 1


@pytest.mark.parametrize("name", ["saliency", "grad_cam", "cam", "lrp", "occlusion", "integrated_gradients"])
def test_attributions_of_one_logit_equal_those_of_two(name: str) -> None:
    one, two = (run(name, model=m, images=IMAGES, target=1) for m in one_and_two_logits(flat=False))
    torch.testing.assert_close(one.maps, two.maps, rtol=1e-4, atol=1e-6)
    assert one.targets == ("positive", "positive")


@pytest.mark.parametrize("name", ["fgsm", "square", "saliency", "lipschitz", "randomized_smoothing"])
def test_one_number_per_image_is_refused_until_declared(name: str) -> None:
    for network in (body(1), nn.Sequential(body(1), nn.Flatten(0))):
        with pytest.raises(ModelError, match=r"task='binary'.* task='regression'"):
            run(name, model=load_model(network, input_size=(3, 16, 16)), images=IMAGES)


def test_class_names_of_a_binary_network() -> None:
    assert load_model(body(1), classes=["sick"], task="binary").classes == ("not sick", "sick")
    assert load_model(body(1), classes=["well", "sick"], task="binary").classes == ("well", "sick")
    with pytest.raises(InputError, match="two classes"):
        load_model(body(1), classes=["a", "b", "c"], task="binary")
    with pytest.raises(ModelError, match="one logit"):
        load_model(body(2), task="binary", input_size=(3, 16, 16))(IMAGES)
    with pytest.raises(UnknownName, match="did you mean 'multilabel'"):
        load_model(body(2), task="multi-label")  # type: ignore[arg-type]


def test_outputs_of_a_regression_are_explained_and_not_attacked() -> None:
    model = load_model(body(1), input_size=(3, 16, 16), task="regression")
    torch.testing.assert_close(scores(model, IMAGES, None), model.outputs(IMAGES)[:, 0])
    assert run("saliency", model=model, images=IMAGES).targets == ("output 0", "output 0")
    for name in ("fgsm", "deepfool", "square", "lipschitz", "randomized_smoothing", "jpeg"):
        with pytest.raises((ModelError, InputError), match="regression|value"):
            run(name, model=model, images=IMAGES)
    with pytest.raises(InputError, match="target=0"):
        run("saliency", model=load_model(body(3), input_size=(3, 16, 16), task="regression"), images=IMAGES)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "deepfool", "square"])
def test_a_label_of_several_is_switched_off(name: str) -> None:
    network = body(4)
    network[4].bias.data = network[4].bias - network(IMAGES).amin(0).detach() + 1e-3
    model = load_model(network, input_size=(3, 16, 16), task="multilabel")
    present = model.outputs(IMAGES) > 0
    assert present.all()
    result = run(name, model=model, images=IMAGES, labels=[2, 1], **ATTACKS[name])
    after = model.outputs(result.adversarial)
    assert result.success.all() and after[0, 2] < 0 and after[1, 1] < 0
    assert result.names_before == ("class 2", "class 1")
    assert result.names_after == ("not class 2", "not class 1")
    if name != "deepfool":  # the others can be targeted: the label is switched on again
        settings = ATTACKS[name] | {"targeted": True}
        result = run(name, model=model, images=result.adversarial, labels=[2, 1], **settings)
    assert result.success.all()
    with pytest.raises(ModelError, match="multilabel"):
        model(IMAGES)
    maps = run("rise", model=model, images=IMAGES, target=3, masks=4, grid=1, keep_probability=1, seed=0).maps
    torch.testing.assert_close(maps[:, 0, 0], model.outputs(IMAGES)[:, 3].sigmoid())


class Colors(nn.Module):
    """A segmentation by color: the logits of red, green and blue are the pixel's channels times 10."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": 10 * x}


def red_square() -> tuple[Model, Tensor]:
    """A segmentation and an image with a reddish square on blue."""
    image = torch.tensor([0.2, 0.3, 0.6])[None, :, None, None].repeat(1, 1, 12, 12)
    image[:, :, 3:7, 2:8] = torch.tensor([0.45, 0.3, 0.4])[None, :, None, None]
    names = ["red", "green", "blue"]
    return load_model(Colors(), input_size=(3, 12, 12), classes=names, task="segmentation"), image


def test_region_score_is_the_mean_logit_of_its_pixels() -> None:
    model, image = red_square()
    torch.testing.assert_close(scores(model, image, "region:red"), torch.tensor([4.5]))
    torch.testing.assert_close(scores(model, image, "region:blue@3,4"), torch.tensor([4.0]))
    torch.testing.assert_close(scores(model, image, "region:blue@all"), 10 * image[:, 2].mean((1, 2)))
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[0, 0] = True
    torch.testing.assert_close(scores(model, image, Region(2, mask=mask)), torch.tensor([6.0]))
    gradient = input_gradient(model, image, "region:red")
    expected = torch.zeros_like(image)
    expected[:, 0, 3:7, 2:8] = 10 / 24
    torch.testing.assert_close(gradient, expected)


def test_regions_and_boxes_are_those_of_the_image_itself_when_it_is_occluded() -> None:
    model, image = red_square()
    # Black pixels are tied, so that red is predicted there as well.
    options: dict[str, Any] = {"window": 1, "stride": 1, "baseline": "zero"}
    maps = run("occlusion", model=model, images=image, target="region:red", **options).maps
    expected = torch.zeros(1, 12, 12)
    expected[:, 3:7, 2:8] = 4.5 / 24
    torch.testing.assert_close(maps, expected)
    images = torch.full((1, 3, 8, 8), 0.5)
    images[..., :4] = 0.6
    options |= {"window": 4, "stride": 4}
    maps = run("occlusion", model=detector(), images=images, **options).maps
    torch.testing.assert_close(maps, torch.tensor([0.3, 0.0]).repeat_interleave(4).expand(1, 8, 8))
    target = Region(0)
    for shifted in (image, image.roll(2, 3)):  # an object is used for several images
        maps = run("saliency", model=model, images=shifted, target=target).maps
        torch.testing.assert_close(maps.bool(), 10 * shifted[:, 0] > 4)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_change_a_region(name: str) -> None:
    model, image = red_square()
    two = torch.cat([image, image.flip(3)])
    result = run(name, model=model, images=two, labels="region:red", **ATTACKS[name])
    logits = model.outputs(result.adversarial)
    margin = logits[:, 0] - logits[:, 1:].amax(1)
    for index, mask in enumerate(10 * two[:, 0] > 4):
        assert result.success[index] and margin[index][mask].mean() < 0
    assert result.names_before == ("region:red", "region:red")
    assert run(name, model=model, images=image, labels="region:red@3,4", **ATTACKS[name]).success.all()


def test_region_that_is_predicted_nowhere_is_refused_with_those_that_are() -> None:
    model, image = red_square()
    with pytest.raises(
        InputError, match=r"green is predicted at no pixel of image 0; predicted there: blue \(83%\), red"
    ):
        run("saliency", model=model, images=image, target="region:green")
    for wrong, message in (
        ("region:grean", "green"),
        ("region:red@1", "x,y"),
        ("region:red@99,0", "out"),
    ):
        with pytest.raises((InputError, UnknownName), match=message):
            run("saliency", model=model, images=image, target=wrong)
    with pytest.raises(ModelError, match="region:"):
        run("saliency", model=model, images=image)


class BrightBox(nn.Module):
    """A detector of two boxes, the left and the right half; the score of each is its brightness."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        side = x.shape[3] // 2
        boxes = torch.tensor([[0.0, 0, side, 2 * side], [side, 0, 2 * side, 2 * side]])
        scores = torch.stack([x[..., :side].mean((1, 2, 3)), x[..., side:].mean((1, 2, 3))], 1)
        labels = torch.tensor([1, 2])
        return [{"boxes": boxes, "labels": labels, "scores": row} for row in scores]


def detector() -> Model:
    names = ["background", "cat", "dog"]
    return load_model(BrightBox(), input_size=(3, 8, 8), classes=names, task="detection")


def test_box_score_is_that_of_the_matching_detection() -> None:
    model = detector()
    images = torch.full((2, 3, 8, 8), 0.4)
    images[1, :, :, 4:] = 0.9
    torch.testing.assert_close(scores(model, images, "box:cat"), torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(scores(model, images, None), torch.tensor([0.4, 0.9]))
    torch.testing.assert_close(scores(model, images, "box:*@6,1"), torch.tensor([0.4, 0.9]))
    gradient = input_gradient(model, images, Box(1))
    torch.testing.assert_close(gradient[:, :, :, :4], torch.full((2, 3, 8, 4), 1 / 96))
    assert not gradient[:, :, :, 4:].any()
    result = run("saliency", model=model, images=images)
    assert result.targets == ("box:cat", "box:dog")
    with pytest.raises(InputError, match="detects no cat at 6,1 in image 0; it detects"):
        run("saliency", model=model, images=images, target="box:cat@6,1")


@pytest.mark.parametrize("name", ["fgsm", "pgd", "square"])
def test_attacks_remove_a_box(name: str) -> None:
    model, images = detector(), torch.full((2, 3, 8, 8), 0.1)
    images[1] += 0.05
    settings = ATTACKS[name] | ({"max_queries": 400} if name == "square" else {})
    result = run(name, model=model, images=images, labels="box:dog", **settings)
    assert result.success.all()
    before, after = (scores(model, x, "box:dog") for x in (images, result.adversarial))
    assert (after < before / 2).all()
    with pytest.raises(ModelError, match="box:3"):
        run(name, model=model, images=images, labels=[1, 2], **settings)


def test_a_result_of_a_detector_has_a_table_of_detections(tmp_path: Path) -> None:
    model, images = detector(), torch.full((2, 3, 8, 8), 0.4)
    images[1, :, :, 4:] = 0.9
    attacked = run("fgsm", model=model, images=images, labels="box:dog", eps=0.3, out=tmp_path / "out")
    frame = attacked.to_pandas("detections")
    assert list(frame.columns) == ["image", "version", "class", "score", "x0", "y0", "x1", "y1"]
    before = frame[(frame.image == 1) & (frame.version == "original")]
    assert before["class"].tolist() == ["dog", "cat"] and before.score.tolist() == [0.9, 0.4]
    assert before[["x0", "y0", "x1", "y1"]].iloc[0].tolist() == [4, 0, 8, 8]
    after = frame[(frame.image == 0) & (frame["class"] == "dog") & (frame.version == "adversarial")]
    assert after.score.tolist() == pytest.approx([0.1])
    assert load_result(tmp_path / "out").detections() == attacked.detections()
    maps = run("saliency", model=model, images=images)
    assert set(maps.detections()["version"]) == {"original"}
    assert "targets" in maps.to_pandas().columns
    with pytest.raises(InputError, match="not the result of a detector"):
        run("saliency", images="builtin:scenes/1").to_csv(tmp_path / "boxes.csv", "detections")


class Backbone(nn.Module):
    """Two levels of a pyramid, as an SSD has them: the coarse one is computed from the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"0": fine, "1": self.coarse(fine.relu())}


class TwoLevels(nn.Module):
    """A detector with one box from each level."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        levels = self.backbone(x).values()
        scores = torch.stack([self.head(level).sigmoid().mean((1, 2, 3)) for level in levels], 1)
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 16, 16]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": row} for row in scores]


def test_all_boxes_depend_on_the_last_map_of_a_detector() -> None:
    torch.manual_seed(0)
    model = load_model(TwoLevels(), input_size=(3, 16, 16), task="detection")
    assert model.last_map == "backbone.fine"
    for name in ("grad_cam", "occlusion"):
        for target in ("box:1", "box:2"):
            assert run(name, model=model, images=IMAGES, target=target).maps.flatten(1).any(1).all()
    assert run("occlusion", model=model, images=IMAGES).maps.any()


def test_tasks_are_inferred_where_the_library_says_them() -> None:
    from timm import create_model
    from torchvision.models import detection, segmentation

    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    segmenter = segmentation.lraspp_mobilenet_v3_large(num_classes=3, **options)
    boxes = detection.ssdlite320_mobilenet_v3_large(num_classes=3, **options).eval()
    assert load_model(segmenter).task == "segmentation"
    assert load_model(boxes, input_size=(3, 64, 64)).task == "detection"
    assert load_model(create_model("test_resnet", num_classes=0)).task == "embedding"
    assert load_model(create_model("test_resnet", num_classes=3)).task is None
    images = torch.rand(1, 3, 64, 64)
    model = load_model(boxes, input_size=(3, 64, 64))
    assert run("saliency", model=model, images=images).maps.isfinite().all()
    with pytest.raises(ModelError, match="task='detection'"):
        run("saliency", model=load_model(BrightBox(), input_size=(3, 8, 8)), images=images[:, :, :8, :8])


def test_boxes_overlap_by_intersection_over_union() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6]])
    torch.testing.assert_close(box_iou(boxes, boxes[0]), torch.tensor([1, 1 / 7, 0]))


def test_similarity_to_an_image(tmp_path: Path) -> None:
    Image.fromarray((IMAGES[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / "dog.png")
    headless = body(4)[:4]
    model = load_model(headless, input_size=(3, 16, 16), task="embedding")
    target = parse_target(f"similar:{tmp_path / 'dog.png'}", model)
    assert isinstance(target, Similar)
    torch.testing.assert_close(scores(model, IMAGES, target)[0], torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.embed(IMAGES), headless(IMAGES))
    assert run("saliency", model=model, images=IMAGES, target=target).maps.any()
    result = run("pgd", model=model, images=IMAGES, labels=Similar(target.vector, threshold=0.999), eps=0.3)
    assert result.success.all()
    with pytest.raises(ModelError, match="similar:"):
        run("saliency", model=model, images=IMAGES)


def test_contrast_is_the_difference_of_two_logits() -> None:
    model = load_model(body(3), input_size=(3, 16, 16), classes=["cat", "dog, hound", "fox"])
    logits = model(IMAGES)
    torch.testing.assert_close(scores(model, IMAGES, "contrast:fox,hound"), logits[:, 2] - logits[:, 1])
    first, second = logits[0].argsort(descending=True)[:2].tolist()
    image = IMAGES[:1]
    result = run("pgd", model=model, images=image, labels=Contrast(first, second), eps=0.5, steps=40)
    after = model(result.adversarial)[0]
    assert bool(result.success) == bool(after[first] < after[second])
    with pytest.raises(InputError, match="twice"):
        Contrast(1, 1)


def test_objectives_and_classes_on_the_command_line(tmp_path: Path) -> None:
    from phosphene.roles.labels import LABELS

    assert LABELS.parse_option(["contrast:star,square"]) == ["contrast:star,square"]
    assert LABELS.parse_option(["star, square"]) == ["star", "square"]
    for labels in ("contrast:star,square", ["contrast:star,square"]):
        names = run("fgsm", images="builtin:scenes/2", labels=labels).names_before
        assert names[0].removeprefix("not ") == "star - square"
    named = run("fgsm", images="builtin:scenes/2", labels=["class:star", "class:square"])
    assert torch.equal(named.labels, run("fgsm", images="builtin:scenes/2", labels=["star", "square"]).labels)


def test_text_that_names_a_layer_and_a_class_is_refused() -> None:
    model = load_model(body(5), input_size=(3, 16, 16))
    with pytest.raises(InputError, match="'class:3' or 'layer:3'"):
        parse_target("3", model)
    assert parse_target("class:3", model) == Class(3)
    assert str(parse_target("layer:3", model)) == "3"
    names = load_model(body(3), input_size=(3, 16, 16), classes=["2", "1", "0"])
    with pytest.raises(InputError, match="'class:2'"):
        parse_target("2", load_model(Two("one"), input_size=(3, 16, 16), classes=["2", "x", "0"]))
    assert parse_target("class:2", names) == Class(0)


class Two(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.features, self.head, self.output = body(5)[:4], nn.Linear(6, 3), output

    def forward(self, x: Tensor) -> Any:
        f = self.features(x)
        z = self.head(f)
        outputs = {"one": z, "f, z": (f, z), "z, f": (z, f), "mapping": {"embedding": f, "prediction": z}}
        return outputs[self.output]


@pytest.mark.parametrize("output", ["f, z", "z, f", "mapping"])
def test_one_of_two_outputs_has_to_be_chosen(output: str) -> None:
    model = load_model(Two(output), input_size=(3, 16, 16))
    with pytest.raises(ModelError, match=r"\(1, 6\).*output=lambda result: result\["):
        run("saliency", model=model, images=IMAGES)
    named = load_model(Two(output), input_size=(3, 16, 16), classes=list("abc"))
    assert named(IMAGES).shape == (2, 3)


def test_zero_gradients_are_reported_for_each_image() -> None:
    network = nn.Sequential(body(3), nn.Sigmoid())
    network[0][4].weight.data *= 1e5
    plain = load_model(body(3), input_size=(3, 16, 16))
    saturated = load_model(network, input_size=(3, 16, 16))
    for name in ("fgsm", "bim", "pgd", "apgd", "deepfool", "carlini_wagner", "fab"):
        result = run(name, model=saturated, images=IMAGES, labels=[0, 1], **ATTACKS[name])
        attacked = saturated(IMAGES).argmax(1) == torch.tensor([0, 1])
        assert torch.equal(result.zero_gradient, attacked), name
        assert not run(name, model=plain, images=IMAGES, **ATTACKS[name]).zero_gradient.any()


def saturated(tail: nn.Module) -> nn.Module:
    """Logits of 5 to 14 for three of the five classes, whose sigmoid is 1 to three digits or more."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), tail)
    network[6].weight.data *= 400
    return network.eval()


GRADIENT_ATTACKS = ("fgsm", "bim", "pgd", "apgd")


@pytest.mark.parametrize("name", [*ATTACKS, "auto_attack"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_attacks_report_outputs_that_are_probabilities(name: str, activation: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tail = nn.Softmax(1) if activation == "softmax" else nn.Sigmoid()
    options = {"effort": 0.01} if name == "auto_attack" else ATTACKS[name] | {"seed": 0}
    options = {key: value for key, value in options.items() if key in methods[name].spec.params.model_fields}
    model = load_model(saturated(tail), input_size=(3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(name, model=model, images=images, **options)
    assert result.output_activation == activation
    warned = any(f"probabilities of a {activation}" in line for line in result.lines())
    assert warned == (result.zero_gradient is not None)  # attacks that follow no gradient are not affected
    assert torch.allclose(result.confidence_before, model(images).amax(1))
    plain = run(
        name, model=load_model(saturated(nn.Identity()), input_size=(3, 32, 32)), images=images, **options
    )
    assert not plain.output_activation and not any("probabilities of" in line for line in plain.lines())
    if name in GRADIENT_ATTACKS and activation == "sigmoid":
        assert plain.success.all() and not result.success.any()
        with pytest.warns(UserWarning, match="replace the sigmoid by nn.Identity"):
            run(name, model=model, images=images, **options)
        network = saturated(tail)
        network[7] = nn.Identity()
        logits = load_model(network, input_size=(3, 32, 32))
        assert run(name, model=logits, images=images, **options).success.all()


class Threshold(nn.Module):
    """Probabilities of two classes that are rounded to 0 and 1 next to the mean pixel 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        z = 1000 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([z, -z], 1).sigmoid()


@pytest.mark.parametrize("name", ["pgd", "apgd", "fgsm"])
def test_attacks_without_a_direction_warn(name: str) -> None:
    images = torch.full((2, 3, 8, 8), 0.52)
    images[1] = 0.45
    options = {
        k: v for k, v in {"eps": 0.06, "seed": 0}.items() if k in methods[name].spec.params.model_fields
    }
    clamped = load_model(Threshold(), input_size=(3, 8, 8), output=lambda p: p.logit(1e-6))
    with pytest.warns(UserWarning, match="of 2 images was zero at every pixel"):
        result = run(name, model=clamped, images=images, **options)
    assert not result.success.all() and "had no direction" in result.lines()[0]
    with pytest.warns(UserWarning, match="had no direction"):
        run("robust_accuracy", model=clamped, dataset=TensorDataset(images), attacks=[name], eps=[0.06],
            target="predicted", seed=0)  # fmt: skip
    infinite = load_model(Threshold(), input_size=(3, 8, 8), output=torch.logit)
    with pytest.raises(NotFiniteError, match=r"rounded to 0( or 1 have infinite logits)?: return the logits"):
        run(name, model=infinite, images=images, **options)


@pytest.mark.parametrize("name", ["robust_accuracy", "universal"])
def test_rates_of_a_network_with_a_sigmoid_come_with_a_warning(name: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"held_out": 0, "attack": "fgsm"}
    if name == "robust_accuracy":
        options = {"attacks": ["fgsm"], "eps": [0.01], "target": "predicted", "seed": 0}
    warned = pytest.warns(UserWarning, match="probabilities of a sigmoid")
    for tail, context in ((nn.Sigmoid(), warned), (nn.Identity(), warnings.catch_warnings(action="error"))):
        model = load_model(saturated(tail), input_size=(3, 32, 32))
        with context:
            run(name, model=model, dataset=TensorDataset(images), **options)


class Reshaped(nn.Module):
    """The same outputs, whose shape and precision change, and which are subtracted from 1 twice."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        p = self.network(x)[:, None].squeeze(1).double().view(len(x), -1).contiguous()
        return {"logits": 1 - torch.cat([1 - p[:, :2], 1 - p[:, 2:]], 1).clamp(0, 1)}


def test_probabilities_are_recognized_by_the_last_step() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    size = {"input_size": (3, 32, 32)}
    between = torch.rand(2, 5)
    calls: list[int] = []
    for tail, expected in ((nn.Sigmoid(), "sigmoid"), (nn.Softmax(1), "softmax"), (nn.Identity(), "")):
        network = saturated(tail)
        for module in (network, Reshaped(network), torch.export.export(network, (images,)).module()):
            model = load_model(module, **size)
            with torch.no_grad():
                assert model.output_activation(between, images) == expected, module
                assert model.output_activation(between + 1, images) == ""
        model = load_model(network, **size)
        handle = network.register_forward_hook(lambda *_: calls.append(1))
        assert model.output_activation(between, images) == expected
        handle.remove()
    assert not calls
    # Without gradients values that sum to 1 are a softmax; a sigmoid cannot be recognized.
    for tail, expected in ((nn.Softmax(1), "softmax"), (nn.Sigmoid(), "")):
        black_box = lambda x, network=saturated(tail): network(x).detach().numpy()
        model = load_model(black_box, classes=list("abcde"), **size)
        assert model.output_activation(model(images), images) == expected
        assert torch.equal(model.probabilities(images), model(images)) == bool(expected)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_sigmoids_of_a_task_that_reads_the_sign_of_logits_are_refused(task: str) -> None:
    network = nn.Sequential(body(1 if task == "binary" else 3), nn.Sigmoid())
    options: dict[str, Any] = {"input_size": (3, 16, 16), "task": task}
    with pytest.raises(ModelError, match=r"ends in a sigmoid.*output=torch\.logit"):
        run("fgsm", model=load_model(network, **options), images=IMAGES, labels=[0, 0])
    logits = load_model(network, output=torch.logit, **options)
    plain = load_model(network[0], **options)
    assert torch.allclose(logits.outputs(IMAGES), plain.outputs(IMAGES), atol=1e-5)
    assert torch.allclose(logits.probabilities(IMAGES), plain.probabilities(IMAGES), atol=1e-5)


@pytest.mark.parametrize("task", ["binary", "classification"])
def test_cam_reads_the_current_weights(task: str) -> None:
    network = body(1 if task == "binary" else 3)
    options: dict[str, Any] = {"input_size": (3, 16, 16), "task": task}
    model = load_model(network, **options)
    before = run("cam", model=model, images=IMAGES, target=1).maps
    with torch.no_grad():
        network[4].weight.copy_(network[4].weight.flip(1) + 0.5)
    after = run("cam", model=model, images=IMAGES, target=1).maps
    expected = run("cam", model=load_model(network, **options), images=IMAGES, target=1).maps
    assert torch.equal(after, expected) and not torch.allclose(after, before)


class Calibrated(nn.Module):
    """A temperature behind the head: a module that takes a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.temperature = body(4), nn.Softplus(), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) / self.scale(self.temperature)


class Positions(nn.Module):
    """An embedding of positions: a module that takes a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions(torch.arange(16))
        return tokens.relu().mean(1)


@pytest.mark.parametrize("network", [Calibrated(), Positions()], ids=["scalar", "vector"])
@pytest.mark.parametrize("name", ["saliency", "occlusion", "grad_cam", "pgd"])
def test_modules_of_scalars_and_vectors(name: str, network: nn.Module) -> None:
    model = load_model(network, input_size=(3, 16, 16))
    assert len(run(name, model=model, images=IMAGES, **({"seed": 0} if name == "pgd" else {})).images) == 2


def test_objectives_are_recorded_and_replayed(tmp_path: Path) -> None:
    model = load_model("builtin:shapes-vgg")
    out = tmp_path / "result"
    saved = run("fgsm", model=model, images="builtin:scenes/2", labels="contrast:0,1", out=out)
    from phosphene import replay

    assert torch.equal(replay(out).result.adversarial, saved.adversarial)
    assert methods["fgsm"].spec.input("labels") is not None
