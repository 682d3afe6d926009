"""A kind of promise: rows that never rise. Here and not with the method, so that nobody waits for torch."""

from typing import Literal

from phosphene import hookimpl
from phosphene.spec import Invariant


class Descending(Invariant):
    """From left to right no row of ``field`` rises."""

    kind: Literal["descending"] = "descending"
    field: str

    def check(self, inputs, params, result):
        steps = getattr(result, self.field).diff(dim=1)
        assert not (steps > 0).any(), f"{self.field} rises by {float(steps.max()):.3g}"


@hookimpl
def phosphene_invariants():
    return [Descending]
