"""``registers:``: a register token takes the activations that make the norms of patches high."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from phosphene import InputError, Model, ModelError, load_model, run

URI, OUTLIER, NEURON = "timm:vit_tiny_patch16_224", 7, 11
OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5,
    "input_size": (3, 32, 32),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in whose second block one neuron responds to one position and adds a large vector."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", **{n: v for n, v in OPTIONS.items() if n != "input_size"}
    )
    with torch.no_grad():
        network.pos_embed[0, OUTLIER, :12] += 6
        network.pos_embed[0, OUTLIER, 12:] -= 6
        mlp = network.blocks[1].mlp
        mlp.fc1.weight[NEURON] = torch.cat([torch.ones(12), -torch.ones(12)])
        mlp.fc1.bias[NEURON] = -19
        mlp.fc2.weight[:, NEURON] = 100 * torch.randn(24)
    path: Path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def plain(weights: Path) -> Model:
    return load_model(URI, weights=weights, **OPTIONS)


@pytest.fixture(scope="module")
def registered(weights: Path) -> Model:
    return load_model(f"registers:{URI}", weights=weights, neurons=1, factor=50.0, **OPTIONS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_high_norms_move_from_the_patch_to_the_register(
    plain: Model, registered: Model, images: Tensor
) -> None:
    before: Any = run("token_norms", model=plain, images=images, factor=50)
    after: Any = run("token_norms", model=registered, images=images, factor=50)
    row, column = divmod(OUTLIER - 1, 4)
    assert bool(before.is_high()[:, 1, row, column].all()) and before.high[:, 1].tolist() == [1, 1]
    assert not after.high[:, 1:].any()
    assert after.others.shape == (2, 3, 2)  # the class token, and the register behind the patches
    # The register has what the neuron added to the patch, and no other token has it.
    assert bool((after.others[:, 1, 1] > 10 * after.maps[:, 1].flatten(1).median(1).values).all())


def test_everything_else_is_the_network_by_hand(plain: Model, registered: Model, images: Tensor) -> None:
    network = plain.module
    tokens = network.pos_drop(network._pos_embed(network.patch_embed(plain.normalize(images))))  # type: ignore[operator]
    tokens = torch.cat([tokens, torch.zeros(2, 1, 24)], 1)
    for number, block in enumerate(network.blocks):  # type: ignore[arg-type]
        tokens = tokens + block.attn(block.norm1(tokens))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(tokens)))
        if number == 1:
            largest = hidden[..., NEURON].amax(1)
            hidden[..., NEURON] = 0
            hidden[:, -1, NEURON] = largest
        tokens = tokens + block.mlp.fc2(hidden)
    logits = network.head(network.norm(tokens[:, :-1])[:, 0])  # type: ignore[operator]
    torch.testing.assert_close(registered(images), logits)
    assert registered.name == f"registers:{plain.name}" and registered.digest != plain.digest


@pytest.mark.parametrize("name", ["attention_maps", "attention_rollout", "gradient_attention", "legrad"])
def test_methods_read_the_network_with_a_register(name: str, registered: Model, images: Tensor) -> None:
    result: Any = run(name, model=registered, images=images)
    assert result.maps.shape[-2:] == (4, 4)
    assert result.centers == ((3.5, 11.5, 19.5, 27.5),) * 2


def test_the_network_itself_does_not_change(plain: Model, registered: Model, images: Tensor) -> None:
    assert [*plain.module.blocks[0]._modules] == [
        "norm1",
        "attn",
        "ls1",
        "drop_path1",
        "norm2",
        "mlp",
        "ls2",
        "drop_path2",
    ]  # type: ignore[index]


def test_networks_without_high_norms_are_refused(weights: Path) -> None:
    with pytest.raises(ModelError, match=r"no patch of 16 images has more than 1e\+06 times the median norm"):
        load_model(f"registers:{URI}", weights=weights, factor=1e6, **OPTIONS)
    with pytest.raises(ModelError, match="computes no attention"):
        load_model("registers:builtin:shapes-vgg")
    with pytest.raises(InputError, match="neurons must be 1 or more"):
        load_model(f"registers:{URI}", weights=weights, neurons=0, **OPTIONS)
