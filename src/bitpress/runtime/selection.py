"""Which runtime opens a model: the native engine, or transformers' own classes."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitpress.errors import CheckpointError, KernelUnavailable, UsageError, unknown_name
from bitpress.runtime.native.engine import USUAL_HEAD, Activations, check_options, make_engine
from bitpress.runtime.native.layout_cache import is_prepared, keep_prepared, open_prepared
from bitpress.runtime.native.text import TextEngine

__all__ = ["RUNTIMES", "RuntimeSelection", "load", "load_native", "select_runtime"]

RUNTIMES = ("auto", "native", "transformers")


@dataclass(frozen=True)
class RuntimeSelection:
    runtime: Literal["native", "transformers"]
    reason: str


def select_runtime(
    directory: str | Path,
    runtime: str = "auto",
    *,
    native: Collection[str] = (),
    transformers: Collection[str] = (),
    head: str = USUAL_HEAD,
) -> RuntimeSelection:
    """Choose the runtime for a directory: with "auto" the native engine where it knows the model.

    `native` and `transformers` name the options that are given and that only this runtime has; the other one refuses them. `head` is the
    native engine's option of that name: a layout that is kept for it says that the engine knows the model.
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
        return RuntimeSelection(
            "transformers", "as asked" if runtime == "transformers" else f"{', '.join(transformers)} needs it"
        )
    reason = None if is_prepared(directory, head) else _refusal(directory)
    if reason is None:
        return RuntimeSelection("native", "as asked" if runtime == "native" else "it knows the model")
    reason = reason.removesuffix(".")
    if runtime == "native":
        raise KernelUnavailable(f"the native engine does not run {directory}: {reason}; use the runtime transformers.")
    if native:
        raise UsageError(f"{', '.join(native)}: only for the runtime native, which does not run this model: {reason}.")
    return RuntimeSelection("transformers", reason)


def _refusal(directory: str | Path) -> str | None:
    from bitpress.checkpoints.compressed import CompressedCheckpoint
    from bitpress.runtime.native.assemble import refuses_directory

    return refuses_directory(CompressedCheckpoint.open(directory, verify=False))


def load_native(
    directory: str | Path,
    *,
    activations: Activations | None = None,
    cache: Literal["fp16", "int8"] = "fp16",
    head: str = USUAL_HEAD,
    context: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> TextEngine:
    """Load a directory into the native engine, with its tokenizer; options are those of `load_engine`.

    What is laid out is kept in the user's cache folder, and mapped from there the next time: see `runtime.native.layout_cache`.
    """
    check_options(activations, cache, threads)
    prepared = open_prepared(directory, head, verify=verify)
    if prepared is not None:
        engine = make_engine(prepared.parts, activations=activations, cache=cache, context=context, threads=threads)
        return TextEngine(
            engine, lambda: prepared.tokenizer or _transformers_tokenizer(directory), prepared.generation, prepared.file_bytes
        )
    from bitpress.runtime.native.assemble import lay_out_directory

    parts, generation, file_bytes = lay_out_directory(directory, head, context=context, verify=verify, note=note)
    try:
        engine = make_engine(parts, activations=activations, cache=cache, context=context, threads=threads)
    except UsageError:  # which is a ValueError too
        raise
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}.") from error
    text = TextEngine(engine, lambda: _transformers_tokenizer(directory), generation, file_bytes)
    with contextlib.suppress(CheckpointError):  # a tokenizer that cannot be read is no reason against tokens in, tokens out
        keep_prepared(directory, head, parts, text.tokenizer, generation, file_bytes)
    return text


def _transformers_tokenizer(directory: str | Path) -> Any:
    from bitpress.checkpoints.tokenizer import load_tokenizer

    return load_tokenizer(Path(directory))


def load(
    directory: str | Path,
    *,
    runtime: Literal["auto", "native", "transformers"] = "transformers",
    weights: Literal["decoded", "packed"] | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    memory: int | str | None = None,
    activations: Activations | None = None,
    cache: Literal["fp16", "int8"] | None = None,
    head: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load a directory that bitpress wrote: as a model of transformers, or into the native engine.

    runtime      "transformers": a model of transformers, ready for `generate`; "native": a `runtime.native.text.TextEngine`; "auto": native
                 where it knows the model
    verify       check the SHA-256 of every file first

    Of transformers:
    weights      "decoded" (default): decode each weight once, as fast and as large in memory as the original;
                 "packed": keep the codes, a fraction of the memory
    dtype        what the rest computes in; "auto" (default) is the original's type
    memory       read at most so many bytes ("60MB") of a model made of stacks (the quantizer bitstack); weights are "packed" by default

    Of the native engine:
    activations  "int8": inputs of products are rounded to 8 bits, a scale for every group; "none": they stay float; "mixed": they do in
                 prompts. By default "int8", or "mixed" where the directory says that 8 bits would cost its prompts much
    cache        type of the kept keys and values, "fp16" (default) or "int8"
    head         format to round an uncompressed output head to, "int8-g64" by default; "keep": its 16 bits
    context      tokens that there must be room for; by default the model's own limit, 32,768 at most
    threads      by default as many as the process may use

    Raises CheckpointError when anything in the directory is not as its manifest says, UsageError for an option of the other runtime,
    KernelUnavailable where the native engine does not know the model.
    """
    of_transformers: dict[str, Any] = {"weights": weights, "dtype": dtype, "memory": memory}
    of_native = {"activations": activations, "cache": cache, "head": head, "context": context, "threads": threads}
    of_transformers = {name: value for name, value in of_transformers.items() if value is not None}
    given: dict[str, Any] = {name: value for name, value in of_native.items() if value is not None}
    choice = select_runtime(
        directory, runtime, native=given.keys(), transformers=of_transformers.keys(), head=head or USUAL_HEAD
    )
    if choice.runtime == "native":
        return load_native(directory, verify=verify, note=note, **given)
    from bitpress.runtime.hf.loading import load as load_transformers

    options: dict[str, Any] = of_transformers if memory is None else {"weights": "packed", **of_transformers}
    return load_transformers(directory, verify=verify, note=note, **options)
