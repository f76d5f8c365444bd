"""lm-eval's tasks: found by name, run as the protocol has it, their scores collected.

Importing this file needs lm-eval. Tasks are others' files that fetch others' data sets: whatever
goes wrong in them is told in one line.
"""

import contextlib
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from dsv3_jax.cli import to_stderr
from dsv3_jax.evaluate import harness as ours
from dsv3_jax.evaluate.harness import Harness
from dsv3_jax.evaluate.protocol import Run, Wish, runs_of
from dsv3_jax.evaluate.results import TaskScore

FEWSHOT_SEED = 1234
"""lm-eval's own, so that examples are the usual ones"""
BOOTSTRAP = 1000  # draws for the error of a metric that is no mean


@dataclass
class Ran:
    """Scores of all tasks, and every sample of every run by task."""

    scores: list[TaskScore]
    samples: dict[str, list[dict[str, Any]]]


def load(wish: Wish) -> dict[str, Any]:
    """The tasks and groups of these names, as lm-eval has them, ready to run.

    ValueError, one line, for unknown names, tasks that cannot be read, whose data cannot be had,
    that run what the model writes without leave, or that ask for texts as none are written here.
    """
    with _quiet():
        manager = _manager(wish)
        _check_names(wish.names, manager, wish.include_path)
        if wish.unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # of the metric that lm-eval's own tasks load
        try:
            loaded = manager.load(list(wish.names))
            for task in loaded["tasks"].values():
                _settle(task, wish)
        except Exception as error:  # others' code and data
            raise ValueError(f"--tasks {','.join(wish.names)}: {_line(error)}") from error
    unsafe = [name for name, task in loaded["tasks"].items() if _is_unsafe(task)]
    if unsafe and not wish.unsafe_code:
        raise ValueError(
            f"--tasks: {unsafe[0]} runs what the model writes, as you, on this machine; "
            "allowed: with --confirm-run-unsafe-code"
        )
    for name, task in loaded["tasks"].items():
        if _writes(task):
            _check_generation(name, task)
    return loaded


def run(loaded: dict[str, Any], harness: Harness, wish: Wish) -> Ran:
    """Every task as often as the protocol says. ValueError as of `Harness`."""
    scores: dict[tuple[str, str], list[tuple[Run, dict[str, Any]]]] = {}
    ran = Ran([], {})
    told: dict[str, Any] = {}
    passes = _by_run(loaded, wish)
    for number, (run_, names) in enumerate(passes.items(), start=1):
        harness.seed, harness.temperature = run_.seed, run_.temperature
        how = "" if run_.temperature is None else f" at temperature {run_.temperature:g}"
        to_stderr(f"pass {number} of {len(passes)}{how}: {_shortened(names)}")
        with _quiet(), _told_of(names):
            found = evaluate(
                lm=harness,
                task_dict=_part(loaded, names),
                limit=wish.limit,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=wish.chat,
                fewshot_as_multiturn=wish.chat,
                confirm_run_unsafe_code=wish.unsafe_code,
            )
        for name, metrics in found["results"].items():
            told.setdefault(name, found)
            for metric in (key for key, value in metrics.items() if _is_score(key, value)):
                scores.setdefault((name, metric), []).append((run_, metrics))
        for name, samples in found.get("samples", {}).items():
            more = {"temperature": run_.temperature, "seed": run_.seed}
            ran.samples.setdefault(name, []).extend({**more, **sample} for sample in samples)
    for (name, metric), runs in scores.items():
        ran.scores.append(_score(name, metric, runs, told[name], loaded))
    return ran


def _shortened(names: Sequence[str]) -> str:
    return (
        ", ".join(names) if len(names) < 6 else f"{', '.join(names[:4])} and {len(names) - 4} more"
    )


def _score(
    name: str,
    metric: str,
    runs: Sequence[tuple[Run, dict[str, Any]]],
    found: dict[str, Any],
    loaded: dict[str, Any],
) -> TaskScore:
    short, _, filter_ = metric.partition(",")
    task = loaded["tasks"].get(name)
    error = runs[0][1].get(f"{short}_stderr,{filter_}")
    counts = found["n-samples"].get(name) or {}
    return TaskScore(
        task=name,
        version=str(found["versions"].get(name, "")),
        shots=found["n-shot"].get(name),
        metric=short,
        filter=filter_,
        scored="" if task is None else str(task.get_config("output_type")),
        samples=counts.get("effective", runs[0][1].get("sample_len")),
        of=counts.get("original"),
        higher_is_better=(found["higher_is_better"].get(name) or {}).get(short),
        error=error if isinstance(error, float) else None,
        runs=[run_ for run_, _ in runs],
        values=[float(metrics[metric]) for _, metrics in runs],
    )


