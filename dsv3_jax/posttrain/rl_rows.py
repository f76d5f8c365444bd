"""Groups of answers as rows of a training batch: whole samples side by side, isolated.

A sample is a prompt with one of its answers. As in fine-tuning each is a segment of its own, and
the labels are the answer's tokens, its end among them if the model wrote one. The number of rows is
the caller's, so that one program serves every step: rows that nothing fell to hold no label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.first_fit import first_fit
from dsv3_jax.data.loader import Batch
from dsv3_jax.posttrain.grpo_objective import Place
from dsv3_jax.posttrain.rl_prompts import PromptSet
from dsv3_jax.posttrain.rollouts import Group


class Packed(NamedTuple):
    """A batch, and the places of all answers, group by group."""

    batch: Batch
    places: list[Place]


def rows_needed(outputs: int, longest: int, length: int) -> int:
    """Rows of `length` that hold so many samples of at most `longest` places, whatever each has.

    First fit opens a row only when no other has room for `longest`: each of these then holds
    length // longest samples or more, so no more rows come than of samples that are all longest.
    """
    assert 0 < longest <= length, (longest, length)
    return -(-outputs // (length // longest))


def pack(
    prompts: PromptSet, groups: Sequence[Group], length: int, rows: int, eos_id: int
) -> Packed:
    """In first fit's order. Behind a row's last sample stands eos, in a segment of its own.

    ValueError, one line, for answers that do not fit: `rows_needed` says how many rows always do.
    """
    samples = [
        ([*prompts.tokens[group.prompt], *output.tokens], len(output.tokens))
        for group in groups
        for output in group.outputs
    ]
    row_of = first_fit([len(tokens) - 1 for tokens, _ in samples], length)
    if max(row_of) >= rows:
        raise ValueError(f"{len(samples)} answers take {max(row_of) + 1} rows; allowed: {rows}")
    tokens_BT = np.full((rows, length), eos_id, np.int32)
    labels_BT = np.full((rows, length), -1, np.int32)
    segments_BT = np.zeros((rows, length), np.int32)
    ends, places = [0] * rows, []
    for row, (tokens, answered) in zip(row_of, samples, strict=True):
        begin = ends[row]
        ends[row] = end = begin + len(tokens) - 1
        tokens_BT[row, begin:end] = tokens[:-1]
        labels_BT[row, end - answered : end] = tokens[len(tokens) - answered :]
        segments_BT[row, end:] += 1
        places.append(Place(row, end - answered, end))
    return Packed(Batch(tokens_BT, labels_BT, segments_BT), places)
