"""Networks as users have them: half precision, checkpointed, quantized, exported, wrapped, other inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.utils.checkpoint import checkpoint

from phosphene import (
    InputError,
    Model,
    ModelError,
    TensorDataset,
    at_least_float32,
    load_model,
    methods,
)
from phosphene.builtin.scenes import draw_scenes
from phosphene.hooks import RecordAttention

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    ).eval()  # fmt: skip


def model_of(network: nn.Module, **options: Any) -> Model:
    return load_model(network, input_size=(3, 32, 32), **options)


def maps(name: str, network: nn.Module) -> Tensor:
    return methods[name](model_of(network), IMAGES, 0).maps


# --- half precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["eigen_cam", "pca", "clusters", "tsne", "set_distance", "deep_dream",
                                  "feature_inversion", "lipschitz_fit"])  # fmt: skip
def test_methods_of_linear_algebra_and_resizing_run_in_half_precision(name, dtype):
    method = methods[name]
    scenes = draw_scenes(24, seed=0).images[..., :32, :32]
    labels = tuple(["circle", "square"] * 8)
    inputs: dict[str, Any] = {"images": IMAGES, "dataset": TensorDataset(scenes[:16], labels)}
    inputs |= {"other": TensorDataset(scenes[16:]), "reference": TensorDataset(scenes[16:])}
    declared = {declared.name for declared in method.spec.inputs}
    seed = {} if method.seed is None else {method.seed: 0}
    network = model_of(small().to(dtype), classes=["circle", "square", "triangle", "star", "cross"])
    method(network, **{n: v for n, v in inputs.items() if n in declared}, **dict(method.spec.quick), **seed)


def test_features_that_overflow_float16_have_distances():
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 512, 8, 8), nn.Linear(512, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(200 * self.conv(x).mean((2, 3)))

    torch.manual_seed(0)
    network = Large().half()
    result = methods["pca"](model_of(network), TensorDataset(torch.rand(12, 3, 32, 32)))
    assert result.points.isfinite().all() and result.features.dtype == torch.float32


def test_at_least_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        promoted = torch.float64 if dtype == torch.float64 else torch.float32
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == promoted


def test_networks_that_change_precision_inside():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small()[:6].bfloat16(), small()[6:]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).float())

    for name in ("saliency", "grad_cam", "occlusion", "eigen_cam"):
        target = () if name == "eigen_cam" else (0,)
        result = methods[name](model_of(Mixed()), IMAGES, *target)
        expected = methods[name](model_of(small()), IMAGES, *target)
        pair = torch.stack([result.maps.float().flatten(), expected.maps.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.85


# --- activation checkpointing -------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = (
            self.block(x)
            if self.reentrant is None
            else checkpoint(self.block, x, use_reentrant=self.reentrant)
        )
        return self.fc(x.mean((2, 3)))


RULES = [
    "saliency",
    "grad_cam",
    "guided_backprop",
    "deconvnet",
    "guided_grad_cam",
    "lrp",
    "integrated_gradients",
]


@pytest.mark.parametrize("name", RULES)
def test_checkpointed_networks_have_the_maps_of_the_network_without(name):
    assert torch.equal(maps(name, Checkpointed(False).eval()), maps(name, Checkpointed(None).eval()))


@pytest.mark.parametrize("name", [*RULES, "pgd", "fgsm", "deepfool", "class_visualization"])
def test_reentrant_checkpoints_are_refused_with_the_way_out(name):
    network = Checkpointed(True).eval()
    arguments = (IMAGES, [0, 0]) if name in ("pgd", "fgsm", "deepfool") else (IMAGES, 0)
    if name == "class_visualization":
        arguments = (0,)
    with pytest.raises(ModelError, match="Checkpointed recomputes layers .* pass use_reentrant=False"):
        methods[name](model_of(network), *arguments)
    assert methods["occlusion"](model_of(network), IMAGES, lambda logits: logits[:, 0]).maps.any()


def test_attention_of_a_checkpointed_block_has_gradients():
    class Block(nn.Module):
        def __init__(self, use_checkpoint: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.use_checkpoint = use_checkpoint
            self.patches, self.mix, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 24), nn.Linear(8, 3)

        def attend(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).chunk(3, -1)
            return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            tokens = (
                checkpoint(self.attend, tokens, use_reentrant=False)
                if self.use_checkpoint
                else self.attend(tokens)
            )
            return self.fc(tokens.mean(1))

    gradients = []
    for network in (Block(False), Block(True)):
        images = IMAGES.clone().requires_grad_()
        with RecordAttention(dict(network.named_modules())) as recording:
            network(images)
            (values,) = recording.maps.values()
            gradients.append(torch.autograd.grad(values.square().sum(), images)[0])
        # After the block, where the checkpoint would compute fused attention again.
        images = IMAGES.clone().requires_grad_()
        (values,) = model_of(network).attention(images).values()
        gradients.append(torch.autograd.grad(values.square().sum(), images)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("layer", ["first", "block.0", "block.2", "block"])
@pytest.mark.parametrize("options", [{}, {"leaf": True}, {"replace": lambda values: 1.5 * values}])
def test_gradients_after_a_tap_in_a_checkpoint(layer, options):
    gradients = []
    for reentrant in (None, False):
        model, images = model_of(Checkpointed(reentrant).eval()), IMAGES.clone().requires_grad_()
        with model.guard():
            with model.tap(layer, **options) as tap:
                score = model(images)[:, 1].sum()
            gradients.append(torch.autograd.grad(score, tap[layer] if "leaf" in options else images)[0])
    assert torch.equal(*gradients) and gradients[0].any()


# --- quantized and exported networks ------------------------------------------------------------


def test_quantized_networks_run_methods_without_gradients():
    network = quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    for name in ("occlusion", "rise"):
        assert methods[name](model_of(network), IMAGES, 0).maps.isfinite().all()
    for name in ("square", "hop_skip_jump"):
        methods[name](model_of(network), IMAGES, [0, 0], seed=0)
    refusal = (
        r"its layer '6' is quantized \(Linear\), which has no gradient; load the network as it was before"
    )
    for name in ("saliency", "integrated_gradients", "smooth_grad", "grad_cam", "guided_backprop"):
        with pytest.raises(ModelError, match=refusal):
            methods[name](model_of(network), IMAGES, 0)
    with pytest.raises(ModelError, match="LRP has no rule for 'linear_dynamic'"):
        methods["lrp"](model_of(network), IMAGES, 0)
    for name in ("pgd", "fgsm"):
        with pytest.raises(ModelError, match=f"{refusal}.*square and hop_skip_jump need none"):
            methods[name](model_of(network), IMAGES, small()(IMAGES).argmax(1).tolist())


def test_exported_networks_have_the_maps_of_the_network():
    batch = torch.export.Dim("batch", min=1, max=256)
    exported = torch.export.export(small(), (IMAGES,), dynamic_shapes={"input": {0: batch}}).module()
    for name in ("saliency", "integrated_gradients", "guided_backprop", "deconvnet", "lrp", "occlusion"):
        torch.testing.assert_close(maps(name, exported), maps(name, small()))
    methods["pgd"](model_of(exported), IMAGES, [0, 0])
    with pytest.raises(
        ModelError, match="is an exported network.*load the network as it was before torch.export"
    ):
        maps("grad_cam", exported)


# --- wrappers ---------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """As peft's LoRA layers: W x + B A x, with the original layer inside."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, nn.Conv2d):
            options = {"stride": base_layer.stride, "padding": base_layer.padding, "bias": False}
            self.lora_A = nn.Conv2d(base_layer.in_channels, rank, base_layer.kernel_size, **options)
            self.lora_B = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        else:
            self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def merged(layer: LowRank) -> nn.Linear | nn.Conv2d:
    base = layer.base_layer
    with torch.no_grad():
        delta = layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)
        base.weight += delta.view_as(base.weight)
    return base


