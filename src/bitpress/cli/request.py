"""What is asked of a model on the terminal."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Asked", "threads_text"]


@dataclass(frozen=True)
class Asked:
    """What the options of `bitpress run` say. `native` holds those that only the native engine has."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    sampling: dict[str, float | None] = field(default_factory=dict)
    runtime: str = "auto"
    packed: bool = False
    memory: str | None = None
    threads: int | None = None
    native: dict[str, Any] = field(default_factory=dict)


def threads_text(count: int) -> str:
    """Say how many threads there are."""
    return f"{count} thread{'s' * (count != 1)}"
