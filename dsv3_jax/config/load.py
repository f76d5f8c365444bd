"""Runs from files: `configs/*.py` that users write, and `config.json` beside a run."""

import json
import runpy
import traceback
from pathlib import Path

from dsv3_jax.config.run import RunConfig, from_dict


class ConfigFileError(ValueError):
    """A config file that cannot be used; the message names file, line and reason."""


def load_config(path: Path) -> RunConfig:
    """What `config()` of a Python file returns.

    ConfigFileError for a missing file, an exception in it, or another result.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ConfigFileError(f"--config {path}: {found}; allowed: a Python file with config()")
    try:
        make = runpy.run_path(str(path)).get("config")
        if not callable(make):
            raise ConfigFileError(
                f"--config {path}: no function config(); it must return a RunConfig"
            )
        made = make()
    except ConfigFileError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ConfigFileError(_where_and_what(path, error)) from error
    if not isinstance(made, RunConfig):
        raise ConfigFileError(
            f"--config {path}: config() returned {type(made).__name__}; it must return a RunConfig"
        )
    return made


def load_json(path: Path) -> RunConfig:
    """The configuration written beside a run."""
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ConfigFileError(f"{path}: not a readable configuration: {error}") from error


def _where_and_what(path: Path, error: BaseException) -> str:
    """One line: file, line in that file (not where the library noticed), exception, message."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    place = f"{path}, line {line}" if line else f"{path}"  # no line: null bytes, for one
    return f"--config {place}: {type(error).__name__}: {message}"
