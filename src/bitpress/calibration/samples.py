"""Calibration and evaluation text, and the token windows that are cut from it.

    builtin                       the package's own calibration text          builtin:heldout        its text for evaluation
    builtin:heldout:reference     one kind of either
    FILE.txt                      one text in UTF-8
    FILE.jsonl                    a line is an object with `text`, or with `messages` [{"role": ..., "content": ...}]
    hf:NAME[:CONFIG[:SPLIT]]      a data set of the `datasets` package, columns `text` or `messages`, its first 20,000 rows

The texts of a kind are joined, with the end-of-text token between them (a blank line if there is none), and cut into windows that do
not overlap. A seed draws the windows, evenly from every kind as far as possible.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Shaped

from bitpress.errors import CalibrationError, UsageError, unknown_name
from bitpress.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS, bounded

__all__ = ["Document", "Samples", "begin_tokens", "builtin_texts", "read_texts", "sample_windows"]

MAX_FILE_BYTES = 2**30
MAX_HUB_ROWS = 20_000
HUB_SECONDS = 10
PIECE = 2**20  # characters that are tokenized at a time
SPARE = 4  # a kind larger than this many times its share is not tokenized to the end
_NO_LIMIT = 10**9  # tokenizers without a context length state something larger
_TEXTS = Path(__file__).parent / "texts"
_ROLES = ("calibration", "heldout")

Role = Literal["calibration", "heldout"]
Message = tuple[str, str]


@dataclass(frozen=True)
class Document:
    """One text, or one conversation as (role, content) pairs."""

    kind: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Samples:
    """Inputs drawn for a model, such as token windows [samples, length]; the kind of text of each, and a SHA-256 of all.

    The hash of token windows is that of the tokens as little-endian 64-bit numbers. `held_out` are further inputs like them, on which
    errors may be measured; there may be fewer than were asked for.
    """

    inputs: Shaped[torch.Tensor, "samples ..."]
    kinds: tuple[str, ...]
    sha256: str
    held_out: Shaped[torch.Tensor, "further ..."] | None = None


def builtin_texts(role: Role) -> dict[str, str]:
    """Return the package's own texts by kind; several files of a kind are joined by a blank line."""
    if role not in _ROLES:
        raise unknown_name("role of the built-in texts", role, _ROLES)
    parts: dict[str, list[str]] = {}
    for entry in json.loads((_TEXTS / "texts.json").read_text("utf-8")):
        if entry["role"] == role:
            parts.setdefault(entry["kind"], []).append((_TEXTS / entry["file"]).read_text("utf-8").strip("\n"))
    return {kind: "\n\n".join(texts) for kind, texts in parts.items()}


def read_texts(spec: str) -> list[Document]:
    """Read the texts that `spec` names, as listed above. Raises CalibrationError, and UsageError for an unknown name."""
    if spec == "builtin" or spec.startswith("builtin:"):
        return _read_builtin(spec)
    if spec.startswith("hf:"):
        return _read_hub(spec)
    path = Path(spec)
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"{spec}: unknown text; use builtin, builtin:heldout, a .txt file, a .jsonl file or hf:NAME.")
    text = _read_file(path)
    if path.suffix == ".jsonl":
        return _parse_lines(path, text)
    if not text.strip():
        raise CalibrationError(f"{path}: holds no text.")
    return [Document(path.stem, text)]


