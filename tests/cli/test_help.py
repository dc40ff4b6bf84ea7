"""Help: every command has an example that its options take, and the program alone says where to begin."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import typer

from bitpress.cli.app import app

Run = Callable[..., Any]
GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_has_an_example_that_can_be_typed(name: str, bitpress: Run) -> None:
    command = GROUP.commands[name]
    example = (command.epilog or "").partition("Example: ")[2]
    words = shlex.split(example)
    assert words[:2] == ["bitpress", name]
    command.make_context(name, words[2:])  # raises for an option that is not there, or a value that does not do
    done = bitpress(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert "Example: bitpress" in " ".join(done.out.split())


def test_the_program_alone_shows_help_and_a_first_command(bitpress: Run) -> None:
    done = bitpress()
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert "Begin with: bitpress quantize smollm2-135m out/smollm2-4bit --bits 4" in text
    for name in COMMANDS:
        assert name in text
