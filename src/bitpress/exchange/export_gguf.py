"""Export into one GGUF file: weights in blocks with their codes, the rest in the types they are stored in, norms in float32."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.hub_names import HubNames, Piece
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import BitpressError, DiskError, FormatError, UsageError
from bitpress.exchange.export_directory import added_error, round_again
from bitpress.exchange.gguf import Gguf, block_type, move_rows
from bitpress.exchange.gguf_blocks import BLOCK_TYPES
from bitpress.exchange.gguf_metadata import find_architecture, frequency_tensors, set_metadata, whole_config
from bitpress.exchange.gguf_names import ARCHITECTURES, order_to_pairs
from bitpress.exchange.gguf_tokenizer import set_tokenizer
from bitpress.exchange.pieces import cut_layer, pieces_of, spec_of_piece
from bitpress.exchange.plain_layer import plain_layer
from bitpress.exchange.source import Fate, Fates, Target
from bitpress.formats import CompressedLayer, CompressedWeight, Packed, parse_format
from bitpress.progress import Progress

__all__ = ["GgufExporter"]

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file to be: its type, shape and bytes, and the pieces of the parameter that it is made of, one for each expert."""

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        if self.kind in BLOCK_TYPES:
            return count // BLOCK_TYPES[self.kind].weights * BLOCK_TYPES[self.kind].nbytes
        return count * (4 if self.kind == "F32" else 2)


@dataclass(frozen=True)
class GgufExporter:
    @property
    def about(self) -> str:
        return "one GGUF file, for llama.cpp"

    @property
    def target(self) -> type[Target]:
        return Gguf

    @property
    def is_file(self) -> bool:
        return True

    def export(
        self, checkpoint: CompressedCheckpoint, target: Path, fates: Fates, names: HubNames, progress: Progress
    ) -> dict[str, float]:
        if target.suffix.lower() != ".gguf":
            raise UsageError(f"{target.name}: the name of a GGUF file ends in .gguf.")
        architecture = find_architecture(checkpoint.config)
        config = whole_config(checkpoint.config)
        tensors = _plan(checkpoint, architecture, fates, names)
        beside = frequency_tensors(config)
        made = _Made(checkpoint, architecture, config, fates)
        progress.begin(f"writing {target.name}", len(tensors))
        writer = _begin(target, architecture, tensors, checkpoint, config)
        try:
            for name, values in beside.items():
                writer.add_tensor_info(name, list(values.shape), values.numpy().dtype, values.nbytes)
            factors = _announce(writer, checkpoint, tensors)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in beside.values():
                writer.write_tensor_data(values.numpy())
            for tensor in tensors:
                raw = made.content(tensor)
                assert raw.nbytes == tensor.nbytes, tensor.name
                writer.write_tensor_data(raw.contiguous().view(torch.uint8).numpy())
                if tensor.name in factors:
                    writer.write_tensor_data(factors[tensor.name].numpy())
                progress.advance(tensor.parameter)
        except OSError as error:
            raise DiskError(f"{target}: cannot be written: {error.strerror or error}.") from error
        finally:
            writer.close()
        _sync(target)
        return made.added


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _plan(checkpoint: CompressedCheckpoint, architecture: str, fates: Fates, names: HubNames) -> list[_Tensor]:
    """Return the tensors of the file. Raises UsageError for a parameter that has no place in it."""
    row = ARCHITECTURES[architecture]
    tensors: list[_Tensor] = []
    for parameter in checkpoint.names:
        fate, entry = fates.get(parameter), checkpoint.plain.get(parameter)
        shape = checkpoint.manifest.weights[parameter].parameter(parameter).parameter_shape if entry is None else entry.shape
        places: dict[str, dict[int | None, Piece]] = {}
        for piece in pieces_of(names, parameter, shape):
            place = row.theirs(piece.name)
            if place is None:
                raise UsageError(
                    f"{checkpoint.root}: {piece.name} has no place in a GGUF file of {architecture} as it is written here."
                )
            places.setdefault(place.tensor, {})[place.expert] = piece
        for tensor, experts in places.items():
            one = next(iter(experts.values()))
            whole = one.shape if None in experts else (len(experts), *one.shape)
            pieces = tuple(piece for _, piece in sorted(experts.items(), key=lambda item: item[0] or 0))
            if entry is None:
                assert fate is not None
                kind = _kind(checkpoint.manifest.weights[parameter].spec, one, fate)
            else:
                small = len(shape) < 2 or row.routes(tensor)
                kind = "F32" if small else _PLAIN.get(entry.torch_dtype, "F32")
            tensors.append(_Tensor(tensor, parameter, kind, whole, pieces))
    return tensors


def _kind(spec: Mapping[str, Any], piece: Piece, fate: Fate) -> str:
    if fate.how == "decoded":
        return "F16"
    if fate.how == "rounded":
        assert fate.format is not None
        fmt = parse_format(fate.format)
        return next(name for name, kind in BLOCK_TYPES.items() if parse_format(kind.format) == fmt)
    plain = plain_layer(spec_of_piece(spec, piece.shape[0]), None)
    name = None if isinstance(plain, str) else block_type(plain)
    assert name is not None
    return name


