"""Rows of a task's JSON Lines file beside this one, as lm-eval wants them: a data set a split."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def read(file: str, **metadata: Any) -> dict[str, Dataset]:
    """Each row says its split."""
    lines = (Path(__file__).parent / file).read_text("utf-8").splitlines()
    splits: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        splits.setdefault(row.pop("split"), []).append(row)
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}
