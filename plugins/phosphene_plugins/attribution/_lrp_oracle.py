"""Small networks whose relevance follows from explicit contributions, for the oracle of LRP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, fork_random_state, load_model
from phosphene.errors import PhospheneError

from ._oracle_networks import NORMALIZATION

SIZE = (3, 3, 4)


class ByModules(nn.Module):
    """Two positions of a convolution with batch norm and ReLU6, a linear layer with ReLU, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, (3, 2), stride=2), nn.BatchNorm2d(4, eps=0.5)
        for values in (self.norm.running_var, self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.uniform_(values, 0.5, 1.5)  # type: ignore[arg-type]
        self.relu6, self.dropout, self.relu = nn.ReLU6(), nn.Dropout(), nn.ReLU()
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 2)
        nn.init.uniform_(self.convolution.weight, -2, 2)
        nn.init.uniform_(self.head.weight[1], -1, 0.2)  # a negative score

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.relu6(self.norm(self.convolution(x))))
        result: Tensor = self.head(self.relu(self.hidden(x.flatten(1))))
        return result

    def first_layer(self, x: Tensor) -> Tensor:
        """The convolution with the batch norm folded in."""
        result: Tensor = self.norm(self.convolution(x)).flatten(1)
        return result


class ByFunctions(ByModules):
    """The same by function calls and in-place calls, without the optional arguments, with factors between."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.convolution.weight, stride=2)
        x = torch.batch_norm(x, None, None, *self.statistics(), False, 0.1, 1e-5, False)
        x = F.relu(x.mul(0.5)) * 2
        x.clamp_(0, 6)
        x = F.dropout(x, 0.5, False).flatten(1) / 1
        x = F.linear(x[:, None], self.hidden.weight, self.hidden.bias)[:, 0]
        F.hardtanh(x, 0, 100, inplace=True)  # a ReLU
        return F.linear(x, self.head.weight)

    def first_layer(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.convolution.weight, stride=2)
        return F.batch_norm(x, *self.statistics()).flatten(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        return mean, variance


def model_of(network: nn.Module) -> Model:
    """A model of one of the networks, in double precision."""
    return load_model(network.double().eval(), input_size=SIZE, **NORMALIZATION)


@dataclass
class Contributions:
    """How much each input of a layer, and its bias as the last, contributes to its outputs: (N, J, I + 1)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    #: The smallest and largest values of the inputs (I,), where they are pixels.
    bounds: tuple[Tensor, Tensor] | None = None

    def relevance(self, relevance: Tensor, rule: str, gamma: float, epsilon: float) -> Tensor:
        """The relevance (N, I) of the inputs, from that of the outputs (N, J)."""
        values = torch.cat([self.x[:, None] * self.weight, self.bias[:, None].expand(len(self.x), -1, 1)], 2)
        shares = {
            "epsilon": lambda: _divided(values, epsilon),
            "gamma": lambda: _divided(values * (1 + gamma * (values * values.sum(2, True) > 0)), epsilon),
            "zplus": lambda: _divided(values.clamp(min=0), epsilon),
            "alpha_beta": lambda: (
                2 * _divided(values.clamp(min=0), epsilon) - _divided(values.clamp(max=0), epsilon)
            ),
            "box": lambda: _divided(self._above_bounds(), epsilon),
            "flat": lambda: _divided((self.weight != 0).to(values).expand(len(values), -1, -1), epsilon),
            "w_square": lambda: _divided(
                torch.cat([self.weight, self.bias[:, None]], 1).square().expand_as(values), epsilon
            ),
        }[rule]()
        return (shares * relevance[..., None]).sum(1)[:, : self.x.shape[1]]

    def _above_bounds(self) -> Tensor:
        """x w minus its smallest value for inputs within the bounds, (N, J, I)."""
        assert self.bounds is not None
        low, high = self.bounds
        return self.x[:, None] * self.weight - torch.minimum(low * self.weight, high * self.weight)


