"""Groups of named arrays on disk and back, bit for bit: the one file that talks to Orbax.

Part of `store.py`, which adds steps, manifest and commit. A group ("params") maps names
("layers.3.moe.w_gate_EDF") to arrays. Orbax joins the keys of a tree with dots, and TensorStore
those with slashes and chunk numbers, so groups and names are percent-encoded: any two stay apart.
Shape, dtype and checksum are what `describe` says; Orbax's own metadata is not relied upon.

CRC-32 runs at 4 GB/s in zlib, against 1.8 for SHA-256 and 0.9 for BLAKE2b. What several processes
write is in `parts.py`; they read what one process wrote here, each for itself.

Layout, best of 10 interleaved runs on two busy cores, 990 arrays of 94 MB in all:

    one OCDBT tree (this file)    save 0.68 s   load 0.45 s     28 files
    one OCDBT tree a group             0.64          0.42       36
    one folder an array                1.25          0.71     1983

The first two differ by less than the noise; one tree is the simpler. Compression is off: zstd would
save 15 % of the bytes, but on 24 large tensors (268 MB) a save takes 0.9 s instead of 0.2 s and
over 200 MB more memory instead of 9 MB. On the small ones it is a draw.

Orbax runs in a thread of ours, where no signal is raised. Interrupted, it would leave threads at
work whose event loop is closed, in a folder that the caller then removes, and they would print a
traceback for each failure.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with np.dtype)
import numpy as np

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 "
    "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
).split()
_PATIENCE = 10  # seconds that an interrupt waits for a write under way

Result = TypeVar("Result")


class CheckpointError(ValueError):
    """A checkpoint could not be written, found or trusted; the message is one line."""


class OrbaxError(Exception):
    """Whatever Orbax raised: with TensorStore below it, that can be nearly any class."""


def to_host(where: str, x: Any) -> np.ndarray:
    """Returns `x` (jax, NumPy or scalar) as a NumPy array; `where` names it in errors.

    Raises `CheckpointError` for a dtype that is not in `DTYPES`.
    """
    dtype = str(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)
    if dtype not in DTYPES:
        raise CheckpointError(f"array {where}: dtype {dtype}; allowed: {', '.join(DTYPES)}")
    return np.asarray(x)


def describe(array: np.ndarray) -> dict[str, Any]:
    """Returns an array's line in the manifest: shape, dtype, CRC-32 of its bytes in C order."""
    array_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "crc32": crc32(memoryview(array_bytes)),
    }


def crc32(content: "bytes | memoryview") -> str:
    """Returns the CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def check_path(folder: Path) -> None:
    """CheckpointError for a name that TensorStore cannot be told."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{folder}: not UTF-8; allowed for checkpoints: UTF-8") from None


