"""Checks that all configuration dataclasses share: types of fields, allowed ranges."""

import math
import reprlib
import types
import typing
from typing import Any, Literal


def check_types(where: str, section: Any) -> None:
    """ValueError for a field that is not of its type, or a number that is not finite."""
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if not _is_a(value, hint):
            place = f"{where}.{name}".strip(".")
            raise ValueError(f"{place} is {shown(value)}; allowed: {_described(hint)}")


def shown(value: Any) -> str:
    """`repr`, cut to the length of a line whatever a file holds."""
    return _SHORT.repr(value)


def check(name: str, value: Any, holds: bool, allowed: str) -> None:
    """ValueError in the one form of all messages: what it is, what is allowed."""
    if not holds:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")


def check_temperature(name: str, temperature: float) -> None:
    """ValueError for what float32, which ends at 3.4e38, cannot divide logits by."""
    check(name, temperature, 0 <= temperature < 1e38, "from 0 to below 1e38")


def check_top_p(name: str, top_p: float) -> None:
    """ValueError for what is no share of all, or none but 0 to float32."""
    check(name, top_p, 1e-37 < top_p <= 1, "above 0, at most 1")


def _is_a(value: Any, hint: Any) -> bool:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in choices
    if origin is types.UnionType:
        return any(_is_a(value, choice) for choice in choices)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, choices[0]) for item in value)
    if hint is float and not isinstance(value, bool):
        return isinstance(value, int | float) and _is_finite(value)
    return type(value) is hint


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {_described(typing.get_args(hint)[0])}"
    return _NAMES.get(hint, hint.__name__)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
_NAMES = {
    int: "whole numbers",
    float: "finite numbers",
    str: "text",
    bool: "True, False",
    types.NoneType: "None",
}
