"""Every way in which a command can fail: one line for people on standard error, and with --json an object on standard output.

{"error": {"code": 2, "kind": "UsageError", "message": "..."}}      code is the exit code, kind the class of the error
"""

import errno
import itertools
import json
import re
import sys
import traceback
from typing import Any, NoReturn

import typer

from bitpress.cli.screen import err, has_printed_json
from bitpress.errors import BitpressError, UsageError, nearest, shown
from bitpress.exhaustion import first_line, is_out_of_memory

__all__ = ["check_arguments", "explain", "fail", "interrupted", "wants_json"]

# Options that have a message of their own for an empty value.
HEARD_ELSEWHERE = ("--prompt", "--set", "--stop", "--memory", "--tasks")

# The root of typer's own errors about the command line, whichever copy of click this version of typer has.
_COMMAND_LINE: type[Any] = next(k for k in typer.BadParameter.__mro__ if k.__name__ == "ClickException")


def fail(error: BaseException, *, debug: bool, arguments: list[str]) -> NoReturn:
    """Print the error in one line, and exit with its code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help itself
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    message, code = explain(error)
    if debug:
        traceback.print_exception(error)
    if wants_json(arguments) and not has_printed_json():
        sys.stdout.write(json.dumps({"error": {"code": code, "kind": type(error).__name__, "message": message}}) + "\n")
    err.print(f"[bold red]error:[/bold red] {message.replace('[', chr(92) + '[')}", soft_wrap=True)
    sys.exit(code)


def interrupted() -> KeyboardInterrupt:
    """Return the error that stands for Ctrl-C, which typer turns into a bare exit code."""
    return KeyboardInterrupt("interrupted.")


def wants_json(arguments: list[str]) -> bool:
    """Say whether a command line asks for JSON, even one that cannot be parsed."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own


def check_arguments(arguments: list[str]) -> None:
    """Raise UsageError for an empty word, which as a path would be the current directory."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word == "" and before not in HEARD_ELSEWHERE:
            if before.startswith("-"):
                raise UsageError(f"{before}: its value is empty; write one, or leave {before} out.")
            raise UsageError("an argument is empty; is a variable of the shell not set?")


def explain(error: BaseException) -> tuple[str, int]:
    """Return the error as one line, and the exit code."""
    if isinstance(error, BitpressError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, _COMMAND_LINE):
        return _one_line(_of_command_line(error)), 2
    if is_out_of_memory(error):
        if isinstance(error, ImportError):
            return (
                "out of memory: there is not enough to load the program; give it more, about 1 GB of address space at least.",
                5,
            )
        reason = first_line(error) or "an allocation failed"
        return f"out of memory: {reason}. Use fewer or shorter samples, or a smaller batch (--set batch=1).", 5
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return f"{error.filename or 'disk'}: {error.strerror}; make room and run the same command again.", 4
        return _one_line(f"{error.filename or 'a file'}: {error.strerror or error}."), 4
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", 130
    if type(error).__name__ == "Abort":
        return "the input ended before an answer.", 1
    said = _one_line(str(error))[:200]
    return f"{type(error).__name__}: {said} This was not foreseen; `bitpress --debug ...` shows where it happened.", 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _of_command_line(error: Any) -> str:
    """Return an error of the command line with the nearest correct word and an example."""
    context = getattr(error, "ctx", None)
    if context is None:
        return str(error.format_message())
    command, where = context.command, context.command_path
    commands = getattr(command, "commands", None)
    options = [name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")]
    message = str(error.format_message())
    kind = type(error).__name__
    if kind == "NoSuchOption":
        name = str(error.option_name)
        if name == "--debug":
            return f"--debug goes before the command: bitpress --debug {context.info_name} ..."
        near = nearest(name.lstrip("-"), [option.lstrip("-") for option in options if option.startswith("--")])
        hint = f" Did you mean --{near[0]}?" if near else ""
        return f"{where}: there is no option {name}.{hint} `{where} --help` lists them."
    if kind == "UsageError" and commands is not None:
        name = next((word for word in sys.argv[1:] if word not in commands and not word.startswith("-")), "")
        near = nearest(name, commands)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}: there is no command {shown(name)}.{hint} Known: {', '.join(commands)}."
    if kind == "MissingParameter" and error.param is not None:
        what = (
            error.param.metavar or error.param.name.upper()
            if error.param.param_type_name == "argument"
            else error.param.opts[0]
        )
        message = f"{what} is missing."
    elif kind == "BadParameter" and error.param is not None:
        message = _bad_value(error)
    epilog = (command.epilog or "").partition("\n")[0]
    stop = "" if message.endswith((".", "?")) else "."
    return f"{where}: {message}{stop} {epilog}".strip()


# Messages of typer about a value, in the words of click or pydantic, and ours for them.
_NEEDED = (
    (re.compile(r"valid integer|is not a valid int"), "a whole number is needed"),
    (re.compile(r"valid number|is not a valid float"), "a number is needed"),
    (re.compile(r"valid boolean"), "true or false is needed"),
    (re.compile(r"greater than or equal to (\S+)|x>=(\S+?)\.?$"), "{} or more is needed"),
    (re.compile(r"less than or equal to (\S+)|x<=(\S+?)\.?$"), "{} or less is needed"),
)


def _bad_value(error: Any) -> str:
    name = error.param.opts[0] if error.param.param_type_name == "option" else error.param.name.upper()
    said = str(error.message)
    needed = said.removesuffix(".")
    for pattern, ours in _NEEDED:
        found = pattern.search(said)
        if found is not None:
            needed = ours.format(next((group for group in found.groups() if group), ""))
            break
    given = [b for a, b in itertools.pairwise(sys.argv) if a in error.param.opts]
    given += [word.partition("=")[2] for word in sys.argv if word.partition("=")[0] in error.param.opts and "=" in word]
    got = f" (got {shown(given[-1])})" if given else ""
    return f"{name}: {needed}{got}."
