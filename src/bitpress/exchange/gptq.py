"""GPTQ checkpoints: integers of 2, 3, 4 or 8 bits, as AutoGPTQ, GPTQModel, auto-round, vLLM and transformers read and write them.

    X.qweight   int32 [in * bits / 32, out]       codes down the inputs, least significant bits first, over the ends of words at 3 bits
    X.qzeros    int32 [groups, out * bits / 32]   zero points along the outputs; version 1 stores each less 1, version 2 as it is
    X.scales    float16 or bfloat16 [groups, out]
    X.g_idx     int32 [in]                        the group of every input

    w_hat[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o])

Version 1 (`checkpoint_format: gptq`) cannot hold a zero point of 0, which its readers take for 2^bits or, after a wrap, for 0. So it is
written where no zero points are stored (they are 2^(bits - 1) everywhere), and version 2 where they are. A checkpoint has one version.
With `sym` a layer whose stored zero points are those of the other version all the same is read as symmetric: kernels that take symmetric
weights alone (Marlin) look at neither, so that such files are about, and others compute something else of them.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from bitpress.checkpoints.safetensors_file import TensorEntry
from bitpress.errors import FormatError
from bitpress.exchange.expert_names import Stacks, fold_experts
from bitpress.exchange.flags import read_flag
from bitpress.exchange.name_patterns import NamePatterns
from bitpress.exchange.plain_layer import PlainLayer, make_plain, order_of_groups, plain_layer, unpack_plain
from bitpress.exchange.source import ReadTensor, StoredLayer
from bitpress.exchange.words import join_words, split_words
from bitpress.formats import Block, CompressedLayer, Format, Integer

__all__ = ["Gptq"]

_WIDTHS = (2, 3, 4, 8)
_STORES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_VERSIONS = ("gptq", "gptq_v2")
# Of a group's settings in the file: what the tensors' meaning depends on. Others tell how the codes were chosen.
_KEYS = frozenset({"bits", "group_size", "desc_act", "sym", "checkpoint_format"})
# Of `dynamic`: whether it leaves layers out, its pattern, its settings.
_Rule = tuple[bool, str, dict[str, Any]]


class Gptq:
    about: ClassVar[str] = "GPTQ's integers of 2, 3, 4 and 8 bits, in groups of inputs"
    tables: ClassVar[bool] = False
    transposed: ClassVar[bool] = True
    experts: ClassVar[bool] = True
    marks: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    stacks: ClassVar[Stacks] = Stacks({})

    @staticmethod
    def claims(config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, dict) and settings.get("quant_method") in ("gptq", "gptqmodel")

    @staticmethod
    def entries(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, TensorEntry]]) -> Mapping[str, Mapping[str, Any]]:
        settings = config["quantization_config"]
        version = settings.get("checkpoint_format", settings.get("format", "gptq"))
        marlin = read_flag(settings, "is_marlin_format", False)
        if marlin or version not in _VERSIONS:
            kind = "marlin" if marlin else version
            raise FormatError(f"quantization_config: checkpoint_format {kind!r}; these are read: {', '.join(_VERSIONS)}.")
        base = {
            "bits": settings.get("bits"),
            "group_size": settings.get("group_size", -1),
            "desc_act": read_flag(settings, "desc_act", False),
            "sym": read_flag(settings, "sym", True),
            "checkpoint_format": version,
        }
        patterns = NamePatterns(layers)
        rules = _rules(settings.get("dynamic"), patterns)
        return {name: base | _dynamic(rules, name, patterns) for name in layers}

    @staticmethod
    def shape(entry: Mapping[str, Any], tensors: Mapping[str, TensorEntry], read: ReadTensor) -> tuple[int, int]:
        bits = _bits(entry)
        words = tensors["qweight"].shape
        if len(words) != 2 or words[0] * 32 % bits:
            raise FormatError(f"qweight {list(words)} does not hold codes of {bits} bits.")
        return words[1], words[0] * 32 // bits

    @staticmethod
    def configure(
        config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], plain: Collection[str]
    ) -> dict[str, Any]:
        if len({entry["checkpoint_format"] for entry in entries.values()}) > 1:
            raise FormatError(
                "some weights have zero points and others have none, which GPTQ stores in two versions; a checkpoint has one. "
                "Give all weights formats with `-zero`, or none."
            )
        ordered = sorted(entries.items())
        counted = [tuple(sorted(entry.items())) for _, entry in ordered]
        base = dict(Counter(counted).most_common(1)[0][0])
        own: dict[str, dict[str, Any]] = {}
        for told in dict.fromkeys(counted):
            layers = [name for name, entry in ordered if tuple(sorted(entry.items())) == told]
            if (differing := {key: value for key, value in told if base[key] != value}) != {}:
                others = [*(name for name, _ in ordered if name not in set(layers)), *plain]
                own |= dict.fromkeys((f"+:{rule}" for rule in _named(layers, others)), differing)
        # Layers of blocks: what is outside of them is not quantized unless the file says so.
        inside = [name for name in plain if re.search(r"\.\d+\.", name)]
        own |= {f"-:{rule}": {} for rule in _named(inside, entries)}
        settings = {"quant_method": "gptq", **base, "lm_head": "lm_head" in entries}
        return {**config, "quantization_config": settings | ({"dynamic": own} if own else {})}

    @staticmethod
    def plain(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}

    @staticmethod
    def refuses(spec: Mapping[str, Any], input_spec: Mapping[str, str] | None = None) -> str | None:
        plain = plain_layer(spec, input_spec)
        return plain if isinstance(plain, str) else _refuses(plain)

    @staticmethod
    def nearest(bits: float, shape: tuple[int, int]) -> str | None:
        fitting = {
            width + 16 / group: f"int{width}-g{group}"
            for width in _WIDTHS
            for group in (32, 64, 128)
            if shape[1] % group == 0 and shape[0] * width % 32 == 0
        }
        within = [size for size in fitting if size <= bits]
        return fitting[max(within) if within else min(fitting)] if fitting else None

    @staticmethod
    def write(layer: CompressedLayer) -> StoredLayer:
        plain, codes, params, order = unpack_plain(layer)
        refused = _refuses(plain)
        if refused is not None:
            raise FormatError(f"{refused}.")
        grid, (out, width) = plain.format.grid, plain.shape
        assert isinstance(grid, Integer)
        group = plain.format.block.resolve(plain.shape, 1)[1]
        groups = torch.arange(width) // group
        if order is not None:
            codes, groups = codes[:, torch.argsort(order)], groups[torch.argsort(order)]
        across = width // group
        zero = torch.full((out, across), 1 << grid.bits >> 1) if not grid.zero else params["zero"].long()
        version = "gptq_v2" if grid.zero else "gptq"
        stored = zero if grid.zero else zero - 1
        scale = params["scale"].to(torch.float16 if plain.format.scale == "fp16" else torch.bfloat16)
        tensors = {
            "qweight": join_words(codes.T, grid.bits, down=True),
            "qzeros": join_words(stored.T, grid.bits),
            "scales": scale.T.contiguous(),
            "g_idx": groups.to(torch.int32),
        }
        entry = {
            "bits": grid.bits,
            "group_size": -1 if plain.format.block.cols == "all" else group,
            "desc_act": order is not None,
            "sym": not grid.zero,
            "checkpoint_format": version,
        }
        return StoredLayer(tensors, entry)

    @staticmethod
    def read(stored: StoredLayer) -> CompressedLayer:
        entry, tensors = stored.entry, stored.tensors
        if set(entry) != _KEYS:
            raise FormatError(f"a layer of GPTQ is described by {sorted(_KEYS)}, not {sorted(entry)}.")
        bits = _bits(entry)
        if not Gptq.marks <= tensors.keys() <= Gptq.suffixes:
            raise FormatError(f"a layer of GPTQ has {sorted(Gptq.suffixes)}, not {sorted(tensors)}.")
        codes = split_words(tensors["qweight"], bits, down=True).T
        out, width = codes.shape
        group = width if entry["group_size"] in (-1, None) else entry["group_size"]
        if type(group) is not int or group < 1 or width % group:
            raise FormatError(f"group_size {group!r} does not divide the {width} inputs.")
        across = width // group
        scales, zeros = tensors["scales"], split_words(tensors["qzeros"], bits)
        if tuple(scales.shape) != (across, out) or tuple(zeros.shape) != (across, out) or scales.dtype not in _STORES:
            raise FormatError(
                f"scales are {scales.dtype} {list(scales.shape)} and zero points {list(zeros.shape)}, where {[across, out]} are needed."
            )
        order = order_of_groups(tensors.get("g_idx"), width, group)
        half = 1 << bits >> 1
        of_either = entry["sym"] is True and (bool((zeros == half).all()) or bool((zeros == half - 1).all()))
        zeros = zeros if entry["checkpoint_format"] == "gptq_v2" else (zeros.long() + 1) % (1 << bits)
        symmetric = of_either or bool((zeros == half).all())
        grid = Integer(bits, zero=not symmetric)
        fmt = Format(grid, Block(1, "all" if entry["group_size"] in (-1, None) else group), _STORES[scales.dtype])
        params = {"scale": scales.T.float().contiguous()} | ({} if symmetric else {"zero": zeros.T.float().contiguous()})
        return make_plain(fmt, codes if order is None else codes[:, order], params, order)


def _named(layers: Collection[str], others: Collection[str]) -> list[str]:
    """Return patterns of these layers that match none of the others."""
    names, patterns = fold_experts(layers, others)
    return [*(rf"^{re.escape(name)}$" for name in names), *patterns]


def _bits(entry: Mapping[str, Any]) -> int:
    if type(entry["bits"]) is not int or entry["bits"] not in _WIDTHS:
        raise FormatError(f"bits {entry['bits']!r}; GPTQ checkpoints hold {', '.join(map(str, _WIDTHS))}.")
    return int(entry["bits"])


def _rules(dynamic: Any, patterns: NamePatterns) -> list[_Rule]:
    """Return the rules of `dynamic`: whether one leaves layers out, its pattern, its settings. Raises FormatError."""
    if dynamic in (None, False):
        return []
    if not isinstance(dynamic, dict):
        raise FormatError(f"quantization_config: dynamic is {type(dynamic).__name__}; settings by pattern are needed.")
    rules: list[_Rule] = []
    for rule, values in dynamic.items():
        pattern = rule.removeprefix("+:").removeprefix("-:")
        patterns.compile(pattern)
        if not isinstance(values, dict) or values.get("checkpoint_format", "gptq") not in _VERSIONS:
            raise FormatError(f"quantization_config: dynamic: {rule[:60]!r}: {str(values)[:60]!r} are no settings of a layer.")
        own = {key: value for key, value in values.items() if key in _KEYS}
        own |= {key: read_flag(own, key, key == "sym") for key in ("desc_act", "sym") if key in own}
        rules.append((rule.startswith("-"), pattern, own))
    return rules


def _dynamic(rules: list[_Rule], name: str, patterns: NamePatterns) -> dict[str, Any]:
    """Return the settings of the first rule that matches a layer with codes. Raises FormatError where that rule leaves it out."""
    for leaves_out, pattern, own in rules:
        if patterns.matches(pattern, name):
            if leaves_out:
                raise FormatError(f"quantization_config: dynamic leaves out {name}, which has codes.")
            return own
    return {}


def _refuses(plain: PlainLayer) -> str | None:
    grid, block, (out, width) = plain.format.grid, plain.format.block, plain.shape
    if not isinstance(grid, Integer) or grid.bits not in _WIDTHS or plain.format.layout != "dense":
        return f"{plain.format.name} is not a format of GPTQ, which holds int2, int3, int4 and int8 in groups of inputs"
    if block.rows != 1 or plain.format.scale not in ("fp16", "bf16"):
        return f"{plain.format.name}: GPTQ has one fp16 or bf16 scale for each group of inputs of a row"
    if out * grid.bits % 32 or width * grid.bits % 32:
        return f"codes of {grid.bits} bits of a weight {list(plain.shape)} do not fill words of 32 bits"
    return None
