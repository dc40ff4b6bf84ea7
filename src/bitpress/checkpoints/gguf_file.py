"""GGUF files as a source: turned into a model directory in bf16, once their header is checked (`gguf_header`).

transformers' own reader dequantizes the values. Cases that this reader drops in silence are refused here: a parameter without a tensor,
a tensor without a parameter (such as factors for rotary frequencies), and values that are not finite.
"""

import contextlib
import functools
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.gguf_config import own_config
from bitpress.checkpoints.gguf_header import GgufHeader, read_gguf_header
from bitpress.checkpoints.jsonfile import read_foreign_json, write_json_bytes
from bitpress.checkpoints.source import encode_floats, read_config
from bitpress.checkpoints.tokenizer import reader_errors
from bitpress.errors import CheckpointError, MemoryLimitError
from bitpress.progress import Progress

__all__ = ["GgufModel", "load_gguf", "load_gguf_config", "load_gguf_tokenizer", "save_directory", "tokenizer_problem"]

# Kinds of tokenizers in GGUF that transformers rebuilds.
_TOKENIZERS = ("gpt2", "llama")

# Architectures whose configuration transformers does not read out of GGUF, which it does before it looks for the class of a tokenizer.
_UNREAD = frozenset({"olmo2", "olmoe", "smollm3"})

# tokenizer.ggml.pre: vocabularies that split digits one by one (transformers' reader treats them like GPT-2), and those like GPT-2.
_SINGLE_DIGITS = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})
_LIKE_GPT2 = frozenset({"default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "trillion"})


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds: transformers' configuration, the values in float32, and the tokenizer."""

    config: Any
    state: dict[str, torch.Tensor]
    tokenizer: Any


def load_gguf(path: Path, progress: Progress) -> GgufModel:
    """Load every value of a GGUF file in float32. Raises CheckpointError, MemoryLimitError.

    `progress` follows the tensors, and receives warnings that do not stop the load.
    """
    header = read_gguf_header(path)
    _check_counts(path, header, len(header.tensors))
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise CheckpointError(f"{path}: the file has no tokenizer; use a GGUF file of the complete model.")
    names = iter(header.tensors)

    def advance() -> None:
        progress.advance(next(names, ""))

    with _quiet(), _read_once(advance), reader_errors(f"{path}: transformers cannot read this GGUF file"):
        config = _load_config(path)
        _check_cover(path, header, config)
        progress.begin(f"reading {path.name}", len(header.tensors))
        state = _load_state(path, config)
        for name in names:  # of an architecture that transformers reads in another way
            progress.advance(name)
        tokenizer = _load_tokenizer(path, header, config, progress.note)
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


def load_gguf_config(parts: Sequence[tuple[Path, GgufHeader]]) -> dict[str, Any]:
    """Return transformers' configuration of a model, of one file or of several. Raises CheckpointError."""
    path, header = parts[0]
    tensors = {name: tensor for _, part in parts for name, tensor in part.tensors.items()}
    _check_counts(path, header, len(tensors))
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path}: has no matrix token_embd.weight, so this is no language model.")
    with _quiet(), _read_once(lambda: None), reader_errors(f"{path}: transformers cannot read the configuration of this file"):
        own = own_config(header.metadata)
        values = (_load_config(path).to_dict() if own is None else own) | {
            "vocab_size": tensors["token_embd.weight"].shape[1],
            "tie_word_embeddings": "output.weight" not in tensors,
            "dtype": "bfloat16",
        }
        config = _made_config(values)
    return _wide_config(config.to_dict())


def tokenizer_problem(path: Path, header: GgufHeader) -> str | None:
    """Say why the tokenizer of a file cannot be rebuilt; None if it can."""
    model = header.metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" in header.metadata and model in _TOKENIZERS:
        return None
    what = "no tokenizer" if model is None else f"a tokenizer of the kind {str(model)[:40]!r}, which is not rebuilt here"
    name = header.metadata.get("general.name") or header.metadata.get("general.basename") or path.stem
    return (
        f"{path}: {str(name)[:80]} has {what}: its weights can be exported, and text needs the tokenizer of the original model"
    )


def load_gguf_tokenizer(path: Path, header: GgufHeader, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a model's tokenizer. Raises CheckpointError."""
    with _quiet(), _read_once(lambda: None), reader_errors(f"{path}: transformers cannot read the tokenizer of this file"):
        tokenizer = _load_tokenizer(path, header, _made_config(config), lambda text: None)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            _widen_tokenizer(Path(folder))
            return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def _widen(target: Path) -> None:
    """Repeat the configuration in the keys of transformers 4, which other tools use to read the directory."""
    write_durably(target / "config.json", [write_json_bytes(encode_floats(_wide_config(read_config(target))))])
    _widen_tokenizer(target)
    for file in target.glob("*.safetensors"):
        shutil.copymode(target / "config.json", file)  # they are written for their owner alone


def _wide_config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return config | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})


def _widen_tokenizer(target: Path) -> None:
    tokenizer = read_foreign_json(target / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        del tokenizer["backend"]
    write_durably(target / "tokenizer_config.json", [write_json_bytes(tokenizer)])


def _check_counts(path: Path, header: GgufHeader, tensors: int) -> None:
    """Refuse a number of layers that the tensors cannot fill, before a model is built from it."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: the header has no general.architecture, so this is not a model.")
    layers = header.metadata.get(f"{architecture}.block_count")
    if type(layers) is not int or not 0 < layers <= tensors:
        raise CheckpointError(f"{path}: {architecture}.block_count is {str(layers)[:40]}, but the file has {tensors} tensors.")


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    values = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    return _made_config({key: value for key, value in values.items() if key != "dtype"})


def _made_config(values: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    left_out = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "auto_map", "model_type")
    kept = {key: value for key, value in values.items() if key not in left_out}
    config = AutoConfig.for_model(values["model_type"], **_shortest(kept))
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
    """Check that the file has exactly as many values as the model, and that they fit into memory."""
    import psutil

    wanted = sum(parameter.numel() for parameter in _build_empty(config).parameters())  # a tied one counts once
    numels = {name: tensor.numel for name, tensor in header.tensors.items()}
    found = sum(numels.values()) - (numels.get("output.weight", 0) if config.tie_word_embeddings else 0)
    if found != wanted:
        rope = sorted(name for name in header.tensors if name.startswith("rope_f"))
        hint = f" transformers' configuration has no key for {rope[0]}." if rope else ""
        raise CheckpointError(
            f"{path}: holds {found} values, but its configuration describes a {config.model_type} model with {wanted}.{hint} "
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
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if header.metadata.get("general.architecture") in _UNREAD:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, config=config)
    split = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        if split in _SINGLE_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
        elif isinstance(splitter, ByteLevel) and split not in _LIKE_GPT2:
            say(f"{path}: unknown tokenizer.ggml.pre {split!r}; text is split as for GPT-2, so some tokens may differ.")
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
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _read_once(advance: Callable[[], None]) -> Iterator[None]:
    """Let transformers parse a file once, and call `advance` for every tensor in place of its own bar.

    It makes a reader for the configuration, for the values and for the tokenizer, and each spends seconds on the vocabulary: numpy's
    memory maps are slow to slice. For every module of a model it makes the table of names again.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    def followed(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            advance()

    replaced = [
        (gguf, "GGUFReader", functools.cache(Reader)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", followed),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
