"""A model's tokenizer in GGUF, from its tokenizer.json: tokens, merges or scores, how text is split, and the chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress.checkpoints.jsonfile import read_foreign_json
from bitpress.errors import UsageError

__all__ = ["set_tokenizer"]

_CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer splits text, by the expression of its tokenizer.json, and llama.cpp's names of that.
_SPLITS = {
    rf"{_CONTRACTED}|{_WORD}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTED}|{_WORD}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}": "tekken",
    rf"{_CASED[0]}{_CONTRACTED}?|{_CASED[1]}{_CONTRACTED}?|\p{{N}}{{1,3}}|{_SLASHED}": "gpt-4o",
}


def set_tokenizer(writer: Any, root: Path, vocabulary: int) -> None:
    """Say a writer of GGUF the tokenizer of a directory. Raises UsageError for one that llama.cpp has no name for."""
    if not (root / "tokenizer.json").is_file():
        raise UsageError(f"{root}: has no tokenizer.json, which a GGUF file needs.")
    tokenizer = read_foreign_json(root / "tokenizer.json")
    config_file = root / "tokenizer_config.json"
    config = read_foreign_json(config_file) if config_file.is_file() else {}
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"{root}: its tokenizer is a {model.get('type')} model; llama.cpp's are written of BPE here.")
    if model.get("byte_fallback"):
        _set_pieces(writer, tokenizer, vocabulary)
    else:
        _set_bytes(writer, root, tokenizer, vocabulary)
    _set_special(writer, root, tokenizer, config)


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return every token and its type, places without a token filled."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    for text, number in tokenizer["model"]["vocab"].items():
        if number < vocabulary:
            tokens[number], types[number] = text, int(TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or ():
        if added["id"] < vocabulary:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in tokenizer["model"]["merges"]]
    return [(first, second) for first, second in pairs]


def _set_bytes(writer: Any, root: Path, tokenizer: Mapping[str, Any], vocabulary: int) -> None:
    """A byte-level BPE, as GPT-2's."""
    tokens, types = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(root, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{first} {second}" for first, second in _merges(tokenizer)])


def _split(root: Path, tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before merging."""
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    whole = kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and whole:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and whole and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = _SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
        if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges"):
            return "dbrx"  # the same expression, and tokens only by their merges
        if name is not None:
            return name
    raise UsageError(
        f"{root}: its tokenizer splits text as llama.cpp has no name for here ({' + '.join(map(str, kinds))}); "
        "a file with another one would read other tokens."
    )


def _set_pieces(writer: Any, tokenizer: Mapping[str, Any], vocabulary: int) -> None:
    """A BPE of pieces with bytes to fall back on, as SentencePiece's: the earlier a merge, the higher the score of what it makes."""
    from gguf import TokenType

    tokens, types = _tokens(tokenizer, vocabulary)
    numbers = {text: number for number, text in enumerate(tokens)}
    scores = [0.0] * vocabulary
    for rank, (first, second) in reversed(list(enumerate(_merges(tokenizer)))):
        made = numbers.get(first + second)
        if made is not None:
            scores[made] = -1.0 - rank
    for number, text in enumerate(tokens):
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">") and types[number] == TokenType.NORMAL:
            types[number] = int(TokenType.BYTE)
        if types[number] in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED):
            scores[number] = -1000.0
    unknown = numbers.get(tokenizer["model"].get("unk_token") or "")
    if unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    normalizer = tokenizer.get("normalizer") or {}
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps = [step for part in (normalizer, splitter) for step in part.get("normalizers") or part.get("pretokenizers") or [part]]
    prepended = any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    writer.add_add_space_prefix(prepended)


def _set_special(writer: Any, root: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer

    numbers = {
        **tokenizer["model"]["vocab"],
        **{added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()},
    }
    found: dict[str, int] = {}
    for kind, tell in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in numbers:
            found[kind] = numbers[text]
            tell(numbers[text])
    ids = Tokenizer.from_file(str(root / "tokenizer.json")).encode("a").ids
    writer.add_add_bos_token(bool(ids) and ids[0] == found.get("bos"))
    writer.add_add_eos_token(bool(ids) and ids[-1] == found.get("eos"))
    template = root / "chat_template.jinja"
    text = template.read_text("utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)
