"""Messages of a chat, as other programs write them: every turn is checked and copied into plain values before a chat template reads it.

Content as parts, tool calls, results of tools and reasoning are for templates to interpret, and are passed on as they are. A key whose
value is null is left out, as in transformers: a template would write the word "None".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.errors import UsageError

__all__ = ["Prompt", "is_odd", "read_messages", "read_tools", "turn"]

Prompt = str | Sequence[Mapping[str, Any]]

# Parts of content that a text model takes; others hold images, sound or files.
TEXT_PARTS = ("text", "thinking", "reasoning")
# Names of a turn's reasoning with different providers; templates read the first or the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
DEEPEST = 32


def read_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as a list of turns in plain values.

    Raises UsageError, which names the turn, for a value that is no turn, for content other than text, and for invalid UTF-8.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("the prompt is empty.")
        return [_plain({"role": "user", "content": prompt}, "the prompt")]
    if isinstance(prompt, (Mapping, bytes)) or not isinstance(prompt, Sequence):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; pass a text, or a list of messages with role and content.")
    if not prompt:
        raise UsageError("the prompt is empty.")
    messages = [_read_turn(message, index) for index, message in enumerate(prompt)]
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise UsageError("the prompt is empty.")
    return messages


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return descriptions of tools in plain values; None if there are no tools. Raises UsageError."""
    if not tools:
        return None
    if isinstance(tools, (str, Mapping)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UsageError("tools are a list of JSON schemas, such as {'type': 'function', 'function': {...}}.")
    return [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def turn(messages: Sequence[Mapping[str, Any]], index: int) -> str:
    """Return a turn's name for an error: `messages[2] (user)`."""
    return f"messages[{index}] ({messages[index]['role']})"


def is_odd(message: Mapping[str, Any]) -> bool:
    """Say whether a turn's content is anything but one text, which not every template takes."""
    return not isinstance(message.get("content"), str)


def _read_turn(message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} is a {type(message).__name__}; a message has a role and content.")
    made: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None}, where)
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError(f"{where} has no role; it is user, assistant, system, or another that the chat template knows.")
    where = f"{where} ({role})"
    if "content" not in made and role != "assistant":
        raise UsageError(f"{where} has no content; write a text, which may be ''.")
    if "content" in made:
        _check_content(made["content"], role, where)
    reasoning = next((made[key] for key in REASONING if key in made), None)
    return made if reasoning is None else {"thinking": reasoning, **made, "reasoning_content": reasoning}


def _check_content(content: Any, role: str, where: str) -> None:
    if isinstance(content, str) or (isinstance(content, dict) and role not in ("user", "assistant", "system", "developer")):
        return  # the result of a tool may be an object
    if not isinstance(content, list):
        raise UsageError(f"{where}: content is a {type(content).__name__}; it is a text, a list of parts, or null.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise UsageError(f"{where}: a part of the content has no type, such as {{'type': 'text', 'text': ...}}.")
        if kind not in TEXT_PARTS:
            raise UsageError(f"{where}: a part of the type {kind!r}; the model is run on text only.")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise UsageError(f"{where}: a part of the type 'text' has no text.")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copy a value of JSON's types. Raises UsageError for any other type, and for text that is not valid UTF-8."""
    if depth > DEEPEST:
        raise UsageError(f"{where}: nested deeper than {DEEPEST}.")
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{where}: the text is not valid UTF-8.")
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where, depth): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise UsageError(f"{where}: holds a {type(value).__name__}; messages hold what JSON can.")


def _key(key: Any, where: str, depth: int) -> Any:
    if not isinstance(key, str):
        raise UsageError(f"{where}: {key!r} is a key; keys are texts.")
    return _plain(key, where, depth)
