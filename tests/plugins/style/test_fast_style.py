"""Fast style transfer: normalization, training, selecting and blending styles, saving, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import (
    Dataset,
    DivergenceError,
    InputError,
    Model,
    ProgressEvent,
    UnknownName,
    load_model,
    load_result,
    max_batch,
    methods,
    replay,
    report_progress,
    run,
)
from phosphene.builtin.scenes import draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.images import write_png
from phosphene.optimize import gram_matrix, total_variation
from phosphene.results import TrainedNetwork
from phosphene_plugins.style._style_network import (
    BatchNorm,
    ConditionalInstanceNorm,
    Norm,
    StyledConv,
    StyleNetwork,
    network_for_new_styles,
)

fit = methods["style.fast_style_fit"]
add = methods["style.fast_style_add"]
fast_style = methods["style.fast_style"]

SMALL: dict[str, Any] = {"width": 4, "blocks": 1, "batch": 2, "seed": 0}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    fine, coarse = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
    return load_model(nn.Sequential(fine, nn.ReLU(), nn.MaxPool2d(2), coarse, nn.ReLU()))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 18, 21, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def styles() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) ** 2


@pytest.fixture(scope="module")
def stylizer(model: Model, images: Tensor, styles: Tensor) -> TrainedNetwork:
    return fit(model, images, styles, names=["oil", "ink", "chalk"], steps=3, **SMALL)


def stylize(network: nn.Module, images: Tensor, blend_weights: list[float]) -> Tensor:
    with torch.no_grad():
        stylized: Tensor = network(images, torch.tensor([blend_weights]))
    return stylized


def test_oracles() -> None:
    for method in (fit, fast_style, add):
        method.spec.oracle()


def test_the_norm_gives_each_image_its_own_style() -> None:
    norm = ConditionalInstanceNorm(2, 1)
    with torch.no_grad():
        norm.gamma.copy_(torch.tensor([[2.0], [3.0]]))
        norm.beta.copy_(torch.tensor([[5.0], [-1.0]]))
    x = torch.randn(2, 1, 8, 8)
    out = norm(x, torch.eye(2))
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.tensor([5.0, -1.0]))
    spread = out.flatten(1).std(1, correction=0)
    torch.testing.assert_close(spread, torch.tensor([2.0, 3.0]), atol=1e-3, rtol=0)


def test_batch_norm_uses_batch_statistics_and_then_running_ones() -> None:
    norm, mix = BatchNorm(2), torch.ones(3, 1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([5.0, -1.0]))
    x = 4 + torch.randn(3, 2, 8, 8)
    out = norm(x, mix)
    torch.testing.assert_close(out.mean((0, 2, 3)), norm.bias)
    mean, variance = 0.1 * x.mean((0, 2, 3)), 0.9 + 0.1 * x.var((0, 2, 3))
    scale, shift = (t[:, None, None] for t in (norm.weight / (variance + 1e-5).sqrt(), norm.bias))
    torch.testing.assert_close(norm.eval()(x, mix), scale * (x - mean[:, None, None]) + shift)


def test_one_style_of_conditional_norm_is_instance_norm(model: Model, images: Tensor, styles: Tensor) -> None:
    one, other = (
        fit(model, images, styles[:1], norm=n, steps=3, **SMALL) for n in ("instance", "conditional")
    )
    assert torch.equal(one.losses, other.losses) and torch.equal(one.previews, other.previews)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_instance_norm_is_invariant_to_contrast(norm: Norm) -> None:
    """T(a x + b) = T(x): a convolution makes a and b a scale and a shift, which instance norm takes away."""
    torch.manual_seed(0)
    network = StyleNetwork(styles=1, width=4, blocks=1, norm=norm).double()
    images, mix = torch.rand(2, 3, 16, 16).double(), torch.ones(2, 1).double()
    for _ in range(20):  # so that batch norm has running statistics of these images
        network(images, mix)
    pale = network.eval()(0.5 * images + 0.4, mix)
    far = (pale - network(images, mix)).abs().max()
    assert far < 1e-3 if norm == "instance" else far > 0.1


def test_a_network_with_batch_norm_stylizes_images_independently(
    model: Model, images: Tensor, styles: Tensor, tmp_path: Path
) -> None:
    result = fit(model, images, styles[:1], norm="batch", steps=3, **SMALL)
    assert not result.network.training and result.network.down[0].norm.running_mean.abs().min() > 0
    together = stylize(result.network, images, [1.0])
    torch.testing.assert_close(fast_style(images, result).stylized, together, atol=1e-5, rtol=0)
    result.save(tmp_path / "batch")
    loaded = fast_style(images, load_result(tmp_path / "batch"))
    assert torch.equal(loaded.stylized, fast_style(images, result).stylized)


def test_a_styled_convolution_is_reflection_padding_convolution_and_norm() -> None:
    layer, x, mix = (
        StyledConv(2, "conditional", 3, 4, 5, stride=2),
        torch.rand(1, 3, 9, 11),
        torch.tensor([[0.0, 1.0]]),
    )
    plain = nn.Conv2d(3, 4, 5, stride=2, padding=2, padding_mode="reflect", bias=False)
    plain.weight = layer.conv.weight
    torch.testing.assert_close(layer(x, mix), layer.norm(plain(x), mix))


def test_the_initial_network_preserves_edges() -> None:
    """Residual blocks are zero, 9 x 9 filters weight their center, skip connections carry fine features."""
    torch.manual_seed(0)
    deep, flat = StyleNetwork(styles=1, width=8, blocks=2), StyleNetwork(styles=1, width=8, blocks=0)
    flat.load_state_dict({n: w for n, w in deep.state_dict().items() if not n.startswith("residual")})
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(deep(images, torch.ones(2, 1)), flat(images, torch.ones(2, 1)))
    for wide in (deep.down[0].conv.weight, deep.paint.conv.weight):
        energy = wide.detach().square()
        assert energy[:, :, 2:-2, 2:-2].sum() > 0.95 * energy.sum()
        default_variance = 1 / (3 * wide[0].numel())  # of PyTorch's default initialization
        assert energy.mean().item() == pytest.approx(default_variance, rel=0.3)
    for layer in flat.up:
        nn.init.zeros_(layer.norm.gamma)
    stylized = flat(images, torch.ones(2, 1))
    assert (stylized[0] - stylized[1]).abs().max() > 0.1


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (31, 33), (64, 40)])
def test_images_keep_their_size(size: tuple[int, int]) -> None:
    stylized = StyleNetwork(styles=2, width=3, blocks=1)(torch.rand(1, 3, *size), torch.tensor([[0.0, 1.0]]))
    assert stylized.shape == (1, 3, *size)


def test_the_loss_equals_the_equation(model: Model, images: Tensor, styles: Tensor) -> None:
    """Steps with a negligible learning rate, computed by hand: phi of layer 1, Gram matrices of 1 and 4."""
    weights = {"content_weight": 2.0, "style_weight": 5.0, "total_variation": 7.0}
    result = fit(model, images, styles, steps=2, lr=1e-12, **SMALL, **weights)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        network = StyleNetwork(styles=3, width=4, blocks=1)
        for step, rows in enumerate((order[:2], order[2:4])):
            torch.manual_seed(step)
            batch, style_indices = images[rows], torch.randint(3, (2,))
            stylized = network(batch, torch.eye(3)[style_indices])
            total = 0.0
            for n, style in enumerate(style_indices.tolist()):
                one, other, sample = stylized[n : n + 1], batch[n : n + 1], styles[style : style + 1]
                phi, phi_target = model.features(one, "1"), model.features(other, "1")
                total += 2.0 * float((phi - phi_target).square().sum() / phi_target.square().sum())
                for layer, weight in (("1", 1.0), ("4", 1 / 3)):
                    gram, target = (gram_matrix(model.features(i, layer)) for i in (one, sample))
                    total += 5.0 * weight * float((gram - target).square().sum() / target.square().sum())
                total += 7.0 * float(total_variation(one)) / (18 * 21)
            assert result.losses[step].item() == pytest.approx(total / 2, rel=1e-4)


def test_training_lowers_the_loss(model: Model, images: Tensor, styles: Tensor) -> None:
    result = fit(model, images, styles, steps=60, **SMALL)
    assert result.losses.shape == (60,)
    assert result.losses[-5:].mean() < 0.8 * result.losses[:5].mean()
    assert result.previews.shape == (3, 3, 18, 21)
    assert result.labels == ("style 0", "style 1", "style 2")


def test_progress_reports_the_loss(model: Model, images: Tensor, styles: Tensor) -> None:
    events: list[ProgressEvent] = []
    with report_progress(events.append):
        result = fit(model, images, styles, steps=3, **SMALL)
    assert [e.done for e in events] == [1, 2, 3]
    assert [e.note for e in events] == [f"loss {loss:.3f}" for loss in result.losses.tolist()]


def test_the_loss_weights_trade_content_for_style(model: Model, images: Tensor, styles: Tensor) -> None:
    """The content loss alone leaves the image closer to its content than the style loss alone."""

    def distance(result: TrainedNetwork) -> float:
        stylized = fast_style(images, result).stylized
        with torch.no_grad():
            far = model.features(stylized, "4") - model.features(images, "4")
        return float(far.square().mean())

    content = fit(model, images, styles, steps=40, style_weight=0.0, **SMALL)
    style = fit(model, images, styles, steps=40, content_weight=0.0, **SMALL)
    assert distance(content) < distance(style)


def test_the_same_seed_gives_the_same_bits(model: Model, images: Tensor, styles: Tensor) -> None:
    first, second, other = (fit(model, images, styles, steps=2, **SMALL | {"seed": s}) for s in (1, 1, 2))
    assert torch.equal(first.previews, second.previews)
    assert torch.equal(first.losses, second.losses)
    assert not torch.equal(first.previews, other.previews)


def test_the_memory_limit_changes_only_rounding(model: Model, images: Tensor, styles: Tensor) -> None:
    free = fit(model, images, styles, steps=2, **SMALL)
    with max_batch(1):
        limited = fit(model, images, styles, steps=2, **SMALL)
    torch.testing.assert_close(free.losses, limited.losses, atol=1e-4, rtol=1e-4)


def test_the_loss_network_is_not_changed(model: Model, images: Tensor, styles: Tensor) -> None:
    before = model.digest
    fit(model, images, styles, steps=2, **SMALL)
    assert model.digest == before
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


def test_a_stylizer_is_loaded_from_its_folder(
    stylizer: TrainedNetwork, images: Tensor, tmp_path: Path
) -> None:
    stylizer.save(tmp_path / "styles")
    loaded = load_result(tmp_path / "styles")
    assert isinstance(loaded, TrainedNetwork)
    assert loaded.labels == stylizer.labels
    stylized = fast_style(images, stylizer, style="ink").stylized
    assert torch.equal(fast_style(images, loaded, style="ink").stylized, stylized)
    folder = tmp_path / "styles"
    by_path = run("fast_style", images=images, stylizer=folder, style="ink", out=tmp_path / "out")
    assert torch.equal(by_path.stylized, stylized)
    assert replay(tmp_path / "out").same


def test_names_and_numbers_select_a_style(stylizer: TrainedNetwork, images: Tensor) -> None:
    for number, name in enumerate(stylizer.labels):
        result = fast_style(images, stylizer, style=name)
        assert result.style == name
        assert torch.equal(result.stylized, fast_style(images, stylizer, style=number).stylized)
        alone = [stylize(stylizer.network, i[None], [float(n == number) for n in range(3)]) for i in images]
        assert torch.equal(result.stylized, torch.cat(alone))
    assert fast_style(images, stylizer).style == "oil"


def test_a_blend_of_one_style_is_that_style(stylizer: TrainedNetwork, images: Tensor) -> None:
    ink = fast_style(images, stylizer, style="ink")
    alone = fast_style(images, stylizer, style={"ink": 3.0, "oil": 0.0})
    assert torch.equal(alone.stylized, ink.stylized)
    assert alone.style == "ink"
    half = fast_style(images, stylizer, style={"chalk": 2, "ink": 2})
    assert half.style == "50% ink + 50% chalk"
    mixed = [stylize(stylizer.network, i[None], [0.0, 0.5, 0.5]) for i in images]
    assert torch.equal(half.stylized, torch.cat(mixed))
    assert not torch.equal(half.stylized, ink.stylized)


def test_a_blend_mixes_scales_and_shifts_linearly(stylizer: TrainedNetwork, images: Tensor) -> None:
    """A network whose first style was set to the blend returns the same images."""
    mixed = StyleNetwork(**stylizer.config)
    mixed.load_state_dict(stylizer.network.state_dict())
    with torch.no_grad():
        for module in mixed.modules():
            if isinstance(module, ConditionalInstanceNorm):
                for parameter in (module.gamma, module.beta):
                    parameter[0] = 0.25 * parameter[1] + 0.75 * parameter[2]
    blended = fast_style(images, stylizer, style={"ink": 0.25, "chalk": 0.75}).stylized
    torch.testing.assert_close(blended, stylize(mixed, images, [1.0, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_images_keep_their_precision(stylizer: TrainedNetwork, images: Tensor) -> None:
    result = fast_style(images.double(), stylizer)
    assert result.stylized.dtype == torch.float64
    assert next(stylizer.network.parameters()).dtype == torch.float32


def test_a_diverging_loss_raises(model: Model, images: Tensor, styles: Tensor) -> None:
    with pytest.raises(DivergenceError, match="no longer finite"):
        fit(model, images, styles, steps=5, style_weight=1e38, content_weight=1e38, **SMALL)


def test_an_interruption_leaves_the_model_as_it_was(model: Model, styles: Tensor) -> None:
    class Interrupted(Dataset):
        def __len__(self) -> int:
            return 9

        def read(self, indices: Any) -> Tensor:
            if 4 in indices:  # of the third step
                raise KeyboardInterrupt
            return styles[:1].expand(len(indices), -1, -1, -1)

    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupted(), styles, **SMALL)
    assert all(p.requires_grad for p in model.module.parameters())
    assert not any(module._forward_hooks for module in model.module.modules())


def test_bad_input_is_refused(model: Model, stylizer: TrainedNetwork, images: Tensor, styles: Tensor) -> None:
    with pytest.raises(UnknownName, match="ink"):
        fast_style(images, stylizer, style="inc")
    with pytest.raises(InputError, match="style 7"):
        fast_style(images, stylizer, style=7)
    with pytest.raises(UnknownName, match="pastel"):
        fast_style(images, stylizer, style={"ink": 1.0, "pastel": 1.0})
    with pytest.raises(InputError, match="above zero"):
        fast_style(images, stylizer, style={"ink": 0.0})
    for share in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ink"):
            fast_style(images, stylizer, style={"ink": share, "oil": 1.0})
    with pytest.raises(InputError, match="8 pixels"):
        fast_style(images[..., :6, :6], stylizer)
    with pytest.raises(InputError, match="training method"):
        fast_style(images, "somewhere")
    with pytest.raises(InputError, match="different names"):
        fit(model, images, styles, names=["one"], **SMALL)
    with pytest.raises(UnknownName):
        fit(model, images, styles, content_layer="conv9", **SMALL)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_n_styles_need_conditional_norm(model: Model, images: Tensor, styles: Tensor, norm: Norm) -> None:
    with pytest.raises(InputError, match='3 need norm="conditional"'):
        fit(model, images, styles, norm=norm, **SMALL)


@pytest.mark.parametrize("name", ["fast_style_fit", "fast_style_add"])
def test_an_interrupted_training_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "builtin:scenes/5", "styles": ["builtin:waves"], "names": ["sea"]}
    options |= {"steps": 6, "batch": 2, "frames": 4, "seed": 1}
    if name == "fast_style_fit":  # whose running means are saved, too
        options |= {"norm": "batch", "width": 4, "blocks": 1}
    uninterrupted = run(name, **options, out=tmp_path / "uninterrupted")

    def stop(event: ProgressEvent) -> None:
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, **options, out=tmp_path / "interrupted", progress=stop)
    events: list[ProgressEvent] = []
    loaded = run(name, **options, out=tmp_path / "interrupted", progress=events.append)
    assert [event.total for event in events] == [2, 2]
    for field in ("losses", "previews", "frames"):
        assert torch.equal(getattr(uninterrupted, field), getattr(loaded, field)), field
    other = loaded.network.state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in uninterrupted.network.state_dict().items())


def test_a_data_set_can_be_a_folder_of_images_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    for number, shape in enumerate(((40, 90), (120, 70), (64, 64))):
        write_png(torch.rand(3, *shape), tmp_path / "photographs" / f"{number}.png")
    options: dict[str, Any] = {"dataset": tmp_path / "photographs", "styles": ["builtin:waves"], **SMALL}
    result = run("fast_style_fit", steps=2, **options, out=tmp_path / "out")
    assert result.previews.shape == (1, 3, 64, 64) and result.losses.isfinite().all()


def test_preview_frames_are_small(model: Model, images: Tensor, styles: Tensor, tmp_path: Path) -> None:
    result = fit(model, images, styles, steps=6, frames=3, **SMALL)
    assert result.frames is not None and result.frames.shape == (3, 3, 3, 18, 21)
    assert torch.equal(result.frames[-1], (result.previews * 255).round().byte())
    assert not torch.equal(result.frames[0], result.frames[-1])
    plain = fit(model, images, styles, steps=6, **SMALL)
    assert torch.equal(plain.losses, result.losses) and plain.frames is None
    result.save(tmp_path / "film")
    assert (tmp_path / "film" / "film.gif").is_file()
    assert result.lines()[0] == f"loss: {result.losses[0]:.3g} -> {result.losses[-1]:.3g} in 6 steps"
    wide = torch.rand(2, 3, 48, 192)
    assert fit(model, wide, styles[:1], steps=1, frames=1, **SMALL).frames.shape == (1, 1, 3, 32, 128)


def test_mixed_precision_is_rounding_of_the_convolutions(
    model: Model, images: Tensor, styles: Tensor
) -> None:
    full = fit(model, images, styles, steps=4, **SMALL)
    mixed = fit(model, images, styles, steps=4, mixed_precision=True, **SMALL)
    assert not torch.equal(full.losses, mixed.losses)
    torch.testing.assert_close(full.losses, mixed.losses, rtol=0.05, atol=0)
    assert {p.dtype for p in mixed.network.parameters()} == {torch.float32} == {mixed.previews.dtype}
    double = load_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double())
    with pytest.raises(InputError, match="mixed precision is for float32"):
        fit(double, images.double(), styles.double(), mixed_precision=True, **SMALL)


# --- adding styles -------------------------------------------------------------------------------------


def test_a_style_has_a_small_share_of_the_parameters() -> None:
    """Dumoulin's network: 1,679,235 with 3,200 scales and shifts, biases and no norm in the last layer."""
    network = StyleNetwork(styles=1, width=32, blocks=5)
    total = sum(p.numel() for p in network.parameters())
    biases, on_top = 32 + 64 + 128 + 10 * 128 + 64 + 32 + 3, 2 * 3
    assert total == 1_679_235 - biases + on_top
    free = sum(p.numel() for p in network_for_new_styles(network, 1).parameters() if p.requires_grad)
    assert free == 3_200 + on_top
    assert f"{free / total:.2%}" == f"{3_200 / 1_679_235:.2%}" == "0.19%"


