"""What the benchmarks of GPUs, which have no tyro, ask of a command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.cli import fail


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and behind each option its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if not text or action.default in (None, argparse.SUPPRESS) or "default:" in text:
            return text
        several = isinstance(action.default, list | tuple)
        default = " ".join(map(str, action.default)) if several else action.default
        return f"{text} (default: {default})"


def parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Whose --help begins with the program's own text."""
    return argparse.ArgumentParser(
        program,
        description=doc,
        formatter_class=_Help,
        exit_on_error=False,
    )


def parsed(of: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 with one line after a mistake."""
    hint = f"{of.prog} --help lists all options"
    try:
        options, unknown = of.parse_known_args(args)
    except argparse.ArgumentError as error:
        fail(str(error), hint=hint)
    if unknown:
        fail(f"{unknown[0]} is no option of {of.prog}", hint=hint)
    return options


def new_file(text: str) -> Path:
    """A place where a file can be written when all is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}; allowed: a file in a folder that exists")
    return path