def test_low_rank_adapters_have_the_maps_of_the_merged_network():
    adapted, plain = small(), small()
    for index in (2, 6):
        torch.manual_seed(index)
        adapted[index] = LowRank(adapted[index])
        torch.manual_seed(index)
        plain[index] = merged(LowRank(plain[index]))
    for name in ("saliency", "grad_cam", "guided_backprop", "occlusion", "cam"):
        if name != "cam":  # its head is one linear layer
            torch.testing.assert_close(maps(name, adapted), maps(name, plain), rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match=r"no GAP \+ linear head, which CAM needs; use grad_cam"):
        maps("cam", adapted)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel_networks_are_unwrapped():
    network = small()
    for wrapped in (nn.DataParallel(network), nn.parallel.DistributedDataParallel(network)):
        model = model_of(wrapped)
        assert model.module is network and model.name == "module:Sequential"
        assert torch.equal(maps("grad_cam", wrapped), maps("grad_cam", network))


# --- functions and modules that need more than images ---------------------------------------------


def test_functions_get_plain_tensors():
    types = set()

    def session(images: Tensor) -> Any:
        types.add(type(images))
        return images.numpy().mean((2, 3))

    model = load_model(session, input_size=(3, 32, 32), classes=list("abc"))
    for name in ("occlusion", "rise"):
        assert methods[name](model, IMAGES, 0).maps.isfinite().all()
    methods["square"](model, IMAGES, [0, 0], seed=0)
    methods["hop_skip_jump"](model, IMAGES, [0, 0], seed=0)
    assert types == {Tensor}


def test_modules_that_leave_torch_run():
    class Session(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy(images.detach().numpy().mean((2, 3)))

    assert methods["occlusion"](model_of(Session()), IMAGES, 0).maps.any()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, image: Tensor, meta: Tensor, *, scale: float) -> Tensor:
        return scale * self.network(image) + meta


