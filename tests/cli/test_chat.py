"""The chat: what a terminal sends (a stop, history, pasted lines, commands), what a pipe sends, and what the conversation is afterwards."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bitpress as package
from bitpress import native
from bitpress.cli.conversation import Conversation
from bitpress.cli.request import Answer
from bitpress.errors import UsageError
from bitpress.runtime.native.engine import Engine
from bitpress.runtime.opening import load_native

pty = pytest.importorskip("pty")
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

Run = Callable[..., Any]
ENTER, CTRL_C, CTRL_D, UP = "\r", "\x03", "\x04", "\x1b[A"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
AT_PROMPT = "\x1b[?2004h"  # a terminal is told to mark what is pasted whenever a turn is asked for

# Runs the command line; every prompt goes into a file, and an answer to a question with "wait" in it stands still until it is stopped.
WATCHED = """
import json, os, sys, time
from bitpress.runtime.native.text import TextEngine
from bitpress.runtime.native.engine import Engine
stream, generate, waits = TextEngine.stream, Engine.generate, []
def noted(self, prompt, **options):
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps(prompt) + "\\n")
    waits[:] = ["wait"] * ("wait" in prompt[-1]["content"])
    return stream(self, prompt, **options)
def standing(self, tokens, **options):
    for count, token in enumerate(generate(self, tokens, **options)):
        yield token
        if waits and count == 6:
            sys.stderr.write("STANDING")
            sys.stderr.flush()
            while True:  # a stop that comes between two calls is not lost, as it is in front of signal.pause
                time.sleep(0.01)
