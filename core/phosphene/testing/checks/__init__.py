"""The checks of the conformance kit, one small function for each promise."""

# Importing a module registers its checks, in this order.
from . import declaration, oracle_examination, single_run, repeated_runs, refusals  # isort: skip
from .base import CHECKS, Check, checks_of

__all__ = [
    "CHECKS",
    "Check",
    "checks_of",
    "declaration",
    "oracle_examination",
    "refusals",
    "repeated_runs",
    "single_run",
]
