"""Opening what was written as its user will: the loader of transformers, decoded and packed, and the runtime that `run` would choose.

Before publishing, every road is taken with one block in memory at a time, through the functions that `bitpress.load` is made of. Only the
native engine holds all its weights at once; where the memory for that is not free, the report says that it was not opened.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Integer as Int

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import CheckpointError, JobStopped, MemoryLimitError, NumericsError
from bitpress.evaluation import measure_distance
from bitpress.exhaustion import is_out_of_memory
from bitpress.measure.samples import draw_calibration
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel
from bitpress.models.tasks.table import find_task
from bitpress.native import code_paths
from bitpress.progress import Progress
from bitpress.recipes import Calibration
from bitpress.runtime.hf.loading import default_dtype, fill_, open_skeleton
from bitpress.runtime.native.assemble import lay_out_directory, load_engine, refuses_directory
from bitpress.runtime.native.engine import MOST_PROMPT_COST, Engine, make_engine
from bitpress.runtime.native.options import USUAL, Activations, EngineOptions

__all__ = [
    "Runtime",
    "check_loads",
    "check_opens",
    "choose_opened",
    "draw_prompts",
    "measure_prompt_cost",
    "native_runtime",
    "opening",
    "transformers_runtime",
]

Logits = Callable[[torch.Tensor], torch.Tensor]
# Tokens that a block runs in packed layers: enough that every expert of a small model gets some.
TRIED = 8
# Texts that say what 8-bit inputs cost in prompts.
PROMPTS, PROMPT_LENGTH = 4, 256


@dataclass(frozen=True)
class Runtime:
    """A runtime with its settings; `engine` is the native one, and a model of transformers computes in `dtype`."""

    name: str
    settings: Mapping[str, Any]
    engine: Engine | None = None
    dtype: torch.dtype | None = None

    def logits(self, tokens: Int[torch.Tensor, "1 length"]) -> torch.Tensor:
        """Return the native engine's logits of a text of its own."""
        assert self.engine is not None
        self.engine.reset()
        return self.engine.forward(tokens[0].numpy(), logits="all")[None]


def choose_opened(checkpoint: CompressedCheckpoint) -> str:
    """Name the runtime that `run` would choose for a directory that is not published yet."""
    return "transformers" if refuses_directory(checkpoint) is not None else "native"


def native_runtime(checkpoint: CompressedCheckpoint, options: EngineOptions = USUAL) -> Runtime:
    """Open a directory in the native engine. Raises MemoryLimitError before it takes what is not free."""
    _check_room(checkpoint)
    try:
        engine = load_engine(checkpoint, options)
    except MemoryError as error:
        raise MemoryLimitError(
            f"{checkpoint.root}: there is no memory to open the native engine; make room and try again."
        ) from error
    return Runtime("native", {key: engine.facts[key] for key in ("activations", "cache", "head")}, engine=engine)


def draw_prompts(model: Path, opened: StreamedModel) -> Int[torch.Tensor, "samples length"]:
    """Draw texts for `measure_prompt_cost` where a recipe reads none. Raises CalibrationError, CheckpointError."""
    task, config = opened.task, opened.model.config
    samples, length = task.cut(config, PROMPTS * PROMPT_LENGTH, PROMPT_LENGTH)
    return draw_calibration(Calibration(samples=min(samples, PROMPTS), length=length), task, model, config).inputs


def measure_prompt_cost(
    checkpoint: CompressedCheckpoint, windows: Int[torch.Tensor, "windows length"], progress: Progress
) -> float | None:
    """Measure what 8-bit inputs of products cost in prompts of the native engine, in nats a token; None where that is not much.

    `windows` are texts that choices may be made on. Measured on bytes even where this processor has tiles of bf16: the directory may be
    run anywhere. None too where the engine does not run the model, or has no room (which is noted).
    """
    if choose_opened(checkpoint) != "native":
        return None
    length = min(PROMPT_LENGTH, windows.shape[1])
    with opening(checkpoint, "the runtime native"):
        try:
            _check_room(checkpoint)
        except MemoryLimitError as error:
            progress.note(str(error))
            return None
        parts, _, _ = lay_out_directory(checkpoint, EngineOptions(head="keep", context=length))
        path = next((name for name in code_paths() if name != "amx"), None)

        def logits(activations: Activations) -> Logits:
            engine = make_engine(parts, EngineOptions(activations, context=length), where=checkpoint.root, path=path)
            return Runtime("native", {}, engine=engine).logits

        cost = measure_distance(logits("none"), logits("int8"), windows[:PROMPTS, :length]).kl_mean
    if cost <= MOST_PROMPT_COST:
        return None
    progress.note(f"8-bit inputs would cost prompts {cost:.2g} nats a token: the native engine reads them in float.")
    return round(cost, 6)


