"""Answers on the terminal: one prompt, or a chat.

A chat template is code: it runs in transformers' sandboxed jinja environment, for a few seconds and in limited memory at most.
"""

import time
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.screen import err, out
from bitpress.errors import CheckpointError, UsageError
from bitpress.limits import TEMPLATE_BYTES, TEMPLATE_SECONDS, bounded
from bitpress.runtime.loading import load
from bitpress.runtime.skeleton import check_tokens

__all__ = ["answer_once", "chat"]

TEMPLATE_CHARACTERS = 2**22


def answer_once(
    directory: Path, prompt: str, *, max_tokens: int, temperature: float, seed: int, raw: bool, packed: bool, stream: bool
) -> dict[str, Any]:
    """Answer one prompt; the text goes to standard output while it is made when `stream` is set."""
    if not prompt:
        raise UsageError("the prompt is empty.")
    model, tokenizer = _open(directory, packed)
    ids = _encode(tokenizer, [{"role": "user", "content": prompt}], raw=prompt if raw else None)
    return _generate(model, tokenizer, ids, max_tokens, temperature, seed, stream)


def chat(directory: Path, *, max_tokens: int, temperature: float, seed: int, packed: bool) -> None:
    """Talk until an empty line, end of input or Ctrl-C."""
    model, tokenizer = _open(directory, packed)
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template; use --prompt with --raw.")
    err.print("[dim]An empty line ends the chat.[/dim]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        ids = _encode(tokenizer, messages, raw=None)
        answer = _generate(model, tokenizer, ids, max_tokens, temperature, seed, stream=True)
        messages.append({"role": "assistant", "content": answer["text"]})


def _open(directory: Path, packed: bool) -> tuple[Any, Any]:
    PressedCheckpoint.open(directory, verify=False)  # a wrong directory is said before anything slow happens
    model = load(directory, weights="packed" if packed else "decoded")
    return model, load_tokenizer(directory)


def _encode(tokenizer: Any, messages: list[dict[str, str]], raw: str | None) -> torch.Tensor:
    import jinja2

    if any("\ud800" <= character <= "\udfff" for character in messages[-1]["content"]):
        raise UsageError("the prompt is not valid UTF-8.")
    if raw is not None or tokenizer.chat_template is None:
        text = raw if raw is not None else messages[-1]["content"]
        ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        return ids
    try:
        with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except MemoryError as error:
        raise CheckpointError("the chat template needs too much memory; use --raw.") from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"the chat template failed: {reason}; use --raw.") from error
    if not isinstance(text, str) or len(text) > TEMPLATE_CHARACTERS:
        raise CheckpointError(f"the chat template gives more than {TEMPLATE_CHARACTERS:,} characters; use --raw.")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


def _generate(
    model: Any, tokenizer: Any, ids: torch.Tensor, max_tokens: int, temperature: float, seed: int, stream: bool
) -> dict[str, Any]:
    from transformers import TextStreamer

    room = _check_prompt(model, ids)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation(model, tokenizer, min(max_tokens, room), temperature),
            streamer=streamer,
        )
    seconds = time.perf_counter() - start
    new = made[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if stream:
        out.file.flush()
    return {
        "text": text,
        "tokens": int(new.numel()),
        "prompt_tokens": int(ids.shape[1]),
        "tokens_per_second": new.numel() / seconds,
    }


def _check_prompt(model: Any, ids: torch.Tensor) -> int:
    """Give how many tokens may follow a prompt; refuse one that is empty, too long or not of the model's vocabulary."""
    count = ids.shape[1]
    if not count:
        raise UsageError("the prompt has no tokens.")
    check_tokens(ids, model.config, "this directory")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return 2**31
    if count >= limit:
        raise UsageError(f"the prompt has {count} tokens; the model's context is {limit}, and the answer needs room in it.")
    return int(limit) - count


def _generation(model: Any, tokenizer: Any, max_tokens: int, temperature: float) -> Any:
    """Make the settings of one answer: the model's own special tokens, and its sampling where there is a temperature."""
    from transformers import GenerationConfig

    given = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = {"eos_token_id": given.eos_token_id, "pad_token_id": pad, "max_new_tokens": max_tokens}
    if temperature == 0:
        return GenerationConfig(**settings, do_sample=False)
    kept = {key: getattr(given, key, None) for key in ("top_p", "top_k", "repetition_penalty")}
    kept = {key: value for key, value in kept.items() if value is not None}
    try:
        return GenerationConfig(**settings, **kept, do_sample=True, temperature=temperature)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"generation_config.json: {str(error).strip().split(chr(10))[0]}") from error
