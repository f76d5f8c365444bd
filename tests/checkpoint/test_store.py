"""A checkpoint is whole or absent, whatever fails; the newest whole one is found, and says so."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.store import CheckpointError

Groups = dict[str, dict[str, Any]]
META = {"step": 3, "consumed_rows": 96, "config": {"d_model": 128}, "rng": [2**64 - 1, 7]}


def state(seed: int) -> Groups:
    """Returns a small training state: float32 masters, bfloat16 moments, a jax and an int array.

    OCDBT compresses values below 1 kB into its index; weights of 5 kB get bytes of their own.
    """
    rng = np.random.default_rng(seed)
    w_DF = rng.standard_normal((32, 40)).astype(np.float32)
    return {
        "params": {"layers.3.moe.w_gate_EDF": w_DF, "norm": jnp.asarray(w_DF[0])},
        "mu": {"layers.3.moe.w_gate_EDF": w_DF.astype(ml_dtypes.bfloat16)},
        "bias": {"layers.3.router": np.full(4, seed, np.int32)},
    }


def assert_same_state(found: Groups, expected: Groups) -> None:
    bits = [
        {
            (g, n): (str(x.dtype), x.shape, np.asarray(x).tobytes())
            for g in tree
            for n, x in tree[g].items()
        }
        for tree in (found, expected)
    ]
    assert bits[0] == bits[1]


def never(line: str) -> None:
    pytest.fail(f"unexpected report: {line}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, each with its step as the seed of its state."""
    path = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        store.save(path, step, state(step), {"step": step})
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to damage."""
    return shutil.copytree(saved, tmp_path / "run")


# --- saving and loading --------------------------------------------------------------------------


def test_a_loaded_checkpoint_is_the_saved_one(tmp_path: Path) -> None:
    assert store.save(tmp_path, 123, state(0), META) == tmp_path / "step_00000123"
    found = store.load(tmp_path, report=never)
    assert (found.step, found.meta) == (123, META)
    assert_same_state(found.arrays, state(0))
    files = {path.name for path in (tmp_path / "step_00000123").iterdir()}
    assert files == {"arrays", "manifest.json", "meta.json", "COMMITTED"}


def test_the_newest_is_loaded_unless_a_step_is_named(folder: Path) -> None:
    store.save(folder, 123_456_789, state(9), {})
    assert store.steps(folder) == [1, 2, 123_456_789]
    assert store.load(folder).step == 123_456_789
    assert_same_state(store.load(folder, 1).arrays, state(1))


def test_some_groups_can_be_loaded_alone(folder: Path) -> None:
    found = store.load(folder, groups=["mu", "bias"]).arrays
    assert_same_state(found, {g: state(2)[g] for g in ("mu", "bias")})
    assert store.load(folder, groups=()).arrays == {}
    with pytest.raises(CheckpointError, match="no group nu, xi; found: bias, mu, params"):
        store.load(folder, 2, groups=["xi", "mu", "nu"])


def test_the_manifest_is_a_function_of_step_arrays_and_meta(tmp_path: Path) -> None:
    backwards = {g: dict(reversed(named.items())) for g, named in reversed(state(0).items())}
    numpy = {g: {n: np.asarray(x) for n, x in named.items()} for g, named in state(0).items()}
    texts = [
        (store.save(tmp_path / str(i), 3, arrays, meta) / "manifest.json").read_bytes()
        for i, (arrays, meta) in enumerate(
            [(state(0), META), (backwards, dict(reversed(META.items()))), (numpy, META)]
        )
    ]
    assert texts[0] == texts[1] == texts[2]
    others = [(4, state(0), META), (3, state(1), META), (3, state(0), {})]
    for i, (step, arrays, meta) in enumerate(others):
        path = store.save(tmp_path / f"other{i}", step, arrays, meta)
        assert (path / "manifest.json").read_bytes() != texts[0]


def test_the_manifest_names_group_shape_dtype_and_checksum(folder: Path) -> None:
    manifest = json.loads((folder / "step_00000002" / "manifest.json").read_text())
    w_DF = state(2)["mu"]["layers.3.moe.w_gate_EDF"]
    crc = f"{zlib.crc32(w_DF.tobytes()):08x}"
    expected = {"layers.3.moe.w_gate_EDF": {"shape": [32, 40], "dtype": "bfloat16", "crc32": crc}}
    assert manifest["arrays"]["mu"] == expected
    meta = (folder / "step_00000002" / "meta.json").read_bytes()
    assert manifest["meta"] == f"{zlib.crc32(meta):08x}"


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    store.save(folder, 2, state(5), {"again": True})
    found = store.load(folder, report=never)
    assert (found.step, found.meta) == (2, {"again": True})
    assert_same_state(found.arrays, state(5))
    assert sorted(os.listdir(folder)) == ["step_00000001", "step_00000002"]


def test_saving_a_damaged_step_again_repairs_it(folder: Path) -> None:
    (folder / "step_00000002" / "manifest.json").unlink()
    store.save(folder, 2, state(2), {})
    assert_same_state(store.load(folder, report=never).arrays, state(2))


@pytest.mark.parametrize("name", ["run", "run #1?", "100%", "läuft", "a b/c"])
def test_folders_may_be_relative_and_oddly_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store.save(Path(name), 1, state(0), META)
    assert_same_state(store.load(Path(name)).arrays, state(0))
    assert store.steps(tmp_path / name) == [1]


# --- what cannot be saved ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "arrays", "meta", "message"),
    [
        (-1, {}, {}, "step of a checkpoint: -1; allowed: 0 or more"),
        (3, {"a": {"x": np.array(["s"])}}, {}, "array a/x: dtype <U1; allowed: bool, int8"),
        (3, {}, {"loss": float("nan")}, "meta of a checkpoint must be JSON: Out of range float"),
        (3, {}, {"x": np.ones(2)}, "meta of a checkpoint must be JSON: Object of type ndarray"),
        (3, {"\udc80": {"x": np.ones(2)}}, {}, "is not Unicode"),
    ],
    ids=["step", "dtype", "nan", "meta", "name"],
)
def test_what_cannot_be_saved_changes_nothing(
    folder: Path, step: int, arrays: Groups, meta: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        store.save(folder, step, arrays, meta)
    assert sorted(os.listdir(folder)) == ["step_00000001", "step_00000002"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as error:
        store.save(tmp_path / "file" / "run", 1, state(0), {})
    assert str(tmp_path / "file" / "run") in str(error.value)
    assert "Not a directory" in str(error.value)
    assert "\n" not in str(error.value)


# --- damage --------------------------------------------------------------------------------------


def largest_file(path: Path) -> Path:
    return max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=os.path.getsize)


def flip(path: Path, at: bytes | None = None) -> None:
    """Flips one bit, inside the bytes `at` if given."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2 if at is None else content.index(at) + len(at) // 2
    content[place] ^= 1
    path.write_bytes(content)