def write_arrays(folder: Path, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the arrays to a new folder, except those of size 0, which Orbax refuses.

    Raises `OrbaxError` where that fails, `CheckpointError` for a name that is not Unicode. An
    interrupt is raised when nobody writes any more, or after seconds; a second one at once.
    """
    tree = _tree({g: {n: x for n, x in named.items() if x.size} for g, named in groups.items()})
    place = folder.absolute()
    check_path(place)

    def write() -> None:
        with _orbax() as (orbax, checkpointer):
            checkpointer.save(place, args=orbax.args.PyTreeSave(tree))

    if tree:
        _in_thread(write, _PATIENCE)


def read_arrays(
    folder: Path, described: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays named in (part of) a manifest, as Orbax finds them, unverified.

    Those of size 0 are made from their description. Raises `OrbaxError`. After an interrupt the
    reading goes on for nobody, until it ends or the process does.
    """
    tree = _tree(
        {g: {n: 0 for n, d in named.items() if not _empty(d)} for g, named in described.items()}
    )
    place = folder.absolute()
    check_path(place)

    def read() -> dict[str, dict[str, np.ndarray]]:
        with _orbax() as (orbax, checkpointer):
            as_numpy = orbax.RestoreArgs(restore_type=np.ndarray)
            restore_args = {g: dict.fromkeys(named, as_numpy) for g, named in tree.items()}
            args = orbax.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
            return checkpointer.restore(place, args=args)

    restored = _in_thread(read, patience=0) if tree else {}
    return {
        g: {
            n: np.empty(d["shape"], d["dtype"]) if _empty(d) else _found(restored, g, n)
            for n, d in named.items()
        }
        for g, named in described.items()
    }


def _found(restored: Mapping[str, Mapping[str, Any]], group: str, name: str) -> np.ndarray:
    array = restored.get(_group_key(group), {}).get(_key(name))
    if not isinstance(array, np.ndarray):  # Orbax leaves what it does not have as it was asked for
        raise OrbaxError(f"array {group}/{name} is missing")
    return array


def _empty(description: Mapping[str, Any]) -> bool:
    return 0 in description["shape"]


def _tree(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns Orbax's tree: encoded keys, no empty groups."""
    return {
        _group_key(g): {_key(n): x for n, x in named.items()}
        for g, named in groups.items()
        if named
    }


def _group_key(group: str) -> str:
    """Returns a group without dots, as Orbax's key "<group>.<name>" is cut at the first one."""
    return _key(group).replace(".", "%2E")


def _key(name: str) -> str:
    """Returns a name in letters, digits, "_", ".", "-", "~" and percent signs."""
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"name of an array or group: {name!a} is not Unicode") from error


def _in_thread(work: Callable[[], Result], patience: float) -> Result:
    """Returns what `work` returns or raises what it raises. An interrupt here waits until it has
    ended, `patience` seconds at most; it then goes on by itself, and nobody hears of it.
    """
    ended: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def act() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:  # raised by the caller's thread
            ended.set_exception(error)

    try:
        try:
            threading.Thread(target=act, name="arrays").start()
        except RuntimeError as error:  # no more threads
            ended.set_exception(OrbaxError(str(error)))
        return ended.result()
    finally:
        concurrent.futures.wait([ended], patience)


@contextlib.contextmanager
def _orbax() -> "Iterator[tuple[Any, ocp.Checkpointer]]":
    """Yields Orbax and a checkpointer; what Orbax logs is dropped, what it raises is marked."""
    import jax
    import orbax.checkpoint as ocp  # 1.5 s

    def drop(record: logging.LogRecord) -> bool:
        return False

    # A filter of its own for each: others may write or read at the same time, and end in any order.
    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    failures: list[Exception] = []
    try:
        # Each process for itself: otherwise all would have to read the same at the same time.
        here = jax.process_index()
        alone = (
            ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions()
        )
        handler = _handler(ocp, failures, alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield ocp, checkpointer
        if failures:
            raise failures[0]
    except MemoryError:
        raise
    except Exception as error:
        first = failures[0] if failures else error
        raise OrbaxError(f"{type(first).__name__}: {first}") from first
    finally:
        logger.removeFilter(drop)


def _handler(orbax: Any, failures: list[Exception], alone: Any) -> "ocp.PyTreeCheckpointHandler":
    """Returns a handler of NumPy arrays alone, which adds failed writes to `failures`.

    Orbax leaves at the first error of many operations that run at once. TensorStore's threads
    then print a traceback for each of the others, as the event loop they report to is closed.
    So here every operation ends before the first error is raised.
    """
    types = orbax.type_handlers

    class Handler(types.NumpyHandler):
        # A private name: without it Orbax raises the error itself, with the tracebacks.
        async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
            try:
                await super()._open_and_write(*args, **kwargs)
            except Exception as error:
                failures.append(error)

        async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list[np.ndarray]:
            read = super().deserialize
            each = args or [orbax.RestoreArgs()] * len(infos)
            results = await asyncio.gather(
                *(read([info], [arg]) for info, arg in zip(infos, each, strict=True)),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            return [array for (array,) in results]

    # By default every array is copied first, lest it change meanwhile (263 MB more memory for a
    # state of 268 MB instead of 9 MB, no time); here nobody writes to them meanwhile.
    handler = Handler(deepcopy_host_arrays=False)
    registry = types.create_type_handler_registry((np.ndarray, handler))
    return orbax.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=registry, multiprocessing_options=alone
    )
