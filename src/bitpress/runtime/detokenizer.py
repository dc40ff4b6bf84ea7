"""Text from tokens, piece by piece, up to a stop string.

No piece ends within a character. Text that may be the beginning of a stop string is held back until that is decided.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from bitpress.errors import UsageError

__all__ = ["Detokenizer", "check_stop", "text_decoder"]

# The character that decoding puts in place of bytes that are not, or not yet, a character.
REPLACEMENT = "\ufffd"


def text_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return the function from tokens to their text, without special tokens and with spaces unchanged."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return functools.partial(backend.decode, skip_special_tokens=True)
    return functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_stop(stop: Sequence[str]) -> None:
    """Raise UsageError unless these can end a text."""
    if isinstance(stop, str) or not all(stop):
        raise UsageError("stop strings are a list of texts that are not empty.")


class Detokenizer:
    """Turns tokens, one after the other, into pieces of text that no later token changes.

    decode   a function from tokens to their text
    stop     strings that end the text: it is cut where the first of them begins
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self._decode = decode
        self._stop = tuple(stop)
        # A token's text may depend on the one before, so tokens are decoded together with those of the last piece.
        self._window: list[int] = []
        self._context = 0
        self._returned = 0  # characters of the window's text that were returned already
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that no later token can change: often this token's own, sometimes an empty text."""
        self._window.append(token)
        text = self._decode(self._window)
        settled = text.rstrip(REPLACEMENT)
        fresh = settled[self._returned :]
        if fresh and len(settled) == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._returned = len(self._decode(self._window))
        else:
            self._returned = max(self._returned, len(settled))
        return self._release(fresh)

    def end(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        rest = "" if self.stopped else self._release(self._decode(self._window)[self._returned :]) + self._held
        self._window, self._context, self._returned, self._held = [], 0, 0, ""
        return rest

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        starts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        waiting = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
