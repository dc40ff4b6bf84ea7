"""EngineOptions: the options of the native engine."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from bitpress.errors import UsageError

__all__ = ["MOST_THREADS", "USUAL", "USUAL_CACHE", "USUAL_HEAD", "Activations", "CacheType", "EngineOptions"]

Activations = Literal["int8", "mixed", "none"]
CacheType = Literal["fp16", "int8"]
USUAL_CACHE: CacheType = "fp16"
USUAL_HEAD = "int8-g64"
MOST_THREADS = 1024


@dataclass(frozen=True)
class EngineOptions:
    """Options of the native engine. None leaves the choice to the engine. Raises UsageError for an unknown value.

    activations  inputs of products: "int8", "none" (float), or "mixed" (float in prompts); by default "int8", or "mixed" if the
                 directory records that 8 bits would cost its prompts much
    cache        type of the stored keys and values, one of `CacheType`; USUAL_CACHE by default
    head         format that an uncompressed output head is rounded to, USUAL_HEAD by default; "keep" leaves it in 16 bits
    context      tokens to make room for; by default the model's own limit, 32,768 at most
    threads      by default as many as the process may use
    """

    activations: Activations | None = None
    cache: CacheType | None = None
    head: str | None = None
    context: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.activations is not None and self.activations not in get_args(Activations):
            raise UsageError(f"activations={self.activations!r}: it is {_either(Activations)}.")
        if self.cache is not None and self.cache not in get_args(CacheType):
            raise UsageError(f"cache={self.cache!r}: it is {_either(CacheType)}.")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UsageError(f"threads={self.threads}: it is 1 to {MOST_THREADS}.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "EngineOptions":
        """Read options from unchecked values, such as words of a command line. Raises UsageError."""
        return cls(**values)

    @property
    def cache_type(self) -> CacheType:
        return self.cache or USUAL_CACHE

    @property
    def head_format(self) -> str:
        return self.head or USUAL_HEAD

    def chosen(self) -> tuple[str, ...]:
        """Name the options that are not left to the engine."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


def _either(choices: Any) -> str:
    """Return the values of a Literal as words: 'int8', 'mixed' or 'none'."""
    *others, last = map(repr, get_args(choices))
    return f"{', '.join(others)} or {last}"


# Every choice left to the engine.
USUAL = EngineOptions()
