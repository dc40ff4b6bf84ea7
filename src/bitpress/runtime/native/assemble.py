"""Loading into the native engine: read a pressed directory, lay its weights out, round an output head that is not compressed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import CheckpointError, FormatError, KernelUnavailable, UsageError
from bitpress.formats import CompressedWeight
from bitpress.formats.table import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.kernels.native_layout import NativeLayout, lay_out, lay_out_matrix
from bitpress.models.skeleton import build_config, build_skeleton
from bitpress.runtime.native.architectures import Layout, describe, refusal
from bitpress.runtime.native.engine import USUAL_HEAD, Activations, Engine, Parts, check_options, make_engine, wanted_context
from bitpress.runtime.prompt import read_generation

__all__ = ["assemble", "lay_out_directory", "load_engine", "refuses", "refuses_directory"]

# Rows of a head that are rounded at a time.
ROUNDED_TOGETHER = 4096
# Nats a token that the usual rounding of a head may cost by the estimate; beyond, it keeps its 16 bits.
MOST_HEAD_COST = 0.001


def refuses(config: Any) -> str | None:
    """Say why the native engine cannot run a model of this configuration here, or None."""
    try:
        native.library()
    except KernelUnavailable as error:
        return str(error)
    return refusal(config)


def refuses_directory(pressed: CompressedCheckpoint) -> str | None:
    """Say why the native engine cannot run a directory here, or None."""
    rounded = next((name for name, record in pressed.manifest.weights.items() if record.input is not None), None)
    if rounded is not None:
        return f"the input of {rounded} is rounded as its layer says, which the engine does not do"
    return refuses(build_config(pressed.config))


def load_engine(
    directory: str | Path | CompressedCheckpoint,
    *,
    activations: Activations | None = None,
    cache: Literal["fp16", "int8"] = "fp16",
    head: str = USUAL_HEAD,
    context: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Load a directory that bitpress wrote, opened already or not, into the native engine.

    activations  as in `bitpress.load`
    cache        type of the kept keys and values
    head         format to round an uncompressed output head to ("keep": its 16 bits); a tied embedding keeps its 16 bits
    context      tokens that there must be room for; the model's own limit, or 32,768, where not given
    threads      as many as the process may use, where not given

    Raises KernelUnavailable for an architecture that the engine does not know, CheckpointError as `load` does.
    """
    check_options(activations, cache, threads)
    pressed = directory if isinstance(directory, CompressedCheckpoint) else CompressedCheckpoint.open(directory, verify=verify)
    parts, _, _ = lay_out_directory(pressed, head, context=context, note=note)
    try:
        return make_engine(parts, activations=activations, cache=cache, context=context, threads=threads)
    except UsageError:  # which is a ValueError too
        raise
    except ValueError as error:
        raise CheckpointError(f"{pressed.root}: {error}.") from error


def lay_out_directory(
    directory: str | Path | CompressedCheckpoint,
    head: str = USUAL_HEAD,
    *,
    context: int | None = None,
    verify: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Parts, Any, int]:
    """Read a directory and lay its weights out; give the parts, the model's generation settings and the bytes of its files.

    Raises as `load_engine` does.
    """
    pressed = directory if isinstance(directory, CompressedCheckpoint) else CompressedCheckpoint.open(directory, verify=verify)
    config = build_config(pressed.config)
    if (reason := refuses_directory(pressed)) is not None:
        raise KernelUnavailable(f"the native engine does not run {pressed.root}: {reason}; use the runtime transformers.")
    wanted_context(describe(config), context)
    pressed.check_fits(build_skeleton(config, torch.float32).state_dict())
    return assemble(pressed, config, head, note), read_generation(pressed), pressed.nbytes


