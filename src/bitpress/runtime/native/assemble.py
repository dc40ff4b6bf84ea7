"""Loading into the native engine: read a compressed model, lay its weights out, round an output head that is not compressed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import CheckpointError, FormatError, KernelUnavailable
from bitpress.formats import CompressedWeight, InputFormat
from bitpress.formats.table import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.kernels.integers import refuses_input, told_input
from bitpress.kernels.native_layout import NativeLayout, lay_out, lay_out_matrix
from bitpress.models.skeleton import build_config, build_skeleton
from bitpress.runtime.native.architectures.steps import NativeStep, Step, make_step
from bitpress.runtime.native.architectures.table import ARCHITECTURES, describe, refusal
from bitpress.runtime.native.engine import Bits, Engine, Parts, make_engine, wanted_context
from bitpress.runtime.native.options import USUAL, USUAL_HEAD, EngineOptions
from bitpress.runtime.prompt import read_generation

__all__ = ["assemble", "lay_out_directory", "load_engine", "refuses", "refuses_directory"]

# Rows of a head that are rounded at once.
ROUNDED_TOGETHER = 4096
# Nats per token that the usual rounding of a head may cost by the estimate; a head that costs more keeps its 16 bits.
MOST_HEAD_COST = 0.001


def refuses(config: Any) -> str | None:
    """Say why the native engine cannot run a model of this configuration here, or None."""
    try:
        native.library()
    except KernelUnavailable as error:
        return str(error)
    return refusal(config)


def refuses_directory(checkpoint: CompressedCheckpoint, config: Any = None) -> str | None:
    """Return why the native engine cannot run a directory here, or None. `config` is its configuration, if it was built already."""
    for name, record in checkpoint.manifest.weights.items():
        if record.input is not None and (reason := refuses_input(record.input, record.spec)) is not None:
            return f"{name}: {reason}"
    if checkpoint.operands:
        return f"the attention of {next(iter(checkpoint.operands))} rounds its operands, which the engine does not support"
    config = build_config(checkpoint.config) if config is None else config
    if (reason := refuses(config)) is not None:
        return reason
    head = checkpoint.manifest.weights.get(ARCHITECTURES[config.model_type].names().head)
    return (
        None
        if head is None or head.input is None
        else "the input of the output head is rounded, which the engine does not support"
    )


def load_engine(
    directory: str | Path | CompressedCheckpoint,
    options: EngineOptions = USUAL,
    *,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load a directory that bitpress wrote, opened already or not, into the native engine.

    A tied embedding keeps its 16 bits, whatever format the output head is rounded to.
    Raises KernelUnavailable for an architecture that the engine does not know, CheckpointError as `load` does.
    """
    checkpoint = (
        directory if isinstance(directory, CompressedCheckpoint) else CompressedCheckpoint.open(directory, verify=verify)
    )
    parts, _, _ = lay_out_directory(checkpoint, options, note=note)
    return make_engine(parts, options, where=checkpoint.root)


def lay_out_directory(
    directory: str | Path | CompressedCheckpoint,
    options: EngineOptions = USUAL,
    *,
    config: Any = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Parts, Any, int]:
    """Read a directory and lay its weights out; return the parts, the model's generation settings and the bytes of its files.

    `config` is transformers' configuration of the directory, if it was built already. Raises the errors of `load_engine`.
    """
    checkpoint = (
        directory if isinstance(directory, CompressedCheckpoint) else CompressedCheckpoint.open(directory, verify=verify)
    )
    config = build_config(checkpoint.config) if config is None else config
    if (reason := refuses_directory(checkpoint, config)) is not None:
        raise KernelUnavailable(f"the native engine does not run {checkpoint.root}: {reason}; use the runtime transformers.")
    wanted_context(describe(config), options.context)
    checkpoint.check_fits(build_skeleton(config, torch.float32).state_dict())
    return assemble(checkpoint, config, options.head_format, note), read_generation(checkpoint), checkpoint.nbytes


def assemble(checkpoint: CompressedCheckpoint, config: Any, head: str, note: Callable[[str], None]) -> Parts:
    """Read a directory whose configuration `refuses` accepts, and lay its weights out."""
    layout, architecture = describe(config), ARCHITECTURES[config.model_type]
    reader, names = _Reader(checkpoint, architecture.norm_offset(), note), architecture.names()
    layers = [reader.layer(names.layer.format(index), architecture.layer(layout, index)) for index in range(layout.layers)]
    inside = _bits(reader.linears)
    layer_bytes = sum(made.nbytes for made, _ in reader.linears)
    table = reader.weight(names.embedding)
    if isinstance(table, CompressedWeight) and table.output_map is not None:
        table = table.dequantize()  # behind a map of the outputs a row takes all rows
    top = table if layout.tied else reader.weight(names.head)
    final_norm = reader.norm(names.final_norm)
    if isinstance(top, CompressedWeight):
        head_format = "as stored"
    elif head == "keep":
        head_format = str(top.dtype).removeprefix("torch.")
    else:
        top, head_format = _head(top, head, final_norm)
    made_head = reader.strips("head", top)
    # A lookup reads one row: rounding a tied embedding too would save no time, so only the head is rounded.
    embedding = made_head if top is table else reader.strips("embedding", table)
    return Parts(
        config=config,
        layout=layout,
        layers=layers,
        final_norm=final_norm,
        embedding=embedding.linear,
        head=made_head.linear,
        head_format=head_format,
        expanded=sorted(set(reader.expanded)),
        bytes_per_token=layer_bytes + made_head.nbytes,
        bits=inside,
        prompt_cost=checkpoint.manifest.prompt_cost,
        inputs=sorted(reader.inputs),
    )


