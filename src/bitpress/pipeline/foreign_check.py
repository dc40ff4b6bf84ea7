"""The check of an export by somebody else's code: transformers opens it with the package that knows its format, and both give their logits."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import BitpressError, NumericsError
from bitpress.evaluation.distance import without_details
from bitpress.exhaustion import is_out_of_memory
from bitpress.formats import Integer, parse_format
from bitpress.measure.samples import draw_evaluation
from bitpress.models.skeleton import build_config
from bitpress.models.tasks.table import find_task
from bitpress.progress import Progress
from bitpress.runtime.opening import load

__all__ = ["MOST_DISTANCE", "ForeignReading", "read_by_others"]

# What two right readers may differ by: arithmetic in float32 alone, where nothing was rounded, gives less than 1e-5.
MOST_DISTANCE = 1e-3
TEXT, TOKENS, LENGTH = "builtin:heldout", 1024, 256

# Targets that transformers reads, and the packages that it needs for them. Not hqq: version 5 opens such a directory and leaves its weights
# as they were drawn.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "bf16": (),
    "fp16": (),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
}


@dataclass(frozen=True)
class ForeignReading:
    """What another reader found.

    reader   its packages and versions; None where it could not be asked
    why      why it was not asked
    kl_mean  the KL divergence of its logits from those of bitpress, in nats a token, on `tokens` held-out tokens
    """

    reader: str | None
    why: str | None = None
    kl_mean: float | None = None
    tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def read_by_others(directory: Path, out: Path, to: str, progress: Progress) -> ForeignReading:
    """Let transformers open an export, and compare its logits with those of the model that was exported.

    Raises NumericsError if they are further apart than `MOST_DISTANCE`, or it does not open the export.
    """
    if to not in PACKAGES:
        return ForeignReading(None, f"nothing that is installed here reads {to}")
    missing = [name for name in PACKAGES[to] if importlib.util.find_spec(name) is None]
    if missing:
        package = missing[0].replace("_", "-")
        return ForeignReading(None, f"the package {package} is not installed (pip install {package})")
    checkpoint = CompressedCheckpoint.open(directory, verify=False)
    if (why := _experts_unread(checkpoint, to)) is not None:
        return ForeignReading(None, why)
    config = build_config(checkpoint.config)
    task = find_task(config, str(directory))
    needed, available = 2 * _decoded_bytes(checkpoint), psutil.virtual_memory().available
    if needed > available:
        return ForeignReading(
            None, f"two models in float32 need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        )
    try:
        samples, _ = draw_evaluation(TEXT, task, directory, config, count=TOKENS, length=LENGTH)
    except BitpressError as error:  # a directory without a tokenizer
        return ForeignReading(None, f"there is no text to compare on: {error}")
    progress.begin("reading by others", samples.inputs.shape[0])
    theirs, ours = _open(out), load(directory, dtype="fp32")

    def of(model: Any) -> Any:
        return lambda inputs: task.forward(model, inputs)

    with torch.no_grad():
        figures = task.distance(of(ours), of(theirs), samples.inputs, lambda done: progress.advance(f"sample {done}"))
    found = without_details(figures)["kl_mean"]
    reader = ", ".join(f"{name} {_version(name)}" for name in ("transformers", *PACKAGES[to]))
    if found > MOST_DISTANCE:
        raise NumericsError(
            f"{out}: {reader} computes something else of it: {found:.2g} nats a token from the model that was exported, where at most "
            f"{MOST_DISTANCE:g} come of arithmetic; do not use this export."
        )
    return ForeignReading(reader, None, found, samples.inputs.numel())


def _experts_unread(checkpoint: CompressedCheckpoint, to: str) -> str | None:
    """Return why transformers does not read the experts of an export; None if it does, or there are none.

    Of compressed-tensors it decodes all experts of a model by one scheme, without zero points and without an order of inputs
    (transformers/integrations/compressed_tensors.py).
    """
    stacks = [record for record in checkpoint.manifest.weights.values() if record.experts]
    plain = any(len(entry.shape) == 3 and not name.endswith(".weight") for name, entry in checkpoint.plain.items())
    if not PACKAGES[to] or not (stacks or plain):
        return None
    if to != "compressed-tensors":
        return f"transformers' reader of {to} is not known to take experts"
    told = [(term["format"], record.spec["input_map"]) for record in stacks for term in record.spec["terms"]]
    grids = [parse_format(name).grid for name, _ in told]
    simple = all(isinstance(grid, Integer) and not grid.zero for grid in grids) and all(change is None for _, change in told)
    if plain or not simple or len({name for name, _ in told}) > 1:
        return "transformers reads experts of one format for all, of integers without zero points"
    return None


def _open(out: Path) -> Any:
    """Open an export as its users do. Raises NumericsError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # in a log they are lines of noise between ours
    try:
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise NumericsError(f"{out}: transformers does not open the export: {reason}; do not use it.") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _decoded_bytes(checkpoint: CompressedCheckpoint) -> int:
    weights = sum(rows * columns for rows, columns in (r.spec["shape"] for r in checkpoint.manifest.weights.values()))
    return 4 * (int(weights) + sum(entry.numel for entry in checkpoint.plain.values()))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