TextEngine.stream, Engine.generate = noted, standing
from bitpress.cli.app import main
main()
"""


class Session:
    """The command line on a terminal of its own."""

    def __init__(self, arguments: list[str], noted: Path, environment: dict[str, str]) -> None:
        self.noted = noted
        self._read = ""
        self._terminal, inner = pty.openpty()
        self._child = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "NOTED": str(noted), **environment},
            preexec_fn=take_terminal,
        )
        os.close(inner)

    def until(self, text: str) -> str:
        """Read up to a text; return what came before it."""
        end = time.monotonic() + 60
        while text not in self._read:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} does not come; {self._read!r} did"
            self._read += os.read(self._terminal, 1 << 16).decode(errors="replace")
        before, _, self._read = self._read.partition(text)
        return before

    def send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def say(self, text: str) -> str:
        """Send a turn and return what is on the terminal up to the next one."""
        self.send(text + ENTER)
        return self.until(AT_PROMPT)

    def prompts(self) -> list[list[dict[str, str]]]:
        return [json.loads(line) for line in self.noted.read_text().splitlines()]

    def end(self) -> int:
        code = self._child.wait(60)
        os.close(self._terminal)
        return code

    def kill(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()


def take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by what a shell starts in the background
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def session(pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """Start the command line on a model whose layout is kept, which takes neither torch nor transformers."""
    layouts = tmp_path / "layouts"
    monkeypatch.setenv("BITPRESS_LAYOUTS", str(layouts))
    load_native(pressed_original)
    started: list[Session] = []

    def start(*options: str) -> Session:
        given = ["run", str(pressed_original), "--max-tokens", "8", "--temperature", "2", "--seed", "3", *options]
        started.append(Session(given, tmp_path / f"noted{len(started)}", {"BITPRESS_LAYOUTS": str(layouts)}))
        return started[-1]

    yield start
    for made in started:
        made.kill()


@needs_native
def test_a_chat_on_a_terminal(session: Callable[..., Session]) -> None:
    chat = session()
    chat.until(AT_PROMPT)
    assert "cut at 8 tokens: --max-tokens allows more, or ask it to go on" in chat.say("one")
    chat.send("please wait" + ENTER)
    chat.until("STANDING")
    chat.send(CTRL_C)
    assert "stopped; the conversation goes on from here" in chat.until(AT_PROMPT)
    chat.say(UP + UP)  # behind "please wait"
    chat.say(f"{PASTE}first line\nsecond line{PASTED}")
    assert "unknown command '/clera'. Did you mean '/clear'?" in chat.say("/clera")
    chat.say("/clear")
    chat.say("/system Be brief.")
    chat.say("//clear is a command")
    assert "forget the conversation" in chat.say("/help")
    chat.send("half a line" + CTRL_C)
    chat.say("")
    chat.send(CTRL_C)
    assert chat.end() == 0
    prompts = chat.prompts()
    said = [[turn["content"] for turn in prompt if turn["role"] == "user"] for prompt in prompts]
    assert said[:4] == [
        ["one"],
        ["one", "please wait"],
        ["one", "please wait", "one"],
        ["one", "please wait", "one", "first line\nsecond line"],
    ]
    assert all(turn["content"] for turn in prompts[3] if turn["role"] == "assistant"), (
        "a stopped answer is part of what was said"
    )
    assert prompts[4:] == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "/clear is a command"}]]


@needs_native
def test_what_does_not_fit_leaves_the_conversation(session: Callable[..., Session]) -> None:
    chat = session("--context", "40", "--max-tokens", "60")
    chat.until(AT_PROMPT)
    shown = chat.say("a")
    assert "cut: the model's context is full" in shown
    assert "/clear begins a new conversation" in shown
    shown = chat.say("b " * 40)
    assert "the answer needs room in it" in shown
    assert "the conversation stays as it was; /clear begins a new one" in shown
    chat.say("/clear")
    assert "context is full" in chat.say("c")
    chat.send(CTRL_D)
    assert chat.end() == 0
    assert [len(prompt) for prompt in chat.prompts()] == [1, 3, 1]


# ---- without a terminal ----


@needs_native
def test_lines_of_a_pipe(bitpress: Run, pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n/clear\nc"))
    asked: list[int] = []
    monkeypatch.setattr(Engine, "generate", observed(asked))
    done = bitpress("run", pressed_original, "--max-tokens", "4")
    assert done.code == 0, done.err
    assert len(asked) == 3
    assert asked[0] == 0, "nothing is in the cache yet"
    assert asked[1] > 3, "the conversation is"
    assert asked[2] <= 3, "and was forgotten"
    assert "Ctrl-C" not in done.err
    assert "> " not in done.out


def observed(kept: list[int]) -> Callable[..., Iterator[int]]:
    generate = Engine.generate

    def watch(self: Engine, tokens: Any, **options: Any) -> Iterator[int]:
        kept.append(self.common(tokens))
        return generate(self, tokens, **options)

    return watch


def test_an_error_in_a_pipe_ends_it(bitpress: Run, pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/nothing\na\n"))
    done = bitpress("run", pressed_original, "--max-tokens", "4")
    assert (done.code, done.out) == (2, "")
    assert "unknown command '/nothing'" in done.error


def test_bytes_in_a_pipe_that_are_no_text(bitpress: Run, pressed_original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    done = bitpress("run", pressed_original, "--max-tokens", "4")
    assert (done.code, done.out) == (2, "")
    assert "standard input is not valid UTF-8" in done.error


@pytest.mark.parametrize("runtime", ["native", "transformers"])
def test_one_answer_says_that_it_was_cut(runtime: str, bitpress: Run, pressed_original: Path) -> None:
    if runtime == "native" and not native.available():
        pytest.skip("no native library")
    done = bitpress("run", pressed_original, "--prompt", "a", "--max-tokens", "3", "--runtime", runtime)
    assert "cut at 3 tokens: --max-tokens allows more." in done.err
    assert "cut" not in bitpress("run", pressed_original, "--prompt", "a", "--max-tokens", "3", "--json").err


# ---- the conversation itself ----


class Told:
    """A reader that gives what it is told."""

    interactive = True

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def read(self) -> str | None:
        return next(self._lines, None)


class Echo:
    """Answers with the number of turns; stops where it is asked to."""

    facts: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.heard: list[Any] = []

    def line(self) -> str:
        return ""

    def answer(self, prompt: Any, show: Callable[[str], None], *, raw: bool = False) -> Answer:
        self.heard.append([dict(turn) for turn in prompt])
        question = prompt[-1]["content"]
        if question == "refuse":
            raise UsageError("refused.")
        if question == "stop":
            raise KeyboardInterrupt
        show("x")
        if question == "stop later":
            raise KeyboardInterrupt
        return Answer(text="x", tokens=1, prompt_tokens=1, tokens_per_second=1.0, finish="stop")


def talk(tokenizer: Any, *lines: str) -> Conversation:
    made = Conversation(Echo(tokenizer), Told(*lines))
    made.run()
    return made


@pytest.mark.parametrize(
    ("lines", "turns"),
    [
        (("a", "", "  ", "b"), ["a", "x", "b", "x"]),
        (("a", "/exit", "b"), ["a", "x"]),
        (("a", "/quit", "b"), ["a", "x"]),
        (("a", "stop", "b"), ["a", "x", "b", "x"]),
        (("a", "stop later", "b"), ["a", "x", "stop later", "x", "b", "x"]),
        (("a", "refuse", "b"), ["a", "x", "b", "x"]),
        (("a", "/clear", "b"), ["b", "x"]),
        (("a", "/clear all", "/usr/bin", "/"), ["a", "x"]),
        (("//a", "/b\n/c"), ["/a", "x", "/b\n/c", "x"]),
        (("\ta \n b\n",), ["a \n b", "x"]),
    ],
)
def test_a_conversation_is_what_was_said_and_answered(
    lines: tuple[str, ...], turns: list[str], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = talk(tiny_tokenizer, *lines)
    assert [turn["content"] for turn in made.turns] == turns
    assert [turn["role"] for turn in made.turns] == ["user", "assistant"] * (len(turns) // 2)


def test_a_system_message_stands_before_all(tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Echo(tiny_tokenizer)
    Conversation(speaker, Told("/system  Be kind. ", "a", "/clear", "b", "/system", "c")).run()
    system = {"role": "system", "content": "Be kind."}
    assert [prompt[0] for prompt in speaker.heard[:2]] == [system, system]
    assert [len(prompt) for prompt in speaker.heard] == [2, 2, 3]
    assert "no system message" in capsys.readouterr().err


def test_a_system_message_that_the_template_does_not_take_is_refused(
    tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}"
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    for template, says in ((own, "no system role"), (silent, "leaves a system message out")):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        made = talk(tiny_tokenizer, "a", "/system Be kind.")
        assert made.system is None
        assert len(made.turns) == 2
        assert says in capsys.readouterr().err


@needs_native
@pytest.mark.parametrize("after", [1, 3, 6])
def test_the_cache_is_right_behind_an_answer_that_was_stopped(
    after: int, pressed_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes next is what an engine answers that was never stopped."""
    engine = package.load(pressed_original, runtime="native", threads=1)
    question = [{"role": "user", "content": "a long question, and then"}]
    with monkeypatch.context() as patch:
        generate = Engine.generate

        def stopped(self: Engine, tokens: Any, **options: Any) -> Iterator[int]:
            for count, token in enumerate(generate(self, tokens, **options)):
                if count == after:
                    raise KeyboardInterrupt
                yield token

        patch.setattr(Engine, "generate", stopped)
        pieces: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(engine.stream(question, max_tokens=20))
        shown = engine.tokenizer.decode(list(engine.engine._cached[len(engine.encode(question)) : engine.engine.length]))
    again = [*question, {"role": "assistant", "content": shown}, {"role": "user", "content": "and?"}]
    assert engine.engine.common(engine.encode(again)) >= len(engine.encode(question)) - 2
    second = engine.complete(again, max_tokens=12).token_ids
    fresh = package.load(pressed_original, runtime="native", threads=1)
    assert second == fresh.complete(again, max_tokens=12).token_ids
