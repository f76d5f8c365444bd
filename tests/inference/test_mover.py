"""Pages leave one engine's pools and come into another's, which has pages of another size."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import moved_pages
from dsv3_jax.inference.cache import empty_pool
from dsv3_jax.inference.mover import Mover
from dsv3_jax.inference.requests import Request, Text
from dsv3_jax.inference.scheduler import Scheduler
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.step import State, empty_rows
from tests.inference.engines import MODEL
from tests.shapes import compiled

SLOTS, DRAFTS, ROWS = 10, 2, 3
TOKENS = list(range(20, 20 + SLOTS + 1))
PROGRAMS = SimpleNamespace(
    shards=1,
    read_pages=lambda weights, *args: compiled(moved_pages.read_pages)(*args),
    write_pages=lambda weights, *args: compiled(moved_pages.write_pages)(*args),
)


def scrambled(page_slots: int, pages: int, fp8: bool, held: int) -> State:
    """Of one layer and two modules; other numbers everywhere."""
    rng = np.random.default_rng(page_slots)

    def scramble(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return (100 * rng.standard_normal(x.shape)).astype(x.dtype)

    def empty() -> State:
        pool = empty_pool(MODEL, pages, page_slots, jnp.bfloat16, fp8)
        rows = empty_rows(ROWS, DRAFTS, MODEL.d_model, jnp.bfloat16)
        return State((pool,) * (1 + DRAFTS), rows, jnp.zeros(1))

    state = jax.tree.map(scramble, jax.eval_shape(empty))
    return state._replace(rows=state.rows._replace(held_B=np.full(ROWS, held, np.int32)))


def engine_of(page_slots: int, text: Text) -> Mover:
    settings = EngineConfig(rows=ROWS, page_slots=page_slots, pages=9, chunk=8, drafts=DRAFTS)
    scheduler = Scheduler(settings, 1, 9, Statistics())
    scheduler.rows[0][text.row] = text
    return Mover(PROGRAMS, scheduler)


def text_of(pages: list[int], row: int, **more: object) -> Text:
    request = Request(TOKENS[:8], 9)
    return Text(0, request, 17, list(TOKENS), shard=0, row=row, pages=pages, **more)


def flat(state: State, pages: list[int]) -> list[np.ndarray]:
    """Slots of pages in their order."""
    arrays = [np.asarray(x)[pages] for x in jax.tree.leaves(state.pools)]
    return [x.reshape(-1, x.shape[-1]) for x in arrays]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit by bit."""
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("held", [1, 4])
def test_what_is_read_is_what_pools_and_row_hold(fp8: bool, held: int):
    """But for the last slots of modules, which their next step reads and writes anyway."""
    state, text = scrambled(4, 9, fp8, held), text_of([5, 2, 7], row=1, read=SLOTS)
    kept, found = engine_of(4, text).take_out(None, state, text, {"engine.drafts": DRAFTS})
    arrays = 3 if fp8 else 2
    for i, (x_SC, stored_SC) in enumerate(zip(found.latents, flat(state, [5, 2, 7]), strict=True)):
        known = SLOTS - held * (i >= arrays)
        assert same(x_SC[:known], stored_SC[:known])
        assert not x_SC[known:].astype(np.float32).any()
        assert len(x_SC) == SLOTS
    assert same(found.hidden_WD, np.asarray(state.rows.hidden_BWD)[1, -held:])
    assert found.tokens == TOKENS
    assert all(map(same, *(map(np.asarray, jax.tree.leaves(x)) for x in (kept, state))))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("borrowed", [0, 1])
def test_what_comes_in_is_written_where_it_belongs_and_nowhere_else(fp8: bool, borrowed: int):
    """Borrowed pages are not its own. Three slots a page: one piece is too small for it."""
    sent, pages = text_of([5, 2, 7], row=1, read=SLOTS), [8, 0, 3, 4]
    first = scrambled(4, 9, fp8, held=3)
    _, handover = engine_of(4, sent).take_out(None, first, sent, {"engine.drafts": DRAFTS})
    state = scrambled(3, 9, fp8, held=0)
    text = text_of([*pages, 6], row=2, read=3 * borrowed, borrowed=borrowed, handover=handover)
    mover = engine_of(3, text)
    assert mover.count < len(pages)
    after = mover.take_in(None, state)
    assert (text.read, text.began, text.handover) == (SLOTS, True, None)
    begin = 3 * borrowed
    for x_SC, came_SC in zip(flat(after, pages), handover.latents, strict=True):
        assert same(x_SC[begin:SLOTS], came_SC[begin:])
    others = [1, 2, 5, 6, 7, *pages[:borrowed]]
    assert all(map(same, flat(after, others), flat(state, others)))
    rows = jax.tree.map(np.asarray, after.rows)
    assert rows.position_B[2] == SLOTS
    assert rows.recent_Bw[2].tolist() == TOKENS[-5:]
    assert rows.held_B[2] == 3
    assert same(rows.hidden_BWD[2, -3:], np.asarray(first.rows.hidden_BWD)[1, -3:])
    assert not rows.hidden_BWD[2, :-3].any()
    for x, before in zip(rows, state.rows, strict=True):
        assert same(x[:2], np.asarray(before)[:2])
