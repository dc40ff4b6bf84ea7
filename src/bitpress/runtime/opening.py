"""OpenedModel: a directory that bitpress wrote, opened once for every use.

    model = OpenedModel(DIR)
    model.select("auto").runtime        # "native" or "transformers"
    model.load_native()                 # a TextEngine

The manifest is read when the model is opened. The checkpoint, transformers' configuration and the cached layout are opened when they
are first asked for, and then kept: a native start from a cached layout imports neither torch nor transformers.
"""

import contextlib
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitpress.checkpoints.manifest import read_manifest_bytes
from bitpress.errors import CheckpointError
from bitpress.library import available
from bitpress.runtime.native.engine import make_engine
from bitpress.runtime.native.layout_cache import hash_manifest, is_complete, layout_path, read_layout, write_layout
from bitpress.runtime.native.options import USUAL, USUAL_HEAD, Activations, CacheType, EngineOptions
from bitpress.runtime.native.text import TextEngine
from bitpress.runtime.selection import RuntimeSelection, select_runtime

if TYPE_CHECKING:
    from bitpress.checkpoints.compressed import CompressedCheckpoint

__all__ = ["OpenedModel", "load", "load_native"]

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Note = Callable[[str], None]


def _silent(text: str) -> None:
    pass


class OpenedModel:
    """A directory that bitpress wrote. With `verify`, the SHA-256 of every file is compared with the manifest before weights are read.

    `width` are the bits that its nested weights are read at, by default all of them.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True, width: int | None = None) -> None:
        self.directory = Path(directory)
        self._verify = verify
        self._width = width
        self._checkpoint: CompressedCheckpoint | None = None
        self._is_verified = not verify
        self._manifest: bytes | None = None
        with contextlib.suppress(CheckpointError):  # opening the checkpoint reports it in its own words
            self._manifest = read_manifest_bytes(directory)

    @classmethod
    def of(cls, checkpoint: "CompressedCheckpoint") -> "OpenedModel":
        """Take a checkpoint that is opened and verified already."""
        model = cls(checkpoint.root, verify=False, width=checkpoint.width)
        model._checkpoint = checkpoint
        return model

    @property
    def checkpoint(self) -> "CompressedCheckpoint":
        """The checkpoint, its names, sizes and headers checked; its hashes may not be checked yet. Raises CheckpointError."""
        if self._checkpoint is None:
            self._open(verify=False)
        assert self._checkpoint is not None
        return self._checkpoint

    def verified(self) -> "CompressedCheckpoint":
        """Return the checkpoint after its hashes are checked too, if `verify`. Raises CheckpointError."""
        if self._checkpoint is None:
            self._open(verify=self._verify)
        elif not self._is_verified:
            self._checkpoint.check_hashes()
        self._is_verified = True
        return self.checkpoint

    def _open(self, *, verify: bool) -> None:
        from bitpress.checkpoints.compressed import CompressedCheckpoint

        checkpoint = CompressedCheckpoint.open(self.directory, content=self._manifest, verify=verify)
        if self._width is not None:
            from bitpress.checkpoints.width import at_width

            checkpoint = at_width(checkpoint, self._width)
        self._checkpoint = checkpoint

    @functools.cached_property
    def config(self) -> Any:
        """Return transformers' configuration. Raises CheckpointError, UsageError."""
        from bitpress.models.skeleton import build_config

        return build_config(self.checkpoint.config)

    def has_layout(self, head: str = USUAL_HEAD) -> bool:
        """Return whether there is a cached layout with a head of this format, all files of the manifest, and a library to run it."""
        path = self._layout_path(head)
        return path is not None and path.is_file() and available() and self._is_complete

    def _layout_path(self, head: str) -> Path | None:
        return None if self._manifest is None else layout_path(self._manifest_hash, head, self._width)

    @functools.cached_property
    def _manifest_hash(self) -> str:
        assert self._manifest is not None
        return hash_manifest(self._manifest)

    @functools.cached_property
    def _is_complete(self) -> bool:
        return self._manifest is not None and is_complete(self.directory, self._manifest)

    def select(
        self,
        runtime: str = "auto",
        *,
        native: Collection[str] = (),
        transformers: Collection[str] = (),
        head: str = USUAL_HEAD,
    ) -> RuntimeSelection:
        """Select the runtime by `selection.select_runtime`; a cached layout with this head proves that the engine knows the model."""

        def refusal() -> str | None:
            if self.has_layout(head):
                return None
            from bitpress.runtime.native.assemble import refuses_directory

            return refuses_directory(self.checkpoint, self.config)

        return select_runtime(runtime, self.directory, refusal, native=native, transformers=transformers)

    def load_native(self, options: EngineOptions = USUAL, *, note: Note = _silent) -> TextEngine:
        """Load the model into the native engine, with its tokenizer.

        Its layout goes into the user's cache folder, and is mapped from there the next time (`runtime.native.layout_cache`). Raises
        KernelUnavailable for an architecture that the engine does not know, CheckpointError, UsageError.
        """
        head = options.head_format
        path = self._layout_path(head)
        layout = read_layout(path, verify=self._verify) if path is not None and self.has_layout(head) else None
        if layout is not None:
            engine = make_engine(layout.parts, options, where=self.directory)
            return TextEngine(engine, lambda: layout.tokenizer or self._tokenizer(), layout.generation, layout.file_bytes)
        from bitpress.runtime.native.assemble import lay_out_directory

        checkpoint = self.verified()
        parts, generation, file_bytes = lay_out_directory(checkpoint, options, config=self.config, note=note)
        text = TextEngine(make_engine(parts, options, where=self.directory), self._tokenizer, generation, file_bytes)
        if path is not None:
            with contextlib.suppress(
                CheckpointError
            ):  # tokens in, tokens out needs no tokenizer, so a broken one is not an error here
                write_layout(path, parts, text.tokenizer, generation, file_bytes, self.directory.resolve().name)
        return text

    def _tokenizer(self) -> Any:
        from bitpress.checkpoints.tokenizer import load_tokenizer

        return load_tokenizer(self.directory)

    def load_transformers(
        self,
        *,
        weights: Literal["decoded", "packed"] | None = None,
        dtype: Dtype | None = None,
        memory: int | str | None = None,
        note: Note = _silent,
    ) -> Any:
        """Load the model as one of transformers; the options are those of `load`, whose defaults None stands for."""
        from bitpress.runtime.hf.loading import check_options, load_opened

        if weights is None:
            weights = "decoded" if memory is None else "packed"
        if dtype is None:
            dtype = "auto"
        check_options(weights, dtype)
        return load_opened(self.verified(), self.config, weights=weights, dtype=dtype, memory=memory, note=note)


