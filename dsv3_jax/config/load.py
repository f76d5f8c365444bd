"""Runs from files: `configs/*.py` that users write, and `config.json` beside a run."""

import runpy
import traceback
from pathlib import Path
from typing import Any

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.plain_json import read_json
from dsv3_jax.config.run import RunConfig, from_dict
from dsv3_jax.config.schedule import ScheduleConfig


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
    """The configuration written beside a run, or `imported_run` of Hugging Face's `config.json`."""
    try:
        content = read_json(path)
        if is_hf_config(content):
            return imported_run(ModelConfig.from_hf(content))
        return from_dict(RunConfig, content)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigFileError(f"{path}: not a readable configuration: {said}") from error


def is_hf_config(content: Any) -> bool:
    """Whether a parsed `config.json` is Hugging Face's, which names a model_type."""
    return isinstance(content, dict) and "model_type" in content


def imported_run(model: ModelConfig) -> RunConfig:
    """The default run of a model that comes from elsewhere."""
    data = DataConfig(length=min(DataConfig.length, model.max_length))
    # The report's 2,000 steps of warm-up would be longer than the default run. The cosine ends at
    # 0: people choose the rate that they train on with, and few of them that of the end.
    schedule = ScheduleConfig(warmup_steps=50, final_learning_rate=0.0)
    return RunConfig(model, data, schedule=schedule)


def _where_and_what(path: Path, error: BaseException) -> str:
    """One line: file, line in that file (not where the library noticed), exception, message."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    place = f"{path}, line {line}" if line else f"{path}"  # no line: null bytes, for one
    return f"--config {place}: {type(error).__name__}: {message}"
