"""What is asked of a model on the terminal."""

from dataclasses import dataclass, field

from bitpress.runtime.native.options import EngineOptions

__all__ = ["Asked", "threads_text"]


@dataclass(frozen=True)
class Asked:
    """What the options of `bitpress run` say. Of `engine`, transformers follows `threads` and nothing else."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    sampling: dict[str, float | None] = field(default_factory=dict)
    runtime: str = "auto"
    packed: bool = False
    memory: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)

    @property
    def native(self) -> tuple[str, ...]:
        """Name the chosen options that only the native engine has."""
        return tuple(name for name in self.engine.chosen() if name != "threads")


def threads_text(count: int) -> str:
    """Say how many threads there are."""
    return f"{count} thread{'s' * (count != 1)}"
