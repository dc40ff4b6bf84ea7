"""A model's tokenizer without transformers: a tokenizer of `tokenizers`, and the chat template in the same sandbox.

It is built from transformers' own tokenizer, and only if that does nothing more, so that both return the same tokens.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np

__all__ = ["PlainTokenizer"]


class PlainTokenizer:
    """The part of transformers' tokenizer interface that generating text needs.

    backend        a `tokenizers.Tokenizer`
    chat_template  jinja text, several by their names, or None
    special        special tokens by their name in templates, such as `bos_token`
    """

    def __init__(
        self, backend: Any, chat_template: str | dict[str, str] | None, special: Mapping[str, Any], eos_token_id: int | None
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special = dict(special)
        self.eos_token_id = eos_token_id

    @classmethod
    def of(cls, tokenizer: Any) -> "PlainTokenizer | None":
        """Take transformers' tokenizer apart; None if it does more than its backend and its templates."""
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        template = getattr(tokenizer, "chat_template", None)
        texts = template.values() if isinstance(template, dict) else [template]
        if backend is None or not (template is None or all(isinstance(text, str) for text in texts)):
            return None
        copied = Tokenizer.from_str(backend.to_str())
        copied.no_truncation()
        copied.no_padding()
        plain = cls(copied, template, tokenizer.special_tokens_map, tokenizer.eos_token_id)
        return plain if plain._agrees_with(tokenizer) else None

    def _agrees_with(self, tokenizer: Any) -> bool:
        special = [value for value in self.special.values() if isinstance(value, str)]
        text = " Grüße, x = 3.14!\n\t" + " a".join(special) + " 漢字 "
        if self(text)["input_ids"] != tokenizer(text)["input_ids"]:
            return False
        return bool(self(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"])

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        text: str = self.backend_tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: Literal[False] = False,
    ) -> str:
        """Return the text of messages by the chat template; of several templates, the one named default or (with tools) tool_use."""
        template = self.chat_template
        if isinstance(template, dict):
            name = "tool_use" if tools is not None and "tool_use" in template else "default"
            if name not in template:
                raise ValueError(f"there are several chat templates, but none named default: {', '.join(sorted(template))}")
            template = template[name]
        assert template is not None
        text: str = _template(template).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self.special
        )
        return text

    def as_tree(self) -> dict[str, Any]:
        return {
            "backend": np.frombuffer(self.backend_tokenizer.to_str().encode(), np.uint8),
            "chat_template": self.chat_template,
            "special": self.special,
            "eos_token_id": self.eos_token_id,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "PlainTokenizer":
        from tokenizers import Tokenizer

        return cls(
            Tokenizer.from_buffer(tree["backend"].tobytes()), tree["chat_template"], tree["special"], tree["eos_token_id"]
        )


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dictionary:
    """The function `dict` of templates: it builds a dictionary, and can do nothing else."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


@functools.lru_cache(4)
def _template(text: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Text between `generation` tags stays as it is: the tags mark the model's own words for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_itself"), [], [], body).set_lineno(line)

        def _itself(self, caller: Any) -> str:
            return str(caller())

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Namespace(jinja2.utils.Namespace):
        """Refuse attributes that begin with an underscore: they lead to the interpreter's own objects."""

        def __init__(*given: Any, **named: Any) -> None:  # `self` is a name that a template may use
            self, values = given[0], dict(*given[1:], **named)
            for name in values:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}.")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = fail
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = _Dictionary()
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)
