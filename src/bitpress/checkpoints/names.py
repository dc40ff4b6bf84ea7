"""Names: which tensors of a checkpoint make which parameters of a model.

Checkpoints and modules disagree for some architectures (experts stored one by one but held as one 3-d parameter, prefixes that
changed). transformers keeps that knowledge. It is asked once, and every parameter gets the list of its tensors.
Every tensor of the checkpoint must be used, be declared ignorable by the architecture, or be an exact copy of the tensor that it
is tied to.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import CheckpointError

__all__ = ["NameMap", "map_names"]

# Types that a floating-point parameter may be stored in; types of fewer bits need scales that only their own tool knows.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What quantized checkpoints of other tools name their tensors.
_QUANTIZED = re.compile(
    r"\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|weight_zero_point|qweight|qzeros|scales|g_idx|SCB|absmax|"
    r"quant_map|weight_format|[a-z_]*_(blocks|scales))$|\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$"
)
# Buffers that old checkpoints carry and that a module computes by itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")


@dataclass
class _Conversion:
    """One call of transformers' converter: the checkpoint's tensors by pattern, in order."""

    first_target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, pattern)


@dataclass(frozen=True)
class NameMap:
    """How to make parameters out of a checkpoint's tensors.

    plain       parameter -> checkpoint tensor
    aliases     tied parameter -> the parameter that it shares
    left_out    checkpoint tensors that the model rightly does not use
    """

    plain: Mapping[str, str]
    conversions: tuple[_Conversion, ...]
    aliases: Mapping[str, str]
    left_out: tuple[str, ...]
    model: Any

    def load(self, read: Callable[[str], torch.Tensor], prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        """Make all parameters whose name begins with `prefix` and not with `exclude`."""

        def wanted(name: str) -> bool:
            return name.startswith(prefix) and not (exclude is not None and name.startswith(exclude))

        made = {target: read(source) for target, source in self.plain.items() if wanted(target)}
        return made | self.load_conversions(read, prefix, exclude)

    def load_conversions(
        self, read: Callable[[str], torch.Tensor], prefix: str, exclude: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Make the parameters of these names that are put together of several tensors, or otherwise differ from what is stored."""
        made: dict[str, torch.Tensor] = {}
        for conversion in self.conversions:
            if conversion.first_target.startswith(prefix) and not (
                exclude is not None and conversion.first_target.startswith(exclude)
            ):
                made |= self._convert(conversion, read)
        return made

    def _convert(self, conversion: _Conversion, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(conversion.converter)
        for source, pattern in conversion.sources:
            converter.add_tensor(conversion.first_target, source, pattern, read(source))
        done = converter.convert(conversion.first_target, model=self.model, config=self.model.config)
        return {name: (value[0] if isinstance(value, list) else value) for name, value in done.items()}


@dataclass
class _Places:
    """Where the tensors of a checkpoint go, by their names alone.

    tied        tensors of tied parameters, each with the parameter that it is a copy of
    left_out    copies, and tensors that the architecture ignores
    strange     tensors without a parameter
    """

    plain: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, _Conversion] = field(default_factory=dict)
    tied: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


def map_names(
    model: Any,
    checkpoint: Mapping[str, TensorEntry],
    read: Callable[[str], torch.Tensor],
    *,
    carved: bool = False,
    spare: Callable[[str], bool] = lambda name: False,
) -> NameMap:
    """Place every tensor of a checkpoint in a model without weights; `read` is used to compare tied copies only.

    With `carved`, the model is the text part of what the checkpoint holds: towers for other inputs are left out. `spare` claims that
    a tensor without a parameter computes nothing, and may be left out.

    Raises CheckpointError for a tensor without a parameter, a parameter without a tensor, or a shape that differs.
    """
    state = model.state_dict()
    aliases = {str(k): str(v) for k, v in dict(model.all_tied_weights_keys).items()}
    places = _place(model, checkpoint, state, aliases)
    conversions = tuple(places.conversions.values())
    used = {_part(n) for n in (*places.plain.values(), *(source for c in conversions for source, _ in c.sources))}
    for name in places.strange:
        if (not carved or _part(name) in used) and not spare(name):
            raise CheckpointError(
                f"tensor {name!r} of the checkpoint belongs to no parameter of {type(model).__name__}.{_hint(name)}"
            )
    left_out = (*places.left_out, *places.strange)
    result = NameMap(places.plain, conversions, aliases, left_out, model)
    for target, source in places.plain.items():
        _check_type(checkpoint[source], state[target].dtype)
    for conversion in conversions:
        for source, _ in conversion.sources:  # experts and what else is put together are floating-point weights
            _check_type(checkpoint[source], torch.float32)
    _check_complete(result, state, checkpoint)
    for name, original in places.tied:
        _check_type(checkpoint[name], state[original].dtype)
        _check_copy(checkpoint[name], checkpoint[places.plain[original]], read)
    return result


