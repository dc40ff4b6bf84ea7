"""The configuration of a compressed-tensors checkpoint: groups of layers, each with one scheme.

    config_groups   {name: {"targets": [...], "weights": args, "input_activations": args or null, "format": ...}}
    targets         names of layers before `re:` patterns before the class `Linear`, which every layer is
    ignore          layers that are stored as they are

Settings that tell how codes were chosen (observers) are read over; all others are known, or refused by name.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from bitpress.errors import BitpressError, FormatError
from bitpress.exchange.expert_names import fold_experts
from bitpress.exchange.flags import read_flag
from bitpress.exchange.name_patterns import NamePatterns
from bitpress.formats import Integer, parse_format

__all__ = ["INT", "NVFP4", "STORES", "Args", "Scheme", "read_schemes", "write_settings"]

INT = "int"
STORES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# The version whose files are written.
WRITTEN = "0.20.0"
_FORMATS = {
    "pack-quantized": (INT,),
    "int-quantized": (INT,),
    "float-quantized": ("float",),
    "naive-quantized": (INT, "float"),
    "mxfp8-quantized": ("float",),
    "mxfp6-pack-quantized": ("float",),
    "mxfp4-pack-quantized": ("float",),
    "nvfp4-pack-quantized": ("float",),
}
_BITS = {
    "float-quantized": 8,
    "mxfp8-quantized": 8,
    "mxfp6-pack-quantized": 6,
    "mxfp4-pack-quantized": 4,
    "nvfp4-pack-quantized": 4,
}
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
# What a target begins with that is a pattern.
_PATTERN = "re:"
# NVFP4 as files have it, and its strategy and groups.
NVFP4 = "e2m1-g16-fp8over"
_NVFP4_GROUPS = ("tensor_group", 16)
# Inputs in powers of two, by their bits.
_MX = {4: "mxfp4", 6: "mxfp6", 8: "mxfp8"}


@dataclass(frozen=True)
class Args:
    """How a weight or an input is rounded, in the words of compressed-tensors."""

    num_bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: str | None = None
    scale_dtype: str | None = None

    @classmethod
    def from_json(cls, told: Any) -> "Args":
        """Read and check. Raises FormatError for a setting that is not known, by name."""
        if not isinstance(told, Mapping):
            raise FormatError(f"a way to round is told by an object, not by {told!r}.")
        known = {*(field.name for field in fields(cls)), "observer", "observer_kwargs", "zp_dtype"}
        if unknown := sorted(str(key) for key in told if key not in known):
            raise FormatError(f"unknown setting {unknown[0]!r} of compressed-tensors.")
        bits, group = told.get("num_bits", 8), told.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise FormatError(f"num_bits {bits!r}; 1 to 8 are read.")
        if group is not None and (type(group) is not int or group < -1 or group == 0):
            raise FormatError(f"group_size {group!r} is not a number of inputs.")
        named = "tensor" if group is None else "channel" if group == -1 else "group"
        strategy = told.get("strategy") or named
        if told.get("type", INT) not in (INT, "float") or strategy not in _STRATEGIES:
            raise FormatError(f"type {told.get('type')!r}, strategy {strategy!r} of compressed-tensors are not known.")
        if strategy in ("group", "tensor_group") and (group is None or group < 1):
            raise FormatError(f"strategy {strategy!r} needs a group_size, not {group!r}.")
        if not isinstance(told.get("scale_dtype") or "", str):
            raise FormatError(f"scale_dtype {told['scale_dtype']!r} is no type.")
        ordering, local = told.get("actorder"), told.get("dynamic") == "local"
        if isinstance(ordering, bool):  # of old versions
            ordering = "group" if ordering else None
        if ordering not in (None, "group", "dynamic", "weight", "static"):
            raise FormatError(f"actorder {ordering!r} of compressed-tensors is not known.")
        return cls(
            num_bits=bits,
            type=told.get("type", INT),
            symmetric=read_flag(told, "symmetric", True),
            strategy=strategy,
            group_size=group if strategy in ("group", "tensor_group") else None,
            block_structure=_sizes(told.get("block_structure")) if strategy == "block" else None,
            dynamic="local" if local else read_flag(told, "dynamic", False),
            actorder="group" if ordering in ("group", "dynamic") else None,
            scale_dtype=told.get("scale_dtype"),
        )

    def to_json(self) -> dict[str, Any]:
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return told | ({"block_structure": list(self.block_structure)} if self.block_structure else {})

    def input_name(self, store: str = "fp32") -> str:
        """Return the name of our format of such inputs. Raises FormatError where there is none."""
        if self.dynamic == "local":
            if (self.num_bits, self.type, self.symmetric, self.strategy, self.group_size) != (4, "float", True, *_NVFP4_GROUPS):
                raise FormatError("inputs with one stored scale and one of every group of a token are read as NVFP4 alone.")
            return NVFP4
        block = {"token": "row", "tensor": "tensor"}.get(self.strategy, f"g{self.group_size}")
        if self.strategy not in ("token", "tensor", "group") or self.dynamic == (self.strategy == "tensor"):
            how = "dynamic" if self.dynamic else "static"
            raise FormatError(
                f"{how} inputs of strategy {self.strategy!r}; these are read: dynamic token and group, static tensor."
            )
        if self.type == INT:
            return f"int{self.num_bits}-{block}{'' if self.symmetric else '-zero'}-{store}"
        if not self.symmetric:
            raise FormatError("zero points of floats are not read.")
        if self.scale_dtype == "torch.uint8" and self.group_size == 32 and self.num_bits in _MX:
            return f"{_MX[self.num_bits]}-g32-e8m0"
        if self.num_bits != 8 or self.scale_dtype is not None:
            raise FormatError(f"inputs in floats of {self.num_bits} bits with scales {self.scale_dtype} are not read.")
        return f"e4m3-{block}-{store}"

    @classmethod
    def of_input(cls, name: str, parameters: str) -> "Args | str":
        """Return how inputs of a format of ours are told, or why they cannot be."""
        refused = f"the input of its product is rounded to {name} ({parameters}), which compressed-tensors does not say"
        try:
            fmt = parse_format(name)
        except BitpressError as error:
            return str(error)
        if parameters == "local":
            local = cls(4, "float", True, *_NVFP4_GROUPS, dynamic="local", scale_dtype="torch.float8_e4m3fn")
            return local if fmt.name == NVFP4 else f"{refused}; {NVFP4} it does"
        group = fmt.block.cols if isinstance(fmt.block.cols, int) else None
        strategy = "tensor" if fmt.block.name == "tensor" else "token" if group is None else "group"
        whole = isinstance(fmt.grid, Integer)
        mx = fmt.scale == "e8m0"
        made = cls(
            num_bits=fmt.grid.code_bits,
            type=INT if whole else "float",
            symmetric=not any(param.name == "zero" for param in fmt.grid.params),
            strategy=strategy,
            group_size=group,
            dynamic=parameters == "dynamic",
            scale_dtype="torch.uint8" if mx else None,
        )
        try:
            again = made.input_name(fmt.scale if parameters == "static" else "fp32")
        except FormatError:
            return refused
        near = f"; {again} it does" if fmt.scale in STORES.values() else ""
        return made if parse_format(again) == fmt else refused + near


@dataclass(frozen=True)
class Scheme:
    """What is said of one layer. `padded`: codes do not go over the ends of words where the number of words leaves it open."""

    format: str
    weights: Args
    inputs: Args | None = None
    padded: bool = False

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Scheme":
        if set(entry) != {"format", "weights", "input_activations", "padded"} or type(entry["padded"]) is not bool:
            raise FormatError(
                f"a layer of compressed-tensors is told by format, weights, input_activations and padded, not {sorted(entry)}."
            )
        inputs = None if entry["input_activations"] is None else Args.from_json(entry["input_activations"])
        made = cls(entry["format"], Args.from_json(entry["weights"]), inputs, entry["padded"])
        if not isinstance(made.format, str) or made.format not in _FORMATS:
            raise FormatError(f"format {made.format!r}; these are read: {', '.join(_FORMATS)}.")
        weights = made.weights
        if weights.type not in _FORMATS[made.format] or weights.dynamic or weights.strategy == "token":
            raise FormatError(
                f"{made.format} of type {weights.type}, strategy {weights.strategy!r}, dynamic {weights.dynamic}."
            )
        bits = 8 if weights.type == "float" and made.format == "naive-quantized" else _BITS.get(made.format, weights.num_bits)
        if weights.num_bits != bits or (weights.type == "float" and not weights.symmetric):
            raise FormatError(
                f"{made.format} with num_bits {weights.num_bits}, symmetric {weights.symmetric}; it has {bits}, symmetric."
            )
        if (weights.strategy == "tensor_group") != (made.format == "nvfp4-pack-quantized"):
            raise FormatError(f"{made.format} of strategy {weights.strategy!r}.")
        if inputs is not None:
            inputs.input_name()
        return made

    def to_json(self) -> dict[str, Any]:
        inputs = None if self.inputs is None else self.inputs.to_json()
        return {"format": self.format, "weights": self.weights.to_json(), "input_activations": inputs, "padded": self.padded}


def read_schemes(settings: Mapping[str, Any], layers: Collection[str]) -> dict[str, Scheme]:
    """Return the scheme of every layer. Raises FormatError for what is not known."""
    _check_settings(settings)
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise FormatError("config_groups does not describe groups of layers, each by an object.")
    padded = _version(settings.get("version")) < (0, 18)
    by_target: dict[str, Scheme] = {}
    for name, group in groups.items():
        if unknown := sorted(set(group) - {"targets", "weights", "input_activations", "output_activations", "format"}):
            raise FormatError(f"config_groups: {name}: unknown setting {unknown[0]!r}.")
        if group.get("output_activations") is not None:
            raise FormatError(f"config_groups: {name}: the outputs of its products are rounded, which no format here says.")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise FormatError(f"config_groups: {name}: targets is no list of names.")
        if group.get("weights") is None:
            continue  # inputs alone: its layers have no compressed weight
        format = group.get("format") or settings.get("format")
        entry = {
            "format": format,
            "weights": group["weights"],
            "input_activations": group.get("input_activations"),
            "padded": padded,
        }
        try:
            scheme = Scheme.from_json(entry)
        except FormatError as error:
            raise FormatError(f"config_groups: {name}: {error}") from error
        by_target |= dict.fromkeys(targets, scheme)
    ignored, patterns = settings.get("ignore") or [], NamePatterns(layers)
    for target in (*by_target, *map(str, ignored)):
        if target.startswith(_PATTERN):
            patterns.compile(target.removeprefix(_PATTERN))
    return {layer: _find(layer, by_target, ignored, patterns) for layer in layers}


def _check_settings(settings: Mapping[str, Any]) -> None:
    status = settings.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise FormatError(f"quantization_status {status!r}; only compressed weights are read.")
    if settings.get("kv_cache_scheme") is not None:
        raise FormatError("kv_cache_scheme: the cache of keys and values is rounded, which no checkpoint here says.")
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        told = settings.get(name) or {}
        dense = name == "sparsity_config" and isinstance(told, Mapping) and told.get("format") == "dense"
        if not isinstance(told, Mapping) or (any(told.values()) and not dense):
            raise FormatError(f"{name} {told!r} is not read.")
    if not isinstance(settings.get("ignore") or [], list):
        raise FormatError(f"ignore {settings['ignore']!r} is no list of names.")
    if _version(settings.get("version")) >= (1, 0):
        raise FormatError(f"version {settings['version']!r} of compressed-tensors; versions 0.x are read.")


def _version(told: Any) -> tuple[int, int]:
    """Return the first two numbers of a version; those of the newest where it is not told."""
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", told if isinstance(told, str) else WRITTEN)
    if found is None:
        raise FormatError(f"version {told!r} of compressed-tensors; versions 0.x are read.")
    return int(found[1]), int(found[2])


def _find(layer: str, by_target: Mapping[str, Scheme], ignored: Iterable[Any], patterns: NamePatterns) -> Scheme:
    def matches(target: str) -> bool:
        return patterns.matches(target.removeprefix(_PATTERN), layer) if target.startswith(_PATTERN) else target == layer

    if any(matches(str(target)) for target in ignored):
        raise FormatError(f"{layer} is in `ignore`, and its tensors are those of a compressed layer.")
    found = [target for target in sorted(by_target) if matches(target)]
    for target in (*(t for t in found if not t.startswith(_PATTERN)), *found, "Linear"):
        if target in by_target:
            return by_target[target]
    raise FormatError(f"{layer} has the tensors of a compressed layer, and no group of config_groups has it among its targets.")


def _sizes(told: Any) -> tuple[int, int]:
    parts = told.split("x") if isinstance(told, str) else told
    if (
        not isinstance(parts, (list, tuple))
        or len(parts) != 2
        or not all(re.fullmatch(r"[1-9][0-9]{0,8}", str(n)) for n in parts)
    ):
        raise FormatError(f"block_structure {told!r} is no number of rows and of columns.")
    return int(parts[0]), int(parts[1])


def write_settings(schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
    """Return the quantization_config of layers with these schemes, beside plain ones.

    One scheme is that of all layers of class `Linear` but those to ignore. Several name their layers: vLLM looks for the class of a fused
    layer before the names of its parts. Experts of a block are named by one pattern.
    """
    counted = Counter(schemes.values()).most_common()
    formats = sorted({scheme.format for scheme in schemes.values()})
    groups: dict[str, Any] = {}
    for i, (scheme, _) in enumerate(counted):
        told = scheme.to_json()
        del told["padded"]
        if len(formats) == 1:
            del told["format"]
        own = [name for name, its in schemes.items() if its == scheme]
        names = _targets(own, [*(name for name, its in schemes.items() if its != scheme), *plain])
        groups[f"group_{i}"] = {"targets": ["Linear"] if len(counted) == 1 else names, "output_activations": None, **told}
    return {
        "quant_method": "compressed-tensors",
        "version": WRITTEN,
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(_targets({*plain, "lm_head"} - schemes.keys(), schemes)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _targets(layers: Collection[str], others: Collection[str]) -> list[str]:
    names, patterns = fold_experts(layers, others)
    return [*names, *(f"re:{pattern}" for pattern in patterns)]