def flip_array(path: Path) -> None:
    """Flips one bit of an array's own bytes: Orbax itself does not notice."""
    raw = state(2)["params"]["layers.3.moe.w_gate_EDF"].tobytes()
    holding = [p for p in (path / "arrays").rglob("*") if p.is_file() and raw in p.read_bytes()]
    assert len(holding) == 1
    flip(holding[0], raw)


def swap_arrays(path: Path) -> None:
    shutil.rmtree(path / "arrays")
    shutil.copytree(path.with_name("step_00000001") / "arrays", path / "arrays")


def other_arrays(groups: Groups) -> Callable[[Path], None]:
    """Returns a damage: other arrays in the place of those that the manifest names."""

    def damage(path: Path) -> None:
        made = store.save(path.parent.with_name("other"), 2, groups, {})
        shutil.rmtree(path / "arrays")
        shutil.copytree(made / "arrays", path / "arrays")

    return damage


def changed(name: str, change: Callable[[Any], Any]) -> Groups:
    groups = state(2)
    groups["bias"] = {name: change(groups["bias"]["layers.3.router"])}
    return groups


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "array bit": (flip_array, "crc32 of array params/layers.3.moe.w_gate_EDF is"),
    "arrays of another step": (swap_arrays, "crc32 of array"),
    "shape": (
        other_arrays(changed("layers.3.router", lambda x: x.reshape(2, 2))),
        r"shape of array bias/layers.3.router is \[2, 2\], should be \[4\]",
    ),
    "dtype": (
        other_arrays(changed("layers.3.router", lambda x: x.view(np.uint32))),
        "dtype of array bias/layers.3.router is uint32, should be int32",
    ),
    "name": (
        other_arrays(changed("layers.4.router", lambda x: x)),
        "array bias/layers.3.router is missing",
    ),
    "arrays gone": (lambda path: shutil.rmtree(path / "arrays"), "not found"),
    "array file gone": (lambda path: largest_file(path).unlink(), "OCDBT"),
    "array file cut": (lambda path: os.truncate(largest_file(path), 100), "OCDBT"),
    "manifest bit": (lambda path: flip(path / "manifest.json"), "CRC-32 of manifest.json is"),
    "manifest gone": (lambda path: (path / "manifest.json").unlink(), "No such file"),
    "meta bit": (lambda path: flip(path / "meta.json"), "CRC-32 of meta.json is"),
    "meta gone": (lambda path: (path / "meta.json").unlink(), "No such file"),
    "marker emptied": (lambda path: os.truncate(path / "COMMITTED", 0), "CRC-32 of manifest"),
    "marker garbage": (lambda path: (path / "COMMITTED").write_bytes(b"\xff" * 8), "CRC-32 of m"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder / "step_00000002")
    reports: list[str] = []
    found = store.load(folder, report=reports.append)
    assert found.step == 1
    assert_same_state(found.arrays, state(1))
    assert len(reports) == 1
    assert re.search(rf"{re.escape(str(folder / 'step_00000002'))}: .*{message}", reports[0])
    assert "\n" not in reports[0]
    with pytest.raises(CheckpointError, match=message):  # named, it is never replaced by another
        store.load(folder, 2)


