"""What a lowered program holds: StableHLO's operations, functions counted as often as called."""

import math
import re
from collections.abc import Iterator

CALL = re.compile(r"\bcall @([\w.$-]+)")
TENSOR = re.compile(r"tensor<((?:\d+x)*)\w+>")


def operations(text: str, name: str) -> Iterator[str]:
    """Every operation of this name, as written from its name to the end of its types."""
    parts = re.split(r"^\s*func\.func ", text, flags=re.MULTILINE)[1:]
    bodies = {re.search(r"@([\w.$-]+)", part)[1]: part for part in parts}
    found = re.compile(rf"\bstablehlo\.{name}\b.*?-> [^\n]*", re.DOTALL)

    def of(function: str) -> Iterator[str]:
        body = bodies[function]
        yield from found.findall(body)
        for called in CALL.findall(body):
            yield from of(called)

    return of("main")


def count(text: str, name: str) -> int:
    return sum(1 for _ in operations(text, name))


def result_shape(operation: str) -> tuple[int, ...]:
    """Of its first result."""
    dimensions = TENSOR.search(operation.rpartition("->")[2])[1]
    return tuple(map(int, dimensions.split("x")[:-1]))


def result_size(operation: str) -> int:
    return math.prod(result_shape(operation))
