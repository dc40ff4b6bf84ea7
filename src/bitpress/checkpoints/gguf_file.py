"""GGUF files as a source: checked before anything trusts them, then turned into a model directory in bf16.

    byte 0      "GGUF", version (2 or 3), number of tensors, number of metadata pairs       u32 u32 u64 u64, little endian
    metadata    key, type, value                             a string is u64 length + UTF-8, an array u32 type + u64 count
    tensors     name, dimensions (fastest first), type, offset of the data
    data        from the next multiple of general.alignment (32) on; every tensor lies inside the file

The values are dequantized by transformers' own reader. What that reader drops in silence is refused here: a parameter that no
tensor makes, a tensor that makes no parameter (such as factors for rotary frequencies), values that are not finite.
"""

import contextlib
import io
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.durable import open_regular, read_into, write_durably
from bitpress.checkpoints.jsonfile import read_json, write_json_bytes
from bitpress.checkpoints.tokenizer import reader_errors
from bitpress.errors import CheckpointError, MemoryLimitError

__all__ = ["GgufHeader", "GgufModel", "load_gguf", "read_gguf_header", "save_directory"]

MAX_COUNT = 2**20  # of tensors and of metadata pairs
MAX_DIMENSIONS = 4
_HEADER_STEP = 2**24
_MAX_HEADER = 2**28
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32

# tokenizer.ggml.pre: vocabularies whose digits stand alone (transformers' reader splits them like GPT-2), and those like GPT-2.
_SINGLE_DIGITS = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})
_LIKE_GPT2 = frozenset({"default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "trillion"})


@dataclass(frozen=True)
class GgufHeader:
    """The metadata without its arrays (those give their length), and the number of values of every tensor."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds: transformers' configuration, the values in float32, and the tokenizer."""

    config: Any
    state: dict[str, torch.Tensor]
    tokenizer: Any


class _Cursor:
    """Reads numbers and strings one after the other; the file's end and absurd lengths are CheckpointErrors."""

    def __init__(self, path: Path, descriptor: int, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self.at = 0
        self._descriptor = descriptor
        self._data = bytearray()

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def take(self, length: int) -> bytes:
        stop = self.at + length
        if stop > self.num_bytes:
            raise self.fail(f"ends inside its header: byte {stop} is needed, the file has {self.num_bytes}; copy it again.")
        if stop > _MAX_HEADER:
            raise self.fail(f"a header of more than {_MAX_HEADER} bytes is not read.")
        if stop > len(self._data):
            start = len(self._data)
            part = bytearray(min(max(stop - start, _HEADER_STEP), self.num_bytes - start))
            read_into(self.path, self._descriptor, memoryview(part), start)
            self._data += part
        start, self.at = self.at, stop
        return bytes(self._data[start:stop])

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"the string before byte {self.at} of the header is not UTF-8.") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self._skip_array()
        return self._scalar(kind)

    def _scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.fail(f"metadata of the unknown type {kind} before byte {self.at}.")
        return self.number(_SCALARS[kind])

    def _skip_array(self) -> int:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING and count <= self.num_bytes // 8:
            for _ in range(count):
                self.string()
        else:
            raise self.fail(f"an array of type {kind} and {count} entries in the metadata is not read.")
        return int(count)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check all of a file but its values. Raises CheckpointError."""
    with open_regular(path) as (descriptor, num_bytes):
        cursor = _Cursor(path, descriptor, num_bytes)
        if num_bytes < 24 or cursor.take(4) != b"GGUF":
            raise cursor.fail("is not a GGUF file: it does not begin with the four letters GGUF and a header.")
        version = cursor.number("I")
        if version not in (2, 3):
            raise cursor.fail(f"GGUF version {version}; little-endian files of version 2 or 3 are read.")
        num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
        if not 0 < num_tensors <= MAX_COUNT or num_pairs > MAX_COUNT:
            raise cursor.fail(f"states {num_tensors} tensors and {num_pairs} metadata pairs; 1 to {MAX_COUNT} are read.")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.string()
            if key in metadata:
                raise cursor.fail(f"the metadata key {key[:80]!r} is given twice.")
            metadata[key] = cursor.value()
        return GgufHeader(metadata, _read_tensors(cursor, num_tensors, metadata))


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, int]:
    from gguf import GGML_QUANT_SIZES

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment % 8:
        raise cursor.fail(f"general.alignment is {str(alignment)[:40]!r}; a multiple of 8 is needed.")
    sizes = {int(kind): pair for kind, pair in GGML_QUANT_SIZES.items()}
    numels: dict[str, int] = {}
    ends: list[tuple[int, str]] = []
    for _ in range(num_tensors):
        name = cursor.string()
        dimensions = cursor.number("I")
        shape = [cursor.number("Q") for _ in range(dimensions)] if dimensions <= MAX_DIMENSIONS else []
        kind, offset = cursor.number("I"), cursor.number("Q")
        if name in numels or not shape or min(shape) < 1 or kind not in sizes:
            raise cursor.fail(f"tensor {name[:80]!r}: given twice, without a shape, or of the unknown type {kind}.")
        block, block_bytes = sizes[kind]
        if shape[0] % block or offset % alignment:
            raise cursor.fail(f"tensor {name[:80]!r}: rows of {shape[0]} at offset {offset} do not fit blocks of {block}.")
        numels[name] = math.prod(shape)
        ends.append((offset + numels[name] // block * block_bytes, name))
    data_start = -(-cursor.at // alignment) * alignment
    end, name = max(ends)
    if data_start + end > cursor.num_bytes:
        raise cursor.fail(
            f"is cut short: {name[:80]!r} ends at byte {data_start + end}, the file has {cursor.num_bytes}; copy it again."
        )
    return numels


def load_gguf(path: Path, say: Callable[[str], None]) -> GgufModel:
    """Load every value of a GGUF file in float32. Raises CheckpointError, MemoryLimitError.

    `say` hears what may matter but stops nothing.
    """
    header = read_gguf_header(path)
    _check_counts(path, header)
    with _quiet(), reader_errors(f"{path}: transformers cannot read this GGUF file"):
        config = _load_config(path)
        _check_cover(path, header, config)
        state = _load_state(path, config)
        tokenizer = _load_tokenizer(path, header, config, say)
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: {name} holds a NaN or an infinity.")
    return GgufModel(config, state, tokenizer)


def save_directory(model: GgufModel, target: Path) -> None:
    """Write configuration, values cast to bf16, tokenizer and chat template into an existing directory."""
    with _quiet():
        fresh = _build_empty(model.config)
        values = {name: value.to(torch.bfloat16) for name, value in model.state.items()}
        fresh.load_state_dict(values, assign=True)
        fresh.tie_weights()
        fresh.config.dtype = torch.bfloat16
        fresh.save_pretrained(target)
        model.tokenizer.save_pretrained(target)
    _widen(target)


def _widen(target: Path) -> None:
    """Say the same in the words of transformers 4 too, which other tools read the directory with."""
    config = read_json(target / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    tokenizer = read_json(target / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        del tokenizer["backend"]
    write_durably(target / "config.json", [write_json_bytes(config)])
    write_durably(target / "tokenizer_config.json", [write_json_bytes(tokenizer)])
    for file in target.glob("*.safetensors"):
        shutil.copymode(target / "config.json", file)  # they are written for their owner alone


def _check_counts(path: Path, header: GgufHeader) -> None:
    """Refuse a number of layers that the tensors cannot fill, before a model is built from it."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: states no general.architecture; it is not a model.")
    layers = header.metadata.get(f"{architecture}.block_count")
    if type(layers) is not int or not 0 < layers <= len(header.tensors):
        raise CheckpointError(f"{path}: {architecture}.block_count is {str(layers)[:40]}, with {len(header.tensors)} tensors.")
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise CheckpointError(f"{path}: carries no tokenizer; a complete model is needed.")


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "auto_map"):
        values.pop(key, None)
    config = AutoConfig.for_model(values.pop("model_type"), **_shortest(values))
    config.architectures = [type(_build_empty(config)).__name__]
    return config


