"""A progress that writes down what it hears."""

from typing import Any


class Said:
    """stages: (what, total); units: by name, of all stages; lines: the notes."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.units: list[str] = []
        self.lines: list[str] = []

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.stages.append((what, total))

    def advance(self, unit: str, **figures: Any) -> None:
        self.units.append(unit)

    def note(self, text: str) -> None:
        self.lines.append(text)
