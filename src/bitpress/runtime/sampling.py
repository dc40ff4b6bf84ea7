"""Sampling: the settings by which the next token is chosen, their limits, and a user's request for them."""

import math
from dataclasses import dataclass, fields
from typing import Any

from bitpress.errors import CheckpointError, UsageError

__all__ = ["GENERATION", "LIMITS", "Limit", "Sampling", "SamplingRequest"]

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Limit:
    """The values that a setting may have: `least` to `most`, `least` itself only if not `above`; `needs` says so in words."""

    least: float
    most: float
    needs: str
    above: bool = False
    whole: bool = False

    def refusal(self, value: Any) -> str | None:
        """Return what the setting needs if a value is not allowed, else None."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "it must be a number"
        is_kind = isinstance(value, int) if self.whole else math.isfinite(value)
        is_within = self.least < value <= self.most if self.above else self.least <= value <= self.most
        return None if is_kind and is_within else self.needs


# The only place of these limits, for the command line, a model's own settings, and the Python interface.
LIMITS = {
    "temperature": Limit(0.0, math.inf, "it must not be negative"),
    "top_k": Limit(0, 2**31 - 1, "it must be a whole number, 0 or more", whole=True),
    "top_p": Limit(0.0, 1.0, "it must be above 0 and at most 1", above=True),
    "min_p": Limit(0.0, 1.0, "it must be 0 to 1"),
    "repetition_penalty": Limit(0.0, math.inf, "it must be above 0", above=True),
}


def _check(values: dict[str, Any], error: type[Exception] = UsageError, where: str = "") -> None:
    for name, value in values.items():
        if (reason := LIMITS[name].refusal(value)) is not None:
            raise error(f"{where}{name} is {value!r}; {reason}.")


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. The repetition penalty is applied first, then temperature, top-k, top-p and min-p in turn.

    temperature         0 takes the most likely token
    top_k               keep the k most likely; 0 keeps all
    top_p               keep the fewest most likely tokens that have this probability together
    min_p               keep tokens that are at least this fraction as likely as the most likely
    repetition_penalty  divide (multiply, if negative) the logit of every token that has occurred before

    Raises UsageError for a value outside LIMITS.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check({name: getattr(self, name) for name in LIMITS})


@dataclass(frozen=True)
class SamplingRequest:
    """A user's settings of sampling; None leaves a setting to the model.

    Raises UsageError for a value outside LIMITS, or one that would have no effect at temperature 0.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        asked = self._asked()
        if not self.temperature > 0 and (idle := [name for name in asked if name != "repetition_penalty"]):
            raise UsageError(f"{idle[0]} changes nothing at temperature 0; set a temperature above 0.")
        _check({**asked, "temperature": self.temperature})

    def _asked(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values[name] for name in _OF_MODEL if values[name] is not None}

    def resolve(self, generation: Any) -> Sampling:
        """Return all settings: at a temperature above 0 the model's own, each replaced by the requested one.

        `generation` is the model's generation_config.json or None. Raises CheckpointError if it has a value outside LIMITS.
        """
        asked = self._asked()
        own: dict[str, Any] = {}
        if self.temperature > 0:
            values = {name: getattr(generation, name, None) for name in _OF_MODEL if name not in asked}
            own = {name: value for name, value in values.items() if value is not None}
        _check(own, CheckpointError, f"{GENERATION}: ")
        return Sampling(**own, **asked, temperature=self.temperature, seed=self.seed)


# The settings that a model's generation_config.json may hold.
_OF_MODEL = ("top_k", "top_p", "min_p", "repetition_penalty")
