"""`python -m dsv3_jax.convert`: checkpoints from and to Hugging Face's format, and a look at them.

`import` makes a folder like a run's, which `train --init-from` and `generate` take; `export` goes
the other way; `inspect` reads names and sizes only. Values and scales of FP8 weights are carried
untouched where FP8 is kept.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.cli import clean_on_signals, escaped, parse, run, to_stderr, user_errors

PROG = "python -m dsv3_jax.convert"
DESCRIPTION = """Checkpoints from and to Hugging Face's format.

Every tensor is accounted for: one that is missing, left over or misshapen is an error that names
it. A folder appears under its name when it is complete.
"""
Switch = tyro.conf.FlagCreatePairsOff
HFDir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HFDIR")]
Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Dir = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class Import:
    """A Hugging Face folder to one of ours, for train --init-from and generate."""

    source: HFDir
    """Hugging Face folder: config.json, safetensors, tokenizer.json"""
    out: Out
    """Folder to write; new or empty"""
    skip_mtp: Annotated[bool, Switch] = False
    """Take the main model alone"""
    keep_fp8: Annotated[bool, Switch] = False
    """Keep FP8 weights as they are; otherwise they are expanded to bfloat16"""
    overwrite: Annotated[bool, Switch] = False
    """Replace a model in OUT"""


@dataclass(frozen=True)
class Export:
    """A run's or an imported model to a Hugging Face folder, in bfloat16, float32 or FP8."""

    source: Checkpoint
    """Folder of a run or an imported model, its `checkpoints` or one `step_...` in it; or a Hugging
    Face folder"""
    out: Out
    """Folder to write; new or empty"""
    fp8: Annotated[bool, Switch] = False
    """Linears in 128x128 blocks of FP8, as released: untouched where CKPT has them"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of all else"""
    scale: Literal["float32", "pow2"] = "float32"
    """Of weights that are quantised here; pow2 as in DeepSeek-V3.1"""
    skip_mtp: Annotated[bool, Switch] = False
    """Take the main model of a Hugging Face folder alone"""
    ema: Annotated[bool, Switch] = False
    """The averaged weights"""
    step: int | None = None
    """Of a run's checkpoints; default: the newest"""
    overwrite: Annotated[bool, Switch] = False
    """Replace a model in OUT"""


@dataclass(frozen=True)
class Inspect:
    """What a folder holds: configuration, tensors, dtypes, bytes, what is missing or unknown."""

    source: Dir
    """Hugging Face folder, or a run's, or one `step_...` of its checkpoints"""


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(args: Sequence[str]) -> int | None:
    """The command. SystemExit 2 for the user's mistakes."""
    command = parse(Command, tyro.MISSING, prog=PROG, description=DESCRIPTION, args=args)
    with clean_on_signals(), user_errors():
        if isinstance(command, Import):
            print(escaped(import_folder(command)))
        elif isinstance(command, Export):
            print(escaped(export_folder(command)))
        else:
            from dsv3_jax.checkpoint.inspection import inspect

            for line in inspect(command.source):
                print(escaped(line))


def import_folder(command: Import) -> str:
    """What was written, in a line. ValueError or OSError, one line, for what cannot work."""
    from dsv3_jax.checkpoint.arrays import check_path
    from dsv3_jax.checkpoint.folder_tokenizer import open_tokenizer
    from dsv3_jax.checkpoint.hf import load_pretrained
    from dsv3_jax.checkpoint.hf_folder import open_folder
    from dsv3_jax.checkpoint.new_folder import check_free_name
    from dsv3_jax.checkpoint.run_model import write_model

    cfg = open_folder(command.source).model_config(command.skip_mtp)
    _check_apart(command.source, command.out)
    check_free_name(command.out, command.overwrite)  # before a model is read in vain
    check_path(command.out.absolute())
    try:
        open_tokenizer(command.source, cfg.vocab_size)
    except ValueError as error:  # the weights can be had without
        to_stderr(f"warning: tokenizer: none that can be used: {error}")
    model = load_pretrained(command.source, keep_fp8=command.keep_fp8, skip_mtp=command.skip_mtp)
    write_model(model, command.source, command.out, overwrite=command.overwrite)
    return f"{command.out}: imported; train from it with --init-from {command.out}"


def export_folder(command: Export) -> str:
    """What was written, in a line. ValueError or OSError, one line, for what cannot work."""
    from dsv3_jax.checkpoint.hf import load_pretrained, save_pretrained
    from dsv3_jax.checkpoint.model_folder import find
    from dsv3_jax.checkpoint.new_folder import check_free_name
    from dsv3_jax.checkpoint.run_model import read_model

    place = find(command.source)
    _check_apart(place.folder, command.out)
    check_free_name(command.out, command.overwrite)
    if place.is_hf:
        if command.ema or command.step is not None:
            raise ValueError(f"{command.source} is of Hugging Face: --ema and --step are for runs")
        what = "the model"
        model = load_pretrained(command.source, keep_fp8=command.fp8, skip_mtp=command.skip_mtp)
    elif command.skip_mtp:
        raise ValueError(f"{command.source} is a run: --skip-mtp is for Hugging Face folders")
    else:
        model, _, step = read_model(place.folder, place.chosen(command.step), command.ema)
        what = f"step {step:,}"
    save_pretrained(
        model,
        command.out,
        command.fp8,
        dtype=command.dtype,
        scale=command.scale,
        tokenizer_from=place.folder,
        overwrite=command.overwrite,
    )
    return f"{command.out}: exported {what} of {command.source}"


def _check_apart(source: Path, out: Path) -> None:
    """ValueError if replacing OUT would remove what is read, links within the source included, or
    if a run would take OUT for a checkpoint of its own, and remove it in time.
    """
    read, target = [source, *source.iterdir()], _real(out)
    if any(_real(path).is_relative_to(target) for path in read):
        raise ValueError(f"OUT {out} holds the source {source}; allowed: another folder")
    for above in target.parents:
        if above.name == "checkpoints" and (above.parent / "config.json").is_file():
            raise ValueError(f"OUT {out} lies among a run's checkpoints; allowed: another folder")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, of links in a loop too


if __name__ == "__main__":
    run(main)
