"""The hook of the role ``captions``. It is a module of its own, so that printing help does not import torch."""

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from phosphene_captions import CAPTIONS

    return [CAPTIONS]
