"""Changes that are restored, wherever Ctrl-C arrives: ``Restoring`` context managers and their record.

Ctrl-C may arrive between any two instructions, also at the first one of an ``__exit__``, which then does not
run. So a change is recorded before it is made, and ``torch_state.call_and_restore`` restores all that remain.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

#: What the current call changed, the last last; each entry may be called repeatedly. None outside calls.
current_changes: ContextVar[list[Callable[[], None]] | None] = ContextVar("phosphene_changes", default=None)


def record_change(restore: Callable[[], None]) -> None:
    """Record a change before it is made: ``restore`` is called at the end of the call, if not forgotten."""
    changes = current_changes.get()
    if changes is not None:
        changes.append(restore)


def forget_change(restore: Callable[[], None]) -> None:
    """The change was restored."""
    changes = current_changes.get()
    if changes is not None and restore in changes:
        changes.remove(restore)


class Restoring:
    """A context manager whose ``close`` restores what ``open`` changed, wherever Ctrl-C arrives.

    ``close`` may be called repeatedly, and after a part of ``open``.
    """

    def open(self) -> None:
        """Make the change."""
        raise NotImplementedError

    def close(self) -> None:
        """Restore what was before."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        try:
            record_change(self.close)
            self.open()
            return self
        except BaseException:
            Restoring.__exit__(self)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:  # again, because Ctrl-C may have ended the first at any instruction
            self.close()
            forget_change(self.close)
