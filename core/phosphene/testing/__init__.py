"""The conformance kit: what a method promises, tested from its spec alone."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
