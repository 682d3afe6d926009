"""Taps read, cut, replace and stop; backward rules reach every ReLU; the guard restores all flags."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phosphene import (
    Model,
    ModelError,
    UnknownName,
    deconvnet,
    guided,
    load_model,
    methods,
    rewrite_backward,
    scores,
)
from phosphene.hooks import Tap, guard


class Net(nn.Module):
    """In-place, reused and functional ReLUs, a layer that never runs, and one that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.pair = Pair()
        self.third = nn.Conv2d(4, 5, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.relu(self.second(x))
        x, _ = self.pair(x)
        x = F.relu(self.third(x), inplace=True)
        return self.head(self.drop(x.mean((2, 3))))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x * 2, 7


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return load_model(Net().double().eval(), input_size=(3, 8, 8))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- reading, cutting, stopping ------------------------------------------------------------------


def test_tap_reads_the_output_before_it_is_overwritten_in_place(model, images):
    expected = model.module.norm(model.module.first(images))
    with model.tap("norm", "third") as tap:
        logits = model(images)
        torch.testing.assert_close(tap["norm"], expected)
        assert (tap["third"] < 0).any()
    torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()), nn.InstanceNorm2d(8)], ids=type
)
@pytest.mark.parametrize("inputs", [False, True])
def test_gradient_of_one_image_is_that_of_it_in_a_batch(norm, inputs):
    # Strides of einsum's gradient for one image: normalizations of torch 2.14 read it in another order.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Linear(8 * 36, 2)).double().eval()
    model = load_model(network, input_size=(3, 8, 8))
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64).requires_grad_()
    weight = torch.rand(8, 8, dtype=torch.float64)

    def gradient(rows: slice) -> torch.Tensor:
        layer = network[2] if inputs else network[1]
        with Tap({"layer": layer}, inputs=inputs) as tap:
            model(images[rows])
        maps = tap["layer"]
        grams = torch.einsum("nchw,ndhw->ncd", maps, maps)
        return torch.autograd.grad((grams * weight).sum(), images)[0][rows]

    torch.testing.assert_close(gradient(slice(0, 1)), gradient(slice(None))[:1])


def test_tapped_output_is_on_the_graph(model, images):
    with model.tap("second") as tap:
        logits = model(images)
    (gradient,) = torch.autograd.grad(logits.sum(), tap["second"])
    assert gradient.any()


def test_tap_reads_the_last_output_of_a_reused_layer(model, images):
    with model.tap("relu", "pair") as tap:
        model(images)
    torch.testing.assert_close(tap["relu"] * 2, tap["pair"])


def test_leaf_cuts_the_graph(model, images):
    pixels = images.clone().requires_grad_()
    with model.guard(), model.tap("second", leaf=True) as tap:
        logits = model(pixels)
        cut = torch.autograd.grad(logits[:, 0].sum(), tap["second"])[0]
        assert tap["second"].is_leaf
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(model(pixels).sum(), pixels)
    with model.tap("second") as tap:
        full = torch.autograd.grad(model(pixels)[:, 0].sum(), tap["second"])[0]
    torch.testing.assert_close(cut, full)


def test_features_run_no_layer_above(model, images):
    _ = model.structure  # recorded once, in a pass of its own
    ran: list[str] = []
    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in model.layers.items()]
    features = model.features(images, "relu")
    for handle in handles:
        handle.remove()
    assert ran == ["first", "norm", "relu", "second", "relu"]
    assert (features >= 0).all()


def test_features_of_several_layers_equal_those_of_each(model, images):
    first, pair = model.features_of(images, ["first", "pair"])
    torch.testing.assert_close(first, model.features(images, "first"))
    torch.testing.assert_close(pair, model.features(images, "pair"))


def test_of_several_leaves_only_the_lowest_is_detached(model, images):
    with model.guard(), model.tap("first", "second", "pair", leaf=True) as tap:
        logits = model(images)
        assert tap["first"].is_leaf
        cut = torch.autograd.grad(logits[:, 0].sum(), [tap["first"], tap["second"], tap["pair"]])
    with model.tap("first", "second", "pair") as tap:
        logits = model(images)
        full = torch.autograd.grad(logits[:, 0].sum(), [tap["first"], tap["second"], tap["pair"]])
    for gradient, expected in zip(cut, full, strict=True):
        assert expected.any()
        torch.testing.assert_close(gradient, expected)


