"""Folders of commands that go on: what a kill leaves in them is no hindrance and not another's."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.posttrain.iteration_folder import iteration_folder
from dsv3_jax.posttrain.synthesis_folder import synthesis_folder

BEGUN = {"asking": {"--seed": 0}, "selecting": {}}
FOLDERS = {
    "synthesis": (synthesis_folder, lambda folder: folder.write_settings(BEGUN)),
    "iteration": (iteration_folder, lambda folder: folder.settle({"--seed": 0})),
}
DIES = """
import os, signal, sys
from pathlib import Path
from tests.posttrain.test_out_folder import FOLDERS

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
opened, begin = FOLDERS[sys.argv[1]]
with opened(Path(sys.argv[2])) as folder:
    begin(folder)
"""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_command_killed_while_it_writes_its_settings_can_begin_again(name: str, tmp_path: Path):
    out = tmp_path / "out"
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", DIES, name, out], cwd=root, timeout=120)
    assert died.returncode == -signal.SIGKILL
    (left,) = out.iterdir()
    opened, begin = FOLDERS[name]
    with opened(out) as folder:
        assert folder.stored is None
        begin(folder)
        assert left not in out.iterdir()


def test_a_part_beside_what_is_not_ours_stays(tmp_path: Path):
    part = tmp_path / f".x.{'0' * 32}.part"
    part.touch()
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="holds x; allowed"), synthesis_folder(tmp_path):
        pass
    assert part.exists()
