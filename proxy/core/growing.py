"""Text that grows by small pieces and is read twice: what is new since the last look, and all of it at the end."""

from io import StringIO

__all__ = ["GrowingText"]


class GrowingText:
    """Append by ``fresh.write``: the hot path pays for nothing else."""

    __slots__ = ("_older", "_older_chars", "fresh")

    def __init__(self) -> None:
        self.fresh = StringIO()
        """What came since the last ``take``."""
        self._older: list[str] = []
        self._older_chars = 0

    @property
    def chars(self) -> int:
        """Characters in all."""
        return self._older_chars + self.fresh.tell()

    def take(self) -> str:
        """What came since the last call."""
        new = self.fresh.getvalue()
        if new:
            self._older.append(new)
            self._older_chars += len(new)
            # A new one, since truncating would keep four bytes for each character it ever had.
            self.fresh = StringIO()
        return new

    def getvalue(self) -> str:
        """All of it."""
        if not self._older:
            return self.fresh.getvalue()
        return "".join(self._older) + self.fresh.getvalue()
