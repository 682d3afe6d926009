"""Layer-wise relevance propagation (LRP) of convolutional networks and transformers."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Method, ModelError, Reference, hookimpl, input_gradient, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import (
    Agrees,
    Complete,
    Cost,
    Equivariant,
    InvariantTo,
    LinearIn,
    MapPerPixel,
    ZeroWhen,
    size,
)

from ._lrp_layers import EpsilonOption, GammaOption, LayerRules, RuleName, RuleOption, RulesByLayer
from ._lrp_oracle import (
    SIZE,
    ByFunctions,
    ByModules,
    Call,
    SmallTransformer,
    calls_have_their_relevance,
    explicit_relevance,
    model_of,
    products_with_weights_are_layers,
    rules_have_their_numbers,
)
from ._lrp_propagation import AttentionOption, AttentionRule, RelevancePropagation, relevance_of_pixels
from ._oracle_networks import NORMALIZATION
from ._relations import EQUIVARIANT


def equals_explicit_contributions() -> None:
    """R_i = sum_j c_ij / (sum_i c_ij + epsilon) R_j with the contributions c_ij = x_i w_ij of each rule.

    Without biases and epsilon the map is x dS/dx, which sums to the score. With constant attention, norms and
    gates a transformer is linear: a pixel's relevance is the score of this pixel alone. An operation that
    divides nothing in proportion is refused.
    """
    torch.manual_seed(0)
    images = torch.rand(4, *SIZE, dtype=torch.float64)
    images[0, :, 0, 0] = torch.tensor(NORMALIZATION["mean"])  # pixels of value 0 have relevance, too
    combinations: dict[RuleName, tuple[str, str, str]] = {
        "epsilon": ("epsilon",) * 3, "gamma": ("gamma",) * 3, "zplus": ("zplus",) * 3,
        "alpha_beta": ("alpha_beta",) * 3, "composite": ("gamma", "epsilon", "epsilon"),
        "epsilon_plus": ("zplus", "epsilon", "epsilon"), "epsilon_plus_flat": ("flat", "epsilon", "epsilon"),
        "epsilon_gamma_box": ("box", "epsilon", "epsilon"),
    }  # fmt: skip
    for network, (rule, names) in itertools.product((ByModules(), ByFunctions()), combinations.items()):
        model = model_of(network)
        for index in (0, 1):
            result = lrp(model, images, index, rule=rule, epsilon=0.25, gamma=2)
            expected = explicit_relevance(network, model, images, index, names, 0.25)
            torch.testing.assert_close(result.maps, expected.sum(1))
            assert result.targets == (f"class {index}",) * 4
    network = ByModules()
    rules = {"convolution": "w_square", "Linear": "zplus", "head": "gamma(2)"}
    maps = lrp(model_of(network), images, 1, rules=rules, epsilon=0.25).maps
    names = ("w_square", "zplus", "gamma")
    expected = explicit_relevance(network, model_of(network), images, 1, names, 0.25)
    torch.testing.assert_close(maps, expected.sum(1))
    transformer = SmallTransformer()
    model = model_of(transformer)
    for attention, index in itertools.product(get_args(AttentionRule), (0, 1)):
        maps = lrp(model, images[:2], index, attention=attention, epsilon=0).maps
        rows = [transformer.linear_relevance(x[None], index, attention) for x in model.normalize(images[:2])]
        torch.testing.assert_close(maps, torch.cat(rows).sum(1))
    layers = nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False)
    last = nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 2, bias=False)
    # Without a mean, which would be a bias.
    std = [0.25, 0.5, 0.75]
    network_without_biases = nn.Sequential(*layers, *last).double()
    model = load_model(network_without_biases, input_size=(3, 12, 12), mean=[0.0] * 3, std=std)
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    for index in (0, 1):
        maps = lrp(model, images, index, epsilon=0).maps
        torch.testing.assert_close(maps, (images * input_gradient(model, images, index)).sum(1))
        torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, index].detach())
    refused: list[Callable[[Tensor], Tensor]] = [
        F.softplus, F.dropout, torch.exp, torch.reciprocal, lambda x: x.sigmoid() + x,
        lambda x: torch.dropout(x, p=0.5, train=True), lambda x: (2 * x.sigmoid()) + x,
        lambda x: F.hardtanh(x, min_val=0.5, max_val=2.0), lambda x: torch.div(torch.ones_like(x), x),
    ]  # fmt: skip
    for call in refused:
        assert _is_refused(nn.Sequential(nn.Conv2d(3, 2, 2), Call(call), nn.Flatten()))
    assert _is_refused(nn.Sequential(nn.MaxPool2d(3), nn.Flatten()))
    calls_have_their_relevance(lrp)
    products_with_weights_are_layers(lrp)
    rules_have_their_numbers(lrp)


def _is_refused(network: nn.Module) -> bool:
    try:
        lrp(model_of(network), torch.rand(1, *SIZE, dtype=torch.float64), 0)
    except ModelError:
        return True
    return False


@method(
    family="attribution",
    title="LRP",
    references=[
        Reference(
            key="bach2015",
            title="On Pixel-Wise Explanations for Non-Linear Classifier Decisions by "
            "Layer-Wise Relevance Propagation",
            authors="Bach, Binder, Montavon, Klauschen, Mueller, Samek",
            year=2015,
            url="https://doi.org/10.1371/journal.pone.0130140",
        ),
        Reference(
            key="montavon2019",
            title="Layer-Wise Relevance Propagation: An Overview",
            authors="Montavon, Binder, Lapuschkin, Samek, Mueller",
            year=2019,
            url="https://doi.org/10.1007/978-3-030-28954-6_10",
        ),
        Reference(
            key="montavon2017",
            title="Explaining NonLinear Classification Decisions with Deep Taylor Decomposition",
            authors="Montavon, Lapuschkin, Binder, Samek, Mueller",
            year=2017,
            url="https://arxiv.org/abs/1512.02479",
        ),
        Reference(
            key="ali2022",
            title="XAI for Transformers: Better Explanations through Conservative Propagation",
            authors="Ali, Schnake, Eberle, Montavon, Mueller, Wolf",
            year=2022,
            url="https://arxiv.org/abs/2202.07304",
        ),
        Reference(
            key="achtibat2024",
            title="AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers",
            authors="Achtibat, Hatefi, Dreyer, Jain, Wiegand, Lapuschkin, Samek",
            year=2024,
            url="https://arxiv.org/abs/2402.05602",
        ),
    ],
    invariants=[MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_explicit_contributions,
    relations=[
        *(
            Complete(0.0, where={"rule": rule, "epsilon": 0}, networks=("homogeneous",), tolerance=1e-6)
            for rule in ("epsilon", "gamma", "composite", "epsilon_gamma_box")
        ),
        Agrees("attribution.gradient_x_input", where={"epsilon": 0}, networks=("homogeneous",)),
        LinearIn("target", where={"epsilon": 0}, networks=("gap",)),
        *EQUIVARIANT,
        *(Equivariant(transform, where={"rule": "gamma"}) for transform in ("hflip", "transpose")),
        InvariantTo("batch_order"),
        ZeroWhen("constant"),
        ZeroWhen("ignored"),
    ],
    demo={"rule": "composite"},
)
def lrp(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    rule: RuleOption = "epsilon",
    rules: RulesByLayer = {},  # noqa: B006
    attention: AttentionOption = "cp_lrp",
    epsilon: EpsilonOption = 1e-6,
    gamma: GammaOption = 0.25,
) -> Attribution:
    """Layer-wise relevance propagation (LRP) of convolutional networks and transformers.

    R_i = sum_j x_i w'_ij / (z'_j + epsilon sign z'_j) R_j,  z' = sum_i x_i w'_ij + b'_j,  M = sum_c R_c

    "epsilon": w' = w. "gamma": w' = w + gamma max(w, 0) where x_i and z_j have the same sign, and w + gamma
    min(w, 0) where they differ, so that contributions with the sign of z_j are favored (b' is as w' for x_i =
    1). "zplus": positive contributions x_i w_ij alone; an output without any passes no relevance on.
    "alpha_beta": the positive ones times alpha = 2, minus the negative ones times alpha - 1. Of the layer
    that reads the pixels also "box" (contributions above the smallest that a pixel in [0, 1] can have),
    "flat" (equal parts) and "w_square" (in proportion to w^2). The relevance is that of the network's input,
    pixels minus the model's mean.

    Convolutional and linear layers follow the rule, as modules or as functions, with a directly following
    batch norm folded in. ReLU, GELU, SiLU, Hardswish and other activations with f(0) = 0, pooling, sums,
    dropout in eval mode, other batch norms and reshaping pass relevance on in proportion. Layer norm, RMS
    norm and group norm do so with their standard deviation as a constant; so are all divisors, and sigmoid
    gates.

    "cp_lrp": attention probabilities are constants, and so is the activation that multiplies another tensor
    in a gated perceptron (SwiGLU). "attn_lrp": both factors of a product have half of its relevance, and that
    of attention probabilities passes softmax by its gradient to queries and keys.

    With "epsilon" or "gamma" and "cp_lrp", the map of a network without biases sums to the score, up to what
    ``epsilon`` absorbs. Biases of layers and norms, class tokens and positions have relevance, too, which no
    pixel has: in a transformer often more than half of the score.

    Returns:
        ``maps`` (N, H, W), raw and signed: the relevance of each pixel, summed over channels.

    Raises:
        ModelError, naming the operation and the layer, for one without a rule (exp, softplus, a softmax or
            sigmoid that multiplies nothing), for a network without convolutional and linear layers, and for
            ``rules`` of a layer that the target does not depend on.
        UnknownName: ``rules`` of a layer or type that the model does not have.
        InputError: a rule for pixels for a layer that does not read them.

    Example::
        from phosphene import run

        rules = {"Conv2d": "gamma(0.25)", "features.0": "box"}
        result = run("lrp", images="builtin:scenes/2", rules=rules)
        result.maps.shape  # (2, 64, 64)
        run("lrp", model="builtin:shapes-vit", rule="epsilon_gamma_box", attention="attn_lrp")

    Source:
        Bach et al. 2015, equations 58 and 60; Montavon et al. 2017 (box, w_square); Montavon et al. 2019,
        section 10.2; Ali et al. 2022, section 3 ("cp_lrp"); Achtibat et al. 2024, section 3 ("attn_lrp").
    """
    layers = LayerRules(model, rule, rules, epsilon, gamma)
    relevance = relevance_of_pixels(RelevancePropagation(model, layers, attention), images, target)
    return Attribution(
        images=images, maps=relevance.sum(1), targets=target.names(model, len(images)), layout="map"
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [lrp]