def _shortest(value: Any) -> Any:
    """Undo the detour of numbers through float32: 9.999999747378752e-06 was written as 1e-05."""
    if isinstance(value, float):
        short = float(f"{value:.6g}")
        return short if struct.pack("<f", short) == struct.pack("<f", value) else value
    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    return [_shortest(item) for item in value] if isinstance(value, list) else value


def _build_empty(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _check_cover(path: Path, header: GgufHeader, config: Any) -> None:
    """The values in the file are exactly as many as the model has; and there is memory for them."""
    import psutil

    wanted = sum(parameter.numel() for parameter in _build_empty(config).parameters())  # a tied one counts once
    spare = header.tensors.get("output.weight", 0) if config.tie_word_embeddings else 0
    found = sum(header.tensors.values()) - spare
    if found != wanted:
        rope = sorted(name for name in header.tensors if name.startswith("rope_f"))
        hint = f" {rope[0]} has no place in the configuration that transformers makes." if rope else ""
        raise CheckpointError(
            f"{path}: holds {found} values, but a {config.model_type} model of its configuration has {wanted}.{hint} "
            "Use the model's safetensors files instead."
        )
    needed, available = 10 * wanted, psutil.virtual_memory().available  # float32 twice for a moment, and bf16
    if needed > available:
        raise MemoryLimitError(f"{path}: the conversion needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free.")


def _load_state(path: Path, config: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind, ()))
        if names:
            raise CheckpointError(f"{path}: {len(names)} {kind.replace('_', ' ')} for a {config.model_type} model: {names[0]}.")
    return {name: value.detach() for name, value in model.state_dict().items()}


def _load_tokenizer(path: Path, header: GgufHeader, config: Any, say: Callable[[str], None]) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, config=config)
    split = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        if split in _SINGLE_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
        elif isinstance(splitter, ByteLevel) and split not in _LIKE_GPT2:
            say(f"{path}: its way to split text, {split!r}, is not known here; GPT-2's is used, some tokens may differ.")
    tokenizer.model_max_length = int(getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    for key in ("is_local", "local_files_only", "name_or_path"):  # of this machine, not of the model
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and log lines of transformers from the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's own bar asks nobody
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
