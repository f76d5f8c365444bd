"""Random values of a JSON Schema, as far as the server's description uses its words."""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]
_SAID = {"title", "description", "default", "additionalProperties", "required"}


def values_of(schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    """`others` by the last part of a reference. KeyError for a word that is not known here."""
    words = {name: value for name, value in schema.items() if name not in _SAID}
    if "$ref" in words:
        return values_of(others[words["$ref"].rpartition("/")[2]], others)
    if "anyOf" in words:
        return st.one_of(*(values_of(one, others) for one in words["anyOf"]))
    if "const" in words:
        return st.just(words["const"])
    if "enum" in words:
        return st.sampled_from(words["enum"])
    made = _KINDS[words.pop("type")](words, schema, others)
    assert not words, f"words that are not known here: {words}"
    return made


def _object(words: dict, schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    fields = {k: values_of(v, others) for k, v in words.pop("properties", {}).items()}
    needed = {name: fields.pop(name) for name in schema.get("required", ())}
    words.pop("maxProperties", None)  # used for "none" alone, as here
    return st.fixed_dictionaries(needed, optional=fields)


def _array(words: dict, schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    most = min(words.pop("maxItems", 6), 6)
    items = values_of(words.pop("items"), others) if most else st.nothing()
    if not most:
        words.pop("items", None)
    return st.lists(items, min_size=words.pop("minItems", 0), max_size=most)


def _string(words: dict, schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    most = min(words.pop("maxLength", 30), 30)
    return st.text(min_size=words.pop("minLength", 0), max_size=most)


def _integer(words: dict, schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    most = words.pop("maximum", None)
    if "exclusiveMaximum" in words:
        most = words.pop("exclusiveMaximum") - 1
    return st.integers(words.pop("minimum", None), most)


def _number(words: dict, schema: Schema, others: Mapping[str, Schema]) -> st.SearchStrategy[Any]:
    least, above = words.pop("minimum", None), words.pop("exclusiveMinimum", None)
    most = words.pop("maximum", None)
    return st.floats(
        above if least is None else least,
        most,
        exclude_min=above is not None,
        allow_nan=False,
        allow_infinity=False,
    )


_KINDS = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda words, schema, others: st.booleans(),
    "null": lambda words, schema, others: st.none(),
}
