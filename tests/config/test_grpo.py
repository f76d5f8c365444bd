"""Settings of reinforcement learning as a file beside a run."""

from pathlib import Path

import pytest

from dsv3_jax.config.grpo import GrpoConfig, load_grpo
from dsv3_jax.config.load import ConfigFileError


def test_what_is_written_is_read_back(tmp_path: Path):
    settings = GrpoConfig(reward=("boxed*2", "length:1-2"), clip=0.3, updates=4)
    (tmp_path / "grpo.json").write_text(settings.to_json())
    assert load_grpo(tmp_path / "grpo.json") == settings
    assert settings.outputs == 64


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"groups": 3}', "GrpoConfig has no field groups; fields: reward, "),
        ('{"group": 1}', "--group is 1; allowed: 2 or more, since one is no group"),
        ('{"kl": "much"}', "kl is 'much'; allowed: finite numbers"),
        ("{", "not readable settings of GRPO"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, text: str, line: str):
    (tmp_path / "grpo.json").write_text(text)
    with pytest.raises(ConfigFileError) as error:
        load_grpo(tmp_path / "grpo.json")
    assert str(error.value).startswith(f"{tmp_path / 'grpo.json'}: not readable settings of GRPO")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
