"""The one exception that a user's mistake raises."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(RuntimeError):
    """Something the user can put right: a wrong setting, a missing file, an unreachable address.

    The commands (`lavis_dcd.train`, `lavis_dcd.evaluate`, `lavis_dcd.mine`) print one line per fault and exit with
    status 2, with no traceback.

    Args:
        message: one line, or several faults at once; each names the file, field or value, and the way out.
    """

    def __init__(self, message: str | Iterable[str]) -> None:
        self.faults: list[str] = [message] if isinstance(message, str) else [str(line) for line in message]
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[str]]]:
        # Keeps the list of faults when a data-loader worker sends the error to its parent.
        return type(self), (self.faults,)


class NotFiniteError(UserError, ValueError):
    """Scores that are NaN or infinite, which no ranking can be made of."""