def _is_score(key: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and "," in key and "_stderr," not in key


def _by_run(loaded: dict[str, Any], wish: Wish) -> dict[Run, list[str]]:
    """Names of the tasks of each pass; those that pass alike pass together."""
    found: dict[Run, list[str]] = {}
    for name, task in loaded["tasks"].items():
        size = len(task.eval_docs)
        size = size if wish.limit is None else min(size, wish.limit)
        for run_ in runs_of(size, _writes(task), wish.temperatures, wish.repeats, wish.seed):
            found.setdefault(run_, []).append(name)
    return found


def _part(loaded: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """These tasks, and the groups that have no others."""
    groups = {
        name: group
        for name, group in loaded["groups"].items()
        if {task.task_name for task in group.get_all_tasks()} <= {*names}
    }
    return {
        "tasks": {name: loaded["tasks"][name] for name in names},
        "groups": groups,
        "group_map": {name: group.child_names for name, group in groups.items()},
    }


# --- loading -------------------------------------------------------------------------------------


def _manager(wish: Wish) -> TaskManager:
    """Of the folder alone if it has all: lm-eval's own 14,000 files take ten seconds to list."""
    if wish.include_path is not None:
        if not wish.include_path.is_dir():
            raise ValueError(f"--include-path {wish.include_path}: no such folder")
        try:
            manager = TaskManager(include_path=str(wish.include_path), include_defaults=False)
        except Exception as error:  # others' files
            raise ValueError(f"--include-path {wish.include_path}: {_line(error)}") from error
        if {*wish.names} <= {*manager.all_tasks}:
            return manager
    return TaskManager(include_path=wish.include_path and str(wish.include_path))


def _check_names(names: Sequence[str], manager: TaskManager, folder: Path | None) -> None:
    known = manager.all_tasks
    for name in names:
        if name not in known:
            _check_files(folder)
            near = difflib.get_close_matches(name, known, 3)
            hint = (
                f"perhaps you meant {', '.join(near)}" if near else "lm-eval ls tasks lists its own"
            )
            raise ValueError(f"--tasks: there is no task {name!r}; {hint}")


def _check_files(folder: Path | None) -> None:
    """ValueError for a task file that cannot be read: lm-eval passes over it without a word."""
    for file in sorted(folder.rglob("*.yaml")) if folder is not None else ():
        try:
            yaml.load(file.read_bytes(), _Reader)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--include-path: {file}: {_line(error)}") from error


class _Reader(yaml.SafeLoader):
    """Passes over !function."""


_Reader.add_multi_constructor("!", lambda *_: None)


def _settle(task: Any, wish: Wish) -> None:
    """Examples as wished, but for tasks that are defined without any, as lm-eval has it."""
    defined = task.get_config("num_fewshot")
    if defined is None or (wish.shots is not None and defined != 0):
        task.set_config(key="num_fewshot", value=wish.shots or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _is_unsafe(task: Any) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def _writes(task: Any) -> bool:
    return task.get_config("output_type") == "generate_until"


def _check_generation(name: str, task: Any) -> None:
    """Before other tasks are scored, whose scores its fault would cost."""
    try:
        ours.wishes_of(task.get_config("generation_kwargs") or {}).check()
    except ValueError as error:
        raise ValueError(f"--tasks {name}: {error}") from None


@contextlib.contextmanager
def _told_of(names: Sequence[str]) -> Iterator[None]:
    """What goes wrong in tasks is a ValueError, one line; what goes wrong in answers is ours."""
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_filename == ours.__file__ for frame, _ in frames):
            raise
        raise ValueError(f"--tasks {_shortened(names)}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """With its first cause: libraries say that something failed, and there what."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    said = [" ".join(str(one).split())[:300] for one in dict.fromkeys((error, first))]
    return ": ".join((type(error).__name__, *filter(None, said)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """stdout is for results alone; of lm-eval's log errors are shown."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork beside JAX's threads
    with contextlib.redirect_stdout(sys.stderr):
        yield