def test_replaced_output_is_used_above_and_the_original_is_read(model, images):
    def without_first_channel(output):
        output[:, 0] = 0
        return output

    net, plain = model.module, model.features(images, "second")
    with model.tap("second", replace=without_first_channel) as tap:
        logits = model(images)
        again = model(images)
    torch.testing.assert_close(tap["second"], plain)
    maps = plain * torch.tensor([0, 1, 1, 1])[:, None, None]
    torch.testing.assert_close(logits, net.head(net.third(2 * maps.relu()).relu().mean((2, 3))))
    torch.testing.assert_close(again, logits)
    assert not torch.allclose(model(images), logits)


def test_replace_applies_to_the_last_call_of_a_reused_layer(model, images):
    with model.tap("relu", replace=torch.zeros_like) as tap:
        logits = model(images)
    torch.testing.assert_close(tap["relu"], model.features(images, "relu"))
    net = model.module
    expected = net.head(net.third(torch.zeros_like(tap["relu"])).relu().mean((2, 3)))
    torch.testing.assert_close(logits, expected)


def test_reading_layers_that_do_not_exist_or_run_is_refused(model, images):
    with pytest.raises(UnknownName, match="did you mean 'second'"):
        model.tap("secnd")
    with pytest.raises(ModelError, match="'idle' does not run in a forward pass"):
        model.features(images, "idle")
    with model.tap("second", "idle") as tap:
        with pytest.raises(ModelError, match="has not run"):
            _ = tap["second"]
        model(images)
        with pytest.raises(UnknownName, match="tapped layer"):
            _ = tap["third"]


def test_nested_taps_read_separately(model, images):
    with model.tap("second") as outer:
        model(images)
        before = outer["second"]
        with model.tap("second", leaf=True) as inner:
            model(images / 2)
        assert inner["second"].is_leaf
        torch.testing.assert_close(inner["second"].detach(), model.features(images / 2, "second"))
    torch.testing.assert_close(before, model.features(images, "second"))


def test_tap_does_not_read_a_method_that_runs_inside(model, images):
    with model.tap("second") as tap:
        model(images)
        before = tap["second"]
        methods["saliency"](model, images.flip(0), 1)
        assert tap["second"] is before


# --- rewriting -------------------------------------------------------------------------------------


def test_backward_rules_apply_to_every_form_of_relu():
    relus = [
        F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), F.relu6,
        lambda x: F.relu(x, inplace=True), lambda x: x.relu_(), lambda x: torch.relu_(x),
        lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0), lambda x: x.clamp_min(0),
        lambda x: x.clip(0), lambda x: torch.clamp_(x, min=0), lambda x: x.clamp(0, 6), lambda x: x.clip_(0),
        lambda x: F.hardtanh(x, 0.0, 6.0),
    ]  # fmt: skip
    x = torch.tensor([-1.0, 2.0, 3.0, -4.0], requires_grad=True)
    down = torch.tensor([1.0, 1.0, -1.0, -1.0])
    for rule, expected in ((guided, [0.0, 1.0, 0.0, 0.0]), (deconvnet, [1.0, 1.0, 0.0, 0.0])):
        for relu in relus:
            with rewrite_backward(rule) as rewrite:
                out = relu(x.clone())
            assert rewrite.count == 1
            assert out.tolist() == [0, 2, 3, 0]
            (gradient,) = torch.autograd.grad(out, x, down)
            assert gradient.tolist() == expected


def test_backward_rule_applies_to_every_relu_of_a_network_and_ends_with_the_block(model, images):
    pixels = images.clone().requires_grad_()
    with model.guard():
        plain = torch.autograd.grad(scores(model, pixels, 0).sum(), pixels)[0]
        with rewrite_backward(guided) as rewrite:
            rewritten = torch.autograd.grad(scores(model, pixels, 0).sum(), pixels)[0]
        assert rewrite.count == 3
        assert not torch.allclose(plain, rewritten)
        again = torch.autograd.grad(scores(model, pixels, 0).sum(), pixels)[0]
    assert torch.equal(plain, again)


def test_rule_that_is_not_required_leaves_a_network_without_relu_as_it_is():
    x = torch.ones(3, requires_grad=True)
    with rewrite_backward(guided, required=False) as rewrite:
        (gradient,) = torch.autograd.grad((-2 * x.sigmoid()).sum(), x)
    assert rewrite.count == 0 and (gradient < 0).all()


