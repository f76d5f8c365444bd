"""A folder that appears under its name when it is complete, and not before."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.checkpoint.arrays import CheckpointError
from dsv3_jax.files import exchange, sync, sync_tree

_TRIES = 200  # at a lock, for ten seconds
# What we write, and what tokenizers of the family bring along.
_OF_A_MODEL = re.compile(
    r"(generation_)?config\.json|.*\.safetensors(\.index\.json)?|tokenizer.*\.json"
    r"|special_tokens_map\.json|.*\.jinja|tiktoken\.model|tokenization_.*\.py"
)


@contextlib.contextmanager
def new_folder(path: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which takes that name when the block ends.

    After an error inside the block it is removed, and what stood under `path` stands there still.
    ValueError if `path` is in use: an empty folder is not, and with `overwrite` a folder that holds
    a model and nothing else is replaced whole. OSError if fewer than `size` bytes are free.
    """
    check_free_name(path, overwrite)
    path = _resolved(path)
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    _check_disk(parent, size)
    temporary = parent / _temporary_name(path)
    with contextlib.ExitStack() as until_the_end:
        try:
            with _alone_in(parent):
                _settle(path)
                _check_unused(path, overwrite)
                temporary.mkdir()
                until_the_end.enter_context(_held(temporary))
            yield temporary
            sync_tree(temporary)
            with _alone_in(parent):
                _check_unused(path, overwrite)  # somebody may have put something there meanwhile
                _publish(temporary, path)
        except (OSError, CheckpointError) as error:
            raise _of_final_name(error, temporary, path) from error
        except KeyboardInterrupt:
            _remove_for_good(temporary)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_for_good(folder: Path) -> None:
    """TensorStore's threads write on for a moment after their caller was interrupted, and make
    folders that are gone: so it must be gone twice.
    """
    gone = 0
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        if gone == 2:
            return
        time.sleep(0.05)


def check_free_name(path: Path, overwrite: bool) -> None:
    """ValueError or OSError if `new_folder` could not take this name. What a killed process left
    under it is settled first.
    """
    path = _resolved(path)
    above = path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{path} cannot be made: {above} is a file; allowed: a new folder")
    if above == path.parent:
        with _alone_in(above):
            _settle(path)
    _check_unused(path, overwrite)
    trial = above / _temporary_name(path)  # permissions, a name too long, a disk that only reads
    try:
        trial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another writer clears up
            trial.rmdir()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def _resolved(path: Path) -> Path:
    """ValueError for links that lead nowhere but to each other."""
    try:
        resolved = path.resolve()
    except RuntimeError:  # up to Python 3.12; later ones leave a link
        resolved = path
    if resolved.is_symlink():
        raise ValueError(f"{path} is a loop of links; allowed: a new folder")
    return resolved


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{secrets.token_hex(4)}.part"


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """While this process lives, no other takes its folder for one that a kill left."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """No other writer looks at a folder's names, or changes them, at the same time.

    OSError if somebody holds the folder for seconds: we only do for moments.
    """
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        for _ in range(_TRIES):
            if _lock(descriptor):
                break
            time.sleep(0.05)
        else:
            raise OSError(
                f"{parent}: locked by another process; allowed: to wait, or another folder"
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether nobody else has it; a file system that knows no locks has nobody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _of_final_name(error: Exception, temporary: Path, path: Path) -> Exception:
    """The same error about the folder as it was to be called: nobody knows the temporary name."""
    if isinstance(error, CheckpointError):
        return CheckpointError(str(error).replace(str(temporary), str(path)))
    files = [str(name) for name in (error.filename2, error.filename) if name is not None]
    if not error.strerror or (files and not files[0].startswith(str(temporary))):
        return error
    place = files[0].replace(str(temporary), str(path)) if files else path
    return OSError(f"cannot write {place}: {error.strerror}")


def _check_unused(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; allowed: a new folder")
    held = sorted(entry.name for entry in path.iterdir())
    if not held:
        return
    if "config.json" not in held:
        raise ValueError(f"{path} holds {held[0]} and no model; allowed: a new or an empty folder")
    if not overwrite:
        raise ValueError(f"{path} holds a model already; --overwrite (overwrite=True) replaces it")
    others = [name for name in held if not _is_of_a_model(path / name)]
    if others:
        raise ValueError(
            f"{path} holds {others[0]}, which is no part of a model; allowed to overwrite: what "
            "convert and save_pretrained write"
        )


def _is_of_a_model(entry: Path) -> bool:
    """Checkpoints of an imported model are one, of step 0; others took somebody a training."""
    if entry.name == "checkpoints":
        return entry.is_dir() and {step.name for step in entry.iterdir()} <= {"step_00000000"}
    return _OF_A_MODEL.fullmatch(entry.name) is not None and not entry.is_dir()


def _check_disk(folder: Path, size: int) -> None:
    """OSError if a disk has less room than `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"not enough disk for {size / 1e9:,.2f} GB: {free / 1e9:,.2f} GB free in {folder}"
        )


def _settle(path: Path) -> None:
    """Ends what a killed process began: an old folder takes its name back where no new one has it;
    what else it left is removed.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(?:old|part)", re.DOTALL)
    left = [entry for entry in sorted(path.parent.iterdir()) if pattern.fullmatch(entry.name)]
    left = [entry for entry in left if entry.is_dir()]
    if any(_is_held(entry) for entry in left):
        raise OSError(f"{path}: another process is writing it; allowed: to wait, or another folder")
    for entry in left:
        if entry.suffix == ".old" and _is_free(path):
            os.rename(entry, path)
        else:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(entry)


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _publish(temporary: Path, path: Path) -> None:
    """Old and new swap names at once, where the system can; else the old folder steps aside first,
    since a folder is not renamed onto one with content. A kill then may leave none under `path`
    until the next writer comes.
    """
    if path.exists() and exchange(temporary, path):
        sync(path.parent)
        return
    aside = temporary.with_suffix(".old")
    try:
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
