"""Progress of a long run. The pipeline calls it; the command line or a notebook decides how it looks."""

from typing import Any, Protocol, runtime_checkable

__all__ = ["Progress", "Silent", "Stepwise"]


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


@runtime_checkable
class Stepwise(Protocol):
    """A progress that also shows how far the unit in work has come; others hear of whole units."""

    def step(self, unit: str, share: float, **figures: Any) -> None:
        """A share, from 0 to 1, of the unit in work is done; figures such as loss=0.003 belong to its last step."""
        ...


class Silent:
    """Ignores all progress."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, unit: str, **figures: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass
