"""Arrays come back bit for bit, under any name, or an error says why not."""

import asyncio
import logging
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.checkpoint import arrays

Groups = dict[str, dict[str, Any]]


def round_trip(folder: Path, groups: Groups) -> dict[str, dict[str, np.ndarray]]:
    """Writes as the store does and reads back by the description alone."""
    host = {g: {n: arrays.to_host(n, x) for n, x in named.items()} for g, named in groups.items()}
    arrays.write_arrays(folder / "arrays", host)
    return arrays.read_arrays(folder / "arrays", describe_all(host))


def describe_all(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Groups:
    return {g: {n: arrays.describe(x) for n, x in named.items()} for g, named in groups.items()}


def assert_same_bits(found: Groups, expected: Groups) -> None:
    assert {g: set(named) for g, named in found.items()} == {
        g: set(named) for g, named in expected.items()
    }
    for group, named in expected.items():
        for name, x in named.items():
            array = np.asarray(x)
            where = f"{group}/{name}"
            assert isinstance(found[group][name], np.ndarray), where
            assert found[group][name].dtype == array.dtype, where
            assert found[group][name].shape == array.shape, where
            assert found[group][name].tobytes() == array.tobytes(), where


def every_byte(dtype: str) -> np.ndarray:
    """Returns an array with every byte value at every place: NaN payloads, denormals, -0.0, ..."""
    width = np.dtype(dtype).itemsize
    num_values = 2 if dtype == "bool" else 256
    place = [np.roll(np.arange(num_values, dtype=np.uint8), i) for i in range(width)]
    return np.stack(place, axis=1).reshape(-1).view(dtype)


def test_every_dtype_and_bit_pattern_comes_back(tmp_path: Path) -> None:
    vectors = {dtype: every_byte(dtype) for dtype in arrays.DTYPES}
    scalars = {dtype: x[1].reshape(()) for dtype, x in vectors.items()}
    groups = {"vectors": vectors, "scalars": scalars}
    assert_same_bits(round_trip(tmp_path, groups), groups)


@pytest.mark.usefixtures("x64")
def test_jax_arrays_of_every_dtype_come_back(tmp_path: Path) -> None:
    groups = {"jax": {dtype: jnp.asarray(every_byte(dtype)) for dtype in arrays.DTYPES}}
    for dtype, x in groups["jax"].items():
        assert str(x.dtype) == dtype
        assert np.asarray(x).tobytes() == every_byte(dtype).tobytes()
    assert_same_bits(round_trip(tmp_path, groups), groups)


@pytest.mark.parametrize("bits", [0x80000000, 0x7FC00001, 0xFFA55AA5, 0x00000001, 0x00000000])
def test_arrays_of_one_special_value_come_back(tmp_path: Path, bits: int) -> None:
    # TensorStore can leave out chunks that equal its fill value 0: -0.0 must not count as equal.
    special = np.full((4, 3), bits, np.uint32).view(np.float32)
    assert_same_bits(round_trip(tmp_path, {"a": {"x": special}}), {"a": {"x": special}})


def test_arrays_sharded_over_devices_come_back(tmp_path: Path) -> None:
    x_DF = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    mesh = jax.make_mesh(
        (4, 2), ("data", "local"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    spread = {
        str(spec): jax.device_put(x_DF, jax.NamedSharding(mesh, spec))
        for spec in (jax.P("data", "local"), jax.P("local"), jax.P(None, "data"), jax.P())
    }
    assert_same_bits(round_trip(tmp_path, {"a": spread}), {"a": dict.fromkeys(spread, x_DF)})


def test_any_memory_layout_gives_the_same_bytes_and_description(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.int32).reshape(5, 12)
    layouts = {"fortran": np.asfortranarray(x), "strided": np.repeat(x, 2, axis=1)[:, ::2]}
    assert len({str(arrays.describe(y)) for y in (x, *layouts.values())}) == 1
    assert_same_bits(round_trip(tmp_path, {"a": layouts}), {"a": dict.fromkeys(layouts, x)})


def test_scalars_of_python_numpy_and_jax_come_back_as_arrays(tmp_path: Path) -> None:
    scalars = {"float": 1.5, "int": 7, "bool": True, "numpy": np.float32(3), "jax": jnp.int32(4)}
    scalars["bfloat16"] = ml_dtypes.bfloat16(0.5)
    found = round_trip(tmp_path, {"a": scalars})
    assert_same_bits(found, {"a": scalars})


def test_empty_arrays_groups_and_checkpoints_come_back(tmp_path: Path) -> None:
    empty = {"a": {"x": np.zeros((0, 3), ml_dtypes.bfloat16)}, "nothing": {}}
    mixed = {"a": {"x": np.zeros((2, 0)), "y": np.ones(2)}, "nothing": {}}
    for i, groups in enumerate(({}, empty, mixed)):
        assert_same_bits(round_trip(tmp_path / str(i), groups), groups)


ODD_NAMES = ("", ".", "..", "a", "a.b", "a/b", "/a", "a/", "a/0.0", "a/.zarray", "%2F", "%2E", "A")
ODD_NAMES += ("a b", "a\nb", "a\x00", "é", "e\u0301", "𝔸", "'", '"', "\\", "None", "{}", "0", "*")
ODD_NAMES += ("~", "x" * 600)


def test_odd_names_stay_apart(tmp_path: Path) -> None:
    groups = {
        g: {n: np.int32(1000 * i + j) for j, n in enumerate(ODD_NAMES)}
        for i, g in enumerate(("a", "a.b", "a/b", "a%2Eb", ""))
    }
    groups["a"]["b.c"], groups["a.b"]["c"] = np.int32(-1), np.int32(-2)  # both "a.b.c" when joined
    assert_same_bits(round_trip(tmp_path, groups), groups)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.dictionaries(
        st.text(max_size=6), st.dictionaries(st.text(max_size=8), st.integers(0, 255)), max_size=4
    )
)
def test_any_names_stay_apart(
    tmp_path_factory: pytest.TempPathFactory, numbers: dict[str, dict[str, int]]
) -> None:
    groups = {g: {n: np.uint8(x) for n, x in named.items()} for g, named in numbers.items()}
    assert_same_bits(round_trip(tmp_path_factory.mktemp("names"), groups), groups)


def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(arrays.CheckpointError, match=r"'\\udc80' is not Unicode"):
        arrays.write_arrays(tmp_path / "arrays", {"a": {"\udc80": np.ones(1)}})


@pytest.mark.parametrize(
    "x",
    [np.array(["text"]), np.array([None]), np.ones(2, ">f4"), np.ones(2, "longdouble"), "key"],
    ids=["text", "object", "byte order", "longdouble", "jax key"],
)
def test_other_dtypes_are_refused_by_name(x: Any) -> None:
    x = jax.random.key(0) if isinstance(x, str) else x
    with pytest.raises(arrays.CheckpointError) as error:
        arrays.to_host("params/w", x)
    assert f"array params/w: dtype {x.dtype}; allowed: bool, int8" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_description_tells_changed_bits_shapes_and_dtypes_apart() -> None:
    x = np.arange(6, dtype=np.int32)
    changed = x.copy()
    changed[3] ^= 1
    others = [changed, x.reshape(2, 3), x.view(np.uint32), x[::-1], x[:5]]
    assert all(arrays.describe(y) != arrays.describe(x) for y in others)


def test_the_checksum_is_crc_32_by_its_published_check_value() -> None:
    check = np.frombuffer(b"123456789", np.uint8)
    assert arrays.describe(check) == {"shape": [9], "dtype": "uint8", "crc32": "cbf43926"}


def test_checksums_of_shards_merge_by_exclusive_or() -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 10), dtype=np.uint8)
    zero = np.zeros_like(x)
    left, right = x.copy(), x.copy()
    left[:, 4:], right[:, :4] = 0, 0
    crc = [int(arrays.describe(y)["crc32"], 16) for y in (x, left, right, zero)]
    assert crc[0] == crc[1] ^ crc[2] ^ crc[3]


