"""Which runtime opens a model: the native engine, or transformers' own classes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.errors import KernelUnavailable, UsageError, unknown_name
from bitpress.runtime.engine import load_engine, refuses
from bitpress.runtime.loading import load as load_transformers
from bitpress.runtime.skeleton import build_config, build_skeleton
from bitpress.runtime.text import TextEngine

__all__ = ["RUNTIMES", "Choice", "choose_runtime", "load", "load_native"]

RUNTIMES = ("auto", "native", "transformers")


@dataclass(frozen=True)
class Choice:
    runtime: Literal["native", "transformers"]
    reason: str


def choose_runtime(
    directory: str | Path, runtime: str = "auto", *, native: Collection[str] = (), transformers: Collection[str] = ()
) -> Choice:
    """Choose the runtime for a directory: with "auto" the native engine where it knows the model.

    `native` and `transformers` name the options that are given and that only this runtime has; the other one refuses them.
    Raises UsageError for those, KernelUnavailable where the native engine is asked for and does not run the model.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if native and transformers:
        raise UsageError(
            f"{', '.join(native)}: only for the runtime native; {', '.join(transformers)}: only for transformers. Leave one out."
        )
    if runtime == "native" and transformers:
        raise UsageError(f"{', '.join(transformers)}: only for the runtime transformers, and native is asked for.")
    if runtime == "transformers" or transformers:
        if native:
            raise UsageError(f"{', '.join(native)}: only for the runtime native, and transformers is asked for.")
        return Choice("transformers", "as asked" if runtime == "transformers" else f"{', '.join(transformers)} needs it")
    reason = refuses(build_config(PressedCheckpoint.open(directory, verify=False).config))
    if reason is None:
        return Choice("native", "as asked" if runtime == "native" else "it knows the model")
    reason = reason.removesuffix(".")
    if runtime == "native":
        raise KernelUnavailable(f"the native engine does not run {directory}: {reason}; use the runtime transformers.")
    if native:
        raise UsageError(f"{', '.join(native)}: only for the runtime native, which does not run this model: {reason}.")
    return Choice("transformers", reason)


def load_native(directory: str | Path, *, verify: bool = True, **options: Any) -> TextEngine:
    """Load a directory into the native engine, with its tokenizer; options are those of `load_engine`."""
    pressed = PressedCheckpoint.open(directory, verify=False)
    pressed.check_fits(build_skeleton(build_config(pressed.config), torch.float32).state_dict())
    return TextEngine(load_engine(directory, verify=verify, **options), directory)


def load(
    directory: str | Path,
    *,
    runtime: Literal["auto", "native", "transformers"] = "transformers",
    weights: Literal["decoded", "packed"] | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    activations: Literal["int8", "none"] | None = None,
    cache: Literal["fp16", "int8"] | None = None,
    head: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load a directory that bitpress wrote: as a model of transformers, or into the native engine.

    runtime      "transformers": a model of transformers, ready for `generate`; "native": a `runtime.text.TextEngine`; "auto": native
                 where it knows the model
    verify       check the SHA-256 of every file first

    Of transformers:
    weights      "decoded" (default): decode each weight once, as fast and as large in memory as the original;
                 "packed": keep the codes, a fraction of the memory
    dtype        what the rest computes in; "auto" (default) is the original's type

    Of the native engine:
    activations  "int8" (default): inputs of products are rounded to 8 bits, a scale for every group; "none": they stay float
    cache        type of the kept keys and values, "fp16" (default) or "int8"
    head         format to round an uncompressed output head to, "int8-g64" by default; "keep": its 16 bits
    context      tokens that there must be room for; by default the model's own limit, 32,768 at most
    threads      by default as many as the process may use

    Raises CheckpointError when anything in the directory is not as its manifest says, UsageError for an option of the other runtime,
    KernelUnavailable where the native engine does not know the model.
    """
    of_transformers = {"weights": weights, "dtype": dtype}
    of_native = {"activations": activations, "cache": cache, "head": head, "context": context, "threads": threads}
    of_transformers = {name: value for name, value in of_transformers.items() if value is not None}
    given: dict[str, Any] = {name: value for name, value in of_native.items() if value is not None}
    choice = choose_runtime(directory, runtime, native=given.keys(), transformers=of_transformers.keys())
    if choice.runtime == "native":
        return load_native(directory, verify=verify, note=note, **given)
    options: dict[str, Any] = of_transformers
    return load_transformers(directory, verify=verify, note=note, **options)
