"""The rules by which a runtime is selected: the native engine, or transformers' own classes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitpress.errors import KernelUnavailable, UsageError, unknown_name

__all__ = ["RUNTIMES", "RuntimeSelection", "select_runtime"]

RUNTIMES = ("auto", "native", "transformers")


@dataclass(frozen=True)
class RuntimeSelection:
    runtime: Literal["native", "transformers"]
    reason: str


def select_runtime(
    runtime: str,
    directory: Path,
    refusal: Callable[[], str | None],
    *,
    native: Collection[str] = (),
    transformers: Collection[str] = (),
) -> RuntimeSelection:
    """Select the runtime of a directory: with "auto" the native engine if it knows the model.

    `refusal` returns why the native engine does not run the model, or None; it is called only if that matters. `native` and
    `transformers` name the options in use that only this runtime has.
    Raises UsageError for an option of the other runtime, KernelUnavailable if the native engine is requested and does not run the model.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if native and transformers:
        raise UsageError(
            f"{', '.join(native)}: only for the runtime native; {', '.join(transformers)}: only for transformers. Leave one out."
        )
    if runtime == "native" and transformers:
        raise UsageError(f"{', '.join(transformers)}: only for the runtime transformers, and native was requested.")
    if runtime == "transformers" or transformers:
        if native:
            raise UsageError(f"{', '.join(native)}: only for the runtime native, and transformers was requested.")
        return RuntimeSelection(
            "transformers", "as asked" if runtime == "transformers" else f"{', '.join(transformers)} needs it"
        )
    reason = refusal()
    if reason is None:
        return RuntimeSelection("native", "as asked" if runtime == "native" else "it knows the model")
    reason = reason.removesuffix(".")
    if runtime == "native":
        raise KernelUnavailable(f"the native engine does not run {directory}: {reason}; use the runtime transformers.")
    if native:
        raise UsageError(f"{', '.join(native)}: only for the runtime native, which does not run this model: {reason}.")
    return RuntimeSelection("transformers", reason)
