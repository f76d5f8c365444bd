"""Conversations become the tokens that their template means, and nobody speaks for another."""

import json
import os
from pathlib import Path

import pytest

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from tests.chat_tokenizer import ASSISTANT, BOS, EOS, THOUGHT, USER, byte_backend, chat_tokenizer

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def spelt(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Marks as they are, and the text between them."""
    parts, marks = [], {i: mark for mark, i in tokenizer.added_tokens.items()}
    for token in ids:
        if token in marks:
            parts += [marks[token], ""]
        else:
            parts = parts or [""]
            parts[-1] += tokenizer.decode([token])
    return [part for part in parts if part]


def test_deepseeks_template_is_the_published_one(tokenizer):
    messages = [
        {"role": "system", "content": "be kind. "},
        {"role": "user", "content": "  hi\n"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "so?"},
    ]
    template = ChatTemplate(tokenizer)
    turns = [BOS, "be kind. ", USER, "  hi\n", ASSISTANT, "ho", EOS, USER, "so?"]
    assert spelt(tokenizer, template.encode(messages)) == [*turns, ASSISTANT]
    assert spelt(tokenizer, template.encode(messages, answer=False)) == turns


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("mark", [BOS, EOS, USER, ASSISTANT, THOUGHT])
def test_who_spells_a_mark_has_its_text_and_not_the_mark(tokenizer, role, mark):
    said = f"a{mark}{mark}b"
    ids = ChatTemplate(tokenizer).encode([{"role": role, "content": said}])
    assert said in tokenizer.decode(ids)
    expected = ChatTemplate(tokenizer).encode([{"role": role, "content": "a"}])
    marks = set(tokenizer.added_tokens.values())
    assert [i for i in ids if i in marks] == [i for i in expected if i in marks]


@pytest.mark.parametrize("cut", range(1, len(USER)))
def test_two_who_speak_spell_no_mark_together(tokenizer, cut):
    said = [{"role": "system", "content": part} for part in (USER[:cut], USER[cut:])]
    ids = ChatTemplate(tokenizer).encode([*said, *ASK])
    assert tokenizer.decode(ids) == f"{USER}{USER}hi{ASSISTANT}"
    assert ids.count(tokenizer.added_tokens[USER]) == 1


def test_what_takes_marks_apart_cannot_be_sent(tokenizer):
    """Text that has it already is not told from text into which it was put."""
    for said in ("\ufdd0hi", "h\ufdd0i", "hi\ufdd0"):
        ids = ChatTemplate(tokenizer).encode([{"role": "user", "content": said}])
        assert ids == ChatTemplate(tokenizer).encode(ASK)


def test_a_mark_of_one_character_is_text_too():
    backend = byte_backend()
    backend.add_special_tokens([EOS, "☞"])
    tokenizer = Tokenizer(backend, "of the test")
    template = ChatTemplate(tokenizer, "☞{{ messages[0].content }}☞")
    ids = template.encode([{"role": "user", "content": "☞a☞☞"}])
    assert ids.count(tokenizer.added_tokens["☞"]) == 2
    assert tokenizer.decode(ids) == "☞a☞☞"


def test_an_assistants_marks_are_marks_for_templates_look_for_them(tokenizer):
    source = "{{ messages[0].content.split('</think>')[-1] }}"
    said = [{"role": "assistant", "content": f"thought{THOUGHT}word"}]
    assert tokenizer.decode(ChatTemplate(tokenizer, source).encode(said)) == "word"


def test_a_folders_own_template_wins(tokenizer, tmp_path: Path):
    def answer() -> str:
        return tokenizer.decode(ChatTemplate.of_folder(tmp_path, tokenizer).encode(ASK))

    assert answer() == f"{USER}hi{ASSISTANT}"  # marks that are not special have text
    settings = {"chat_template": "settings {{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert answer() == "settings hi"
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "several"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert answer() == "several"
    (tmp_path / "chat_template.jinja").write_text("{% if true %}\nfile\n{% endif %}\n", "utf-8")
    assert answer() == "file\n"


def test_templates_have_what_transformers_gives_them(tokenizer):
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    found = spelt(tokenizer, ChatTemplate(tokenizer, source).encode([*ASK, *ASK]))
    assert found == [BOS, '{"role": "user", "content": "hi"}4', EOS]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ messages[0] | tojson(sort_keys=True) }}", '{"content": "hi", "role": "user"}'),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{{ [1] | tojson(False, None, (',', ':')) }}", "[1]"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "ahib"),
    ],
)
def test_filters_and_tags_are_transformers_own(tokenizer, source: str, said: str):
    template = ChatTemplate(tokenizer, source)
    assert spelt(tokenizer, template.encode(ASK)) == [said]


def test_marks_stay_text_however_deep_a_users_content_is(tokenizer):
    template = ChatTemplate(tokenizer, "{{ messages[0].content[0].text }}")
    content = [{"type": "text", "text": f"a{EOS}b"}]
    ids = template.encode([{"role": "user", "content": content}])
    assert tokenizer.eos_id not in ids
    assert content == [{"type": "text", "text": f"a{EOS}b"}]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no\nsuch') }}", "no such"),
        ("{{ messages[3].content }}", "list object has no element 3"),
        ("{{ messages.pop() }}", "access to attribute 'pop' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object"),
        ("{% for i in range(10**7) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages | xmlattr }}", "has no attribute 'items'"),
        ("{{ 'x' * 2 ** 60 }}", "MemoryError"),
    ],
)
def test_a_template_that_fails_says_so_in_a_line(tokenizer, source, said):
    with pytest.raises(ValueError, match=said) as raised:
        ChatTemplate(tokenizer, source, "the template").encode(ASK)
    assert str(raised.value).startswith("the template")
    assert "\n" not in str(raised.value)


def test_what_is_no_template_is_refused_with_its_file(tokenizer, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match=r"chat_template.jinja is no chat template: "):
        ChatTemplate.of_folder(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xffb")
    with pytest.raises(ValueError, match=r"chat_template.jinja: byte 1 is no UTF-8"):
        ChatTemplate.of_folder(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "pipe.jinja")  # to read it would be to wait for who writes to it
    with pytest.raises(OSError, match=r"not a plain file"):
        ChatTemplate.of_file(tmp_path / "pipe.jinja", tokenizer)
    several = [{"name": ["default"]}, {"name": "default", "template": "{% break %}"}]
    for content, said in (
        ('{"chat_template": 5}', "chat_template is 5; allowed: text"),
        ('{"chat_template": [5]}', r"chat_template is \[5\]; allowed: text"),
        ("{", r"tokenizer_config.json: not JSON: "),
        ('["chat_template"]', "no table of fields"),
        (json.dumps({"chat_template": several}), "no chat template: 'break' outside loop"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            ChatTemplate.of_folder(tmp_path, tokenizer)
