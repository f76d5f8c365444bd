"""What a traced program computes, without running it: each intermediate's shape and dtype."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def equations(function: Callable, *args: Any) -> Iterator[Any]:
    """Every equation of the traced function and of its inner programs (scan, jit, checkpoint)."""
    yield from _walk(jax.make_jaxpr(function)(*args).jaxpr)


def intermediates(function: Callable, *args: Any) -> list[jax.core.ShapedArray]:
    """The abstract value of every array that some equation of the traced function produces."""
    return [var.aval for eqn in equations(function, *args) for var in eqn.outvars]


def _walk(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _walk(inner)
