"""Prompts: their length, where the needle stands, what is asked, and what decides all of it."""

import numpy as np
import pytest

from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.evaluate.haystack import Haystack
from dsv3_jax.evaluate.needles import (
    WORDS,
    Place,
    Prompt,
    Sentence,
    build_prompts,
    depths_of,
    draw_sentence,
    places_of,
)

TEXTS = ["ein Text, größer als andere\n" * 40, "line of text 12\n\n" * 50, "x = y + 1\n" * 60]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*TEXTS, draw_sentence(np.random.default_rng(0)).text * 3], 400)


@pytest.fixture(scope="module")
def haystack(tokenizer: Tokenizer) -> Haystack:
    documents = [Document(str(place), text) for place, text in enumerate(TEXTS)]
    return Haystack("texts", documents, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, haystack: Haystack) -> dict[Place, list[Prompt]]:
    return {
        place: list(build_prompts(tokenizer, haystack, place, 3, seed=5))
        for place in places_of([160, 300], depths_of(4))
    }


def test_a_prompt_has_exactly_its_length_and_ends_with_question_and_answer(prompts, tokenizer):
    for place, of_place in prompts.items():
        assert len(of_place) == 3
        for prompt in of_place:
            assert prompt.tokens_T.shape == (place.length,)
            assert prompt.tokens_T.dtype == np.int32
            assert prompt.tokens_T[0] == tokenizer.bos_id
            asked = prompt.sentence.beginning + prompt.sentence.value
            assert tokenizer.decode(prompt.tokens_T).endswith(asked)
            answer_A = prompt.tokens_T[-prompt.answer :]
            assert tokenizer.decode(answer_A) == prompt.sentence.value


def test_the_needle_stands_at_its_depth_in_the_text_that_the_haystack_has(
    prompts, tokenizer, haystack
):
    whole = [haystack.stretch(document, len(haystack)) for document in range(3)]
    for place, of_place in prompts.items():
        for prompt in of_place:
            needle, tokens_T = prompt.needle, prompt.tokens_T
            assert tokenizer.decode(tokens_T[needle]) == prompt.sentence.text
            question = needle.stop - needle.start - len(tokenizer.encode(prompt.sentence.ending))
            text_T = np.concatenate(
                [tokens_T[1 : needle.start], tokens_T[needle.stop : place.length - question]]
            )
            assert needle.start - 1 == round(place.depth * len(text_T))
            begins = [(text_T == of_document[: len(text_T)]).all() for of_document in whole]
            assert sum(begins) == 1, "the text is documents from a beginning on"


def test_what_is_asked_is_token_for_token_how_the_needle_begins(prompts):
    for of_place in prompts.values():
        for prompt in of_place:
            needle_T = prompt.tokens_T[prompt.needle]
            # The longest end of the prompt that the needle begins with: question and answer.
            asked = max(
                count
                for count in range(1, len(needle_T))
                if (prompt.tokens_T[-count:] == needle_T[:count]).all()
            )
            assert asked > prompt.answer + 3


def test_pieces_are_never_tokenised_as_one_text(tokenizer):
    """A tokenizer that has the haystack's end and the needle's beginning as one token, and the
    question with the answer: pieces keep their own tokens all the same.
    """
    glued = train_tokenizer(["=> 77\n"] * 9 + ["aaa=> 77"] * 9, 290)
    assert len(glued.encode("a=> 77")) < sum(len(glued.encode(x)) for x in ("a", "=", "> ", "77"))
    text = Haystack("a", [Document("a", "a" * 300)], glued)
    sentence = Sentence("=", "> 77", "!")
    (prompt,) = build_prompts(glued, text, Place(64, 0.5), 1, 0, lambda rng: sentence)
    pieces = [glued.encode(piece) for piece in sentence]
    np.testing.assert_array_equal(prompt.tokens_T[prompt.needle], np.concatenate(pieces))
    np.testing.assert_array_equal(
        prompt.tokens_T[-prompt.answer - len(pieces[0]) :], np.concatenate(pieces[:2])
    )


def test_a_cell_depends_on_seed_and_place_and_not_on_other_cells(prompts, tokenizer, haystack):
    def again(place: Place, count: int, seed: int) -> list[Prompt]:
        return list(build_prompts(tokenizer, haystack, place, count, seed))

    def same(one: Prompt, other: Prompt) -> bool:
        return np.array_equal(one.tokens_T, other.tokens_T) and one[1:] == other[1:]

    place = Place(160, 1 / 3)
    for one, other in zip(again(place, 2, 5), prompts[place], strict=False):
        assert same(one, other)
    drawn = [again(place, 1, 6)[0], *(one for cell in prompts.values() for one in cell)]
    values = {prompt.sentence.value for prompt in drawn}
    assert len(values) == len(drawn), "each prompt has a needle of its own"


def test_keys_and_values_are_drawn_evenly():
    rng = np.random.default_rng(1)
    drawn = [draw_sentence(rng) for _ in range(3000)]
    assert len(WORDS) == len({*WORDS}) == 64
    for one in drawn:
        assert one.text == f"{one.beginning}{one.value}.\n"
        assert one.value.startswith(" ")
    texts = [one.text.strip(".\n").removeprefix("The secret words are ").split() for one in drawn]
    assert all(len({*words}) == 4 for words in texts), "a word twice would have two answers"
    for place in range(4):
        counts = [sum(words[place] == word for words in texts) for word in WORDS]
        assert sum(counts) == 3000
        assert min(counts) > 15  # 47 on average, with a deviation of 6.8


def test_depths_are_even_from_end_to_end():
    assert depths_of(5) == [0, 0.25, 0.5, 0.75, 1]
    assert depths_of(1) == [0.5]
    with pytest.raises(ValueError, match="--depths is 0; allowed: 1 or more"):
        depths_of(0)


def test_a_length_without_room_and_a_text_too_short_are_told(tokenizer, haystack):
    with pytest.raises(ValueError, match=r"--lengths: 60 tokens; allowed: at least \d+, for a"):
        list(build_prompts(tokenizer, haystack, Place(60, 0.0), 1, 0))
    with pytest.raises(ValueError, match=r"--haystack texts: [\d,]+ tokens, and 99,9\d\d of text"):
        list(build_prompts(tokenizer, haystack, Place(100_000, 0.0), 1, 0))
