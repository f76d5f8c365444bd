"""`python -m dsv3_jax.needle`: whether a model finds a sentence hidden in a long text."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv3_jax import process
from dsv3_jax.cli import clean_on_signals, parse, run, to_stderr, user_errors
from dsv3_jax.config.fields import check

if TYPE_CHECKING:
    from dsv3_jax.checkpoint.model_folder import OpenedModel
    from dsv3_jax.evaluate.haystack import Haystack
    from dsv3_jax.evaluate.needle_map import Map
    from dsv3_jax.evaluate.needle_scores import Cell
    from dsv3_jax.evaluate.needles import Place, Prompt

PROG = "python -m dsv3_jax.needle"
DESCRIPTION = """Hide needles in haystacks, and see whether a model finds them.

A prompt is text with one sentence in it, "The secret words are falcon kettle wagon mirror.", at
some depth, and at its end how that sentence begins, up to the first of the words; the model must go
on with the others. A needle counts as found if greedy text is exactly these. The table on stdout,
and the picture, have a line for each depth and a column for each length of the prompt.

--out FOLDER keeps needle.json with all that is needed to repeat it, tables in needle.md and the
picture needle.png. The same options and seed give the same prompts, whatever other lengths there
are.
"""


@dataclass(frozen=True)
class Options:
    """The command's options."""

    checkpoint: Path
    """A run's folder, its `checkpoints` or one `step_...` in it; or a Hugging Face folder"""
    lengths: tuple[int, ...] = ()
    """Of prompts, in tokens, answer included; default: the model's longest, 1/2, 1/4, 1/8 of it, as
    far as a needle has room"""
    depths: int = 11
    """Places of the needle, evenly from the beginning of the text to its end"""
    needles: int = 10
    """Prompts for each length and depth, each with a needle and a text of its own"""
    haystack: Path | None = None
    """A UTF-8 text, .jsonl or .parquet file; default: Python's standard library, held-out part"""
    out: Path | None = None
    """A new folder for the results"""
    seed: int = 0
    """Of needles and texts"""
    step: int | None = None
    """Of a run; default: the newest"""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the run's moving average of the weights"""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights; default: bfloat16 for a run, as stored for a Hugging Face folder"""

    def check(self) -> None:
        """ValueError for what no model allows."""
        for name in ("depths", "needles"):
            value = getattr(self, name)
            check(f"--{name}", value, value >= 1, "1 or more")
        check("--seed", self.seed, self.seed >= 0, "0 or more")
        for length in self.lengths:
            check("--lengths: a length", length, length >= 1, "1 or more")


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    default = Options(checkpoint=tyro.MISSING)
    options = parse(Options, default, prog=PROG, description=DESCRIPTION, args=args)
    with clean_on_signals():
        with user_errors():
            options.check()
            process.check_devices()
            # JAX comes in here, not before --help.
            from dsv3_jax.checkpoint.new_folder import check_free_name

            if options.out is not None:
                check_free_name(options.out, overwrite=False)
            opened, haystack, prompts = _prepared(options)
        started = time.monotonic()
        cells = _scored(opened, prompts)
        seconds = time.monotonic() - started
        _tell(options, opened, haystack, cells, seconds)


