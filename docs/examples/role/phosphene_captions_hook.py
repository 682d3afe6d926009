"""The hook of the role ``captions``, in a module of its own that does not import torch."""

from phosphene import hookimpl


@hookimpl
def phosphene_roles():
    from phosphene_captions import CAPTIONS

    return [CAPTIONS]
