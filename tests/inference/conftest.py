"""Programs of engines are compiled as all test programs are: quickly, not for speed."""

from collections.abc import Iterator

import pytest

from tests.runs import jax_option
from tests.shapes import FAST_COMPILATION


@pytest.fixture(scope="package", autouse=True)
def _quick() -> Iterator[None]:
    from dsv3_jax.inference import programs

    with pytest.MonkeyPatch.context() as patch, jax_option("jax_disable_most_optimizations"):
        patch.setattr(programs, "COMPILER_OPTIONS", FAST_COMPILATION)
        yield
