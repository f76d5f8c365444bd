"""Two real processes: what they tell each other, and checkpoints of which each has a part.

One pair of processes runs all of it, since their start takes most of the time.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import joint, store
from dsv3_jax.checkpoint.boxes import Box
from dsv3_jax.checkpoint.parts import Parts, Piece
from dsv3_jax.parallel import processes

ROOT = Path(__file__).parents[2]
MAIN = """
import sys
from dsv3_jax.parallel import launch
from dsv3_jax.parallel.launch import LaunchOptions
here = launch.started()
if not here:
    sys.exit(launch.run(LaunchOptions(processes=2)))
import jax
jax.config.update("jax_platforms", "cpu")
from dsv3_jax.parallel import processes
processes.join(here.place)
from tests.parallel.test_processes import both
both(processes.index(), sys.argv[1])
"""
WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
HALVES = [Box((0, 0), (2, 6)), Box((2, 0), (2, 6))]
COLUMNS = [Box((0, 0), (4, 3)), Box((0, 3), (4, 3))]


def both(index: int, folder: str) -> None:
    """What each of the two processes does. The first prints, as it alone is heard."""
    path = Path(folder)
    told = {"gathered": processes.gather("a", f"from {index}")}
    told["first"] = processes.of_first("b", lambda: "only I")
    told["failed"] = error_of(lambda: processes.together("c", lambda: fail_in(1, index)))
    told["same"] = error_of(lambda: processes.check_same("d", "text", str(index)))
    told["saved"] = [error_of(lambda s=s: joint.save(path, s, pieces(index), {})) for s in (1, 2)]
    damage(path, index, step=2)
    reports: list[str] = []
    wanted = {"params": {"spread": [COLUMNS[index]], ("first", "second")[index]: [whole_row()]}}
    found = joint.load(path, wanted=wanted, report=reports.append)
    right = found.arrays["params"]["spread"][COLUMNS[index].slices]
    assert np.array_equal(right, WHOLE[COLUMNS[index].slices])
    told |= {"step": found.step, "reports": reports, "read": found.bytes_read}
    told["names"] = sorted(found.arrays["params"])
    store_alone(path, index)
    found = joint.load(path, 3, wanted=wanted, report=reports.append)  # Orbax's, each for itself
    told["whole"] = [found.bytes_read, sorted(found.arrays["params"])]
    processes.wait("e")
    lost = {"params": {"w": [Piece((4,), (0,), np.ones(2))] if index == 0 else []}}
    told["gap"] = error_of(lambda: joint.save(path, 4, lost, {}))
    all_told = processes.gather("f", json.dumps(told))
    if index == 0:
        print(json.dumps([json.loads(text) for text in all_told]))


def pieces(index: int) -> dict[str, dict[str, list[Piece]]]:
    """Halves of one array, and one array that is in this process alone."""
    half = HALVES[index]
    named = {"spread": [Piece((4, 6), half.starts, WHOLE[half.slices])]}
    named[("first", "second")[index]] = [Piece((3,), (0,), np.full(3, index, np.int32))]
    return {"params": named}


def whole_row() -> Box:
    return Box((0,), (3,))


def store_alone(path: Path, index: int) -> None:
    """A checkpoint as one process saves it."""
    if index == 0:
        arrays = {"spread": WHOLE, "first": np.zeros(3), "second": np.ones(3)}
        store.save(path, 3, {"params": arrays}, {})
    processes.wait("alone")


def damage(path: Path, index: int, step: int) -> None:
    """One bit of what the second process wrote."""
    if index == 0:
        file = path / f"step_{step:08d}" / "part-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    processes.wait("damaged")


def fail_in(which: int, index: int) -> str:
    if index == which:
        raise OSError("its disk is full")
    return ""


def error_of(do) -> str:
    try:
        do()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    path = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout)


def test_words_reach_all_and_failures_too(told):
    _, (first, second) = told
    for one in (first, second):
        assert one["gathered"] == ["from 0", "from 1"]
        assert one["first"] == "only I"
        assert one["same"].startswith("ValueError: process 1 of 2 has another text than process 0")
        assert one["saved"] == ["", ""]
    assert first["failed"] == "OSError: process 1: its disk is full"
    assert second["failed"] == "OSError: its disk is full"


def test_each_process_reads_its_own_boxes_of_the_newest_that_all_can_read(told):
    _, both = told
    for number, one in enumerate(both):
        assert one["step"] == 1  # of step 2 the second process's file is damaged
        assert len(one["reports"]) == 1
        assert "crc32" in one["reports"][0]
        assert one["names"] == sorted(["spread", ("first", "second")[number]])
        assert one["read"] == WHOLE.nbytes + 12  # both halves have some of its columns
        assert one["whole"] == [WHOLE.nbytes + 24, one["names"]]


def test_one_process_reads_what_several_wrote(told):
    path, _ = told
    found = store.load(path, 1)
    assert np.array_equal(found.arrays["params"]["spread"], WHOLE)
    assert found.arrays["params"]["second"].tolist() == [1, 1, 1]
    steps = store.described(path, 1)[1]["params"]["spread"]
    assert (steps["shape"], steps["dtype"], len(steps["pieces"])) == ([4, 6], "float32", 2)


def test_a_checkpoint_with_a_gap_is_never_committed(told):
    path, both = told
    for one in both:
        assert "pieces of 2 elements for shape [4]" in one["gap"]
    assert store.steps(path) == [1, 2, 3]
    assert not [p for p in path.iterdir() if ".tmp-" in p.name]


def test_in_one_process_everything_returns_at_once():
    assert processes.gather("a", "word") == ["word"]
    assert processes.of_first("a", lambda: "x") == "x"
    assert processes.together("a", lambda: "y") == ["y"]
    assert Parts((4, 6), {HALVES[1]: WHOLE[2:]})[2:4, 0:6].tolist() == WHOLE[2:].tolist()
