"""Progress of a long run. The pipeline calls it; the command line or a notebook decides how it looks."""

from typing import Any, Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A stage of `total` units starts; `done` of them were finished by an earlier run."""
        ...

    def advance(self, unit: str, **figures: Any) -> None:
        """One unit is finished; figures such as error=0.003 belong to it."""
        ...

    def note(self, text: str) -> None:
        """A message of one line."""
        ...


class Silent:
    """Ignores all progress."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, unit: str, **figures: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass
