"""The small run: its text and configuration, and itself, made once."""

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
    """The folder of the small run after 6 steps in one go, without trouble. Not to be changed."""
    assert small.train("--config", small.config, pictures=True) == 0
    return small.home / "runs" / "small-001"
