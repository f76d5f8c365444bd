"""Formats that a text may have: what style is counted by, and rewarded for."""

import json
import re
from collections.abc import Callable

from dsv3_jax.posttrain.verifiers import boxed

# A blank that ends no line: where `\s` may cross lines in several ways, a text that is all blank
# takes the square or the cube of its length.
_ITEM = re.compile(r"^[^\S\n]*(?:[-*+]|\d+[.)])\s", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\S[^\S\n]*\n[^\S\n]*\n\s*\S")


def is_json(text: str) -> bool:
    """Whether a text is an object or a list of JSON, all of it."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


FORMATS: dict[str, Callable[[str], bool]] = {
    "boxed answer": lambda text: boxed(text) is not None,
    "reasoning": lambda text: text.startswith("<think>"),
    "code block": lambda text: re.search(r"^```", text, re.MULTILINE) is not None,
    "list": lambda text: _ITEM.search(text) is not None,
    "heading": lambda text: re.search(r"^#{1,6} ", text, re.MULTILINE) is not None,
    "several paragraphs": lambda text: _PARAGRAPHS.search(text) is not None,
    "JSON": is_json,
}