def test_adding_styles_leaves_the_old_ones_unchanged(
    model: Model, stylizer: TrainedNetwork, images: Tensor, styles: Tensor, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in stylizer.network.state_dict().items()}
    result = add(model, images, styles[:2].flip(3), stylizer, names=["tar", "milk"], steps=8, batch=2, seed=0)
    assert result.labels == ("oil", "ink", "chalk", "tar", "milk") and result.previews.shape == (5, 3, 18, 21)
    for style in stylizer.labels:
        old, new = (fast_style(images, by, style=style).stylized for by in (stylizer, result))
        assert torch.equal(old, new), style
    blend = {"oil": 1.0, "ink": 2.0, "chalk": 3.0}
    mixed = [fast_style(images, by, style=blend).stylized for by in (stylizer, result)]
    torch.testing.assert_close(*mixed, atol=1e-6, rtol=0)
    stylized = fast_style(images, result, style="tar").stylized
    assert not any(
        torch.equal(stylized, fast_style(images, result, style=s).stylized) for s in stylizer.labels
    )
    after = result.network.state_dict()
    for name, tensor in before.items():
        assert torch.equal(stylizer.network.state_dict()[name], tensor)
        assert torch.equal(after[name][: len(tensor)], tensor)
        assert len(after[name]) == (5 if name.endswith(("gamma", "beta")) else len(tensor))
    more = sum(2 * t.shape[1] for n, t in before.items() if n.endswith("gamma")) * 2
    total = sum(t.numel() for t in after.values())
    assert result.note == f"trained {more:,} of {total:,} parameters ({more / total:.2%})"
    result.save(tmp_path / "more")
    loaded = load_result(tmp_path / "more")
    assert torch.equal(fast_style(images, loaded, style="tar").stylized, stylized)


