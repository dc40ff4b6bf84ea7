"""Conversations in every form that other programs write: what a template gets is what transformers gives it, or one line names the turn."""

from pathlib import Path
from typing import Any

import pytest

from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.errors import CheckpointError, UsageError
from bitpress.runtime.messages import read_messages
from bitpress.runtime.native.plain_tokenizer import PlainTokenizer
from bitpress.runtime.prompt import encode_prompt

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TEXT = {"type": "text", "text": "hello"}
USER = {"role": "user", "content": "a"}

TEMPLATES = {
    "text only": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
    "text added": "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}",
    "text trimmed": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }};{% endfor %}",
    "everything": (
        "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>"
        "{% if m.content is string %}{{ m.content }}{% elif m.content is mapping %}{{ m.content | tojson }}"
        "{% elif m.content %}{% for p in m.content %}{{ p.type }}={{ p.text or p.thinking }},{% endfor %}{% endif %}"
        "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}"
    ),
    "strict": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.\nMore') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    ),
    "fails": "{% for m in messages %}{{ m.content.strip() }}{% endfor %}",
}
CONVERSATIONS: dict[str, Any] = {
    "text": [USER],
    "null": [USER, {"role": "assistant", "content": None, "tool_calls": []}, USER],
    "null and a call": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER],
    "a call and no content": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER],
    "a result": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3", "tool_call_id": "1"}],
    "an empty result": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}],
    "an object as result": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"sum": 3}}],
    "arguments as text": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        USER,
    ],
    "parts": [{"role": "user", "content": [TEXT]}],
    "two parts": [USER, {"role": "assistant", "content": [TEXT, TEXT]}, USER],
    "parts in a tuple": ({"role": "user", "content": (TEXT,)},),
    "thinking": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, TEXT]}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "b", "reasoning": "hm"}, USER],
    "a name": [{"role": "user", "name": "Ada", "content": "a"}],
    "a null name": [{"role": "user", "name": None, "content": "a", "tool_calls": None}],
    "another role": [{"role": "critic", "content": "a"}, USER],
    "the same role twice": [USER, USER],
}


@pytest.fixture(scope="module")
def tokenizer(pressed_original: Path) -> Any:
    return load_tokenizer(pressed_original)


def rendered(tokenizer: Any, messages: Any) -> str:
    """What transformers makes of a conversation, where keys that are null are left out: not every version does that itself."""
    given = [{key: value for key, value in m.items() if value is not None} for m in messages]
    text: str = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
    return text


def encoded(tokenizer: Any, messages: Any) -> list[int] | str:
    """Return the tokens of a conversation, or the one line that names a turn or what the template says of them all."""
    try:
        return encode_prompt(tokenizer, messages)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_turn_reaches_the_template_or_is_named(name: str, template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    plain = PlainTokenizer.of(tokenizer)
    messages = CONVERSATIONS[name]
    before = repr(messages)
    results = [encoded(used, messages) for used in (plain, tokenizer)]
    assert results[0] == results[1], "both runtimes say the same"
    assert repr(messages) == before, "nothing of the caller's is changed"
    if not isinstance(results[0], str):
        text = rendered(tokenizer, messages)
        assert results[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "None" not in text
        assert "{'" not in text
        assert template == "everything" or not any(isinstance(m.get("content"), (list, tuple, dict)) for m in messages)
    else:
        assert template != "everything"
        assert results[0].startswith(("messages[", "the chat template refuses these messages: Roles must alternate."))
        assert len(results[0].splitlines()) == 1


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([{"role": "user", "content": ""}], "the prompt is empty"),
        ([{"role": "user", "content": []}], "the prompt is empty"),
        ({"role": "user", "content": "a"}, "the prompt is a dict"),
        (b"a", "the prompt is a bytes"),
        (3, "the prompt is a int"),
        (None, "the prompt is a NoneType"),
        (["a"], r"messages\[0\] is a str"),
        ([USER, ("user", "a")], r"messages\[1\] is a tuple"),
        ([{"content": "a"}], r"messages\[0\] has no role"),
        ([{"role": None, "content": "a"}], r"messages\[0\] has no role"),
        ([{"role": 3, "content": "a"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
        ([{"role": "system", "content": None}, USER], r"messages\[0\] \(system\) has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\] \(user\): content is a int"),
        ([{"role": "user", "content": {"text": "a"}}], r"messages\[0\] \(user\): content is a dict"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\] \(user\): a part of the content has no type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "has no text"),
        (
            [USER, USER, {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "x"}}]}],
            r"messages\[2\].*'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of the type 'image'; the model is run on text only"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "input_audio"),
        ([{"role": "user", "content": "\udcff"}], r"messages\[0\].*UTF-8"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}, USER], r"messages\[0\].*UTF-8"),
        ([{"role": "assistant", "tool_calls": [{1: 2}]}, USER], r"messages\[0\].*keys are texts"),
        ([{"role": "assistant", "tool_calls": [object()]}, USER], r"messages\[0\].*holds a object"),
    ],
)
def test_what_is_no_turn_is_named(messages: Any, says: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["everything"]
    with pytest.raises(UsageError, match=says) as error:
        encode_prompt(tokenizer, messages)
    assert len(str(error.value).splitlines()) == 1


def test_a_conversation_that_has_itself_in_it_ends() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="nested deeper"):
        read_messages([{"role": "assistant", "tool_calls": loop}, USER])


def test_what_a_template_says_about_a_conversation_is_the_users_to_mend(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["strict"]
    for used in (tokenizer, PlainTokenizer.of(tokenizer)):
        with pytest.raises(UsageError, match=r"^the chat template refuses these messages: Roles must alternate\.$"):
            encode_prompt(used, [USER, USER])
    tokenizer.chat_template = "{{ messages[5].content.x }}"
    with pytest.raises(CheckpointError, match="the chat template failed"):
        encode_prompt(tokenizer, [USER])


def test_a_template_of_several_is_chosen_as_transformers_does(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
    tokenizer.chat_template = {"default": "plain {{ tools }}", "tool_use": "with {{ tools | tojson }}"}
    plain = PlainTokenizer.of(tokenizer)
    assert plain is not None
    for used in (tokenizer, PlainTokenizer.from_tree(plain.as_tree())):
        for tools, starts in ((None, "plain None"), ([], "plain None"), ([tool], 'with [{"type"')):
            text = tokenizer.decode(encode_prompt(used, [USER], tools=tools))
            assert text.startswith(starts)
    tokenizer.chat_template = {"other": "x"}
    for used in (tokenizer, PlainTokenizer.of(tokenizer)):
        with pytest.raises(CheckpointError, match="chat templates"):
            encode_prompt(used, [USER])


def test_tools_need_a_template_that_knows_them(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["text only"]
    for tools, options, says in (
        ([{"type": "function"}], {}, "does not know tools"),
        ([{"type": "function"}], {"raw": True}, "need the chat template"),
        ("add", {}, "JSON schemas"),
        ([3], {}, "JSON schemas"),
    ):
        with pytest.raises(UsageError, match=says):
            encode_prompt(tokenizer, [USER], tools=tools, **options)
    with pytest.raises(UsageError, match="need the chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": [TEXT]}], raw=True)
