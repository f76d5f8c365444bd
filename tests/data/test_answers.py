"""The mask is exact to the token: answers with the token that ends them, and nothing else."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dsv3_jax.data.answers import AnswerTemplate, Sample
from dsv3_jax.data.chat import DEEPSEEK, ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
START, STOP, THINK, THOUGHT = "<|im_start|>", "<|im_end|>", "<think>", "</think>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Its answers begin with what looks like thinking, and are trimmed.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<｜Assistant｜><think>\\n</think>' + m.content.strip() + ' ' + eos_token }}{% else %}"
    "{{ '<｜User｜>' + m.content.strip() }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
TEMPLATES = {"DeepSeek": DEEPSEEK, "ChatML": CHATML, "thinking": THINKING}
ENDS = {"DeepSeek": EOS, "ChatML": STOP, "thinking": EOS}


def make_tokenizer() -> Tokenizer:
    """Bytes, all marks, and merges across what stands before an answer and its first letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("e", "n"), ("Ċ", "a"), ("b", "b"), (">", "a"), (":", "a")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    marks = (USER, ASSISTANT, START, STOP, THINK, THOUGHT)
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return Tokenizer(backend, "of the test")


TOKENIZER = make_tokenizer()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def oracle(template: ChatTemplate, messages: list[dict], end: str) -> Sample:
    """Prefix by prefix: an answer is what a conversation with it has and the prompt to it has not,
    up to the first mark behind it. Right where marks stand around all messages.
    """
    end_id, tokens = TOKENIZER.added_tokens[end], template.encode(messages, answer=False)
    answer = np.zeros(len(tokens), bool)
    stop = 0
    for place, one in enumerate(messages):
        if one["role"] == "assistant":
            begin = len(template.encode(messages[:place], answer=True))
            stop = begin + tokens[begin:].index(end_id) + 1
            answer[begin:stop] = True
    return Sample(np.array(tokens[:stop], np.int32), answer[:stop])


TEXT = st.text(st.sampled_from("ab e\n>:é<"), max_size=6)
ANSWER = TEXT.filter(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(["DeepSeek", "thinking"]),
    system=st.none() | TEXT,
    turns=st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3),
)
def test_the_mask_is_that_of_rendering_prefix_by_prefix(name, system, turns):
    template = AnswerTemplate(TOKENIZER, TEMPLATES[name])
    messages = [message("system", system)] if system else []
    for asked, said in turns:
        messages += [message("user", asked), message("assistant", said)]
    found, expected = template.sample(messages), oracle(template, messages, ENDS[name])
    np.testing.assert_array_equal(found.tokens_N, expected.tokens_N)
    np.testing.assert_array_equal(found.answer_N, expected.answer_N)
    assert found.answer_N.sum() > len(turns)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", ["a", "e", "ab", "end", "ab</think>b", "_of_sentence", "im_end"])
def test_an_answer_is_its_words_and_its_end(name: str, said: str):
    """Whatever it says, a piece of a mark for one."""
    template = AnswerTemplate(TOKENIZER, TEMPLATES[name])
    found = template.sample([message("user", said), message("assistant", said)])
    learned = "".join(
        TOKENIZER.decode([i]) or TOKENIZER.spelling_of(i)
        for i in found.tokens_N[found.answer_N].tolist()
    )
    before, between = ("<think>\n</think>", " ") if name == "thinking" else ("", "")
    assert learned == f"{before}{said}{between}{ENDS[name]}"
    assert found.answer_N[-1]  # nothing comes behind the last answer


def test_what_stands_before_an_answer_is_the_very_prompt_of_inference():
    """In ChatML a line end stands there, which would merge with an answer's first letter."""
    template = AnswerTemplate(TOKENIZER, CHATML)
    asked = [message("user", "b")]
    found = template.sample([*asked, message("assistant", "aa")])
    whole = template.encode([*asked, message("assistant", "aa")], answer=False)
    prompt = template.encode(asked)
    assert found.tokens_N[~found.answer_N].tolist() == prompt
    assert whole[: len(prompt)] != prompt  # else this test shows nothing


def test_every_answer_of_several_turns_counts_and_what_is_between_does_not():
    template = AnswerTemplate(TOKENIZER, CHATML)
    turns = [message("user", "b"), message("assistant", "aa"), message("user", "bb")]
    found = template.sample([*turns, message("assistant", "a")])
    parts = np.split(found.tokens_N, np.flatnonzero(np.diff(found.answer_N)) + 1)
    spelt = [
        "".join(TOKENIZER.decode([i]) or TOKENIZER.spelling_of(i) for i in part.tolist())
        for part in parts
    ]
    turn = f"\n{START}user\nbb{STOP}\n{START}assistant\n"
    assert spelt[1:] == [f"aa{STOP}", turn, f"a{STOP}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_ends_answers_is_known_without_any(name: str):
    ends = AnswerTemplate(TOKENIZER, TEMPLATES[name]).ends()
    assert ends == {TOKENIZER.added_tokens[ENDS[name]]}


def test_a_template_that_ends_no_answer_has_no_end():
    for source in ("{{ messages[-1].content }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"):
        assert AnswerTemplate(TOKENIZER, source).ends() == frozenset()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "puts no token behind messages[1]"),
        (CHATML.replace("m.content", "m.content | upper"), "changes what messages[1] says"),
        ("{{ messages | length }}", "what stands before messages[1] is not what a model is asked"),
        (CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif"),
         "what stands before messages[1]"),
        ("{{ messages[-1].content + '<|im_end|>' if messages | length > 2 else '' }}" + CHATML,
         "changes messages[1] when the conversation goes on"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_so_in_a_line(source: str, error: str):
    template = AnswerTemplate(TOKENIZER, source, "t.jinja")
    turns = [message("user", "b"), message("assistant", "ab")] * 2
    with pytest.raises(ValueError, match=r"^t\.jinja") as told:
        template.sample(turns)
    assert error in str(told.value)
    assert "\n" not in str(told.value)