def test_arrays_are_neither_changed_nor_shared(tmp_path: Path) -> None:
    x = np.arange(6.0)
    found = round_trip(tmp_path, {"a": {"x": x}})["a"]["x"]
    found += 1
    assert (x == np.arange(6.0)).all()


def test_saving_works_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def in_loop() -> Any:  # as in a notebook
        return round_trip(tmp_path, {"a": {"x": np.ones(3)}})

    assert_same_bits(asyncio.run(in_loop()), {"a": {"x": np.ones(3)}})


def test_orbax_is_silent_and_its_logger_is_left_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        round_trip(tmp_path, {"a": {"x": np.ones(3)}})
        assert logging.getLogger("absl").level == logging.INFO
        with pytest.raises(arrays.OrbaxError):  # nothing there
            arrays.read_arrays(tmp_path / "none", describe_all({"a": {"x": np.ones(3)}}))
        assert logging.getLogger("absl").level == logging.INFO
    assert caplog.records == []


def test_users_see_nothing_of_orbax(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from dsv3_jax.checkpoint import store;"
        "folder = Path(sys.argv[1]); store.save(folder, 1, {'a': {'x': np.ones(3)}}, {});"
        "store.load(folder)"
    )
    command = [sys.executable, "-W", "default", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def many_arrays() -> dict[str, dict[str, np.ndarray]]:
    """Returns 40 arrays of 16 kB: several are under way when the first of them fails."""
    x_DF = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    return {"a": {f"x{i}": x_DF + i for i in range(40)}}


def test_failing_writes_end_in_one_silent_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(arrays.OrbaxError, match="File too large"):
            arrays.write_arrays(tmp_path / "arrays", many_arrays())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capfd.readouterr() == ("", "")


def test_one_failing_write_among_many_is_an_error(tmp_path: Path) -> None:
    groups = many_arrays()
    groups["a"]["bad"] = np.ones(3, ml_dtypes.uint2)  # TensorStore has no such type
    with pytest.raises(arrays.OrbaxError, match="Unsupported data type"):
        arrays.write_arrays(tmp_path / "arrays", groups)


def test_failing_reads_end_in_one_silent_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    groups = many_arrays()
    arrays.write_arrays(tmp_path / "arrays", groups)
    (tmp_path / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(arrays.OrbaxError, match="NOT_FOUND"):
        arrays.read_arrays(tmp_path / "arrays", describe_all(groups))
    assert capfd.readouterr() == ("", "")


def interrupted_at_the_last_file(patch: pytest.MonkeyPatch, go_on: Callable[[], object]) -> None:
    """^C comes as a thread of Orbax is about to write its last file; `go_on` returns before that
    is written.
    """
    from orbax.checkpoint._src.path import async_path

    write = async_path.write_text

    async def late(path: Any, text: str) -> Any:
        if path.name == "_METADATA":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.to_thread(go_on)
        return await write(path, text)

    patch.setattr(async_path, "write_text", late)


def wait_for_others(before: list[threading.Thread]) -> None:
    """Returns when every thread that was not there before has ended."""
    for thread in set(threading.enumerate()) - set(before):
        threading.Thread.join(thread, 10)  # Orbax's own would raise what went wrong
        assert not thread.is_alive()


def test_an_interrupt_waits_until_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    removed, before = threading.Event(), threading.enumerate()
    interrupted_at_the_last_file(monkeypatch, lambda: removed.wait(0.3))
    with pytest.raises(KeyboardInterrupt):
        arrays.write_arrays(tmp_path / "step" / "arrays", {"a": {"x": np.ones(3)}})
    complete = (tmp_path / "step" / "arrays" / "_METADATA").exists()
    shutil.rmtree(tmp_path / "step")  # as the store does
    removed.set()
    wait_for_others(before)
    assert capfd.readouterr() == ("", "")
    assert complete
    assert not list(tmp_path.iterdir())


def test_a_write_that_an_interrupt_no_longer_waits_for_fails_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    removed, before = threading.Event(), threading.enumerate()
    interrupted_at_the_last_file(monkeypatch, lambda: removed.wait(10))
    monkeypatch.setattr(arrays, "_PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        arrays.write_arrays(tmp_path / "step" / "arrays", {"a": {"x": np.ones(3)}})
    shutil.rmtree(tmp_path / "step")
    removed.set()
    wait_for_others(before)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_read_ends_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import orbax.checkpoint as ocp

    arrays.write_arrays(tmp_path / "arrays", many_arrays())
    read, before = ocp.type_handlers.NumpyHandler.deserialize, threading.enumerate()
    begun, ended = [], []

    async def interrupted(*args: Any, **kwargs: Any) -> Any:
        begun.append(args)
        if len(begun) == 40:  # ^C as the last of the reads begins
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        found = await read(*args, **kwargs)
        ended.append(args)
        return found

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "deserialize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arrays.read_arrays(tmp_path / "arrays", describe_all(many_arrays()))
    wait_for_others(before)
    assert len(ended) == 40  # none was left with an event loop that is closed
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint as ocp

    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    arrays.write_arrays(tmp_path / "arrays", {"a": {"x": np.ones(3)}})
    monkeypatch.setattr(ocp.Checkpointer, "restore", exhausted)
    with pytest.raises(MemoryError):
        arrays.read_arrays(tmp_path / "arrays", describe_all({"a": {"x": np.ones(3)}}))


def test_importing_the_store_loads_neither_jax_nor_orbax() -> None:
    code = (
        "import sys, dsv3_jax.checkpoint.store;"
        "sys.exit(', '.join({'jax', 'orbax', 'tensorstore'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