def test_damage_is_told_on_stderr_unless_someone_listens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(folder / "step_00000002" / "meta.json")
    store.load(folder)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"checkpoint skipped: checkpoint {folder / 'step_00000002'}: CRC-32")
    assert err.count("\n") == 1


def test_a_step_folder_under_another_number_is_refused(folder: Path) -> None:
    (folder / "step_00000002").rename(folder / "step_00000007")
    with pytest.raises(CheckpointError, match="step is 2, should be 7"):
        store.load(folder, 7)


ODD = (
    "[]", "3", '{"format": 1}', '{"format": 1, "step": 2, "arrays": []}', "[" * 10**5, "{",
    '{"format": 1, "step": 2, "arrays": {"params": {"w": 3}}}',
    '{"format": 1, "step": 2, "arrays": {"params": {"w": {"shape": 3, "dtype": "int8"}}}}',
    '{"format": 1, "step": 2, "arrays": {}}',
)  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:50])
def test_a_manifest_of_another_form_is_refused(folder: Path, text: str) -> None:
    """Even where its checksum is right."""
    path = folder / "step_00000002"
    (path / "manifest.json").write_text(text)
    (path / "COMMITTED").write_text(f"{zlib.crc32(text.encode()):08x}")
    for read in (store.load, store.described):
        reports: list[str] = []
        read(folder, report=reports.append)
        assert f"{path}: manifest.json is none of this format" in reports[0]


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "step_00000002" / "manifest.json").unlink()
    os.mkfifo(folder / "step_00000002" / "manifest.json")
    with pytest.raises(CheckpointError, match=r"not a plain file.*manifest.json"):
        store.load(folder, 2)


def test_a_later_format_is_refused(folder: Path) -> None:
    path = folder / "step_00000002"
    text = (path / "manifest.json").read_text().replace('"format": 1', '"format": 3')
    (path / "manifest.json").write_text(text)
    (path / "COMMITTED").write_text(f"{zlib.crc32(text.encode()):08x}")
    with pytest.raises(CheckpointError, match="format is 3, should be 1 or 2"):
        store.load(folder, 2)


# --- nothing to load, and housekeeping -----------------------------------------------------------


def test_no_checkpoint_is_one_line_with_folder_found_and_needed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("step_00000001", "a", "b", "step_1"):
        (tmp_path / "other" / name).mkdir()
    found = {"none": "no such folder", "empty": "an empty folder", "other": "4 entries (a, b, "}
    for name, words in found.items():
        with pytest.raises(CheckpointError) as error:
            store.load(tmp_path / name)
        start = f"no checkpoint in {tmp_path / name}: found {words}"
        assert str(error.value).startswith(start)
        assert str(error.value).endswith("needed: a folder step_<8 digits> with a file COMMITTED")
        assert store.steps(tmp_path / name) == []


def test_a_missing_step_is_an_error_that_names_those_there(folder: Path) -> None:
    for action in (store.load, store.delete):
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .* steps \[1, 2\]"):
            action(folder, 3)


def test_if_all_are_damaged_the_error_says_so(folder: Path) -> None:
    for step in (1, 2):
        flip(folder / f"step_0000000{step}" / "meta.json")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=r"all 2 fail, newest: .*step_00000002: CRC-32"):
        store.load(folder, report=reports.append)
    assert len(reports) == 2


def test_delete_removes_one_step(folder: Path) -> None:
    store.delete(folder, 2)
    assert os.listdir(folder) == ["step_00000001"]


def test_clean_removes_what_was_never_committed_and_nothing_else(folder: Path) -> None:
    stale = ["step_00000003", "step_00000002.old", "step_00000004.tmp-0123abcd"]
    foreign = ["notes.txt", "step_5", "step_000000006", "step_00000007.bak", "mystep_00000008"]
    for name in stale + foreign:
        (folder / name).mkdir()
        (folder / name / "file").write_text("x")
    assert sorted(store.clean(folder)) == sorted(folder / name for name in stale)
    kept = [*foreign, "step_00000001", "step_00000002"]
    assert sorted(os.listdir(folder)) == sorted(kept)
    assert store.steps(folder) == [1, 2]
    assert store.clean(folder / "none") == []
