"""Prefix, suffix, middle: pieces give back the document, decisions are a function of (seed, epoch,
document), a tokenizer without the tokens is refused.
"""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from dsv3_jax.data.fim import ADDED, Fim, fim_of
from dsv3_jax.data.hashing import WORDS_PER_BLOCK, key64
from dsv3_jax.data.tokenizer import FIM_TOKENS, Tokenizer

BOS, EOS, BEGIN, HOLE, END = range(5)


def fim(rate: float, opening: int = 1) -> Fim:
    return Fim(rate, BEGIN, HOLE, END, opening)


def document(length: int, opening: int) -> np.ndarray:
    """`bos text eos` or `text eos`, all tokens of the text different."""
    ids = np.arange(10, 10 + length, dtype=np.int32)
    ids[:opening], ids[-1] = BOS, EOS
    return ids


def slow_cut(fim: Fim, length: int, seed: int, epoch: int, number: int) -> tuple[int, int] | None:
    """The definition for one document, in Python's integers."""
    generator = np.random.Philox(key=key64("fim", seed, epoch), counter=number)
    chance, *cuts = (int(word) for word in generator.random_raw(WORDS_PER_BLOCK)[:3])
    num_text = length - fim.opening - 1
    if num_text <= 0 or (chance >> 11) / 2**53 >= fim.rate:
        return None
    first, second = sorted((cut >> 32) * (num_text + 1) >> 32 for cut in cuts)
    return first + fim.opening, second + fim.opening


def slowly(fim: Fim, ids: list[int], middle: int, suffix: int) -> list[int]:
    """The order of the report, token by token."""
    bos, text, eos = ids[: fim.opening], ids[fim.opening : -1], ids[-1:]
    middle, suffix = middle - fim.opening, suffix - fim.opening
    prefix, middle, suffix = text[:middle], text[middle:suffix], text[suffix:]
    return [*bos, BEGIN, *prefix, HOLE, *suffix, END, *middle, *eos]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 9) | st.integers(1, 500), min_size=1, max_size=20),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    opening=st.integers(0, 1),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 9),
)
def test_decisions_and_order_are_the_slow_definition(
    lengths: list[int], rate: float, opening: int, seed: int, epoch: int
) -> None:
    order = fim(rate, opening)
    cuts = order.cuts(np.array(lengths), seed, epoch)
    for number, length in enumerate(lengths):
        expected = slow_cut(order, length, seed, epoch, number)
        assert tuple(cuts[number]) == (expected or (-1, -1))
        if expected is not None:
            ids = document(length, opening)
            found = order.rearrange(ids, *expected)
            assert found.dtype == np.int32
            assert found.tolist() == slowly(order, ids.tolist(), *expected)


@pytest.mark.parametrize("opening", [0, 1])
def test_the_pieces_give_back_the_document(opening: int) -> None:
    ids = document(12, opening)
    for middle in range(opening, 12):
        for suffix in range(middle, 12):
            found = fim(1.0, opening).rearrange(ids, middle, suffix).tolist()
            assert len(found) == len(ids) + ADDED
            begin, hole, end = (found.index(token) for token in (BEGIN, HOLE, END))
            before, after = found[begin + 1 : hole], found[hole + 1 : end]
            inside = found[end + 1 : -1]
            assert found[:begin] + before + inside + after + found[-1:] == ids.tolist()


def test_documents_without_text_stay_as_they_are() -> None:
    lengths = np.array([1, 2, 3])
    assert (fim(1.0, 1).cuts(lengths, 0, 0)[:, 0] >= 0).tolist() == [False, False, True]
    assert (fim(1.0, 0).cuts(lengths, 0, 0)[:, 0] >= 0).tolist() == [False, True, True]


def test_a_decision_does_not_depend_on_the_other_documents() -> None:
    lengths = np.arange(3, 1003)
    alone = fim(0.5).cuts(lengths[:10], 1, 2)
    np.testing.assert_array_equal(fim(0.5).cuts(lengths, 1, 2)[:10], alone)


def test_the_rate_holds_and_each_epoch_decides_anew() -> None:
    lengths = np.full(5000, 100)
    cuts = [fim(0.1).cuts(lengths, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    taken = [set(np.flatnonzero(cut[:, 0] >= 0)) for cut in cuts]
    for chosen in taken:
        assert abs(len(chosen) / 5000 - 0.1) < 0.02
    assert all(len(a & b) < 120 for i, a in enumerate(taken) for b in taken[:i])


def test_cuts_fall_everywhere_between_two_tokens() -> None:
    cuts = fim(1.0).cuts(np.full(4000, 6), 0, 0) - 1
    pairs, counts = np.unique(cuts, axis=0, return_counts=True)
    assert len(pairs) == 5 * 6 // 2  # 0 <= first <= second <= 4
    ordered = np.where(pairs[:, 0] == pairs[:, 1], 1, 2)
    np.testing.assert_allclose(counts, ordered * 4000 / 25, rtol=0.25)


def test_a_tokenizer_brings_the_tokens(tokenizer: Tokenizer) -> None:
    found = fim_of(tokenizer, 0.1)
    ids = [tokenizer.id_of(token) for token in FIM_TOKENS]
    assert [found.begin_id, found.hole_id, found.end_id] == ids
    assert (found.rate, found.opening) == (0.1, 1)
    assert fim_of(tokenizer, 0.0) is None


def test_a_tokenizer_without_the_tokens_is_refused_by_their_names() -> None:
    vocabulary = {"</s>": 0, "x": 1, FIM_TOKENS[1]: 2}
    plain = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="x")), "plain")
    with pytest.raises(ValueError, match="tokenizer plain lacks") as error:
        fim_of(plain, 0.1)
    assert f"lacks {FIM_TOKENS[0]}, {FIM_TOKENS[2]}; allowed: 0, or" in str(error.value)
    assert fim_of(plain, 0.0) is None