def _divided(values: Tensor, epsilon: float) -> Tensor:
    """Contributions (N, J, I) as shares of their sum; none where it is 0."""
    z = values.sum(2, keepdim=True)
    return torch.where(z == 0, 0, values / (z + epsilon * z.sign()))


def explicit_relevance(
    network: ByModules, model: Model, images: Tensor, index: int, rules: Sequence[str], epsilon: float
) -> Tensor:
    """The relevance (N, C, H, W) of pixels for a class, with a rule for each layer, and gamma 2."""
    x = model.normalize(images)
    with torch.no_grad():
        zero = torch.zeros_like(x[:1])
        units = torch.eye(zero.numel()).to(x).view(-1, *SIZE)
        offset = network.first_layer(zero)[0]
        matrix = (network.first_layer(units) - offset).T
        first = network.first_layer(x).clamp(0, 6)
        second: Any = network.hidden(first).relu()
        relevance = network.head(second) * F.one_hot(torch.tensor(index), 2)
        black, white = (model.normalize(torch.full_like(images[:1], value)).flatten() for value in (0.0, 1.0))
        last_bias = torch.zeros(2).to(x) if network.head.bias is None else network.head.bias
        layers = [
            Contributions(x.flatten(1), matrix, offset, (black, white)),
            Contributions(first, network.hidden.weight, network.hidden.bias),
            Contributions(second, network.head.weight, last_bias),
        ]
        for layer, rule in reversed(list(zip(layers, rules, strict=True))):
            relevance = layer.relevance(relevance, rule, 2, epsilon)
        return relevance.view_as(x)


class SmallTransformer(nn.Module):
    """Two patches and a class token: layer norm, attention, RMS norm, a gated perceptron, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, (3, 2), stride=2)
        self.class_token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(3, 4))
        self.norm, self.rms_norm = nn.LayerNorm(4, eps=0.2), nn.RMSNorm(4, eps=0.1)
        self.mix, self.project = nn.Linear(4, 12), nn.Linear(4, 4)
        self.gate, self.up, self.down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        for parameter in (*self.norm.parameters(), *self.rms_norm.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        query, key, value = _heads(self.mix(self.norm(x)))
        x = x + self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        normed = self.rms_norm(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        result: Tensor = self.head(F.gelu(self.hidden(x[:, 0])))
        return result

    def linear_relevance(self, x: Tensor, index: int, attention: str) -> Tensor:
        """The relevance (1, C, H, W) of the normalized pixels x of one image, without gradients.

        With its factors fixed at their values for x, and without biases, the network is linear: the relevance
        of a pixel is the score of that pixel alone.
        """
        # Values at x.
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token, tokens], 1) + self.positions
        deviation = (tokens.var(2, correction=0, keepdim=True) + 0.2).sqrt()
        query, key, value = _heads(self.mix(self.norm(tokens)))
        probabilities = (torch.einsum("nhid,nhjd->nhij", query, key) / 2**0.5).softmax(3)
        attended = torch.einsum("nhij,nhjd->nhid", probabilities, value)
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        size = (tokens.square().mean(2, keepdim=True) + 0.1).sqrt()
        gate, up = self.gate(self.rms_norm(tokens)), self.up(self.rms_norm(tokens))
        tokens = tokens + self.down(gate * gate.sigmoid() * up)
        hidden = self.hidden(tokens[:, 0])
        # The linear network on each pixel alone.
        units = torch.diag(x.flatten()).view(-1, *SIZE)
        t = F.conv2d(units, self.patches.weight, stride=2).flatten(2).transpose(1, 2)
        t = torch.cat([torch.zeros(len(t), 1, 4).to(t), t], 1)
        normed = (t - t.mean(2, keepdim=True)) / deviation * self.norm.weight
        q, k, v = _heads(normed @ self.mix.weight.T)
        mixed = torch.einsum("nhij,nhjd->nhid", probabilities.expand(len(t), -1, -1, -1), v)
        if attention == "attn_lrp":
            logits = torch.einsum("nhid,nhjd->nhij", q, key.expand_as(k))
            logits = (logits + torch.einsum("nhid,nhjd->nhij", query.expand_as(q), k)) / 2 / 2**0.5
            change = probabilities * (logits - (probabilities * logits).sum(3, keepdim=True))
            mixed = (mixed + torch.einsum("nhij,nhjd->nhid", change, value.expand_as(v))) / 2
        t = t + mixed.transpose(1, 2).flatten(2) @ self.project.weight.T
        normed = t / size * self.rms_norm.weight
        product = gate * gate.sigmoid() * (normed @ self.up.weight.T)
        if attention == "attn_lrp":
            product = (product + gate.sigmoid() * (normed @ self.gate.weight.T) * up) / 2
        t = t + product @ self.down.weight.T
        h = t[:, 0] @ self.hidden.weight.T * F.gelu(hidden) / hidden
        return (h @ self.head.weight[index]).view(1, *SIZE)


def _heads(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (N, 2, T, 2) of two heads."""
    query, key, value = mixed.unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return query, key, value


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _standardized(y: Tensor, groups: int, shift: Tensor) -> Tensor:
    """y of every group minus its mean, by a deviation without relevance, times two; plus a shift."""
    parts = y.unflatten(1, (groups, -1)).flatten(2)
    deviation = (parts.var(2, correction=0, keepdim=True) + 0.1).sqrt().detach()
    return 2 * ((parts - parts.mean(2, keepdim=True)) / deviation).view_as(y) + shift.view(-1, 1, 1)