@pytest.mark.parametrize(
    "name", ["saliency", "grad_cam", "occlusion", "pgd", "square", "randomized_smoothing", "embed"]
)
def test_a_network_that_needs_other_inputs_is_refused_with_the_way_out(name):
    arguments: tuple[Any, ...] = (IMAGES, 0)
    if name in ("pgd", "square"):
        arguments = (IMAGES, [0, 0])
    elif name in ("randomized_smoothing", "embed"):
        arguments = (TensorDataset(IMAGES),) if name == "embed" else (IMAGES,)
    way_out = r"its forward also needs 'meta', 'scale'; pass a module .* self.network\(images, meta, scale\)"
    with pytest.raises(ModelError, match=way_out):
        methods[name](model_of(TwoInputs()), *arguments)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = TwoInputs()

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images, images.mean((1, 2, 3))[:, None], scale=2.0)

    if name in ("saliency", "grad_cam", "occlusion"):
        assert methods[name](model_of(Wrapper()), IMAGES, 0).maps.any()


def test_a_type_error_of_the_network_itself_is_raised_unchanged():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + "a"  # type: ignore[operator]

    with pytest.raises(TypeError):
        model_of(Broken())(IMAGES)


def test_images_with_other_channels_are_refused():
    with pytest.raises((InputError, ModelError), match=r"3 channels|channels"):
        methods["saliency"](model_of(small()), torch.rand(1, 4, 32, 32), 0)


# --- one rule for every spelling of a ReLU ----------------------------------------------------------


class Rectified(nn.Module):
    def __init__(self, relu: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu = relu
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(20 * self.second(self.relu(self.first(x)))).mean((2, 3)))


RELUS: dict[str, Any] = {
    "nn.ReLU()": nn.ReLU(),
    "nn.ReLU(inplace=True)": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "Tensor.relu_": lambda x: x.relu_(),
    "torch.relu_": torch.relu_,
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp_(0)": lambda x: x.clamp_(0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "torch.clamp_min_": lambda x: torch.clamp_min_(x, 0),
    "clip": lambda x: torch.clip(x, 0, None),
    "torch.clamp(input=)": lambda x: torch.clamp(input=x, min=0),
    "F.threshold": lambda x: F.threshold(x, 0, 0),
    "nn.Threshold": nn.Threshold(0, 0, inplace=True),
    "nn.Hardtanh(0, inf)": nn.Hardtanh(0, float("inf")),
    "nn.LeakyReLU(0)": nn.LeakyReLU(0),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.0),
    "torch.maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "torch.max": lambda x: torch.max(torch.zeros_like(x), x),
    "torch.fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "x * (x > 0)": lambda x: x * (x > 0),
    "mask * x": lambda x: (x > 0).float() * x,
    "torch.where": lambda x: torch.where(x > 0, x, 0),
    "where, x >= 0": lambda x: torch.where(x >= 0, x, torch.zeros_like(x)),
    "Tensor.where": lambda x: x.where(x > 0, torch.zeros(())),
}
CAPPED: dict[str, Any] = {
    "nn.ReLU6()": nn.ReLU6(),
    "F.relu6(inplace=True)": lambda x: F.relu6(x, inplace=True),
    "nn.Hardtanh(0, 6)": nn.Hardtanh(0, 6),
    "F.hardtanh_": lambda x: F.hardtanh_(x, 0, 6),
    "clamp(0, 6)": lambda x: x.clamp(0, 6),
    "clip_": lambda x: x.clip_(0, 6),
}


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "lrp"])
@pytest.mark.parametrize("relu", [*RELUS, *CAPPED])
def test_every_spelling_of_a_relu_has_one_rule(relu, name):
    spelled = (RELUS | CAPPED)[relu]
    plain = nn.ReLU() if relu in RELUS else nn.ReLU6()
    torch.testing.assert_close(maps(name, Rectified(spelled)), maps(name, Rectified(plain)))


@pytest.mark.parametrize("name", ["guided_backprop", "lrp"])
def test_networks_that_mix_spellings(name):
    class Mixed(Rectified):
        def __init__(self, relus: list[Any]) -> None:
            super().__init__(lambda x: self.relus[next(self.calls)](x))
            self.relus = relus

        def forward(self, x: Tensor) -> Tensor:
            self.calls = iter(range(9))
            return super().forward(x)

    expected = maps(name, Rectified(nn.ReLU()))
    for first, second in (
        (nn.ReLU(), torch.relu),
        (F.relu, lambda x: x.clamp(min=0)),
        (Tensor.relu, nn.LeakyReLU(0)),
    ):
        torch.testing.assert_close(maps(name, Mixed([first, second])), expected)


@pytest.mark.parametrize("call", [F.gelu, F.leaky_relu, F.silu, F.hardtanh], ids=lambda call: call.__name__)
def test_other_activations_have_relevance_but_no_guided_gradient(call):
    assert maps("lrp", Rectified(call)).any()
    with pytest.raises(ModelError, match="found no ReLU.* use saliency, or lrp, which has rules for GELU"):
        maps("guided_backprop", Rectified(call))
