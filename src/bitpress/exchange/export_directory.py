"""Export into directories that other tools read: safetensors files, config.json and what goes with the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.directory import INDEX_NAME, SINGLE_NAME
from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.hub_names import HubNames
from bitpress.checkpoints.jsonfile import write_json_bytes
from bitpress.checkpoints.parameter import stem
from bitpress.checkpoints.safetensors_file import read_tensor, serialize
from bitpress.checkpoints.side_files import find_side_files, read_side_file
from bitpress.checkpoints.source import SIDE_FILES, encode_config
from bitpress.errors import BitpressError, FormatError, NumericsError
from bitpress.exchange.expert_names import Stacks
from bitpress.exchange.pieces import cut_layer, pieces_of
from bitpress.exchange.source import DirectoryFormat, Fate, Fates, Target
from bitpress.formats import CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.progress import Progress

__all__ = ["DirectoryExporter", "PlainExporter", "added_error", "round_again", "write_directory"]

# Bytes of one weight file, about.
SHARD = 2 << 30


@dataclass(frozen=True)
class DirectoryExporter:
    """Layers in the way of one tool. Other tensors keep their type, and weights that are decoded have that of most of them."""

    format: type[DirectoryFormat]

    @property
    def about(self) -> str:
        return self.format.about

    @property
    def target(self) -> type[Target]:
        return self.format

    @property
    def is_file(self) -> bool:
        return False

    def export(
        self, checkpoint: CompressedCheckpoint, target: Path, fates: Fates, names: HubNames, progress: Progress
    ) -> dict[str, float]:
        return write_directory(checkpoint, target, self.format, fates, names, None, progress)


@dataclass(frozen=True)
class PlainExporter:
    """Every weight decoded, in one 16-bit type."""

    dtype: torch.dtype

    @property
    def about(self) -> str:
        return f"a plain model directory, every weight decoded into {str(self.dtype).removeprefix('torch.')}"

    @property
    def target(self) -> None:
        return None

    @property
    def is_file(self) -> bool:
        return False

    def export(
        self, checkpoint: CompressedCheckpoint, target: Path, fates: Fates, names: HubNames, progress: Progress
    ) -> dict[str, float]:
        return write_directory(checkpoint, target, None, fates, names, self.dtype, progress)


def write_directory(
    checkpoint: CompressedCheckpoint,
    target: Path,
    format: type[DirectoryFormat] | None,
    fates: Fates,
    names: HubNames,
    dtype: torch.dtype | None,
    progress: Progress,
) -> dict[str, float]:
    """Write a model into an empty directory; return the error that each parameter gained which is not stored as it was.

    `names` are those of the tensors, where they are others than the parameters'. `dtype` is that of all values; None: tensors keep theirs, and decoded weights have that of most tensors.
    """
    progress.begin(f"writing {target.name}", len(checkpoint.plain) + len(fates))
    made = _Made(checkpoint, format, fates, names, dtype, progress)
    _write_shards(made.tensors(), target)
    marks = ("quantization_config", "transformers_weights", "torch_dtype")
    config = {key: value for key, value in checkpoint.config.items() if key not in marks}
    config["dtype"] = str(made.usual).removeprefix("torch.")
    if format is not None and made.entries:
        config = format.configure(config, made.entries, made.matrices)
    write_durably(target / "config.json", [encode_config(config)])
    weights = {name for name in checkpoint.manifest.files if name.endswith(".safetensors")}
    for name, path in find_side_files(checkpoint.root, weights, SIDE_FILES).carried.items():
        (target / name).parent.mkdir(exist_ok=True)
        write_durably(target / name, [read_side_file(path)])
    return made.added


class _Made:
    """The tensors of an export, one parameter after the other, and what is learned on the way.

    entries    what the configuration must say of compressed layers
    added      the error that weights gained
    matrices   layers whose weight is a matrix that is stored as it is
    """

    def __init__(
        self,
        checkpoint: CompressedCheckpoint,
        format: type[DirectoryFormat] | None,
        fates: Fates,
        names: HubNames,
        dtype: torch.dtype | None,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.format, self.fates, self.dtype, self.progress = checkpoint, format, fates, dtype, progress
        self.names, self.stacks = names, Stacks({}) if format is None else format.stacks
        self.entries: dict[str, Mapping[str, Any]] = {}
        self.added: dict[str, float] = {}
        self.matrices: list[str] = []
        self.usual = _usual_type(checkpoint) if dtype is None else dtype

    def tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors of every parameter. Raises FormatError by its name."""
        for name in self.checkpoint.plain:
            value = read_tensor(*self.checkpoint.tensors[name])
            yield self._named(name, self._stored(name, value, self.dtype) if value.is_floating_point() else value)
            self.progress.advance(name)
        for name, fate in self.fates.items():
            try:
                yield self._compressed(name, fate)
            except NumericsError:
                raise
            except BitpressError as error:
                raise FormatError(f"{name}: {error}") from error
            self.progress.advance(name)

    def _compressed(self, name: str, fate: Fate) -> dict[str, torch.Tensor]:
        layer = self.checkpoint.read_layer(name)
        if fate.how == "decoded" or self.format is None:
            return self._named(name, self._stored(name, self.checkpoint.decoded(name, layer), self.usual))
        if fate.how == "rounded":
            assert fate.format is not None
            layer, self.added[name] = round_again(layer, fate.format)
        shape = self.checkpoint.manifest.weights[name].parameter(name).parameter_shape
        tensors: dict[str, torch.Tensor] = {}
        for piece in pieces_of(self.names, name, shape):
            stored = self.format.write(cut_layer(layer, piece))
            place = self.stacks.find(stem(piece.name))
            if self.entries.setdefault(stem(piece.name) if place is None else place[0], stored.entry) != stored.entry:
                raise FormatError("its experts are not stored alike.")
            tensors |= {f"{stem(piece.name)}.{leaf}": tensor for leaf, tensor in stored.tensors.items()}
        return self._stacked(tensors)

    def _named(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a plain parameter by the names of its tensors, and note those that are weights of layers."""
        pieces = pieces_of(self.names, name, tuple(value.shape))
        for piece in pieces:
            if piece.name.endswith(".weight") and len(piece.shape) == 2:
                self.matrices.append(stem(piece.name))
        return self._stacked({piece.name: piece.cut(value) for piece in pieces})

    def _stacked(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors with those of experts joined that the tool stores in one."""
        made: dict[str, torch.Tensor] = {}
        joined: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, leaf = name.rpartition(".")
            place = self.stacks.find(layer)
            if place is None:
                made[name] = tensor
            else:
                joined.setdefault(f"{place[0]}.{leaf}", {})[place[1]] = tensor
        return made | {name: torch.stack([its[i] for i in range(len(its))]) for name, its in joined.items()}

    def _stored(self, name: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Return values in a type, and note what they lose. Raises NumericsError where they leave its range."""
        made = value if dtype is None else value.to(dtype)
        if made.dtype != value.dtype:
            if not bool(torch.isfinite(made).all()):
                raise NumericsError(f"{name}: values are beyond the range of {made.dtype}; export to bf16.")
            if (error := added_error(value, made)) > 0 or name in self.fates:
                self.added[name] = error
        return made.contiguous()


def _usual_type(checkpoint: CompressedCheckpoint) -> torch.dtype:
    """Return the floating type of most values that are stored plainly; bfloat16 if there are none."""
    counts: dict[torch.dtype, int] = {}
    for entry in checkpoint.plain.values():
        if entry.torch_dtype in (torch.float16, torch.bfloat16, torch.float32):
            counts[entry.torch_dtype] = counts.get(entry.torch_dtype, 0) + entry.numel
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.bfloat16


def round_again(layer: CompressedLayer, name: str) -> tuple[CompressedLayer, float]:
    """Return a layer with its decoded weight rounded into a format, by clipping for the least squared error, and the error that this adds."""
    format, w = parse_format(name), layer.weight.dequantize()
    params = format.fit(w, shrink=tuple(1 - i / 40 for i in range(20)))
    term = Packed.pack(format, format.encode(w, params), params)
    return CompressedLayer(CompressedWeight((term,))), added_error(w, term.dequantize())


def added_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the size of a change relative to what is changed, as a ratio of squares; 0 for a weight of zeros."""
    size = float(before.double().square().sum())
    return float((after.double() - before.double()).square().sum()) / size if size else 0.0


def _write_shards(parameters: Iterator[dict[str, torch.Tensor]], target: Path) -> None:
    """Write tensors into one weight file, or into several with an index."""
    index: dict[str, int] = {}
    held: dict[str, torch.Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal held, size, count
        count += 1
        write_durably(target / f"part-{count}.safetensors", serialize(held, {"format": "pt"}))
        index.update(dict.fromkeys(held, count))
        held, size = {}, 0

    for tensors in parameters:
        held |= tensors
        size += sum(tensor.nbytes for tensor in tensors.values())
        total += sum(tensor.nbytes for tensor in tensors.values())
        if size >= SHARD:
            flush()
    if held or not count:
        flush()
    names = [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names, 1):
        (target / f"part-{i}.safetensors").rename(target / name)
    if count > 1:
        weight_map = {name: names[part - 1] for name, part in sorted(index.items())}
        write_durably(target / INDEX_NAME, [write_json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})])