def calls_have_their_relevance(lrp: Callable[..., Any]) -> None:
    """R = x dS/dx of the network with its factors detached, for calls that need a rule."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, *SIZE, generator=draw, dtype=torch.float64)
    other, ones = torch.randn(4, 2, 3, generator=draw, dtype=torch.float64), torch.ones(4).double()
    shift, matrix = torch.randn(4, generator=draw).double(), torch.randn(3, 5, generator=draw).double()
    tanh = lambda y: y * (y.tanh() / y).detach()
    clamped = lambda y: y * (y.clamp(-0.3, 0.4) / y).detach()
    norm = lambda y: y.norm(dim=1, keepdim=True).detach()
    pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (
            lambda y: F.group_norm(y, 2, 2 * ones, shift, 0.1),
            lambda y: _standardized(y, 2, shift),
        ),
        (
            lambda y: F.instance_norm(y, weight=2 * ones, bias=shift, eps=0.1),
            lambda y: _standardized(y, 4, shift),
        ),
        (
            lambda y: F.instance_norm(y, shift, 2 * ones, ones, shift, False, eps=0.5),
            lambda y: (y - shift.view(-1, 1, 1)) / 2.5**0.5 + shift.view(-1, 1, 1),
        ),
        (
            lambda y: F.cosine_similarity(y, other[None], eps=1e-3),
            lambda y: (y * other).sum(1) / norm(y)[:, 0] / other.norm(dim=0),
        ),
        (
            lambda y: F.cosine_similarity(y, y.flip(1)),
            lambda y: (y.detach() * y.flip(1) + y * y.flip(1).detach()).sum(1) / 2 / norm(y)[:, 0] ** 2,
        ),
        (lambda y: F.normalize(y, dim=1), lambda y: y / norm(y)),
        (lambda y: F.hardtanh(y, -0.3, 0.4), clamped),
        (lambda y: F.hardtanh(y, max_val=0.4, min_val=-0.3), clamped),
        (lambda y: F.hardtanh(y.clone(), -0.3, 0.4, True), clamped),
        (lambda y: torch.tanh_(y.clone()), tanh),
        (lambda y: y.clone().tanh_() + y, lambda y: tanh(y) + y),
        (lambda y: F.elu(y.clone(), inplace=True), lambda y: y * (F.elu(y) / y).detach()),
        (lambda y: F.elu(y, inplace=False) + y, lambda y: y * (F.elu(y) / y).detach() + y),
        (lambda y: y.square().pow(1.5), lambda y: y * y.detach().abs() ** 2 * y.detach().sign()),
        (lambda y: y * y.square().pow(0.25), lambda y: y * y.detach().abs().sqrt()),
        (lambda y: y * (2 * y.sigmoid() + 1), lambda y: y * (2 * y.sigmoid() + 1).detach()),
        (lambda y: y / (y.var(1, keepdim=True) + 1), lambda y: y / (y.var(1, keepdim=True) + 1).detach()),
        (
            lambda y: 3 / y.abs().add(1).rsqrt().reciprocal() * y,
            lambda y: 3 / (y.abs() + 1).sqrt().detach() * y,
        ),
        # A gate has no relevance, also as a clone; other tensors that are multiplied have half each.
        (lambda y: y.relu().clone() * y.flip(1), lambda y: y.relu().detach() * y.flip(1)),
        (
            lambda y: y.relu().flip(1) * y,
            lambda y: (y.relu().flip(1).detach() * y + y.relu().flip(1) * y.detach()) / 2,
        ),
        (
            lambda y: torch.addcmul(y, y, y.flip(1), value=0.5),
            lambda y: y + 0.25 * (y.detach() * y.flip(1) + y * y.flip(1).detach()),
        ),
        (lambda y: y.clone().mul_(other), lambda y: y * other),
        (lambda y: y.clone().div_(2) / other.abs(), lambda y: y / 2 / other.abs()),
        (lambda y: y @ matrix, lambda y: y @ matrix),
        (lambda y: torch.matmul(y, other.mT), lambda y: y @ other.mT),
        (
            lambda y: y @ y.flip(1).mT,
            lambda y: (y.detach() @ y.flip(1).mT + y @ y.flip(1).mT.detach()) / 2,
        ),
        (
            lambda y: y.flatten(2).softmax(2) * y.flatten(2),
            lambda y: y.flatten(2).softmax(2).detach() * y.flatten(2),
        ),
        (lambda y: torch.var_mean(y, 1)[1], lambda y: y.mean(1)),
        (lambda y: F.dropout(y, training=False), lambda y: y),
        (
            lambda y: F.cosine_similarity(0 * y, other[None], eps=1e-3) + y.mean(1),
            lambda y: y.mean(1),
        ),
        (
            _overwritten,
            lambda y: (y.detach() * y.flip(1) + y * y.flip(1).detach()) / 2,
        ),
        (
            lambda y: F.scaled_dot_product_attention(y, other.expand_as(y), y, scale=1.0),
            lambda y: (y @ other.mT).softmax(3).detach() @ y,
        ),
        (
            lambda y: F.scaled_dot_product_attention(other.expand_as(y), y, y, scale=1.0),
            lambda y: (other @ y.mT).softmax(3).detach() @ y,
        ),
    ]
    for number, (call, reference) in enumerate(pairs):
        with fork_random_state():
            torch.manual_seed(number)
            first = nn.Conv2d(3, 4, (2, 2), bias=False).double()
        width = reference(first(images)).flatten(1).shape[1]
        weight = torch.randn(2, width, generator=draw, dtype=torch.float64)
        last = nn.Linear(width, 2, bias=False).double()
        last.weight.data = weight
        model = model_of(nn.Sequential(first, Call(call), nn.Flatten(), last))
        x = model.normalize(images).detach().requires_grad_()
        for index in (0, 1):
            score = (reference(first(x)).flatten(1) @ weight[index]).sum()
            (gradient,) = torch.autograd.grad(score, x)
            expected = (x * gradient).sum(1).detach()
            maps = lrp(model, images, index, epsilon=0).maps
            torch.testing.assert_close(maps, expected, msg=f"call {number}")


def _overwritten(y: Tensor) -> Tensor:
    product = y * 1
    product.mul_(y.flip(1))
    return product


def products_with_weights_are_layers(lrp: Callable[..., Any]) -> None:
    """x W and b + x W have the rule of a linear layer, x times a factor has none; constant attention."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, *SIZE, generator=draw, dtype=torch.float64)
    weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((36, 5), (5,)))
    first, last = nn.Linear(36, 5).double(), nn.Linear(5, 2).double()
    nn.init.constant_(last.weight[0], -1.0)
    options: dict[str, Any] = {"rule": "zplus", "epsilon": 0.25}

    def maps(*layers: nn.Module, **more: Any) -> Tensor:
        network = nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), last)
        result: Tensor = lrp(model_of(network), images, 0, **options | more).maps
        return result

    first.weight.data, first.bias.data = weight.mT, bias
    torch.testing.assert_close(maps(Call(lambda x: torch.addmm(bias, x, weight))), maps(first))
    first.bias.data = torch.zeros_like(bias)
    for product in (torch.matmul, torch.mm, lambda x, w: x @ w):
        torch.testing.assert_close(maps(Call(lambda x, product=product: product(x, weight))), maps(first))  # type: ignore[misc]
    # By a factor, here weights times a sigmoid of 0, it is a product, whose gradient divides relevance.
    body = nn.Linear(36, 36).double()
    by_factor = maps(body, Call(lambda x: x @ (2 * weight * (0 * x.sum()).sigmoid())))
    by_constant = maps(body, Call(lambda x: torch.einsum("ni,ij->nj", x, weight)))
    torch.testing.assert_close(by_factor, by_constant)


