"""Runs from files: what `config()` returns, and one line for every file that cannot be used."""

from pathlib import Path

import pytest

from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import ConfigFileError, load_config, load_json

GOOD = """
from dsv3_jax.config import RunConfig, TrainConfig

def config():
    return RunConfig(train=TrainConfig(steps=7))
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.py"
    path.write_text(text)
    return path


def test_a_file_gives_the_run_that_its_function_returns(tmp_path: Path):
    assert load_config(write(tmp_path, GOOD)).train.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "--config {}: no function config(); it must return a RunConfig"),
        ("config = 1", "--config {}: no function config(); it must return a RunConfig"),
        (
            "def config():\n    return {}",
            "--config {}: config() returned dict; it must return a RunConfig",
        ),
        (
            "def config():\n    x = 1\n    return 1 / 0",
            "--config {}, line 3: ZeroDivisionError: division by zero",
        ),
        ("def config(:\n    pass", "--config {}, line 1: SyntaxError: invalid syntax"),
        ("import sys\nsys.exit('stop')", "--config {}, line 2: SystemExit: stop"),
        (
            "raise ValueError('two\\nlines')",
            "--config {}, line 1: ValueError: two lines",
        ),
        (
            GOOD.replace("steps=7", "steps=0"),
            "--config {}, line 5: ValueError: train.steps is 0; allowed: at least 1",
        ),
        (
            GOOD.replace("steps=7", "step=7"),
            "--config {}, line 5: TypeError: TrainConfig.__init__() got an unexpected keyword "
            "argument 'step'. Did you mean 'steps'?",
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) and "{}:" not in x else "",
)
def test_unusable_files_are_named_with_line_and_reason(tmp_path: Path, text: str, message: str):
    path = write(tmp_path, text)
    with pytest.raises(ConfigFileError) as caught:
        load_config(path)
    expected = message.format(path)
    # Python 3.11 does not suggest a name after "argument 'step'".
    assert str(caught.value) == expected or str(caught.value) == expected.split(". Did")[0]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigFileError, match=r"no such file; allowed: a Python file"):
        load_config(tmp_path / "none.py")


def test_a_run_written_beside_its_results_is_read_back(tmp_path: Path):
    cfg, path = RunConfig(), tmp_path / "config.json"
    path.write_text(cfg.to_json())
    assert load_json(path) == cfg


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"modle": {}}', '{"train": {"steps": 0}}'])
def test_unreadable_json_is_named(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match=r"config.json: "):
        load_json(path)
