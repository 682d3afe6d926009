"""VGG layer names as papers write them (``relu3_1``)."""

from __future__ import annotations

from torch import nn


def vgg_layer_aliases(module: nn.Module) -> dict[str, str]:
    """Names of a VGG's layers as papers write them, and the network's own names for them.

    ``conv3_2`` is the second convolution after the second pooling, ``relu3_2`` the ReLU after it, ``pool3``
    the third pooling. Empty where neither the network nor its ``features`` is a plain sequence of
    convolutions, ReLUs and poolings.
    """
    chain = module.get_submodule("features") if hasattr(module, "features") else module
    prefix = "" if chain is module else "features."
    aliases: dict[str, str] = {}
    block, number = 1, 0
    for name, layer in chain.named_children() if isinstance(chain, nn.Sequential) else ():
        match layer:
            case nn.Conv2d():
                number += 1
                aliases[f"conv{block}_{number}"] = prefix + name
            case nn.ReLU():
                aliases[f"relu{block}_{number}"] = prefix + name
            case nn.MaxPool2d() | nn.AvgPool2d():
                aliases[f"pool{block}"] = prefix + name
                block, number = block + 1, 0
            case nn.BatchNorm2d() | nn.Dropout() | nn.ReflectionPad2d():
                pass
            case _:
                return {}
    return aliases if block > 1 else {}
