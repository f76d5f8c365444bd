"""Configurations from files: a user's Python, JSON beside a run, the repository's `configs/`."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    Phase,
    RunConfig,
    ScheduleConfig,
    YarnConfig,
)
from dsv3_jax.config.load import ConfigFileError, load_config, load_json
from dsv3_jax.config.presets import PRESETS, tiny, tiny_run
from dsv3_jax.config.run import from_dict

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

UNUSUAL = RunConfig(
    model=replace(tiny(), q_latent=None, yarn=YarnConfig(factor=2.0), masked_score="0"),
    data=DataConfig(source=("stdlib", "a/**/*.txt"), length=100),
    schedule=ScheduleConfig(bias_speed_phases=(Phase(0, 10, 1e-3), Phase(10, 13, 1 / 3, "cosine"))),
)


# --- files of the repository ---


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads_and_says_how_to_run_it(path: Path):
    cfg = load_config(path)
    command = f"python -m dsv3_jax.train --config configs/{path.name}"
    assert command in path.read_text()
    assert "Hardware:" in path.read_text()
    assert cfg.output.name == path.stem
    assert from_dict(RunConfig, json.loads(cfg.to_json())) == cfg


def test_the_tiny_config_is_the_default_run():
    assert load_config(ROOT / "configs" / "tiny.py") == tiny_run()


# --- a user's Python file ---


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_file_may_import_its_neighbours_and_is_no_main_program(tmp_path: Path):
    text = (
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from dsv3_jax.config.presets import tiny_run\n"
        "assert __name__ != '__main__'\n"
        "NAME = Path(__file__).stem\n"
        "def config():\n"
        "    run = tiny_run()\n"
        "    return replace(run, output=replace(run.output, name=NAME))\n"
    )
    assert load_config(write(tmp_path, text)).output.name == "mine"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("def config():\n\n    raise RuntimeError('two\\nlines')\n", 3, "RuntimeError: two lines"),
        ("def config():\n    return helper()\ndef helper():\n    return {}['k']\n", 4, "KeyError"),
        ("import json\ndef config():\n    return json.loads('{')\n", 3, "JSONDecodeError"),
        ("x = 1\nimport missing_module\n", 2, "ModuleNotFoundError"),
        ("x = 1\n  y = 2\n", 2, "IndentationError"),
        ("raise SystemExit('no')\n", 1, "SystemExit: no"),
        ("def config(name):\n    pass\n", None, "config() missing 1 required positional"),
    ],
)
def test_an_exception_is_told_with_the_line_of_the_users_file(
    tmp_path: Path, text: str, line: int | None, said: str
):
    path = write(tmp_path, text)
    with pytest.raises(ConfigFileError) as error:
        load_config(path)
    place = f"{path}, line {line}: " if line else f"{path}: "
    assert str(error.value).startswith(f"--config {place}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_interrupt_is_no_fault_of_the_file(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        load_config(write(tmp_path, "raise KeyboardInterrupt\n"))


# --- JSON ---


@pytest.mark.parametrize("cfg", [tiny_run(), UNUSUAL], ids=["tiny", "unusual"])
def test_json_is_the_whole_configuration(cfg: RunConfig, tmp_path: Path):
    (tmp_path / "config.json").write_text(cfg.to_json())
    assert load_json(tmp_path / "config.json") == cfg
    assert json.loads(cfg.to_json()) == json.loads(json.dumps(dataclasses.asdict(cfg)))


def test_json_may_leave_out_what_has_a_default():
    found = from_dict(RunConfig, {"data": {"length": 8}, "model": {"yarn": {"factor": 1.0}}})
    assert found == RunConfig(
        data=DataConfig(length=8), model=ModelConfig(yarn=YarnConfig(factor=1.0))
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": {}}, "RunConfig has no field mode; fields: model, data, train"),
        ({"train": {"step": 1, "rowz": 2}}, "train has no field rowz, step; fields: steps, rows"),
        ({"schedule": {"rows_phases": [{"token": 3}]}}, "rows_phases has no field token"),
        ({"model": {"yarn": {"s": 3}}}, "yarn has no field s; fields: factor"),
    ],
)
def test_unknown_fields_are_named_with_those_there_are(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        from_dict(RunConfig, values)


# --- values ---


def changed(section: str, **changes: Any) -> RunConfig:
    run = tiny_run()
    return replace(run, **{section: replace(getattr(run, section), **changes)})


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("train", {"dtype": "float16"}, "train.dtype is 'float16'; allowed: 'float32', 'bfloat16'"),
        ("train", {"remat": "ful"}, "train.remat is 'ful'; allowed: 'none', 'report', 'full'"),
        ("train", {"rows": 8.0}, "train.rows is 8.0; allowed: whole numbers"),
        ("train", {"seed": True}, "train.seed is True; allowed: whole numbers"),
        ("train", {"balance_weight": math.inf}, "train.balance_weight is inf; allowed: finite"),
        ("optimizer", {"eps": math.inf}, "optimizer.eps is inf; allowed: finite numbers"),
        ("optimizer", {"b2": math.nan}, "optimizer.b2 is nan; allowed: finite numbers"),
        ("optimizer", {"weight_decay": -0.1}, "optimizer.weight_decay is -0.1; allowed: 0 or more"),
        ("data", {"source": ["a"]}, r"data.source is \['a'\]; allowed: text or a tuple of text"),
        ("data", {"source": ()}, "data.source is empty"),
        ("data", {"validation_fraction": 0.0}, "validation_fraction is 0.0; allowed: between 0"),
        ("schedule", {"rows_phases": [Phase(0, 1, 1.0)]}, "schedule.rows_phases is "),
        ("schedule", {"rows_phases": (3,)}, r"rows_phases is \(3,\); allowed: a tuple of Phase"),
        ("schedule", {"learning_rate": -1e-3}, "schedule.learning_rate is -0.001; allowed: 0 to"),
        ("model", {"tied_head": 1}, "model.tied_head is 1; allowed: True, False"),
        ("model", {"yarn": None}, "model.yarn is None; allowed: YarnConfig"),
        ("output", {"folder": Path("x")}, r"output.folder is .*Path\('x'\); allowed: text"),
        (
            "output",
            {"sample_temperature": -1.0},
            "output.sample_temperature is -1.0; allowed: from 0",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused_by_name(
    section: str, changes: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said):
        changed(section, **changes)


def test_a_value_deep_in_a_section_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^model\.yarn\.mscale is nan; allowed: finite numbers$"):
        YarnConfig(mscale=math.nan)
    with pytest.raises(ValueError, match=r"phase\.shape is 'step'; allowed: 'constant', 'linear'"):
        Phase(0, 1, 1.0, "step")


def test_a_missing_section_is_refused_by_name():
    with pytest.raises(ValueError, match="model is None; allowed: ModelConfig"):
        RunConfig(model=None)


def test_whole_numbers_serve_as_real_ones():
    assert changed("optimizer", clip_norm=2).optimizer.clip_norm == 2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_at_its_own_length(name: str):
    model = PRESETS[name]()
    assert RunConfig(model=model, data=DataConfig(length=model.max_length)).model is model


@pytest.mark.parametrize(("tokens", "value"), [(0, 1.0), (-5, 1.0), (1, -1.0), (1, math.nan)])
def test_a_phase_takes_tokens_and_ends_at_0_or_more(tokens: int, value: float):
    with pytest.raises(ValueError, match="phase"):
        Phase(0, tokens, value)