def _place(model: Any, names: Iterable[str], state: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> _Places:
    """Place tensors by transformers' own rewritings of names. Raises CheckpointError for two tensors of one parameter."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    ignorable = [re.compile(p) for p in (model._keys_to_ignore_on_load_unexpected or [])]
    places = _Places()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if pattern is not None:
            made = places.conversions.setdefault(target, _Conversion(target, by_pattern[pattern]))
            made.sources.append((name, pattern))
        elif target in aliases:
            places.tied.append((name, aliases[target]))
            places.left_out.append(name)
        elif target in state:
            if target in places.plain:
                raise CheckpointError(
                    f"{name!r} and {places.plain[target]!r} of the checkpoint both map to {target!r} of the model."
                )
            places.plain[target] = name
        elif _COMPUTED.search(name) or any(p.search(name) or p.search(target) for p in ignorable):
            places.left_out.append(name)
        else:
            places.strange.append(name)
    return places


def _hint(name: str) -> str:
    return " It is quantized already; use the original model." if _QUANTIZED.search(name) else ""


def _part(name: str) -> tuple[str, ...]:
    """Return the part of the model that a tensor belongs to: `model.visual`, `language_model.model`."""
    return tuple(name.split(".")[:2])


def _check_type(entry: TensorEntry, wanted: torch.dtype) -> None:
    """Raise CheckpointError for a tensor whose type cannot hold the parameter: codes for weights, or floats for indices."""
    found = f"tensor {entry.name!r} of the checkpoint is {entry.dtype} {list(entry.shape)}"
    if wanted.is_floating_point and entry.torch_dtype not in _FLOATS:
        raise CheckpointError(
            f"{found}; the model needs floating-point values there (BF16, F16, F32 or F64). "
            "If the weights are quantized already, use the original model."
        )
    if not wanted.is_floating_point and (entry.torch_dtype.is_floating_point or entry.torch_dtype.is_complex):
        raise CheckpointError(f"{found}; the model needs whole numbers there ({str(wanted).removeprefix('torch.')}).")


def _check_copy(copy: TensorEntry, original: TensorEntry, read: Callable[[str], torch.Tensor]) -> None:
    # A tied parameter may be stored twice, even in two types; dropping one copy is only right when both are the same.
    if copy.shape != original.shape or not torch.equal(read(copy.name).double(), read(original.name).double()):
        raise CheckpointError(f"{copy.name!r} is tied to {original.name!r} by the configuration but holds other values.")


def _check_complete(names: NameMap, state: Mapping[str, torch.Tensor], checkpoint: Mapping[str, TensorEntry]) -> None:
    def shape_only(name: str) -> torch.Tensor:
        return torch.empty(checkpoint[name].shape, dtype=checkpoint[name].torch_dtype, device="meta")

    made = {target: checkpoint[source].shape for target, source in names.plain.items()}
    for conversion in names.conversions:
        made |= {name: tuple(t.shape) for name, t in names._convert(conversion, shape_only).items()}
    missing = sorted(set(state) - set(made) - set(names.aliases))
    if missing:
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors that the model needs, the first is {missing[0]!r}.")
    for name, shape in made.items():
        if name not in state:
            raise CheckpointError(f"the checkpoint maps to {name!r}, which is not a parameter of {type(names.model).__name__}.")
        if tuple(state[name].shape) != tuple(shape):
            raise CheckpointError(f"{name!r} has shape {list(shape)}, but the configuration needs {list(state[name].shape)}.")
