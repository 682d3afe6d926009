"""``toy:`` - networks whose weights are written by hand, so that everything in them is known.

torch is imported when a network is asked for: ``phosphene --help`` loads this module, too.
"""

from phosphene import InputError, UnknownName, hookimpl


def stripes():
    """Do the edges of a picture lie across or upright? Sobel's two filters, both signs, averaged."""
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
    """The scheme: a network by its name, and all the names."""

    def load(self, name, *, weights, pretrained, **options):
        if name not in NETWORKS:
            raise UnknownName("toy model", name, NETWORKS)
        if weights is not None:
            raise InputError(f"toy:{name} brings its own weights; there are none called {weights!r}")
        return NETWORKS[name](**options)

    def names(self):
        return sorted(NETWORKS)


@hookimpl
def phosphene_model_loaders():
    return {"toy": ToyLoader()}
