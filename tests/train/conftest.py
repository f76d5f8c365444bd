"""The small run's text and configuration, made once."""

import pytest

from tests.runs import SmallRun


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Text and configuration of the small run, which nobody has started yet."""
    small = SmallRun(tmp_path_factory.mktemp("small"))
    small.make()
    return small
