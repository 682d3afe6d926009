"""The checks of the conformance kit, one small function for each promise."""

# Importing a module registers its checks, in this order.
from . import declaration, single_run, repeated_runs, refusals, relations  # isort: skip
from .base import ARITHMETIC_UNTESTED, CHECKS, Check, checks_of

__all__ = [
    "ARITHMETIC_UNTESTED",
    "CHECKS",
    "Check",
    "checks_of",
    "declaration",
    "refusals",
    "relations",
    "repeated_runs",
    "single_run",
]
