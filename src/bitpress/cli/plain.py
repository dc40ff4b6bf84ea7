"""Models that are not compressed, for `run`: transformers runs them in the type that they are stored in."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitpress.checkpoints.manifest import JOB_DIRECTORY, is_compressed
from bitpress.cli.screen import Screen
from bitpress.errors import CheckpointError, UsageError, unknown_name
from bitpress.exhaustion import is_out_of_memory
from bitpress.runtime.selection import RUNTIMES

if TYPE_CHECKING:
    from bitpress.checkpoints.source import SourceCheckpoint

__all__ = ["check_options", "find_model", "load_plain", "open_plain"]


def find_model(model: str) -> Path:
    """Return the directory of a model, compressed or not; what another tool quantized, or a named model, is taken over or fetched first."""
    if not model:
        raise UsageError("the model has no name; write a directory, a .gguf file or a named model (`bitpress models`).")
    if is_compressed(model):
        return Path(model)
    from bitpress.pipeline.exporting import open_model  # not needed for a directory of bitpress, which should answer at once

    with Screen() as screen:
        return open_model(model, screen)


def open_plain(directory: Path) -> "SourceCheckpoint | None":
    """Open a model that is not compressed; None for a directory that bitpress published, or whose job is not done."""
    if is_compressed(directory) or (directory / JOB_DIRECTORY).exists():
        return None
    # These import torch, which a start from a cached layout does without.
    from bitpress.checkpoints.directory import open_directory
    from bitpress.checkpoints.source import SourceCheckpoint, read_config

    quantization = read_config(open_directory(directory)).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitpress":
        return None  # its manifest is missing, which the error is about
    return SourceCheckpoint.open(directory)


def check_options(directory: Path, runtime: str, only_compressed: tuple[str, ...]) -> None:
    """Raise UsageError for options that a model which is not compressed cannot follow."""
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    asked = ("--runtime native",) * (runtime == "native") + only_compressed
    if asked:
        raise UsageError(
            f"{', '.join(asked)}: {directory} is not compressed, and transformers runs it as it is; "
            f"`bitpress quantize {directory} OUT --bits 4` compresses it."
        )


def load_plain(source: "SourceCheckpoint") -> Any:
    """Load a model of transformers in the type of its file. Raises CheckpointError; code in the directory is never run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from bitpress.models.skeleton import build_config

    directory = source.root
    build_config(source.config)
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{directory}: transformers does not open it: {reason}") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    if loaded["missing_keys"]:
        name = sorted(loaded["missing_keys"])[0]
        raise CheckpointError(f"{directory}: holds no {name!r}, which a {source.config['model_type']} model has.")
    return model.eval()
