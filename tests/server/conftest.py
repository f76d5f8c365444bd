"""Programs of engines are compiled as the engine's own tests compile them."""

from tests.inference.conftest import _quick

__all__ = ["_quick"]