def _begin(
    made: Path, architecture: str, tensors: list[_Tensor], checkpoint: CompressedCheckpoint, config: Mapping[str, Any]
) -> Any:
    """Return a writer that has been told all but the tensors."""
    import gguf

    writer = gguf.GGUFWriter(made, architecture)
    writer.add_type("model")
    writer.add_name(made.stem)
    writer.add_quantization_version(2)
    writer.add_file_type(_file_type(tensors))
    set_metadata(writer, architecture, config)
    set_tokenizer(writer, checkpoint.root, config["vocab_size"])
    return writer


def _file_type(tensors: list[_Tensor]) -> int:
    """Return llama.cpp's number for files most of whose bytes have the type that has most of these."""
    import gguf

    nbytes: dict[str, int] = {}
    for tensor in tensors:
        nbytes[tensor.kind] = nbytes.get(tensor.kind, 0) + tensor.nbytes
    most = max(nbytes, key=lambda kind: nbytes[kind])
    known = {kind.name: int(kind) for kind in gguf.LlamaFileType}
    names = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"ALL_{most}", f"MOSTLY_{most}_MOE")
    return next((known[name] for name in names if name in known), known["MOSTLY_F16"])


def _announce(writer: Any, checkpoint: CompressedCheckpoint, tensors: list[_Tensor]) -> dict[str, torch.Tensor]:
    """Say the writer every tensor; return the factors that stand behind weights of NVFP4, by the weight's tensor."""
    import gguf
    import numpy as np

    factors: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        shape: tuple[int, ...] = tensor.shape
        if tensor.kind in BLOCK_TYPES:
            shape = (*shape[:-1], shape[-1] // BLOCK_TYPES[tensor.kind].weights * BLOCK_TYPES[tensor.kind].nbytes)
            writer.add_tensor_info(tensor.name, list(shape), np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
        else:
            writer.add_tensor_info(tensor.name, list(shape), np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        if tensor.kind == "NVFP4":
            term = checkpoint.read_weight(tensor.parameter).terms[0]
            assert isinstance(term, Packed)
            factors[tensor.name] = term.tensors["scale_tensor"].reshape(1).float()
            name = f"{tensor.name.removesuffix('.weight')}.scale"
            writer.add_tensor_info(name, [1], np.dtype(np.float32), 4)
    return factors


class _Made:
    """The contents of tensors, one after the other. Of the parameter that was last read the value is held: several tensors are made of it.

    added   the error that weights gained
    """

    def __init__(self, checkpoint: CompressedCheckpoint, architecture: str, config: Mapping[str, Any], fates: Fates) -> None:
        self.checkpoint, self.row, self.config, self.fates = checkpoint, ARCHITECTURES[architecture], config, fates
        self.added: dict[str, float] = {}
        self.held: tuple[str, torch.Tensor | CompressedLayer] | None = None

    def content(self, tensor: _Tensor) -> torch.Tensor:
        """Return the content of a tensor. Raises FormatError by the parameter's name."""
        try:
            if self.held is None or self.held[0] != tensor.parameter:
                self.held = (tensor.parameter, self._read(tensor))
            value, order = self.held[1], self._order(tensor)
            if isinstance(value, CompressedLayer):
                return self._blocks(value, tensor, order)
        except BitpressError as error:
            raise FormatError(f"{tensor.parameter}: {error}") from error
        pieces = [piece.cut(value) for piece in tensor.pieces]
        values = pieces[0] if len(tensor.shape) == pieces[0].ndim else torch.stack(pieces)
        values = values if order is None else values[order]
        made = values.to({name: dtype for dtype, name in _PLAIN.items()}[tensor.kind])
        if (lost := added_error(values, made)) > self.added.get(tensor.parameter, 0.0):
            self.added[tensor.parameter] = lost
        return made

    def _read(self, tensor: _Tensor) -> torch.Tensor | CompressedLayer:
        """Return what becomes of a parameter: its values, or the layer whose codes are written."""
        name = tensor.parameter
        fate = self.fates.get(name)
        if fate is None:
            values = read_tensor(*self.checkpoint.tensors[name])
            return values.float() + 1 if self.row.shifts(tensor.name) else values
        layer = self.checkpoint.read_layer(name)
        if fate.how == "decoded":
            decoded = self.checkpoint.decoded(name, layer)
            values = decoded.half()
            self.added[name] = added_error(decoded, values.float())
            return values
        if fate.how == "rounded":
            assert fate.format is not None
            layer, self.added[name] = round_again(layer, fate.format)
        return layer

    def _order(self, tensor: _Tensor) -> torch.Tensor | None:
        """Return the order of the rows of queries and keys, where it is another."""
        if not self.row.moves_rows(tensor.name):
            return None
        queries = self.config["num_attention_heads"]
        heads = queries if "attn_q" in tensor.name else self.config.get("num_key_value_heads") or queries
        return order_to_pairs(tensor.shape[0], heads)

    def _blocks(self, layer: CompressedLayer, tensor: _Tensor, order: torch.Tensor | None) -> torch.Tensor:
        weight = CompressedWeight.stack_rows([cut_layer(layer, piece).weight for piece in tensor.pieces])
        if order is not None:
            term = weight.terms[0]
            assert isinstance(term, Packed)
            weight = CompressedWeight((move_rows(term, order),))
        return Gguf.write(CompressedLayer(weight)).tensors["blocks"]
