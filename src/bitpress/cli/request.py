"""What a user asks of a model on the terminal, and what comes back."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bitpress.runtime.detokenizer import check_stop
from bitpress.runtime.native.options import USUAL, EngineOptions
from bitpress.runtime.sampling import SamplingRequest

__all__ = ["Answer", "Request", "threads_text"]


@dataclass(frozen=True)
class Request:
    """The options of `bitpress run`. Of `engine`, transformers follows `threads` alone. Raises UsageError for invalid stop strings."""

    max_tokens: int = 256
    sampling: SamplingRequest = field(default_factory=SamplingRequest)
    stop: tuple[str, ...] = ()
    runtime: str = "auto"
    packed: bool = False
    memory: str | None = None
    width: int | None = None
    engine: EngineOptions = USUAL

    def __post_init__(self) -> None:
        check_stop(self.stop)

    @property
    def native_options(self) -> tuple[str, ...]:
        """Name the options in use that only the native engine has."""
        return tuple(f"--{name}" for name in self.engine.chosen() if name != "threads")

    @property
    def transformers_options(self) -> tuple[str, ...]:
        """Name the options in use that only transformers has."""
        return ("--packed",) * self.packed + ("--memory",) * (self.memory is not None)


@dataclass(frozen=True)
class Answer:
    """An answer and its figures. `finish` says why it ended; transformers does not measure the speed of reading the prompt."""

    text: str
    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    finish: Literal["stop", "length", "context"]
    prefill_tokens_per_second: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def threads_text(count: int) -> str:
    """1 -> '1 thread', 2 -> '2 threads'."""
    return f"{count} thread{'s' * (count != 1)}"