class _Reader:
    """Read parameters by name and lay linear layers out; record the formats that had to be expanded."""

    def __init__(self, checkpoint: CompressedCheckpoint, norm_offset: float, note: Callable[[str], None]) -> None:
        self.checkpoint = checkpoint
        self.norm_offset = norm_offset
        self.note = note
        self.expanded: list[str] = []
        # How inputs are rounded by the model itself.
        self.inputs: set[str] = set()
        # Every linear layer of a step, with its bytes in the file.
        self.linears: list[tuple[NativeLayout, int]] = []

    def has(self, name: str) -> bool:
        return name in self.checkpoint.plain or name in self.checkpoint.manifest.weights

    def plain(self, name: str) -> torch.Tensor:
        if name not in self.checkpoint.plain:
            raise CheckpointError(f"{self.checkpoint.root}: lacks {name!r}.")
        return read_tensor(*self.checkpoint.tensors[name])

    def layer(self, stem: str, steps: list[Step]) -> list[NativeStep]:
        return [
            make_step(step, lambda name: self.linear(f"{stem}.{name}").linear, lambda name: self.norm(f"{stem}.{name}.weight"))
            for step in steps
        ]

    def norm(self, name: str) -> np.ndarray:
        weight = self.plain(name).float()
        return (weight + self.norm_offset if self.norm_offset else weight).contiguous().numpy()

    def weight(self, name: str) -> CompressedWeight | torch.Tensor:
        return self.checkpoint.read_weight(name) if name in self.checkpoint.manifest.weights else self.plain(name)

    def linear(self, stem: str) -> NativeLayout:
        name = f"{stem}.weight"
        bias = self.plain(f"{stem}.bias") if self.has(f"{stem}.bias") else None
        if name in self.checkpoint.manifest.weights:
            layer = self.checkpoint.read_layer(name)
            weight: CompressedWeight | torch.Tensor = layer.weight
            made = self.strips(stem, layer.weight, bias, layer.input)
            if (spec := layer.input_spec()) is not None:
                self.inputs.add(told_input(layer.weight.spec(), spec))
        else:
            weight = self.plain(name)
            made = self.strips(stem, weight, bias)
        self.linears.append((made, weight.nbytes + (0 if bias is None else bias.nbytes)))
        return made

    def strips(
        self,
        stem: str,
        weight: CompressedWeight | torch.Tensor,
        bias: torch.Tensor | None = None,
        inputs: InputFormat | None = None,
    ) -> NativeLayout:
        try:
            made = lay_out(weight, bias, inputs) if isinstance(weight, CompressedWeight) else lay_out_matrix(weight, bias)
        except FormatError as error:
            raise CheckpointError(f"{self.checkpoint.root}: {stem}: {error}") from error
        self.expanded += made.expanded
        self.note(stem)
        return made


def _bits(linears: list[tuple[NativeLayout, int]]) -> Bits:
    weights = sum(math.prod(made.shape) for made, _ in linears)
    return Bits(
        stored=8 * sum(stored for _, stored in linears) / weights, memory=8 * sum(made.nbytes for made, _ in linears) / weights
    )


def _head(w: torch.Tensor, name: str, final_norm: np.ndarray) -> tuple[CompressedWeight | torch.Tensor, str]:
    """Round a head; return it and the name of its format. By default a head that would lose too much keeps its 16 bits."""
    rounded = _rounded(w, name)
    if name == USUAL_HEAD and (cost := _head_cost(w, rounded, torch.from_numpy(final_norm))) > MOST_HEAD_COST:
        return w, f"{str(w.dtype).removeprefix('torch.')} (8 bits would cost {cost:.2g} nats)"
    return CompressedWeight((rounded,)), rounded.format.name


def _head_cost(w: torch.Tensor, rounded: Packed, final_norm: torch.Tensor) -> float:
    """Estimate the KL divergence that rounding a head costs, in nats per token.

    After the final norm, the mean square of a hidden state in every column is that of the norm's weight. Errors of a logit then
    have the variance sum((error * norm)^2), and small independent errors of variance v cost v / 2. SmolLM2: 0.00056, measured 0.00047.
    """
    total = 0.0
    decoded = rounded.dequantize()
    for at in range(0, w.shape[0], ROUNDED_TOGETHER):
        here = slice(at, at + ROUNDED_TOGETHER)
        total += float(((decoded[here].float() - w[here].float()) * final_norm).square().sum())
    return total / w.shape[0] / 2


def _rounded(w: torch.Tensor, name: str) -> Packed:
    fmt = parse_format(name)
    try:
        fmt.block_grid((w.shape[0], w.shape[1]))
    except FormatError:
        if name != USUAL_HEAD:
            raise
        fmt = parse_format("int8-row")
    # Some rows at a time: the head is a model's largest matrix, and only its codes stay in memory.
    equal = next((n for n in range(ROUNDED_TOGETHER, ROUNDED_TOGETHER // 16, -1) if w.shape[0] % n == 0), w.shape[0])
    pieces = w.split(equal) if fmt.rows_apart else (w,)
    packed = []
    for piece in pieces:
        params = fmt.fit(piece.float())
        packed.append(Packed.pack(fmt, fmt.encode(piece.float(), params), params))
    return Packed.stack_rows(packed)
