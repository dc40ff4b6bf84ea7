"""Load a published model into transformers' own classes, every check first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from bitpress.checkpoints.budget import within
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.width import at_width
from bitpress.errors import UsageError
from bitpress.models.attention import round_attention_
from bitpress.models.skeleton import build_config, build_skeleton, set_parameter_
from bitpress.runtime.hf.layers import refuse_saving, replace_
from bitpress.runtime.prompt import read_generation

__all__ = ["check_options", "default_dtype", "fill_", "load", "load_opened", "open_skeleton", "train_"]

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    directory: str | Path,
    *,
    weights: Literal["decoded", "packed"] = "decoded",
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    memory: int | str | None = None,
    width: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load a directory that bitpress wrote as a model of transformers, ready for `generate`.

    weights     "decoded": decode each weight once, as fast and as large in memory as the original; codes stay beside where inputs are rounded;
                "packed": keep the codes, a fraction of the memory, and decode at every product
    dtype       what the rest computes in; "auto" is the original's type
    memory      of a model of stacks (the quantizer bitstack), read only so many terms that all that is read takes at most these bytes,
                as a number or like "60MB"; what is decoded is larger
    width       bits a weight that a nested model is read at: 8 (default), 4 or 2
    verify      check the SHA-256 of every file first

    Raises CheckpointError when anything in the directory is not as its manifest says, MemoryLimitError for too little memory.
    """
    check_options(weights, dtype)
    checkpoint = CompressedCheckpoint.open(directory, verify=verify)
    if width is not None:
        checkpoint = at_width(checkpoint, width)
    return load_opened(checkpoint, build_config(checkpoint.config), weights=weights, dtype=dtype, memory=memory, note=note)


def check_options(weights: str, dtype: str) -> None:
    """Raise UsageError for an option that `load` does not have."""
    if weights not in ("decoded", "packed"):
        raise UsageError(f"weights={weights!r}: it is 'decoded' or 'packed'.")
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r}: it is one of {', '.join(DTYPES)}.")


def load_opened(
    checkpoint: CompressedCheckpoint,
    config: Any,
    *,
    weights: Literal["decoded", "packed"],
    dtype: Literal["auto", "bf16", "fp16", "fp32"],
    memory: int | str | None,
    note: Callable[[str], None],
) -> Any:
    """Load a checkpoint that is open already, whose configuration is built; the options are those of `load`."""
    if memory is not None:
        checkpoint = within(checkpoint, memory)
    chosen = DTYPES[dtype] or default_dtype(checkpoint, config)
    model = open_skeleton(checkpoint, chosen, config)
    fill_(model, checkpoint, chosen, packed=weights == "packed", note=note)
    round_attention_(model, checkpoint.load_attention())
    model.tie_weights(recompute_mapping=False)
    generation = read_generation(checkpoint)
    if generation is not None:
        model.generation_config = generation
    if weights == "packed" or checkpoint.rounds_inputs:
        model.save_pretrained = refuse_saving
    else:
        train_(model)
    return model


def train_(model: torch.nn.Module) -> None:
    """Let every parameter take gradients, as in any model of transformers that was just loaded."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def open_skeleton(checkpoint: CompressedCheckpoint, dtype: torch.dtype, config: Any = None) -> Any:
    """Build the model of a directory without its weights, and check every name and shape. Raises CheckpointError."""
    config = build_config(checkpoint.config) if config is None else config
    config.name_or_path = str(checkpoint.root)
    model = build_skeleton(config, dtype, where=str(checkpoint.root))
    checkpoint.check_fits(model.state_dict())
    return model


def fill_(
    model: Any,
    checkpoint: CompressedCheckpoint,
    dtype: torch.dtype,
    *,
    prefix: str = "",
    packed: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Read the parameters whose name begins with `prefix` into a model of `open_skeleton`, compressed ones decoded or in packed layers.

    One compressed weight at a time is in memory twice. Raises CheckpointError.
    """
    for name in checkpoint.names:
        if not name.startswith(prefix):
            continue
        value = checkpoint.read(name)
        if isinstance(value, torch.Tensor):
            set_parameter_(model, name, value.to(dtype) if value.is_floating_point() else value)
            continue
        if packed or value.input is not None:  # a parameter alone would not round inputs
            parameter = checkpoint.manifest.weights[name].parameter(name)
            replace_(model, parameter, value, dtype, checkpoint.manifest.aliases, keep=not packed)
        else:
            set_parameter_(model, name, checkpoint.decoded(name, value).to(dtype))
        note(name)


def default_dtype(checkpoint: CompressedCheckpoint, config: Any = None) -> torch.dtype:
    """Return the type that a model computes in unless another one is asked for: the original's."""
    config = build_config(checkpoint.config) if config is None else config
    return getattr(config, "dtype", None) or _stored_dtype(checkpoint)


def _stored_dtype(checkpoint: CompressedCheckpoint) -> torch.dtype:
    """Return the floating type that most bytes of what is not compressed have: the original's, where its configuration is silent."""
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.plain.values():
        if entry.torch_dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[entry.torch_dtype] = sizes.get(entry.torch_dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
