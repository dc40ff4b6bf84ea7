"""Prompts to tokens, and the settings for generation in a model's own files.

A chat template is code: it runs in transformers' sandboxed jinja environment, with a limit of a few seconds and of memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitpress.errors import BitpressError, CheckpointError, UsageError
from bitpress.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS, bounded
from bitpress.runtime.messages import Prompt, is_odd, read_messages, read_tools, turn
from bitpress.runtime.sampling import GENERATION

__all__ = [
    "check_prompt",
    "encode_prompt",
    "end_tokens",
    "read_generation",
    "read_generation_file",
]

TEMPLATE_CHARACTERS = 2**22
# Put in place of one turn's content, to find it in the text that a template writes.
_MARK = "\ufdd0turn\ufdd1"


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, raw: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Return the tokens of a prompt: one text, or messages with `role` and `content`, through the model's chat template if it has one.

    `raw` leaves the template out; `tools` are descriptions of functions for it. Raises UsageError for an invalid prompt and for messages
    that the template does not take, CheckpointError for a template that fails.
    """
    messages, described = read_messages(prompt), read_tools(tools)
    if raw or tokenizer.chat_template is None:
        if len(messages) > 1:
            raise UsageError("several messages need the chat template; pass one text.")
        if is_odd(messages[0]) or described:
            raise UsageError("content as parts, and tools, need the chat template; pass one text.")
        return [int(token) for token in tokenizer(messages[0]["content"])["input_ids"]]
    if described and "tools" not in str(tokenizer.chat_template):
        raise UsageError("the model's chat template does not know tools; leave them out.")
    text = _render(tokenizer, messages, described)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """Return the template's text for messages. Raises an error that names the turn if the template does not take its content as parts."""
    import jinja2

    odd = [index for index, message in enumerate(messages) if is_odd(message)]

    def as_text(*indices: int) -> str | None:
        changed = [{**message, "content": _MARK} if i in indices else message for i, message in enumerate(messages)]
        return _attempt(tokenizer, changed, tools)[0]

    text, error = _attempt(tokenizer, messages, tools)
    if error is None:
        for index in odd:
            content = messages[index].get("content")
            if content and (as_text(index) or "").replace(_MARK, str(content)) == text:
                kind = "a list of parts" if isinstance(content, list) else "an object"
                raise UsageError(f"{turn(messages, index)}: content is {kind}, and the chat template takes one text.")
        return text or ""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    if type(error) is jinja2.TemplateError:  # what `raise_exception` raises, and nothing else
        raise UsageError(f"the chat template refuses these messages: {reason}.") from error
    if odd and as_text(*odd) is not None:
        index = next((i for i in odd if as_text(*(other for other in odd if other != i)) is None), odd[0])
        raise UsageError(f"{turn(messages, index)}: the chat template takes one text as content ({reason}).") from error
    raise CheckpointError(f"the chat template failed: {reason}; use --raw.") from error


def _attempt(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[str | None, Exception | None]:
    """Return a template's text, or the error that it raised."""
    import jinja2

    try:
        return _apply(tokenizer, messages, tools), None
    except BitpressError:
        raise
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return None, error


def _apply(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except MemoryError as error:
        raise CheckpointError("the chat template needs too much memory; use --raw.") from error
    if not isinstance(text, str) or len(text) > TEMPLATE_CHARACTERS:
        raise CheckpointError(f"the chat template returns more than {TEMPLATE_CHARACTERS:,} characters; use --raw.")
    return text


def check_prompt(tokens: Sequence[int], config: Any, context: int | None) -> int:
    """Return how many tokens may follow a prompt. Raises UsageError or CheckpointError for one that is empty, too long or outside the vocabulary."""
    if not tokens:
        raise UsageError("the prompt has no tokens.")
    vocabulary = config.get_text_config().vocab_size
    if max(tokens) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer of this directory returns token {max(tokens)}, but the model has only {vocabulary}; "
            "they do not belong together."
        )
    if context is None:
        return 2**31
    if len(tokens) >= context:
        own = getattr(config.get_text_config(), "max_position_embeddings", None)
        hint = f" Its own limit is {own}: set a larger context." if own is not None and own > context else ""
        raise UsageError(
            f"the prompt has {len(tokens)} tokens; the model's context is {context}, and the answer needs room in it.{hint}"
        )
    return context - len(tokens)


def read_generation(checkpoint: Any) -> Any:
    """Read the generation_config.json of a CompressedCheckpoint as transformers' GenerationConfig; None if the file does not exist."""
    from bitpress.checkpoints.directory import safe_file

    if GENERATION not in checkpoint.manifest.files:
        return None
    return read_generation_file(safe_file(checkpoint.root, GENERATION))


def read_generation_file(path: Path) -> Any:
    """Read a generation_config.json as transformers' GenerationConfig. Raises CheckpointError.

    transformers remarks that settings of sampling without `do_sample` are ignored. Here they apply at a temperature above 0, so that
    the remark is left out.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    from bitpress.checkpoints.jsonfile import read_foreign_json

    values = read_foreign_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be an object.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return GenerationConfig.from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: does not describe how to generate: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def end_tokens(generation: Any, config: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the tokens that end a text: those of the generation settings, else of the configuration, else of the tokenizer."""
    for owner in (generation, config.get_text_config(), tokenizer):
        given = getattr(owner, "eos_token_id", None)
        if given is None:
            continue
        tokens = given if isinstance(given, (list, tuple)) else [given]
        if any(type(token) is not int for token in tokens):
            raise CheckpointError(f"eos_token_id is {given!r}; it must be a token or a list of tokens.")
        return tuple(tokens)
    return ()