def _prepared(
    options: Options,
) -> "tuple[OpenedModel, Haystack, dict[Place, list[Prompt]]]":
    """The model, the text, and all prompts. ValueError or OSError for what cannot be had."""
    from dsv3_jax.checkpoint.model_folder import open_model
    from dsv3_jax.evaluate.haystack import open_haystack

    opened = open_model(
        options.checkpoint, dtype=options.dtype, step=options.step, average=options.ema
    )
    longest = opened.cfg.max_length
    lengths = sorted({*options.lengths} or {longest // part for part in (8, 4, 2, 1)})
    if lengths[-1] > longest:
        raise ValueError(
            f"--lengths: {lengths[-1]} tokens; allowed: at most model.max_length = {longest}"
        )
    step = "" if opened.step is None else f", step {opened.step:,}"
    to_stderr(f"{options.checkpoint}{step}")
    haystack = open_haystack(options.haystack, opened.tokenizer, lengths[-1])
    to_stderr(f"{haystack.name}: {haystack.documents:,} documents, {len(haystack):,} tokens")
    prompts = {}
    for length in lengths:
        try:
            prompts |= _prompts(options, opened, haystack, length)
        except ValueError:
            if options.lengths or length == longest:
                raise
            to_stderr(f"{length:,} tokens: no room for a needle, left out")
    return opened, haystack, prompts


def _prompts(
    options: Options, opened: "OpenedModel", haystack: "Haystack", length: int
) -> "dict[Place, list[Prompt]]":
    from dsv3_jax.evaluate.needles import build_prompts, depths_of, places_of

    return {
        place: list(build_prompts(opened.tokenizer, haystack, place, options.needles, options.seed))
        for place in places_of([length], depths_of(options.depths))
    }


def _scored(opened: "OpenedModel", prompts: "dict[Place, list[Prompt]]") -> "list[Cell]":
    """With a bar on a terminal, and a line for each length elsewhere."""
    from dsv3_jax.evaluate.needle_scores import score_cells, scorer_of
    from dsv3_jax.inference.progress import progress

    lengths = [place.length for place, of_place in prompts.items() for _ in of_place]
    shown, done = sys.stderr.isatty(), 0
    with progress(len(lengths), lambda: f"{lengths[done - 1]:,} tokens", shown=shown) as bar:

        def told(count: int) -> None:
            nonlocal done
            done = count
            bar(done)
            if not shown and (done == len(lengths) or lengths[done] != lengths[done - 1]):
                to_stderr(f"{lengths[done - 1]:,} tokens: {done:,} of {len(lengths):,} prompts")

        return score_cells(scorer_of(opened.model), prompts, told)


def _tell(
    options: Options,
    opened: "OpenedModel",
    haystack: "Haystack",
    cells: "list[Cell]",
    seconds: float,
) -> None:
    from dsv3_jax.evaluate.needle_map import TITLES, Map, terminal

    found = Map(cells)
    print(f"{TITLES['exact']}, {cells[0].prompts} prompts a cell, lengths in tokens")
    print(terminal(found, "exact"))
    if options.out is not None:
        with user_errors():
            _write(options, _record(options, opened, haystack, cells, seconds), found)
        to_stderr(f"{options.out}: needle.json, needle.md, needle.png")


def _record(
    options: Options,
    opened: "OpenedModel",
    haystack: "Haystack",
    cells: "list[Cell]",
    seconds: float,
) -> dict[str, Any]:
    """What was measured, and all that is needed to measure it again."""
    import platform

    import jax

    from dsv3_jax import __version__
    from dsv3_jax.train.machine import describe

    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
    versions = {"dsv3_jax": __version__, "python": platform.python_version()}
    return {
        "options": given,
        "step": opened.step,
        "dtype": str(opened.model.embed_VD.dtype),
        "max_length": opened.cfg.max_length,
        "yarn": asdict(opened.cfg.yarn) | {"active": opened.cfg.yarn_active},
        "tokenizer": opened.tokenizer.content_hash,
        "haystack": {
            "name": haystack.name,
            "documents": haystack.documents,
            "tokens": len(haystack),
            "content": haystack.content_hash,
        },
        "versions": versions | {"jax": jax.__version__},
        "machine": describe(),
        "seconds": round(seconds, 3),
        "cells": [
            cell.place._asdict() | {"prompts": cell.prompts} | cell.score._asdict()
            for cell in cells
        ],
    }


def _write(options: Options, record: dict[str, Any], found: "Map") -> None:
    """The folder appears when all is in it."""
    from dsv3_jax.checkpoint.new_folder import new_folder
    from dsv3_jax.drawing import save_picture
    from dsv3_jax.evaluate.needle_map import TITLES, markdown, picture

    name = options.checkpoint.resolve().name
    title = name if record["step"] is None else f"{name}, step {record['step']:,}"
    tables = "\n\n".join(f"## {TITLES[f]}\n\n{markdown(found, f)}" for f in TITLES)
    about = (
        f"# {title}\n\nHaystack: {record['haystack']['name']}; {options.needles} prompts a cell, "
        f"seed {options.seed}; {record['machine']}, {record['seconds']:,.1f} s.\n\n"
    )
    with new_folder(options.out, 0, overwrite=False) as folder:
        (folder / "needle.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "needle.md").write_text(about + tables + "\n")
        save_picture(picture(found, title), folder / "needle.png", "--out")


if __name__ == "__main__":
    process.prepare()
    run(main)
