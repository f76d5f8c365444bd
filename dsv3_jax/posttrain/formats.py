"""Formats that a text may have: what style is counted by, and rewarded for."""

import json
import re
from collections.abc import Callable

from dsv3_jax.posttrain.verifiers import boxed


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
    "list": lambda text: re.search(r"^\s*(?:[-*+]|\d+[.)])\s", text, re.MULTILINE) is not None,
    "heading": lambda text: re.search(r"^#{1,6} ", text, re.MULTILINE) is not None,
    "several paragraphs": lambda text: re.search(r"\S\s*\n\s*\n\s*\S", text) is not None,
    "JSON": is_json,
}
