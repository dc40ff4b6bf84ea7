"""Answers on the terminal: one prompt, or a chat, by the native engine or by transformers."""

from pathlib import Path
from typing import Any

from bitpress.cli.conversation import Conversation, Printed, Show, Speaker, say, say_what_cut
from bitpress.cli.plain import check_options, open_plain
from bitpress.cli.request import Asked, threads_text
from bitpress.cli.terminal import open_reader
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.messages import Prompt
from bitpress.runtime.native.text import Pieces, TextEngine
from bitpress.runtime.opening import OpenedModel
from bitpress.runtime.prompt import choose_sampling
from bitpress.settings import layout_directory

__all__ = ["answer_once", "chat"]


def answer_once(directory: Path, prompt: str, asked: Asked, *, raw: bool = False, stream: bool = True) -> dict[str, Any]:
    """Answer one prompt; the text goes to standard output while it is made when `stream` is set."""
    if not prompt:
        raise UsageError("the prompt is empty.")
    speaker = _open(directory, asked)
    with Printed(stream) as printed:
        answer = speaker.answer(prompt, printed.show, raw=raw)
    if stream:
        say_what_cut(answer, "")
    return {**answer, **speaker.facts}


def chat(directory: Path, asked: Asked) -> None:
    """Talk until the end of input, /exit, or Ctrl-C where nothing is typed; Ctrl-C during an answer stops only that."""
    speaker = _open(directory, asked)
    if speaker.tokenizer.chat_template is None:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template; use --prompt with --raw.")
    reader = open_reader()
    if reader.interactive:
        say("Ctrl-C stops an answer, Ctrl-D ends the chat, /help shows the commands.")
    Conversation(speaker, reader).run()


def _open(directory: Path, asked: Asked) -> Speaker:
    """Load the model in the runtime that fits, and say which one and why. What is wrong is said before anything slow happens."""
    Pieces(str, asked.stop)
    choose_sampling(None, asked.temperature, asked.seed, **asked.sampling)
    speaker: Speaker
    native_options = tuple(f"--{name}" for name in asked.native)
    transformers_options = ("--packed",) * asked.packed + ("--memory",) * (asked.memory is not None)
    if (source := open_plain(directory)) is not None:
        from bitpress.cli.chat_transformers import speak_plain

        check_options(directory, asked.runtime, native_options + transformers_options)
        speaker = speak_plain(source, asked)
        say(speaker.line())
        return speaker
    model, head = OpenedModel(directory), asked.engine.head_format
    had_layout = model.has_layout(head)
    if not had_layout:
        from bitpress.formats import parse_format

        if head != "keep":
            parse_format(head)
        _ = model.checkpoint  # a directory that is broken is reported before an option that does not suit it
    selection = model.select(asked.runtime, native=native_options, transformers=transformers_options, head=head)
    if selection.runtime == "native":
        speaker = _Native(model.load_native(asked.engine), asked)
    else:
        from bitpress.cli.chat_transformers import speak_compressed

        speaker = speak_compressed(model, asked, selection.reason)
    say(speaker.line())
    if not had_layout and model.has_layout(head):
        say(f"cached the layout for the next start in {layout_directory()}; BITPRESS_LAYOUTS=off caches none")
    return speaker


class _Native:
    def __init__(self, engine: TextEngine, asked: Asked) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.facts = engine.facts
        self._asked = asked
        self._sampling = engine.sampling(asked.temperature, asked.seed, **asked.sampling)

    def line(self) -> str:
        f = self.facts
        activations = "float activations" if f["activations"] == "none" else "8-bit activations"
        if f["activations"] == "mixed":
            cost = f" (8 bits would cost {f['prompt_cost']:.2g} nats)" if f["prompt_cost"] else ""
            activations += f", prompts in float{cost}"
        cache = ["8-bit cache"] if f["cache"] == "int8" else []
        expanded = [f"expanded to 16 bits: {', '.join(f['expanded'])}"] if f["expanded"] else []
        parts = [f"native ({f['path']})", threads_text(f["threads"]), activations, *cache, f"head {f['head']}", *expanded]
        return ", ".join(parts)

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> dict[str, Any]:
        asked = self._asked
        stream = self.engine.stream(prompt, max_tokens=asked.max_tokens, sampling=self._sampling, stop=asked.stop, raw=raw)
        for piece in stream:
            show(piece)
        made = stream.result
        return {
            "text": made.text,
            "tokens": made.tokens,
            "prompt_tokens": made.prompt_tokens,
            "tokens_per_second": made.tokens_per_second,
            "prefill_tokens_per_second": made.prefill_tokens_per_second,
            "finish": made.finish,
        }
