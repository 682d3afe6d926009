"""VGG layer names as papers write them (``relu3_1``)."""

from __future__ import annotations

from torch import nn


def vgg_layer_aliases(module: nn.Module) -> dict[str, str]:
    """The layers of a chain of convolutions between poolings, as the papers on VGG number them.

    ``conv3_2`` is the second convolution after the second pooling, ``relu3_2`` what follows it, ``pool3`` the
    pooling behind them. The chain is the network itself or its ``features``; others have no such names.
    """
    chain = module.get_submodule("features") if hasattr(module, "features") else module
    within = "" if chain is module else "features."
    found: dict[str, str] = {}
    block, place = 1, 0
    for name, layer in chain.named_children() if isinstance(chain, nn.Sequential) else ():
        match layer:
            case nn.Conv2d():
                place += 1
                found[f"conv{block}_{place}"] = within + name
            case nn.ReLU():
                found[f"relu{block}_{place}"] = within + name
            case nn.MaxPool2d() | nn.AvgPool2d():
                found[f"pool{block}"] = within + name
                block, place = block + 1, 0
            case nn.BatchNorm2d() | nn.Dropout() | nn.ReflectionPad2d():
                pass
            case _:
                return {}
    return found if block > 1 else {}