def assemble(pressed: CompressedCheckpoint, config: Any, head: str, note: Callable[[str], None]) -> Parts:
    """Read a directory of a configuration that `refuses` has nothing against, and lay its weights out."""
    reader, layout = _Reader(pressed, note), describe(config)
    layers: list[dict[str, Any]] = []
    linears: list[NativeLayout] = []
    family = layout.family
    for index in range(layout.layers):
        stem = f"model.layers.{index}"
        named = {
            **{part: reader.linear(f"{stem}.self_attn.{part}_proj") for part in ("q", "k", "v", "o")},
            **{part: reader.linear(f"{stem}.mlp.{part}_proj") for part in ("gate", "up", "down")},
        }
        linears += named.values()
        behind = "post_attention_layernorm"
        mlp_norm = "pre_feedforward_layernorm" if family.out_norms else behind

        def norm(name: str, wanted: bool = True, stem: str = stem) -> np.ndarray | None:
            return reader.norm(f"{stem}.{name}.weight", layout) if wanted else None

        layers.append(
            {
                **{part: made.linear for part, made in named.items()},
                "input_norm": norm("input_layernorm"),
                "mlp_norm": norm(mlp_norm),
                "attention_out_norm": norm(behind, family.out_norms),
                "mlp_out_norm": norm("post_feedforward_layernorm", family.out_norms),
                "q_norm": norm("self_attn.q_norm", family.head_norms),
                "k_norm": norm("self_attn.k_norm", family.head_norms),
                "rope": layout.rope[index],
                "window": layout.window[index],
            }
        )
    table = reader.weight("model.embed_tokens.weight")
    top = table if layout.tied else reader.weight("lm_head.weight")
    final_norm = reader.norm("model.norm.weight", layout)
    if isinstance(top, CompressedWeight):
        head_format = "as stored"
    elif head == "keep":
        head_format = str(top.dtype).removeprefix("torch.")
    else:
        top, head_format = _head(top, head, final_norm)
    made_head = reader.strips("head", top)
    # Looking a row up reads little: a tied embedding stays as it is where the head is rounded.
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
        bytes_per_token=sum(strips.nbytes for strips in (*linears, made_head)),
        prompt_cost=pressed.manifest.prompt_cost,
    )


class _Reader:
    """Reads parameters by name and lays linear layers out; remembers what had to be expanded."""

    def __init__(self, pressed: CompressedCheckpoint, note: Callable[[str], None]) -> None:
        self.pressed = pressed
        self.note = note
        self.expanded: list[str] = []

    def has(self, name: str) -> bool:
        return name in self.pressed.plain or name in self.pressed.manifest.weights

    def plain(self, name: str) -> torch.Tensor:
        if name not in self.pressed.plain:
            raise CheckpointError(f"{self.pressed.root}: lacks {name!r}.")
        return read_tensor(*self.pressed.tensors[name])

    def norm(self, name: str, layout: Layout) -> np.ndarray:
        weight = self.plain(name).float()
        return (weight + 1.0 if layout.family.one_plus else weight).contiguous().numpy()

    def weight(self, name: str) -> CompressedWeight | torch.Tensor:
        return self.pressed.read_weight(name) if name in self.pressed.manifest.weights else self.plain(name)

    def linear(self, stem: str) -> NativeLayout:
        weight = self.weight(f"{stem}.weight")
        bias = self.plain(f"{stem}.bias") if self.has(f"{stem}.bias") else None
        return self.strips(stem, weight, bias)

    def strips(self, stem: str, weight: CompressedWeight | torch.Tensor, bias: torch.Tensor | None = None) -> NativeLayout:
        try:
            made = lay_out(weight, bias) if isinstance(weight, CompressedWeight) else lay_out_matrix(weight, bias)
        except FormatError as error:
            raise CheckpointError(f"{self.pressed.root}: {stem}: {error}") from error
        self.expanded += made.expanded
        self.note(stem)
        return made


def _head(w: torch.Tensor, name: str, final_norm: np.ndarray) -> tuple[CompressedWeight | torch.Tensor, str]:
    """Round a head; return it and the name of its format. The usual rounding leaves a head alone that it would cost too much."""
    rounded = _rounded(w, name)
    if name == USUAL_HEAD and (cost := _head_cost(w, rounded, torch.from_numpy(final_norm))) > MOST_HEAD_COST:
        return w, f"{str(w.dtype).removeprefix('torch.')} (8 bits would cost {cost:.2g} nats)"
    return CompressedWeight((rounded,)), rounded.format.name


def _head_cost(w: torch.Tensor, rounded: Packed, final_norm: torch.Tensor) -> float:
    """Estimate the KL divergence that rounding a head costs, in nats a token.

    Behind the final norm, a hidden state has a mean square of 1 times that of the norm's weight in every column. Errors of a logit then
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
    # Some rows at a time: the head is a model's largest matrix, and only its codes are to stay.
    equal = next((n for n in range(ROUNDED_TOGETHER, ROUNDED_TOGETHER // 16, -1) if w.shape[0] % n == 0), w.shape[0])
    pieces = w.split(equal) if fmt.rows_apart else (w,)
    packed = []
    for piece in pieces:
        params = fmt.fit(piece.float())
        packed.append(Packed.pack(fmt, fmt.encode(piece.float(), params), params))
    return Packed.stack_rows(packed)