def load_native(
    directory: str | Path,
    options: EngineOptions = USUAL,
    *,
    width: int | None = None,
    verify: bool = True,
    note: Note = _silent,
) -> TextEngine:
    """Load a directory into the native engine, with its tokenizer: see `OpenedModel.load_native`."""
    return OpenedModel(directory, verify=verify, width=width).load_native(options, note=note)


def load(
    directory: str | Path,
    *,
    runtime: Literal["auto", "native", "transformers"] = "transformers",
    weights: Literal["decoded", "packed"] | None = None,
    dtype: Dtype | None = None,
    memory: int | str | None = None,
    activations: Activations | None = None,
    cache: CacheType | None = None,
    head: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    width: int | None = None,
    verify: bool = True,
    note: Note = _silent,
) -> Any:
    """Load a directory that bitpress wrote: as a model of transformers, or into the native engine.

    runtime      "transformers": a model of transformers, ready for `generate`; "native": a `runtime.native.text.TextEngine`; "auto": native
                 if it knows the model
    width        bits a weight that a nested model (weights `bipolar8-...-nested`) is read at: 8 (default), 4 or 2
    verify       check the SHA-256 of every file first

    Of transformers:
    weights      "decoded" (default): decode each weight once, as fast and as large in memory as the original;
                 "packed": keep the codes, a fraction of the memory
    dtype        the type that everything else computes in; "auto" (default) is the original's type
    memory       read at most so many bytes ("60MB") of a model made of stacks (the quantizer bitstack); weights are "packed" by default

    Of the native engine:
    activations  "int8": inputs of products are rounded to 8 bits, a scale for every group; "none": they stay float; "mixed": those of
                 prompts stay float. By default "int8", or "mixed" if the directory records that 8 bits would cost its prompts much
    cache        type of the stored keys and values, one of `CacheType`; "fp16" by default
    head         format to round an uncompressed output head to, "int8-g64" by default; "keep": its 16 bits
    context      tokens to make room for; by default the model's own limit, 32,768 at most
    threads      by default as many as the process may use

    Raises CheckpointError if anything in the directory differs from its manifest, UsageError for an option of the other runtime or a
    width that the model does not have, KernelUnavailable if the native engine does not know the model.
    """
    of_transformers = {"weights": weights, "dtype": dtype, "memory": memory}
    of_native = EngineOptions(activations, cache, head, context, threads)
    model = OpenedModel(directory, verify=verify, width=width)
    selection = model.select(
        runtime,
        native=of_native.chosen(),
        transformers=[name for name, value in of_transformers.items() if value is not None],
        head=of_native.head_format,
    )
    if selection.runtime == "native":
        return model.load_native(of_native, note=note)
    return model.load_transformers(weights=weights, dtype=dtype, memory=memory, note=note)
