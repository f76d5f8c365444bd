"""A hand-over's two ends: pages go from a device's pools to the host, or from there into pools.

As many move at a time as a chunk of a prompt fills, so that texts of all lengths share one program
to read and one to write. On a mesh every device takes part, those without a text with nobody's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dsv3_jax.inference.cache import Pool
from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.moved_pages import Contents, Places
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.requests import Text
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.step import Rows, State
from dsv3_jax.inference.weights import Weights


class Mover:
    """Of one engine, whose state is used up by each of these."""

    def __init__(self, programs: Programs, scheduler: Scheduler) -> None:
        self.programs, self.scheduler = programs, scheduler
        self.count = scheduler.pages[0].needed(scheduler.settings.chunk)

    def take_out(
        self, weights: Weights, state: State, text: Text, form: Mapping[str, Any]
    ) -> tuple[State, Handover]:
        """What a text has read. The state is as it was."""
        pieces, pages = [], text.pages[: self.scheduler.pages[0].needed(text.read)]
        for begin in range(0, len(pages), self.count):
            places = _nobodys(state, self.programs.shards, self.count)
            piece = pages[begin : begin + self.count]
            places.page_BN[text.shard, : len(piece)] = piece
            places.row_B[text.shard] = text.row
            state, found = self.programs.read_pages(weights, state, places)
            pieces.append(_of_device(found, text.shard))
        return state, _collected(text, form, pieces)

    def take_in(self, weights: Weights, state: State) -> State:
        """What others have read of texts that have a row by now, one on each device at a time."""

        def arrived(row: Sequence[Text | None]) -> Text | None:
            return next((text for text in row if text and text.handover), None)

        while any(turn := [arrived(row) for row in self.scheduler.rows]):
            for moved in _in_pages(turn, self.count, state):
                state = self.programs.write_pages(weights, state, *moved)
            for text in filter(None, turn):
                text.read, text.began, text.handover = text.handover.slots, True, None
                self.scheduler.tell(text)
        return state

    def warm_up(self, weights: Weights, state: State) -> State:
        """Compiles both programs. The state is as it was."""
        places = _nobodys(state, self.programs.shards, self.count)
        state, contents = self.programs.read_pages(weights, state, places)
        return self.programs.write_pages(weights, state, places, contents)


def _nobodys(state: State, devices: int, count: int) -> Places:
    """Places beyond the last ones of all devices together, and so of each."""
    pages, rows = len(state.pools[0].k_rope_YZR), len(state.rows.position_B)
    return Places(np.full((devices, count), pages, np.int32), np.full(devices, rows, np.int32))


def _of_device(contents: Contents, shard: int) -> Contents:
    """Its own part [N, Z, ...], on the host; what other devices have is not fetched."""

    def part(x: jax.Array) -> np.ndarray:
        parts = {one.index[0].start or 0: one.data for one in x.addressable_shards}
        return np.asarray(parts[shard])[0]

    return jax.tree.map(part, contents)


def _collected(text: Text, form: Mapping[str, Any], pieces: Sequence[Contents]) -> Handover:
    """Of a text whose pages these are, in order."""
    row, slots = pieces[0].rows, text.read
    held = int(row.held_B)
    pools = jax.tree.map(
        lambda *parts: np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts])[:slots],
        *(piece.pools for piece in pieces),
    )
    drafts = form["engine.drafts"]
    for x_SC in jax.tree.leaves(pools[len(pools) - drafts :]):
        # Modules read these positions at the next step, before anybody looks; until then some hold
        # what other texts left there.
        x_SC[slots - held :] = 0
    hidden_WD = row.hidden_BWD[len(row.hidden_BWD) - held :]
    latents = tuple(jax.tree.leaves(pools))
    # A prompt's scores are told with the first token, before it is handed over.
    request = replace(text.request, prompt_logprobs=False)
    return Handover(request, text.tokens, text.logprobs, form, latents, hidden_WD)


def _in_pages(
    turn: Sequence[Text | None], count: int, state: State
) -> Iterator[tuple[Places, Contents]]:
    """The handed-over latents and row of at most one text of each device, `count` of its own pages
    at a time. The state gives the shapes.
    """

    def zeros(*sizes: int) -> Callable:
        return lambda x: np.zeros((*sizes, *x.shape[1:]), x.dtype)

    devices, size = len(turn), state.pools[0].page_slots
    own = [t.pages[t.borrowed : -(-t.handover.slots // size)] if t else [] for t in turn]
    for begin in range(0, max(map(len, own)), count):
        places = _nobodys(state, devices, count)
        pools = jax.tree.map(zeros(devices, count), state.pools)
        rows = jax.tree.map(zeros(devices), state.rows)
        for i, text in enumerate(turn):
            if text is not None:
                pages = own[i][begin : begin + count]
                places.page_BN[i, : len(pages)], places.row_B[i] = pages, text.row
                _fill_pages(pools, i, text.handover, (text.borrowed + begin) * size)
                _fill_row(rows, i, text.handover)
        yield places, Contents(pools, rows)


def _fill_pages(pools: tuple[Pool, ...], i: int, handover: Handover, first: int) -> None:
    """Slots from the `first` on; behind the last one there is 0."""
    for x_BNZC, from_SC in zip(jax.tree.leaves(pools), handover.latents, strict=True):
        into_SC = x_BNZC[i].reshape(-1, x_BNZC.shape[-1])
        piece_SC = from_SC[first : first + len(into_SC)]
        into_SC[: len(piece_SC)] = piece_SC


def _fill_row(rows: Rows, i: int, handover: Handover) -> None:
    """Of the last W + 1 tokens and W positions, those that are not there stay 0."""
    tokens, held = handover.tokens[-rows.recent_Bw.shape[1] :], len(handover.hidden_WD)
    window = rows.hidden_BWD.shape[1]
    rows.recent_Bw[i, window + 1 - len(tokens) :] = tokens
    rows.hidden_BWD[i, window - held :] = handover.hidden_WD
    rows.position_B[i], rows.held_B[i] = handover.slots, held
