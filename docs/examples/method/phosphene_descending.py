"""A kind of invariant: rows that never increase. In a module of its own, which does not import torch."""

from typing import Literal

from phosphene import hookimpl
from phosphene.spec import Invariant


class Descending(Invariant):
    """No row of ``field`` increases from left to right."""

    kind: Literal["descending"] = "descending"
    field: str

    def check(self, inputs, params, result):
        steps = getattr(result, self.field).diff(dim=1)
        assert not (steps > 0).any(), f"{self.field} increases by {float(steps.max()):.3g}"


@hookimpl
def phosphene_invariants():
    return [Descending]
