"""What people say of samples: the file that synthesis wrote, with their words in `verification`."""

from pathlib import Path
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.journal import Key
from dsv3_jax.posttrain.json_lines import json_of, numbered_lines

VERDICTS = ("accepted", "rejected")


def read_reviews(file: Path | None) -> dict[Key, dict[str, Any]]:
    """The `verification` of every sample whose `by` is "human"; other lines say nothing.

    ValueError, one line, with file, line and field, for a line that is no sample or a verdict that
    is none; OSError for a file that cannot be read.
    """
    if file is None:
        return {}
    reviews = {}
    for number, line in numbered_lines(file):
        if line.strip():
            try:
                key, said = _review(line)
            except ValueError as error:
                raise ValueError(f"{file} line {number}: {error}") from None
            if said["by"] == "human":
                reviews[key] = said
    return reviews


def _review(line: str) -> tuple[Key, dict[str, Any]]:
    found = json_of(line)
    try:
        made = found["provenance"]
        key = Key(made["prompt"]["id"], found["kind"], made["candidate"])
        said = found["verification"]
        by, verdict, note = said["by"], said["verdict"], said["note"]
    except (TypeError, LookupError):
        raise ValueError("no sample of this command, with verification and provenance") from None
    for name, value in (("provenance.prompt.id", key.id), ("kind", key.kind)):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}; allowed: text")
    if type(key.number) is not int:
        raise ValueError(f"provenance.candidate is {shown(key.number)}; allowed: a whole number")
    if by == "human" and verdict not in VERDICTS:
        allowed = ", ".join(VERDICTS)
        raise ValueError(f"verification.verdict is {shown(verdict)}; allowed: {allowed}")
    if not isinstance(note, str):
        raise ValueError(f"verification.note is {shown(note)}; allowed: text")
    # Of halves of surrogate pairs, which no file of ours can hold, question marks.
    whole = note.encode("utf-8", "replace").decode()
    return key, {"by": by, "verdict": verdict, "note": whole}
