"""Load a published model into transformers' own classes, every check first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from bitpress.checkpoints.budget import within
from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import CheckpointError, FormatError, UsageError
from bitpress.runtime.layers import PackedExperts, PackedLinear, replace_
from bitpress.runtime.prompt import read_generation
from bitpress.runtime.skeleton import build_config, build_skeleton, restore_ties_, set_parameter_

__all__ = ["install_", "load", "refuse_saving_"]

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    directory: str | Path,
    *,
    weights: Literal["decoded", "packed"] = "decoded",
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    memory: int | str | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load a directory that bitpress wrote as a model of transformers, ready for `generate`.

    weights     "decoded": decode each weight once, as fast and as large in memory as the original;
                "packed": keep the codes, a fraction of the memory, and decode at every product
    dtype       what the rest computes in; "auto" is the original's type
    memory      of a model of stacks (the quantizer bitstack), read only so many terms that all that is read takes at most these bytes,
                as a number or like "60MB"; what is decoded is larger
    verify      check the SHA-256 of every file first

    Raises CheckpointError when anything in the directory is not as its manifest says, MemoryLimitError for too little memory.
    """
    if weights not in ("decoded", "packed"):
        raise UsageError(f"weights={weights!r}: it is 'decoded' or 'packed'.")
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r}: it is one of {', '.join(DTYPES)}.")
    pressed = PressedCheckpoint.open(directory, verify=verify)
    if memory is not None:
        pressed = within(pressed, memory)
    config = build_config(pressed.config)
    chosen = DTYPES[dtype] or getattr(config, "dtype", None) or _stored_dtype(pressed)
    model = build_skeleton(config, chosen)
    pressed.check_fits(model.state_dict())
    install_(model, pressed, chosen)
    for name, entry in pressed.plain.items():
        value = read_tensor(pressed.tensors[name][0], entry)
        set_parameter_(model, name, value.to(chosen) if value.is_floating_point() else value)
    restore_ties_(model)
    for name, record in pressed.manifest.weights.items():
        layer = _packed_at(model, name if record.experts else record.parameter(name).stem)
        for leaf, value in pressed.read_weight(name).tensors().items():
            set_parameter_(layer, leaf, value)
        if weights == "decoded":
            try:
                layer.decode_()
            except FormatError as error:
                raise CheckpointError(f"{pressed.root}: {name}: {error}") from error
        note(name)
    _set_generation_(model, pressed)
    refuse_saving_(model)
    return model


def install_(model: torch.nn.Module, pressed: PressedCheckpoint, dtype: torch.dtype) -> None:
    """Replace every compressed weight's module by an empty packed layer."""
    for name, record in pressed.manifest.weights.items():
        replace_(model, record.parameter(name), record.spec, dtype)


def refuse_saving_(model: Any) -> None:
    """Let `save_pretrained` say that it cannot: decoded and packed weights are in no state dict, so it would leave them out."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UsageError("a model on compressed weights is not saved again; copy the directory that it was loaded from.")

    model.save_pretrained = refuse


def _stored_dtype(pressed: PressedCheckpoint) -> torch.dtype:
    """Give the floating type that most bytes of what is not compressed have: the original's, where its configuration is silent."""
    sizes: dict[torch.dtype, int] = {}
    for entry in pressed.plain.values():
        if entry.torch_dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[entry.torch_dtype] = sizes.get(entry.torch_dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _packed_at(model: torch.nn.Module, name: str) -> PackedLinear | PackedExperts:
    layer = model.get_submodule(name)
    if not isinstance(layer, (PackedLinear, PackedExperts)):
        raise CheckpointError(f"{name!r} is no packed layer of the model.")
    return layer


def _set_generation_(model: Any, pressed: PressedCheckpoint) -> None:
    generation = read_generation(pressed)
    if generation is not None:
        model.generation_config = generation
