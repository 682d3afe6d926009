"""The URI scheme ``toy:``: networks with weights written by hand.

torch is imported when a network is built: ``phosphene --help`` imports this module, too.
"""

from phosphene import InputError, UnknownName, hookimpl


def stripes():
    """Horizontal or vertical edges: Sobel's two filters with both signs, averaged over the image."""
    import torch
    from torch import nn

    edge = torch.tensor([[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]]) / 8
    kernels = torch.stack([edge, -edge, edge.T, -edge.T])
    network = nn.Sequential()
    network.add_module("edges", nn.Conv2d(3, 4, 3, bias=False))
    network.add_module("relu", nn.ReLU())
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classes", nn.Linear(4, 2, bias=False))
    network.edges.weight.data = kernels[:, None].repeat(1, 3, 1, 1) / 3
    network.classes.weight.data = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    return network, {"input_size": (3, 32, 32), "classes": ("across", "upright")}


NETWORKS = {"stripes": stripes}


class ToyLoader:
    """Builds a network by its name, and lists the names."""

    def load(self, name, *, weights, pretrained, **options):
        if name not in NETWORKS:
            raise UnknownName("toy model", name, NETWORKS)
        if weights is not None:
            raise InputError(f"toy:{name} has fixed weights; there are none named {weights!r}")
        return NETWORKS[name](**options)

    def names(self):
        return sorted(NETWORKS)


@hookimpl
def phosphene_model_loaders():
    return {"toy": ToyLoader()}