def sample_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    chat: bool = False,
    held_out: int = 0,
) -> Samples:
    """Draw `samples` windows of `length` tokens, in turn from every kind of text that has one left, and at most `held_out` after them.

    `chat` puts passages of plain text into the user's turn of the chat template; conversations always go through it. If the
    tokenizer puts a token before every text, every window begins with it. Raises CalibrationError, UsageError.
    """
    _check_sizes(tokenizer, samples, length)
    kinds = list(dict.fromkeys(document.kind for document in documents))
    if not kinds:
        raise CalibrationError("there is no text to take samples from.")
    generator = torch.Generator().manual_seed(seed)
    begin = begin_tokens(tokenizer)
    share = length - len(begin)
    enough = max(samples, SPARE * -(-samples // len(kinds))) * share
    drawn: dict[str, list[torch.Tensor]] = {}
    num_tokens = 0
    for kind in kinds:
        passage = 2 * length if chat else PIECE
        units = [unit for document in documents if document.kind == kind for unit in _units(document, chat, passage)]
        tokens = _tokenize(units, tokenizer, enough, generator)
        num_tokens += len(tokens)
        cut = tokens[: len(tokens) // share * share].view(-1, share)
        drawn[kind] = list(cut[torch.randperm(len(cut), generator=generator)])
    num_windows = sum(map(len, drawn.values()))
    if num_windows < samples:
        raise CalibrationError(
            f"the text has {num_tokens} tokens, enough for {num_windows} windows of {length}, but {samples} are needed; "
            "use fewer samples, a shorter length or more text."
        )
    turns = itertools.zip_longest(*([(kind, window) for window in drawn[kind]] for kind in kinds))
    taken = [pair for turn in turns for pair in turn if pair is not None][: samples + held_out]
    first = torch.tensor(begin, dtype=torch.int64)
    windows = torch.stack([torch.cat([first, window]) for _, window in taken])
    drawn_windows, further = windows[:samples], windows[samples:]
    sha256 = hashlib.sha256(drawn_windows.numpy().astype("<i8").tobytes()).hexdigest()
    return Samples(drawn_windows, tuple(kind for kind, _ in taken[:samples]), sha256, further if len(further) else None)


def _read_builtin(spec: str) -> list[Document]:
    _, _, rest = spec.partition(":")
    role, _, kind = rest.partition(":")
    role = role or "calibration"
    if role not in _ROLES:
        raise unknown_name("role of the built-in texts", role, _ROLES)
    texts = builtin_texts("heldout" if role == "heldout" else "calibration")
    if kind and kind not in texts:
        raise unknown_name(f"kind of the built-in {role} texts", kind, texts)
    return [Document(name, text) for name, text in texts.items() if kind in ("", name)]


def _read_file(path: Path) -> str:
    try:
        if not path.is_file():
            raise CalibrationError(f"{path}: {'is not a regular file' if path.exists() else 'does not exist'}.")
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_BYTES:
            raise CalibrationError(f"{path}: has {num_bytes} bytes, the limit is {MAX_FILE_BYTES}; use a part of it.")
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8 at byte {error.start}; convert it first.") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}.") from error


def _parse_lines(path: Path, text: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{where}: is not JSON: {error}.") from error
        documents.append(_document(where, path.stem, row))
    if not documents:
        raise CalibrationError(f"{path}: holds no text.")
    return documents


def _document(where: str, kind: str, row: Any) -> Document:
    """Check one row: exactly one of `text` and `messages`; other keys are ignored."""
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise CalibrationError(f"{where}: must be an object with either text or messages.")
    if "text" in row:
        _check_text(f"{where}: text", row["text"])
        return Document(kind, row["text"])
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(f"{where}: messages must be a list that is not empty.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise CalibrationError(f"{where}: every message must be an object with role and content.")
        _check_text(f"{where}: role", message["role"])
        _check_text(f"{where}: content", message["content"])
    return Document(kind, messages=tuple((message["role"], message["content"]) for message in messages))


def _check_text(where: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(f"{where} must be a string that is not empty.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where} holds half of a surrogate pair.") from error


def _read_hub(spec: str) -> list[Document]:
    name, config, split, *rest = [*spec.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise CalibrationError(f"{spec}: must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT.")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(f"{spec}: needs the package datasets; install bitpress[datasets], or use a file.") from error
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of HfHubHTTPError are OSError and the root of the HTTP client's errors, whichever client this version uses.
    failures: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError, LookupError, TypeError, RuntimeError)
    try:
        if not Path(name).exists():
            HfApi().dataset_info(name, timeout=HUB_SECONDS)  # one question: load_dataset would try six times, and log each
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        found = list(itertools.islice(rows, MAX_HUB_ROWS))
    except failures as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"{spec}: cannot be fetched from the hub: {reason} Use a .txt or .jsonl file instead."
        ) from error
    kept = [
        row for row in found if not isinstance(row.get("text"), str) or row["text"].strip()
    ]  # sets of lines have empty ones
    documents = [_document(f"{spec}, row {number}", name, row) for number, row in enumerate(kept)]
    if not documents:
        raise CalibrationError(f"{spec}: holds no text.")
    return documents


def _check_sizes(tokenizer: Any, samples: int, length: int) -> None:
    if samples < 1:
        raise UsageError(f"samples={samples}: at least 1 is needed.")
    if length < 2:
        raise UsageError(f"length={length}: a window needs at least 2 tokens.")
    limit = int(min(tokenizer.model_max_length, _NO_LIMIT))
    if limit < _NO_LIMIT and length > limit:
        raise UsageError(f"length={length}: the model's context is {limit} tokens; use at most that.")


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before every text: one or none."""
    token = tokenizer.bos_token_id
    return [token] if token is not None and list(tokenizer("a", verbose=False).input_ids[:1]) == [token] else []


def _units(document: Document, chat: bool, size: int) -> Iterator[Document]:
    """Cut a text into documents of bounded size, each to be tokenized by itself; a conversation stays whole."""
    if document.text is None:
        yield document
        return
    for part in _split(document.text, size):
        yield replace(document, text=None, messages=(("user", part.strip()),)) if chat else replace(document, text=part)


def _split(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into parts of about `size` characters; a longer line is cut at a space, or anywhere."""
    start = 0
    while start < len(text):
        stop = min(start + size, len(text))
        if stop < len(text):
            cut = max(text.rfind("\n\n", start + size // 2, stop), text.rfind("\n", start + 3 * size // 4, stop))
            cut = cut if cut > start else text.rfind(" ", start + size // 2, stop)
            stop = cut if cut > start else stop
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop


def _render(tokenizer: Any, kind: str, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CalibrationError(f"{kind}: the tokenizer has no chat template; use plain text, without chat.")
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except MemoryError as error:
        raise CalibrationError(f"{kind}: the chat template needs too much memory.") from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CalibrationError(f"{kind}: the chat template cannot render a conversation: {error}") from error


def _tokenize(units: Sequence[Document], tokenizer: Any, enough: int, generator: torch.Generator) -> torch.Tensor:
    """Tokenize the units in a random order, until there are `enough` tokens."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    end = tokenizer.eos_token_id
    between = [end] if end is not None else encode("\n\n")
    parts: list[torch.Tensor] = []
    num_tokens = 0
    for index in torch.randperm(len(units), generator=generator).tolist():
        unit = units[index]
        text = unit.text if unit.messages is None else _render(tokenizer, unit.kind, unit.messages)
        ids = encode(text or "")
        if parts and unit.messages is None:  # a chat template marks the begin and the end by itself
            ids = [*between, *ids]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        num_tokens += len(ids)
        if num_tokens >= enough:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