def test_adding_styles_lowers_the_loss_and_can_be_repeated(
    model: Model, stylizer: TrainedNetwork, images: Tensor, styles: Tensor
) -> None:
    one = add(model, images, styles[:1].roll(1, 1), stylizer, steps=40, batch=2, seed=0)
    assert one.losses[-5:].mean() < 0.9 * one.losses[:5].mean()
    assert one.labels[3] == "style 3"
    two = add(model, images, styles[:1], one, steps=1, batch=2, seed=0)
    assert two.labels[3:] == ("style 3", "style 4") and torch.equal(two.previews[:4], one.previews)


def test_styles_can_be_added_to_instance_norm_and_not_to_batch_norm(
    model: Model, images: Tensor, styles: Tensor
) -> None:
    one = fit(model, images, styles[:1], norm="instance", steps=1, **SMALL)
    two = add(model, images, styles[1:2], one, steps=1, batch=2)
    assert two.config["norm"] == "conditional" and torch.equal(two.previews[:1], one.previews)
    batch = fit(model, images, styles[:1], norm="batch", steps=1, **SMALL)
    with pytest.raises(InputError, match="batch norm has a single style"):
        add(model, images, styles[:1], batch)
    with pytest.raises(InputError, match="2 styles need as many different names"):
        add(model, images, styles[1:2], one, names=["style 0"])


