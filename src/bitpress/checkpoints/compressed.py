"""A published model: a directory whose manifest, `bitpress.json`, accounts for every byte that a loader will use.

    bitpress.json           {"bitpress": 2, "files": {name: {"bytes", "sha256"}}, "weights": {parameter: ...}, "aliases": {...}, ...}
    bitpress.safetensors    what is in no block; a weight `a.b.weight` is stored as `a.b.term0.codes`, ...
    bitpress-*.safetensors  one file a block; bitpress-head.safetensors: an output head that is compressed
    config.json, the tokenizer's files: as transformers wants them

A directory without a valid manifest is not a model. `report.json` and `README.md` tell how it was made; they hold times, differ from
run to run and are read by nothing, so the manifest leaves them out.

No file has a name under which a reader that does not know bitpress looks for weights: such a reader would find no parameter of the
model in them and go on with random ones. config.json sends transformers to a file that is not there, whose name says what is needed.
Directories of version 1 have transformers' own names (model-*.safetensors and an index); they are read, and no longer written.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bitpress.checkpoints.claims import claim_tensors
from bitpress.checkpoints.directory import INDEX_NAME, SINGLE_NAME, open_directory, read_index, safe_file
from bitpress.checkpoints.durable import hash_file
from bitpress.checkpoints.jsonfile import parse_json, read_json
from bitpress.checkpoints.locks import describe_job
from bitpress.checkpoints.manifest import JOB_DIRECTORY, MANIFEST_NAME, is_compressed
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.checkpoints.records import FileRecord, Manifest
from bitpress.checkpoints.safetensors_file import TensorEntry, read_header, read_tensor
from bitpress.checkpoints.side_files import CHAT_TEMPLATES, listed_file
from bitpress.checkpoints.source import DEPTHS, SIDE_FILES, WIDTHS, read_config
from bitpress.errors import BitpressError, CheckpointError, FormatError
from bitpress.formats import AttentionOperands, CompressedLayer, CompressedWeight
from bitpress.formats.nested import left_out_bytes, weight_at_width

__all__ = [
    "HEAD_NAME",
    "JOB_DIRECTORY",
    "MANIFEST_NAME",
    "OUTER_NAME",
    "VERSION",
    "WEIGHT_FILE_MARKS",
    "CompressedCheckpoint",
    "config_marks",
    "is_compressed",
]

VERSION = 2
# The version whose weight files have transformers' own names.
_FIRST = 1
OUTER_NAME = "bitpress.safetensors"
# A head that is compressed after the blocks.
HEAD_NAME = "bitpress-head.safetensors"
_BLOCK_PREFIX = "bitpress-"
# transformers without bitpress looks for this file, and its error names it; the second one is that of older directories.
WEIGHT_FILE_MARKS = (
    "to load this model install bitpress and import it first.safetensors.index.json",
    "to load this model pip install bitpress and import bitpress first.safetensors.index.json",
)

# What readers open by its name alone wherever they find it: a file that the manifest must list, or that must not be there.
_OPENED_BY_NAME = (
    *(*SIDE_FILES, *WEIGHT_FILE_MARKS, SINGLE_NAME, INDEX_NAME),
    *("adapter_config.json", "custom_generate", "tekken.json"),
)


def config_marks(version: int = VERSION) -> dict[str, Any]:
    """Return what config.json says beside the original's content: the method, and for transformers which weight files to open."""
    method = {"quantization_config": {"quant_method": "bitpress", "version": version}}
    return method if version == _FIRST else {**method, "transformers_weights": WEIGHT_FILE_MARKS[0]}


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A directory that has passed every check; content used as an address is checked when a weight is read.

    `cut` where some terms of its weights are left out (`checkpoints.budget`): what is not in `tensors` is never read. `width` are the
    bits that nested weights are read at (`checkpoints.width`), by default all of them. `stored` are the names of the tensors of every
    weight, `operands` of every module whose attention is rounded.
    """

    root: Path
    config: Mapping[str, Any]
    manifest: Manifest
    tensors: Mapping[str, tuple[Path, TensorEntry]]
    stored: Mapping[str, tuple[str, ...]]
    cut: bool = False
    width: int | None = None
    operands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: str | Path, *, manifest: Manifest | None = None, content: bytes | None = None, verify: bool = True
    ) -> "CompressedCheckpoint":
        """Open and check a directory: names, sizes, SHA-256 of every file (unless `verify` is off), headers, key set.

        `manifest` stands for a file that is still to be written, so that a job can prove a directory before publishing it; `content`
        are the manifest's bytes, where they are read already.
        """
        root = open_directory(path)
        manifest = _read_manifest(root, content) if manifest is None else manifest
        paths = {name: _checked_file(root, name, record, verify) for name, record in manifest.files.items()}
        _check_listed(root, manifest)
        tensors: dict[str, tuple[Path, TensorEntry]] = {}
        for file, target in paths.items():
            if file.endswith(".safetensors"):
                for name, entry in read_header(target)[0].items():
                    if name in tensors:
                        raise CheckpointError(f"{target}: {name!r} is in {tensors[name][0].name} already.")
                    tensors[name] = (target, entry)
        if manifest.bitpress == _FIRST and {name: file.name for name, (file, _) in tensors.items()} != read_index(root):
            raise CheckpointError(
                f"{root}: the index and the headers of the weight files disagree about which file holds what."
            )
        stored, operands = claim_tensors(root, manifest, tensors)
        _check_aliases(root, manifest, tensors)
        return cls(root, _checked_config(root, manifest, tensors), manifest, tensors, stored, operands=operands)

    def check_hashes(self) -> None:
        """Raise CheckpointError unless every file has the SHA-256 of the manifest, as `open` does with `verify`."""
        for name, record in self.manifest.files.items():
            _checked_file(self.root, name, record, verify=True)

    @property
    def plain(self) -> dict[str, TensorEntry]:
        """Parameters that are stored as they are."""
        claimed = {name for names in (*self.stored.values(), *self.operands.values()) for name in names}
        return {name: entry for name, (_, entry) in self.tensors.items() if name not in claimed}

    @property
    def names(self) -> Collection[str]:
        """Parameters that are stored, plain ones first."""
        return [*self.plain, *self.manifest.weights]

    def read(self, name: str) -> torch.Tensor | CompressedLayer:
        """Read one parameter as it is stored, a tensor or a layer whose content is checked. Raises CheckpointError."""
        return self.read_layer(name) if name in self.manifest.weights else read_tensor(*self.tensors[name])

    def read_weight(self, parameter: str) -> CompressedWeight:
        """Read the weight of a layer (all experts below each other), whatever its input. Raises CheckpointError."""
        return self.read_layer(parameter).weight

    def read_layer(self, parameter: str) -> CompressedLayer:
        """Read one compressed weight and the format of its input, and check their content. Raises CheckpointError."""
        record = self.manifest.weights[parameter]
        prefix = self._parameter(parameter).stem + "."
        tensors = {name.removeprefix(prefix): read_tensor(*self.tensors[name]) for name in self.stored[parameter]}
        try:
            layer = CompressedLayer.build(record.spec, tensors, record.input)
            return layer if self.width is None else replace(layer, weight=weight_at_width(layer.weight, self.width))
        except BitpressError as error:
            raise CheckpointError(f"{self.root}: {parameter}: {error}") from error

    def decode(self, parameter: str) -> torch.Tensor:
        """Read one compressed weight as the parameter that it stands for, in float32.

        Raises CheckpointError, also where the input of its product is rounded: a parameter alone would compute something else.
        """
        return self.decoded(parameter, self.read_layer(parameter))

    def decoded(self, parameter: str, layer: CompressedLayer) -> torch.Tensor:
        """Decode a layer that was read; raises as `decode` does."""
        if layer.input is not None:
            raise CheckpointError(
                f"{self.root}: {parameter}: its input is rounded ({layer.input.name}), which decoded weights do not do; "
                "it is run as it is, or exported to what says so (compressed-tensors)."
            )
        return self._restored(parameter, layer.weight)

    def _restored(self, parameter: str, weight: CompressedWeight) -> torch.Tensor:
        try:
            return self._parameter(parameter).restore(weight.dequantize())
        except FormatError as error:
            raise CheckpointError(f"{self.root}: {parameter}: {error}") from error

    def load(self, prefix: str, exclude: str | None = None) -> dict[str, torch.Tensor]:
        """Return the parameters whose name begins with `prefix`, compressed ones decoded to float32: weights alone, whatever their inputs."""

        values = {name: read_tensor(*self.tensors[name]) for name in self.plain if _is_below(name, prefix, exclude)}
        return values | {
            name: self._restored(name, self.read_weight(name))
            for name in self.manifest.weights
            if _is_below(name, prefix, exclude)
        }

    def load_products(self, prefix: str, exclude: str | None = None) -> dict[str, CompressedLayer]:
        """Return the layers whose inputs are rounded: with `load` they are what the model computes."""
        rounded = (name for name, record in self.manifest.weights.items() if record.input is not None)
        return {name: self.read_layer(name) for name in rounded if _is_below(name, prefix, exclude)}

    def load_attention(self, prefix: str = "") -> dict[str, AttentionOperands]:
        """Return how modules below a prefix round the operands of their attention, by the modules' names. Raises CheckpointError."""
        found = {}
        for name, names in self.operands.items():
            if name.startswith(prefix):
                tensors = {leaf.removeprefix(f"{name}."): read_tensor(*self.tensors[leaf]) for leaf in names}
                try:
                    found[name] = AttentionOperands.build(self.manifest.attention[name], tensors)
                except BitpressError as error:
                    raise CheckpointError(f"{self.root}: {name}: {error}") from error
        return found

    def check_fits(self, state: Mapping[str, torch.Tensor], ties: Mapping[str, str] | None = None) -> None:
        """Raise CheckpointError unless the directory holds exactly the parameters of a model, each in its shape.

        `ties` gives the model's tied parameters with their originals; left out, they are the ones that share memory in `state`.
        """
        aliases = dict(self.manifest.aliases)
        held = {name: entry.shape for name, entry in self.plain.items()}
        held |= {name: self._parameter(name).parameter_shape for name in self.manifest.weights}
        held |= {name: held[original] for name, original in aliases.items()}
        missing, extra = sorted(set(state) - set(held)), sorted(set(held) - set(state))
        if missing or extra:
            what = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the model has no use for"
            raise CheckpointError(f"{self.root}: {what} ({len(missing)} missing, {len(extra)} too many).")
        ties = _shared(state, aliases) if ties is None else dict(ties)
        if ties != aliases:
            first = min(set(ties.items()) ^ set(aliases.items()))[0]
            raise CheckpointError(
                f"{self.root}: the configuration and the manifest disagree whether {first!r} is tied, and to what."
            )
        for name, shape in held.items():
            if tuple(state[name].shape) != tuple(shape):
                raise CheckpointError(
                    f"{self.root}: {name!r} is {list(shape)}, the configuration needs {list(state[name].shape)}."
                )
        for name, entry in self.plain.items():
            if entry.torch_dtype.is_floating_point != state[name].is_floating_point():
                raise CheckpointError(f"{self.root}: {name!r} is {entry.dtype}, the configuration needs {state[name].dtype}.")

    def _parameter(self, name: str) -> WeightParameter:
        return self.manifest.weights[name].parameter(name)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of some products are rounded, so that decoded weights alone compute something else."""
        return bool(self.operands) or any(record.input is not None for record in self.manifest.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, or where terms or bits are left out of what is read."""
        if self.cut or self.width is not None:
            return sum(entry.nbytes for _, entry in self.tensors.values()) - sum(map(self._left_out, self.manifest.weights))
        return sum(record.bytes for name, record in self.manifest.files.items() if name.endswith(".safetensors"))

    def _left_out(self, name: str) -> int:
        return 0 if self.width is None else left_out_bytes(self.manifest.weights[name].spec, self.width)

    @property
    def outer(self) -> tuple[str, ...]:
        """Names of the compressed weights that are in no block: embeddings and output head."""
        files = {name: self.tensors[stored[0]][0].name for name, stored in self.stored.items() if stored}
        return tuple(name for name, file in files.items() if file in (OUTER_NAME, HEAD_NAME))

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the compressed weights inside the blocks, from the bytes stored for them."""
        return self.bits_of(self.manifest.weights.keys() - set(self.outer))

    def bits_of(self, names: Collection[str]) -> float:
        """Bits a weight of some compressed weights, 0 for none; those that are read."""
        stored = sum(self.tensors[tensor][1].nbytes for name in names for tensor in self.stored[name])
        stored -= sum(map(self._left_out, names))
        shapes = [self.manifest.weights[name].spec["shape"] for name in names]
        return stored * 8 / sum(rows * columns for rows, columns in shapes) if shapes else 0.0


def _is_below(name: str, prefix: str, exclude: str | None) -> bool:
    return name.startswith(prefix) and not (exclude is not None and name.startswith(exclude))


def _read_manifest(root: Path, content: bytes | None = None) -> Manifest:
    if not (root / MANIFEST_NAME).exists():
        raise CheckpointError(f"{root}: there is no {MANIFEST_NAME}; {describe_job(root / JOB_DIRECTORY)}.")
    where = root / MANIFEST_NAME
    file = safe_file(root, MANIFEST_NAME)
    values = read_json(file) if content is None else parse_json(content, str(file))
    version = values.get("bitpress") if isinstance(values, dict) else None
    if version not in (_FIRST, VERSION) or isinstance(version, bool):
        raise CheckpointError(f"{where}: version {version!r}; this bitpress reads versions {_FIRST} to {VERSION}.")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: {at}: {first['msg']}.") from error


def _checked_file(root: Path, name: str, record: FileRecord, verify: bool) -> Path:
    target = listed_file(root, name)
    size = target.stat().st_size
    if size != record.bytes:
        raise CheckpointError(f"{target}: {size} bytes where the manifest says {record.bytes}; the file is cut or changed.")
    if verify and hash_file(target) != record.sha256:
        raise CheckpointError(f"{target}: its SHA-256 is not the manifest's; the file is damaged or changed.")
    return target


def _check_listed(root: Path, manifest: Manifest) -> None:
    """Refuse a manifest that leaves out a file which some reader would open all the same."""
    first = manifest.bitpress == _FIRST
    for name in ("config.json", INDEX_NAME if first else OUTER_NAME):
        if name not in manifest.files:
            raise CheckpointError(f"{root}: the manifest does not list {name}.")
    for name in manifest.files if not first else ():
        if name.endswith(".index.json") or (
            name.endswith(".safetensors") and name != OUTER_NAME and not name.startswith(_BLOCK_PREFIX)
        ):
            raise CheckpointError(f"{root}: the manifest lists {name}, which other readers would take for the weights.")
    folder = root / CHAT_TEMPLATES
    templates = [f"{CHAT_TEMPLATES}/{leaf}" for leaf in sorted(os.listdir(folder))] if folder.is_dir() else []
    for name in (*_OPENED_BY_NAME, *templates):
        if name not in manifest.files and os.path.lexists(root / name):
            raise CheckpointError(f"{root}: holds {name}, which the manifest does not list; remove it.")


def _checked_config(root: Path, manifest: Manifest, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> dict[str, Any]:
    config = read_config(root, foreign=False)
    where = root / "config.json"
    marks = config_marks(manifest.bitpress)
    method = marks["quantization_config"]
    if config.get("quantization_config") != method:
        raise CheckpointError(f"{where}: quantization_config is not {method}; bitpress did not write it.")
    known = WEIGHT_FILE_MARKS if "transformers_weights" in marks else (None,)
    if config.get("transformers_weights") not in known:
        raise CheckpointError(f"{where}: names weight files of its own (transformers_weights), which is never followed.")
    if "auto_map" in config:
        raise CheckpointError(f"{where}: names code of its own (auto_map), which is never followed.")
    # Modules and their buffers are made before any shape can be compared: what they may cost is bounded by what is stored.
    shapes = [entry.shape for _, entry in tensors.values()] + [tuple(r.spec["shape"]) for r in manifest.weights.values()]
    limits = dict.fromkeys(DEPTHS, len(tensors)) | dict.fromkeys(WIDTHS, max((max(s, default=1) for s in shapes), default=1))
    for part in (config, config.get("text_config")):
        for key, limit in limits.items():
            value = part.get(key) if isinstance(part, dict) else None
            if value is not None and (type(value) is not int or not 0 < value <= limit):
                raise CheckpointError(f"{where}: {key} is {value!r}; the weights that are stored allow for 1 to {limit}.")
    return config


def _check_aliases(root: Path, manifest: Manifest, tensors: Mapping[str, Any]) -> None:
    stored = (set(tensors) | set(manifest.weights)) - set(manifest.aliases)
    for name, original in manifest.aliases.items():
        if original not in stored:
            raise CheckpointError(f"{root}: {name!r} is tied to {original!r}, which is not stored.")
        if name in tensors or name in manifest.weights:
            raise CheckpointError(f"{root}: {name!r} is tied to {original!r} and stored as well.")


def _shared(state: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that share memory with another one, each with the one of them that is no alias."""
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(value.untyped_storage()._cdata, []).append(name)
    ties: dict[str, str] = {}
    for names in groups.values():
        original = next((name for name in names if name not in aliases), names[0])
        ties |= {name: original for name in names if name != original}
    return ties
