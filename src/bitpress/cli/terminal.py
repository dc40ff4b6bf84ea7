"""The turns of a chat: from a terminal with arrow keys, history and pasted text of several lines, or from lines of standard input."""

import sys
from typing import Protocol

from bitpress.errors import UsageError

__all__ = ["Reader", "open_reader"]


class Reader(Protocol):
    """Returns one turn after the other. `interactive` says that a person is there, who can correct an error."""

    interactive: bool

    def read(self) -> str | None: ...


def open_reader() -> Reader:
    """Return the reader for this process: a terminal where there is one."""
    return _Terminal() if sys.stdin.isatty() and sys.stderr.isatty() else _Lines()


class _Lines:
    """Standard input without a terminal: every line is a turn."""

    interactive = False

    def read(self) -> str | None:
        try:
            return sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise UsageError("standard input is not valid UTF-8.") from error


class _Terminal:
    """A terminal. Pasted text is one turn, however many lines it has; Ctrl-C clears the line, and ends the chat on an empty one."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("c-c")
        def clear(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=EOFError())

        @keys.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        # The prompt goes where messages go, so that standard output holds answers alone.
        output = create_output(stdout=sys.stderr)
        self._session: PromptSession[str] = PromptSession(key_bindings=keys, output=output, enable_suspend=True)

    def read(self) -> str | None:
        try:
            return self._session.prompt("> ", prompt_continuation="  ")
        except (EOFError, KeyboardInterrupt):
            return None
