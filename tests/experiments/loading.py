"""Experiments as modules, though they are files that are run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run_module(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """An experiment's run.py, with all that it imports."""
    patch.syspath_prepend(EXPERIMENTS)
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)  # a dataclass looks for its module
    spec.loader.exec_module(module)
    return module
