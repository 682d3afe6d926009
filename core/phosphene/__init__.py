"""Phosphene: one door to everything that can be seen inside a vision model, and everything drawn with one.

Importing it imports neither torch nor pydantic: the names in ``__init__.pyi`` are fetched when first used.
"""

import lazy_loader

from .deprecation import moved

_fetch, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
#: Names that went away, by what to use instead; see CONTRIBUTING.md.
__getattr__ = moved(__name__, {}, _fetch)
