"""Answers on the terminal, to one prompt or in a chat, by the native engine or by transformers."""

from pathlib import Path
from typing import Any

from bitpress.cli.conversation import Conversation, Printed, Show, Speaker, say, say_what_cut
from bitpress.cli.plain import check_options, open_plain
from bitpress.cli.request import Answer, Request, threads_text
from bitpress.cli.terminal import open_reader
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.messages import Prompt
from bitpress.runtime.native.options import USUAL_CACHE
from bitpress.runtime.native.text import TextEngine
from bitpress.runtime.opening import OpenedModel
from bitpress.settings import layout_directory

__all__ = ["answer_once", "chat"]


def answer_once(
    directory: Path, prompt: str, request: Request, *, raw: bool = False, stream: bool = True
) -> tuple[Answer, dict[str, Any]]:
    """Answer one prompt, on standard output too with `stream`; return the answer and the facts of what ran."""
    if not prompt:
        raise UsageError("the prompt is empty.")
    speaker = _open(directory, request)
    with Printed(stream) as printed:
        answer = speaker.answer(prompt, printed.show, raw=raw)
    if stream:
        say_what_cut(answer, "")
    return answer, speaker.facts


def chat(directory: Path, request: Request) -> None:
    """Talk until the end of input, /exit, or Ctrl-C where nothing is typed; Ctrl-C during an answer stops only that."""
    speaker = _open(directory, request)
    if speaker.tokenizer.chat_template is None:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template; use --prompt with --raw.")
    reader = open_reader()
    if reader.interactive:
        say("Ctrl-C stops an answer, Ctrl-D ends the chat, /help shows the commands.")
    Conversation(speaker, reader).run()


def _open(directory: Path, request: Request) -> Speaker:
    """Load the model in the runtime that fits it, and print which one and why. Errors are raised before anything slow happens."""
    speaker: Speaker
    native_options, transformers_options = request.native_options, request.transformers_options
    if (source := open_plain(directory)) is not None:
        from bitpress.cli.chat_transformers import speak_plain

        only_compressed = native_options + transformers_options + ("--width",) * (request.width is not None)
        check_options(directory, request.runtime, only_compressed)
        speaker = speak_plain(source, request)
        say(speaker.line())
        return speaker
    model, head = OpenedModel(directory, width=request.width), request.engine.head_format
    had_layout = model.has_layout(head)
    if not had_layout:
        from bitpress.formats import parse_format

        if head != "keep":
            parse_format(head)
        _ = model.checkpoint  # a directory that is broken is reported before an option that does not suit it
    selection = model.select(request.runtime, native=native_options, transformers=transformers_options, head=head)
    if selection.runtime == "native":
        speaker = _Native(model.load_native(request.engine), request)
    else:
        from bitpress.cli.chat_transformers import speak_compressed

        speaker = speak_compressed(model, request, selection.reason)
    say(speaker.line())
    if not had_layout and model.has_layout(head):
        say(f"cached the layout for the next start in {layout_directory()}; BITPRESS_LAYOUTS=off caches none")
    return speaker


class _Native:
    def __init__(self, engine: TextEngine, request: Request) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.facts = engine.facts
        self._request = request
        self._sampling = request.sampling.resolve(engine.generation)

    def line(self) -> str:
        f = self.facts
        activations = "float activations" if f["activations"] == "none" else "8-bit activations"
        if f["activations"] == "mixed":
            cost = f" (8 bits would cost {f['prompt_cost']:.2g} nats)" if f["prompt_cost"] else ""
            activations += f", prompts in float{cost}"
        if f["inputs"]:
            activations = ", ".join(f["inputs"])
        cache = [] if f["cache"] == USUAL_CACHE else [f"{f['cache']} cache"]
        expanded = [f"expanded to 16 bits: {', '.join(f['expanded'])}"] if f["expanded"] else []
        parts = [f"native ({f['path']})", threads_text(f["threads"]), activations, *cache, f"head {f['head']}", *expanded]
        return ", ".join(parts)

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> Answer:
        stream = self.engine.stream(
            prompt, max_tokens=self._request.max_tokens, sampling=self._sampling, stop=self._request.stop, raw=raw
        )
        for piece in stream:
            show(piece)
        result = stream.result
        return Answer(
            text=result.text,
            tokens=result.tokens,
            prompt_tokens=result.prompt_tokens,
            tokens_per_second=result.tokens_per_second,
            finish=result.finish,
            prefill_tokens_per_second=result.prefill_tokens_per_second,
        )