def test_relu_that_does_not_depend_on_pixels_is_not_counted():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 3)
            self.bias = nn.Sequential(nn.Linear(1, 3), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(self.head(x.flatten(1))) + self.bias(torch.ones(1, 1))

    model = load_model(Biased(), input_size=(3, 2, 2))
    pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
    with (
        pytest.raises(ModelError, match="the guided rule found no ReLU"),
        model.guard(),
        rewrite_backward(guided),
    ):
        torch.autograd.grad(model(pixels).sum(), pixels)


# --- guarding --------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(id(h) for h in getattr(m, kind).values()) for m in module.modules() for kind in kinds]


def _state(module: nn.Module) -> tuple:
    return (
        _hooks(module),
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [id(p) for p in (*module.parameters(), *module.buffers())],
        {name: value.clone() for name, value in module.state_dict().items()},
    )


def _assert_same(after: tuple, before: tuple) -> None:
    assert after[:4] == before[:4]
    assert after[4].keys() == before[4].keys()
    assert all(torch.equal(value, before[4][name]) for name, value in after[4].items())


class Interruption(Exception):
    pass


@settings(deadline=None, max_examples=60)
@given(
    training=st.lists(st.booleans(), min_size=10, max_size=10),
    frozen=st.lists(st.booleans(), min_size=10, max_size=10),
    use=st.sampled_from(["saliency", "grad_cam", "tap", "leaf", "features", "structure", "embed", "guided"]),
    error=st.sampled_from([None, Interruption, KeyboardInterrupt]),
    where=st.sampled_from(["first", "relu", "pair", "head"]),
)
def test_model_is_restored_however_a_run_ends(training, frozen, use, error, where):
    torch.manual_seed(0)
    module = Net()
    module.first.register_forward_pre_hook(lambda m, args: None)
    module.head.register_forward_hook(lambda m, args, out: None)
    for part, flag in zip(module.modules(), training, strict=True):
        part.training = flag
    for parameter, flag in zip(module.parameters(), frozen, strict=False):
        parameter.requires_grad_(not flag)
    if error is not None:

        def stop(*_):
            raise error

        module.get_submodule(where).register_forward_hook(stop)
    model = load_model(module, input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    before = _state(module)

    def run() -> None:
        if use in ("saliency", "grad_cam"):
            methods[use](model, images, 1)
            return
        with model.guard():
            if use == "structure":
                _ = model.structure
            elif use == "features":
                model.features(images, "second")
            elif use == "embed":
                model.embed(images)
            elif use == "guided":
                pixels = images.clone().requires_grad_()
                with rewrite_backward(guided):
                    scores(model, pixels, 0).sum().backward()
            else:
                with model.tap("second", "relu", leaf=use == "leaf"):
                    model(images)

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    _assert_same(_state(module), before)


def test_guards_of_two_threads_restore_when_the_last_is_left():
    module = Net().train()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with guard(module):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with guard(module):
        thread.start()
        assert inside.wait(10)
        with guard(module):
            assert not module.training
        assert not module.head.weight.requires_grad
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    leave.set()
    thread.join()
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())


def test_threads_on_one_model_get_the_results_of_single_runs():
    torch.manual_seed(0)
    module = Net().double()
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    jobs = [("saliency", {"target": t}) for t in (0, "second[1]", "pair[2,3,3]")]
    jobs += [("grad_cam", {"target": 1, "layer": layer}) for layer in ("second", "pair", "third")]
    single_runs = [methods[n](load_model(module, input_size=(3, 8, 8)), images, **k).maps for n, k in jobs]
    for _ in range(5):
        # A new model each time: its structure is recorded while all threads run.
        model = load_model(module, input_size=(3, 8, 8))
        barrier = threading.Barrier(len(jobs))
        results: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(jobs))}

        def work(i: int, model=model, barrier=barrier, results=results) -> None:
            name, params = jobs[i]
            barrier.wait()
            for _ in range(4):
                results[i].append(methods[name](model, images, **params).maps)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, expected in enumerate(single_runs):
            assert len(results[i]) == 4
            for maps in results[i]:
                assert torch.equal(maps, expected)
        calls = {name: layer.calls for name, layer in model.structure.layers.items()}
        assert calls == dict.fromkeys(calls, 1) | {"relu": 2}
        assert all(m.training for m in module.modules())
        assert all(p.requires_grad for p in module.parameters())


class Waiting(nn.Module):
    """Stops one thread's pass here until another thread's has run."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting_thread: threading.Thread | None = None
        self.inside, self.leave = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is self.waiting_thread:
            self.inside.set()
            assert self.leave.wait(10)
        return x


def test_structure_is_not_affected_by_a_pass_in_another_thread():
    waiting = Waiting()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), waiting, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = load_model(net, input_size=(3, 8, 8))
    images = torch.rand(5, 3, 8, 8)

    waiting.waiting_thread = thread = threading.Thread(target=lambda: model.structure)
    thread.start()
    assert waiting.inside.wait(10)
    model(images)
    waiting.leave.set()
    thread.join()
    assert [layer.calls for layer in model.structure.layers.values()] == [1] * 6
    assert model.last_map == "1"
    assert model.head.layer == "1"
