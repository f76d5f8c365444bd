"""Conversations as tokens: by a folder's own chat template (Jinja), else by DeepSeek's.

What users write cannot speak for somebody else: where a template spells a token that marks a turn
or an end it becomes that token, and where a user, a system prompt or a tool spells one it stays
text. An assistant's own words may hold marks, such as </think>, that templates look for.
"""

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import read_table, read_text
from dsv3_jax.data.tokenizer import Tokenizer

# As published: system prompts first, then turns, an answer closed by the end of the sentence.
DEEPSEEK = """{{ bos_token }}
{%- for message in messages if message.role == 'system' %}
{{- message.content }}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' + message.content + eos_token }}
{%- else %}
{{- raise_exception('role ' + message.role + '; allowed: system, user, assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<｜Assistant｜>' }}
{%- endif %}"""
TEMPLATE_FILE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
# Put into what only looks like a token; Unicode guarantees that this is no character.
_APART = "\ufdd0"
_FAILURES = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)


class ChatTemplate:
    """Messages (`role` and `content`, both text, and whatever else a template knows) to ids."""

    def __init__(
        self, tokenizer: Tokenizer, source: str = DEEPSEEK, name: str = "DeepSeek's template"
    ) -> None:
        """ValueError, one line, for what is no template."""
        self._tokenizer, self.source, self.name = tokenizer, source, name
        self._marks = _pattern(tokenizer.added_tokens)
        self._begun = _begun(tokenizer.added_tokens)
        try:
            self._template = _compiled(source)
        except (TemplateError, SyntaxError) as error:  # Python's: a break beside its loop
            raise ValueError(f"{name} is no chat template: {_line(error)}") from None

    @classmethod
    def of_file(cls, file: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """OSError if it cannot be read; ValueError, one line, if it is no template."""
        return cls(tokenizer, read_text(file), str(file))

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """That of `chat_template.jinja` or tokenizer_config.json, else DeepSeek's. Errors as of
        `of_file`.
        """
        file = folder / TEMPLATE_FILE
        if file.is_file():
            return cls.of_file(file, tokenizer)
        settings = folder / _SETTINGS
        found = read_table(settings).get("chat_template") if settings.is_file() else None
        if isinstance(found, list) and all(isinstance(one, dict) for one in found):
            named = (one.get("template") for one in found if one.get("name") == "default")
            found = next(named, None)
        if found is None:
            return cls(tokenizer)
        if not isinstance(found, str):
            raise ValueError(f"{settings}: chat_template is {shown(found)}; allowed: text")
        return cls(tokenizer, found, str(settings))

    def encode(self, messages: Sequence[Mapping[str, Any]], answer: bool = True) -> list[int]:
        """Ids of the conversation; with `answer` up to where the assistant begins to speak.

        ValueError, one line, for messages that the template refuses.
        """
        text = self._rendered([self._apart(message) for message in messages], answer)
        return [int(token) for part in self._encoded(text) for token in part]

    def _rendered(self, messages: Sequence[Mapping[str, Any]], answer: bool) -> str:
        tokenizer = self._tokenizer
        marks = {
            f"{name}_token": tokenizer.spelling_of(token_id)
            for name, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        }
        try:
            return self._template.render(messages=messages, add_generation_prompt=answer, **marks)
        except TemplateError as error:
            raise ValueError(f"{self.name}: {_line(error)}") from None
        except _FAILURES as error:
            # What a template does with messages that it does not expect.
            raise ValueError(f"{self.name} does not take these messages: {_line(error)}") from None

    def _apart(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] == "assistant":
            return dict(message)
        return self._text_apart(message)

    def _text_apart(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._text_apart(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._text_apart(part) for part in value]
        if not isinstance(value, str) or self._marks is None:
            return value
        text = value.replace(_APART, "")
        if text.endswith(self._begun):  # it could end in what stands behind: another's words
            text += _APART
        return self._marks.sub(lambda found: found[0][0] + _APART + found[0][1:], text)

    def _encoded(self, text: str) -> Iterator[Sequence[int] | np.ndarray]:
        """Marks as their ids, and what stands between them."""
        begin = 0
        for found in self._marks.finditer(text) if self._marks else ():
            yield from self._text_between(text[begin : found.start()])
            yield [self._tokenizer.added_tokens[found[0]]]
            begin = found.end()
        yield from self._text_between(text[begin:])

    def _text_between(self, text: str) -> list[np.ndarray]:
        # In pieces: together they would spell a token that is not special, and become it.
        return self._tokenizer.encode_batch([piece for piece in text.split(_APART) if piece])


def _pattern(tokens: Mapping[str, int]) -> re.Pattern | None:
    """The longest first, as one may begin another."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    if not longest_first:
        return None
    # A mark of one character has nothing to be taken apart: what makes it text stands behind it.
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{_APART})")


def _begun(tokens: Iterable[str]) -> tuple[str, ...]:
    """Ends of a text that a mark could go on from; blanks, which templates trim, are none."""
    return tuple({t[:n] for t in tokens for n in range(1, len(t)) if t[:n].strip()})


def _compiled(source: str) -> Template:
    """With what transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """{% generation %}, by which templates mark answers for a mask; here it is what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
