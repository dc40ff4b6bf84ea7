"""Answers on the terminal: one prompt, or a chat. Chat templates run in transformers' sandboxed jinja environment."""

import time
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.screen import err, out
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.loading import load

__all__ = ["answer_once", "chat"]


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

    if raw is not None or tokenizer.chat_template is None:
        text = raw if raw is not None else messages[-1]["content"]
        ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        return ids
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template failed: {error}; use --raw.") from error
    ids = encoded["input_ids"]
    return ids


def _generate(
    model: Any, tokenizer: Any, ids: torch.Tensor, max_tokens: int, temperature: float, seed: int, stream: bool
) -> dict[str, Any]:
    from transformers import TextStreamer

    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if temperature == 0:
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
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