def rules_have_their_numbers(lrp: Callable[..., Any]) -> None:
    """The longest name that contains a layer decides, before its type; numbers of single layers."""
    with fork_random_state():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(3, 4, (2, 2)), nn.ReLU())
        block = nn.Sequential(inner, nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten())
        network = nn.Sequential(block, nn.Linear(24, 2))
    model = model_of(network)
    images = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def maps(**options: Any) -> Tensor:
        result: Tensor = lrp(model, images, 1, **{"epsilon": 0.25} | options).maps
        return result

    cases: tuple[tuple[dict[str, str], dict[str, Any]], ...] = (
        ({"0": "gamma(3)", "1": "gamma(3)"}, {"rule": "gamma", "gamma": 3.0}),
        ({"Conv2d": "gamma", "Linear": "gamma"}, {"rule": "gamma", "gamma": 3.0}),
        ({"0": "zplus", "0.0": "alpha_beta(2)"}, {"rules": {"0.0.0": "alpha_beta", "0.1": "zplus"}}),
        ({"0.0": "alpha_beta(2)", "0": "zplus"}, {"rules": {"0.0.0": "alpha_beta", "0.1": "zplus"}}),
        ({"Conv2d": "zplus", "0.0": "alpha_beta"}, {"rules": {"0.0.0": "alpha_beta", "0.1": "zplus"}}),
        ({"0": "epsilon(0)", "1": "epsilon(0)"}, {"epsilon": 0.0}),
        ({"0": "epsilon(1)", "1": "epsilon(1)"}, {"epsilon": 1.0}),
        ({"0": "gamma(0)", "1": "epsilon"}, {}),
        ({"0": "gamma(1000)", "1": "gamma(1000)"}, {"rule": "gamma", "gamma": 1000.0}),
    )
    for rules, options in cases:
        torch.testing.assert_close(maps(rules=rules, gamma=3.0), maps(**options), msg=str(rules))
    assert (maps(rules={"0": "alpha_beta(1)"}) - maps(rules={"0": "zplus"})).abs().max() < 1e-12
    for rules, message in (
        ({"0": "epsilon(1.5)"}, "epsilon takes a number from 0 to 1, not 1.5"),
        ({"0": "gamma(1000.5)"}, "gamma takes a number from 0 to 1000, not 1000.5"),
        ({"0": "alpha_beta(0.5)"}, "alpha_beta takes a number from 1 to 1000, not 0.5"),
        ({"0": "alpha_beta(1000.5)"}, "alpha_beta takes a number from 1 to 1000, not 1000.5"),
        ({"1": "flat"}, "Flat of '1' is a rule for the layer that reads the pixels"),
        ({"2": "flat"}, "'2'"),
        ({"0.0.1": "gamma"}, "no convolution or linear layer below the target is '0.0.1'"),
    ):
        refusal = ""
        try:
            maps(rules=rules)
        except PhospheneError as error:
            refusal = str(error)
        assert message in refusal, f"{message}: {refusal}"