def transformers_runtime(checkpoint: CompressedCheckpoint) -> Runtime:
    """Return what `bitpress.load` opens without options."""
    dtype = default_dtype(checkpoint)
    return Runtime("transformers", {"weights": "decoded", "dtype": str(dtype).removeprefix("torch.")}, dtype=dtype)


def check_loads(checkpoint: CompressedCheckpoint, check_stop: Callable[[], None] = lambda: None) -> None:
    """Raise CheckpointError unless transformers' model takes every parameter, and its blocks run on packed layers too.

    Of blocks that are alike, the first one is run. What the weights decode to is compared elsewhere.
    """
    with opening(checkpoint, "bitpress.load"):
        open_skeleton(checkpoint, default_dtype(checkpoint))
    with opening(checkpoint, 'bitpress.load(weights="packed")'), torch.no_grad():
        model = StreamedModel(
            build_config(checkpoint.config), checkpoint, default_dtype(checkpoint), where=str(checkpoint.root)
        )
        model.load_outer_()
        hidden = model.embed(_tried(checkpoint))
        seen: set[str] = set()
        for i in range(len(model.blocks)):
            kind = _kind(checkpoint, model.block_name(i))
            if kind not in seen:
                check_stop()
                seen.add(kind)
                fill_(model.model, checkpoint, model.dtype, prefix=f"{model.block_name(i)}.", packed=True)
                model.run_block(i, hidden)
                model.blocks[i].to("meta")


def check_opens(checkpoint: CompressedCheckpoint, progress: Progress) -> None:
    """Raise CheckpointError unless the runtime that `run` would choose opens a directory, NumericsError unless its logits are finite."""
    if choose_opened(checkpoint) == "native":
        with opening(checkpoint, "the runtime native"):
            try:
                native_runtime(checkpoint).logits(_tried(checkpoint))
            except MemoryLimitError as error:
                progress.note(str(error))


def _tried(checkpoint: CompressedCheckpoint) -> torch.Tensor:
    config = build_config(checkpoint.config)
    return find_task(config, str(checkpoint.root)).trial(config, 1, TRIED)


@contextlib.contextmanager
def opening(checkpoint: CompressedCheckpoint, what: str) -> Iterator[None]:
    """Turn what a loader raises into a CheckpointError that says that nothing is published, an overflow into a NumericsError that does."""
    try:
        yield
    except JobStopped:
        raise
    except NumericsError as error:
        raise NumericsError(f"{checkpoint.root}: {error} Nothing is published.") from error
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        raise CheckpointError(
            f"{checkpoint.root}: {what} cannot open what was written: {reason}; nothing is published."
        ) from error


def _kind(checkpoint: CompressedCheckpoint, block: str) -> str:
    """Describe a block by its parameters and how each is stored, sizes of single terms left out."""
    prefix = f"{block}."
    plain = [name.removeprefix(prefix) for name in checkpoint.plain if name.startswith(prefix)]
    weights = [
        (name.removeprefix(prefix), record.transposed, record.experts, record.spec["shape"], _terms(record.spec))
        for name, record in checkpoint.manifest.weights.items()
        if name.startswith(prefix)
    ]
    return str((sorted(plain), sorted(weights, key=str)))


def _terms(spec: Mapping[str, Any]) -> list[Any]:
    maps = [None if spec[key] is None else spec[key]["kind"] for key in ("input_map", "output_map")]
    return [*(term.get("format", term["kind"]) for term in spec["terms"]), *maps]


def _check_room(checkpoint: CompressedCheckpoint) -> None:
    needed = _sixteen_bits(checkpoint)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"{checkpoint.root}: the native engine may need {needed:,} bytes of memory and {free:,} are free; make room and try again."
        )


def _sixteen_bits(checkpoint: CompressedCheckpoint) -> int:
    """Bytes of a model whose compressed weights take 16 bits each: the most that any layout of them takes."""
    shapes = [record.spec["shape"] for record in checkpoint.manifest.weights.values()]
    plain = sum(entry.nbytes for entry in checkpoint.plain.values())
    return plain + sum(2 * int(rows) * int(columns) for rows, columns in shapes)
