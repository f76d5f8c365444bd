"""Kinds of samples, and how each kind asks for its answer (report 5.1).

A problem of reasoning becomes two samples: with its original response and no system prompt, and
with R1's response behind a system prompt that asks to reflect and to verify. The other four kinds
are the report's non-reasoning data; it gives no wording for any of them, so all texts here are
ours. A template is Jinja: `prompt` is the text of the file's line, other names are its `values` and
those of the command. A change of any text here raises VERSION.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import read_table

VERSION = "1"


@dataclass(frozen=True)
class Template:
    """What stands around a prompt."""

    system: str = ""
    """The system prompt; none if it renders to nothing"""
    user: str = "{{ prompt }}"
    """The last user's turn"""
    keeps_reasoning: bool = False
    """Whether the sample's answer begins with the model's <think> ... </think>"""

    @property
    def hash(self) -> str:
        """Of all its fields, in 16 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def render(self, prompt: str, values: Mapping[str, str]) -> tuple[str, str]:
        """System prompt and user's turn. ValueError, one line, if one of them fails, or leaves
        nothing to ask.
        """
        named = {**values, "prompt": prompt}
        system, user = _rendered("system", self.system, named), _rendered("user", self.user, named)
        if not user.strip():
            raise ValueError("its user template gives no text; allowed: one that asks something")
        return system, user


_REFLECT = """\
Think the problem through before you answer. Work step by step and say why each step holds. When \
you have a result, look back: check it against the problem by another way, by an estimate or by \
putting it in, and where a step was wrong say so and mend it. Then write a short, clean solution \
that a reader can follow without your drafts. If the problem asks for one final answer, end with \
it in \\boxed{}."""
_WRITE = """\
You are a writer. Write what is asked for, in the form, the tone and the language of the request, \
and nothing about it."""
_FACT = """\
Answer the question correctly and in few words, in the question's language. If you do not know the \
answer, say that you do not know."""
_SELF = """\
You are {{ name }}, a language model made by {{ developer }}. Answer questions about yourself \
truthfully and briefly: claim no body, no feelings, no memory of other conversations, and nothing \
about your making that you were not told."""
_TRANSLATE = """\
You are a translator. Keep meaning, tone, numbers, names and layout. Write the translation alone."""

ORIGINAL, REFLECTIVE = "reasoning_original", "reasoning_reflective"
TEMPLATES: dict[str, Template] = {
    ORIGINAL: Template(),
    REFLECTIVE: Template(system=_REFLECT, keeps_reasoning=True),
    "writing": Template(system=_WRITE),
    "factual_qa": Template(system=_FACT),
    "self_cognition": Template(system=_SELF),
    "translation": Template(
        system=_TRANSLATE,
        user="Translate into {{ language }}:\n\n{{ prompt }}",
    ),
}
# What a line may name as its kind -> the samples that it becomes.
EXPANDED = {"reasoning": (ORIGINAL, REFLECTIVE)} | {kind: (kind,) for kind in TEMPLATES}


def check_kind(kind: Any, name: str = "kind") -> str:
    """The kind. ValueError for an unknown one."""
    if not isinstance(kind, str) or kind not in EXPANDED:
        raise ValueError(f"{name} is {shown(kind)}; allowed: {', '.join(EXPANDED)}")
    return kind


def read_templates(file: Path | None) -> dict[str, Template]:
    """Ours, with those of a JSON file in their places: an object of objects, kind by kind, whose
    fields are those of `Template`. ValueError or OSError, one line, for another file.
    """
    if file is None:
        return TEMPLATES
    found = read_table(file)
    own = {}
    for kind, fields in found.items():
        if kind not in TEMPLATES:
            allowed = ", ".join(TEMPLATES)
            raise ValueError(f"{file}: kind {shown(kind)} is unknown; allowed: {allowed}")
        own[kind] = _template(f"{file}: {kind}", fields)
    return TEMPLATES | own


def _template(where: str, fields: Any) -> Template:
    types = {"system": str, "user": str, "keeps_reasoning": bool}
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {shown(fields)}; allowed: an object with {', '.join(types)}")
    for name, value in fields.items():
        if name not in types:
            raise ValueError(f"{where}.{name} is unknown; allowed: {', '.join(types)}")
        if type(value) is not types[name]:
            allowed = "true, false" if types[name] is bool else "text"
            raise ValueError(f"{where}.{name} is {shown(value)}; allowed: {allowed}")
    template = Template(**fields)
    for part in ("system", "user"):
        _compiled(f"{where}.{part}", getattr(template, part))
    return template


_FAILURES = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def _compiled(where: str, source: str) -> Any:
    try:
        return _ENVIRONMENT.from_string(source)
    except (TemplateError, SyntaxError) as error:
        raise ValueError(f"{where} is no template: {_line(error)}") from None


def _rendered(part: str, source: str, values: Mapping[str, str]) -> str:
    try:
        return _compiled(part, source).render(values)
    except _FAILURES as error:
        given = ", ".join(sorted(values))
        raise ValueError(f"its {part} template fails: {_line(error)}; given: {given}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
