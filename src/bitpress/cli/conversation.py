"""A chat: turns, answers that can be stopped, and commands that begin with a slash."""

import sys
from collections.abc import Callable
from typing import Any, Protocol

from rich.markup import escape

from bitpress.cli.request import Answer
from bitpress.cli.screen import err
from bitpress.cli.terminal import Reader
from bitpress.errors import UsageError, unknown_name
from bitpress.runtime.messages import Prompt
from bitpress.runtime.prompt import encode_prompt

__all__ = ["Conversation", "Printed", "Show", "Speaker", "say", "say_what_cut"]

Show = Callable[[str], None]
COMMANDS = {
    "/clear": "forget the conversation; a system message stays",
    "/system": "TEXT: set the system message; without a text: remove it",
    "/help": "show this",
    "/exit": "end the chat",
}
KEYS = "Ctrl-C stops an answer. Ctrl-D ends the chat. Arrow keys go through what you typed. Alt-Enter begins a new line."


class Speaker(Protocol):
    """A model that answers. `facts` says what runs; `answer` shows the text while it is generated."""

    tokenizer: Any
    facts: dict[str, Any]

    def line(self) -> str: ...

    def answer(self, prompt: Prompt, show: Show, *, raw: bool = False) -> Answer: ...


class Printed:
    """Prints pieces of text as they come, and ends the line even after an error; `text` is all of them."""

    def __init__(self, wanted: bool) -> None:
        self.text = ""
        self._wanted = wanted

    def show(self, piece: str) -> None:
        self.text += piece
        if self._wanted and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def __enter__(self) -> "Printed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wanted and (self.text or kind is None):
            sys.stdout.write("\n")
            sys.stdout.flush()


def say(text: str) -> None:
    """Print a remark beside the conversation."""
    err.print(text, style="dim", markup=False, soft_wrap=True)


def say_what_cut(answer: Answer, then: str) -> None:
    """Say why an answer was cut, if it was, and what to do."""
    if answer.finish == "length":
        say(f"cut at {answer.tokens} tokens: --max-tokens allows more{then}.")
    elif answer.finish == "context":
        say(f"cut: the model's context is full, {answer.prompt_tokens} tokens were read and {answer.tokens} written.")


class Conversation:
    """The turns so far, the model that answers and the reader of new turns."""

    def __init__(self, speaker: Speaker, reader: Reader) -> None:
        self.system: str | None = None
        self.turns: list[dict[str, str]] = []
        self._speaker = speaker
        self._reader = reader

    def run(self) -> None:
        """Talk until there are no more turns, or /exit.

        On a terminal an error in a turn is shown, and the conversation goes on without that turn. Elsewhere it raises UsageError.
        """
        while (line := self._reader.read()) is not None:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            try:
                if text.startswith("/") and not text.startswith("//") and "\n" not in text:
                    self._command(text)
                elif text:
                    self._ask(text.removeprefix("/") if text.startswith("//") else text)
            except UsageError as error:
                if not self._reader.interactive:
                    raise
                err.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
                if self.turns:
                    say("the conversation stays as it was; /clear begins a new one.")

    def _ask(self, text: str) -> None:
        turns = [*self.turns, {"role": "user", "content": text}]
        with Printed(True) as printed:
            try:
                answer = self._speaker.answer(self._messages(turns), printed.show)
            except KeyboardInterrupt:
                answer = None
                if not self._reader.interactive:
                    raise
        if answer is None and not printed.text:
            say("stopped before the answer began; the question is taken back.")
            return
        self.turns = [*turns, {"role": "assistant", "content": printed.text}]
        if answer is None:
            say("stopped; the conversation goes on from here.")
            return
        say_what_cut(answer, ", or ask it to go on" if answer.finish == "length" else "")
        if answer.finish == "context":
            say("/clear begins a new conversation.")

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name not in COMMANDS:
            unknown = unknown_name("command", name, COMMANDS)
            raise UsageError(f"{unknown} Begin with // to send a text that begins with /.")
        if text and name != "/system":
            raise UsageError(f"{name} takes no text after it.")
        if name == "/help":
            for command, meaning in COMMANDS.items():
                say(f"{command:8} {meaning}")
            say(KEYS)
        elif name == "/clear":
            self.turns = []
            say("cleared.")
        else:
            self._set_system(text.strip())

    def _set_system(self, text: str) -> None:
        if text:
            question = {"role": "user", "content": "?"}
            tokenizer = self._speaker.tokenizer
            if encode_prompt(tokenizer, [{"role": "system", "content": text}, question]) == encode_prompt(
                tokenizer, [question]
            ):
                raise UsageError("the model's chat template leaves a system message out; put it into a question.")
        self.system = text or None
        say("system message set." if text else "no system message.")