def test_the_bundled_stylizer_reproduces_each_style_best() -> None:
    vgg = load_model("builtin:shapes-vgg")
    scenes = draw_scenes(4, seed=0, split="test").images
    bundled = load_result("builtin:shapes-styles")

    def statistics(images: Tensor) -> Tensor:
        with torch.no_grad():
            return gram_matrix(vgg.features(images, vgg.stages[0])).mean(0)

    expected = [statistics(load_texture(name)[None]) for name in bundled.labels]
    for number, name in enumerate(bundled.labels):
        stylized = fast_style(scenes, bundled, style=name).stylized
        grams = statistics(stylized)
        distances = [float((grams - w).norm() / w.norm()) for w in expected]
        assert distances.index(min(distances)) == number, (name, distances)


def test_a_training_starts_at_a_stylizer_and_does_not_change_it(
    model: Model, images: Tensor, styles: Tensor, stylizer: TrainedNetwork
) -> None:
    before = {name: value.clone() for name, value in stylizer.network.state_dict().items()}
    options: Any = {"steps": 1, "batch": 1, "width": 9, "blocks": 3, "seed": 0}
    result = fit(model, images, styles[:2], stylizer, lr=1e-9, **options)
    assert result.config == stylizer.config | {"styles": 2} and result.labels == ("style 0", "style 1")
    for name, value in result.network.state_dict().items():
        mean = before[name].mean(0).expand_as(value) if value.dim() == 2 else before[name]
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=0)
        assert torch.equal(stylizer.network.state_dict()[name], before[name])
    trained = fit(model, images, styles[:2], stylizer, **options | {"steps": 4})
    assert not torch.equal(trained.network.down[0].conv.weight, before["down.0.conv.weight"])


def test_a_start_at_a_stylizer_needs_conditional_norm(
    model: Model, images: Tensor, styles: Tensor, stylizer: TrainedNetwork
) -> None:
    batch = fit(model, images, styles[:1], norm="batch", steps=1, **SMALL)
    for start, norm in ((batch, "conditional"), (stylizer, "instance")):
        with pytest.raises(InputError, match="needs conditional norm in both networks"):
            fit(model, images, styles[:1], start, norm=norm, steps=1, **SMALL)
