"""Random states of every CUDA device, deterministic kernels and free memory, with a simulated torch.cuda."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import load_model, methods
from phosphene.models import batch_size as batch_size_module
from phosphene.testing.cases import Case
from phosphene.torch_state import deterministic_algorithms, fork_random_state, seed_generators


class FakeCuda:
    """The random states of two CUDA devices."""

    def __init__(self) -> None:
        self.states = [torch.tensor([10]), torch.tensor([20])]
        self.seeds: list[int] = []

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)
        self.states = [torch.tensor([seed]), torch.tensor([seed])]

    def get_rng_state(self, index: int) -> Tensor:
        return self.states[index].clone()

    def set_rng_state(self, state: Tensor, index: int) -> None:
        self.states[index] = state

    def draw(self) -> None:
        self.states = [state + 1 for state in self.states]

    def values(self) -> list[int]:
        return [int(state) for state in self.states]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


class Drawing(nn.Module):
    """A network that draws random numbers on every CUDA device in each pass."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.conv, self.cuda = nn.Conv2d(3, 2, 3), cuda

    def forward(self, x: Tensor) -> Tensor:
        self.cuda.draw()
        return self.conv(x).mean((2, 3))

    def __deepcopy__(self, memo: dict[int, Any]) -> Drawing:
        duplicate = Drawing(self.cuda)
        duplicate.load_state_dict(self.state_dict())
        return duplicate.eval()


def test_seeded_methods_restore_the_states_of_all_devices(cuda: FakeCuda) -> None:
    for name in ("efros_leung", "smooth_grad", "pgd"):  # the first takes no model
        method, case = methods[name], Case()
        cuda.seeds.clear()
        case.run(method)
        assert cuda.seeds[-1] == 7
        assert cuda.values() == [10, 20]


def test_structures_and_copies_restore_the_states_of_all_devices(cuda: FakeCuda) -> None:
    model = load_model(Drawing(cuda).eval(), input_size=(3, 8, 8))
    model.structure  # noqa: B018
    assert cuda.values() == [10, 20]
    images = torch.rand(1, 3, 8, 8)
    methods["smooth_grad"](model, images, 0, samples=20, seed=1)
    assert cuda.values() == [10, 20]
    function = load_model(
        lambda x: (cuda.draw(), x.mean((2, 3)))[1], input_size=(3, 8, 8), classes=["a", "b", "c"]
    )
    function.require_gradients()
    assert cuda.values() == [10, 20]


def test_state_of_a_device_that_was_not_used_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the device would be initialized")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, fail)
    before = torch.get_rng_state()
    with fork_random_state():
        seed_generators(3)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), before)


def deterministic_settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_deterministic_algorithms_end_with_the_last_thread() -> None:
    before = deterministic_settings()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with deterministic_algorithms():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    with deterministic_algorithms():
        assert deterministic_settings() == (True, True, True, False, ":4096:8")
        thread.start()
        inside.wait(60)
    assert deterministic_settings()[0], "another thread still needs them"
    leave.set()
    thread.join()
    assert deterministic_settings() == before
    with deterministic_algorithms(enabled=False):
        assert deterministic_settings() == before


def test_deterministic_algorithms_stay_strict_where_the_caller_is_strict() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_algorithms():
            assert deterministic_settings()[:2] == (True, False)
        assert deterministic_settings()[:2] == (True, False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_that_the_allocator_released_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert batch_size_module._free_memory(torch.device("cuda")) == 140
