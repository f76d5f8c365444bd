"""A conversation as text holds all that its ids need, and goes on where it should."""

import pytest

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluate.conversations import Conversations
from tests.chat_tokenizer import ASSISTANT, EOS, USER, chat_tokenizer

ASK = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.fixture
def chat(tokenizer) -> Conversations:
    return Conversations(tokenizer)


@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [{"role": "system", "content": "be brief"}, ASK],
        [ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}],
        [{"role": "user", "content": f"say {ASSISTANT} or {EOS}{USER}, <｜"}],
    ],
)
def test_text_and_back_is_what_the_template_gives(chat, tokenizer, messages):
    assert chat.ids(chat.text(messages)) == ChatTemplate(tokenizer).encode(messages)


def test_what_is_added_follows_the_marks(chat, tokenizer):
    ids = chat.ids(chat.text([ASK]) + " A")
    assert ids == [*chat.ids(chat.text([ASK])), *tokenizer.encode(" A").tolist()]


@pytest.mark.parametrize("begun", ["The answer is", "The answer is "])
def test_an_answer_that_has_begun_goes_on(chat, tokenizer, begun):
    text = chat.text([ASK, {"role": "assistant", "content": begun}], answer=False)
    assert chat.ids(text) == [*chat.ids(chat.text([ASK])), *tokenizer.encode(begun).tolist()]


def test_a_template_that_changes_what_was_begun_is_refused(tokenizer):
    chat = Conversations(tokenizer, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="changes the assistant's own words: 'so'"):
        chat.text([ASK, {"role": "assistant", "content": "so"}], answer=False)


def test_the_fingerprint_is_the_templates(tokenizer):
    one, same, other = (Conversations(tokenizer, source) for source in ("a", "a", "b"))
    assert one.fingerprint == same.fingerprint != other.fingerprint
