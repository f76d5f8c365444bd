"""The small run, made once."""

from pathlib import Path

import pytest

from tests.runs import SmallRun


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Text and configuration of the small run, which nobody has started yet."""
    small = SmallRun(tmp_path_factory.mktemp("small"))
    small.make()
    return small


@pytest.fixture(scope="session")
def finished(small: SmallRun) -> Path:
    """Its folder after 6 steps in one go. To be looked at and copied, not to be changed."""
    assert small.train("--config", small.config) == 0
    return small.home / "runs" / "small-001"
