"""Conversations to rows: what is held out, what has no place in a row, whose template counts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.sample_corpus import build_samples
from dsv3_jax.data.tokenizer import Tokenizer

# Short: the trained tokenizer knows none of DeepSeek's marks for turns.
TEMPLATE = (
    "{% for m in messages %}{{ ('=' if m.role == 'assistant' else '?') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)
LENGTH = 24


def sample(asked: str, said: str, **more: object) -> dict:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns} | more


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """40 questions, each twice."""
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    records = [sample(f"q{i}", f"a{i}{again}") for i in range(40) for again in "xy"]
    write(tmp_path / "a.jsonl", records)
    return DataConfig(
        source=str(tmp_path / "a.jsonl"),
        format="messages",
        isolate=True,
        length=LENGTH,
        chat_template=str(tmp_path / "t.jinja"),
        validation_fraction=0.25,
    )


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def build(
    cfg: DataConfig, tokenizer: Tokenizer | None, folder: Path | None = None
) -> tuple[Corpus, list[str]]:
    said: list[str] = []
    return build_samples(cfg, 400, 0, said.append, tokenizer, folder), said


def texts(rows, tokenizer: Tokenizer) -> list[str]:
    """What the samples of the first epoch ask and say, eos aside."""
    found = []
    for row in rows:
        for segment in range(row.segments_T.max() + 1):
            own = row.tokens_T[row.segments_T == segment]
            text = tokenizer.decode(own[own != tokenizer.eos_id].tolist())
            found += [text] if text else []
    return found


def test_all_samples_of_a_question_are_on_one_side(data: DataConfig, tokenizer: Tokenizer):
    corpus, said = build(data, tokenizer)
    sides = texts(corpus.train, tokenizer), texts(corpus.validation, tokenizer)
    assert sum(map(len, sides)) == 80
    asked = [{text.partition("=")[0] for text in side} for side in sides]
    assert not asked[0] & asked[1]
    assert 4 <= len(asked[1]) <= 16
    train, held_out = (len(side) for side in sides)
    assert f"{train} samples to train on, {held_out} held out" in said[0]


def test_few_questions_still_leave_one_on_each_side(data: DataConfig, tokenizer: Tokenizer):
    for fraction in (1e-9, 1 - 1e-9):
        write(Path(data.source), [sample("a", "1"), sample("b", "2"), sample("c", "3")])
        corpus, _ = build(replace(data, validation_fraction=fraction), tokenizer)
        counts = [len(texts(rows, tokenizer)) for rows in (corpus.train, corpus.validation)]
        assert sorted(counts) == [1, 2]
    write(Path(data.source), [sample("a", "1"), sample("a", "2")])
    same = "2 samples are left of 2, and all ask the same; allowed: two questions"
    with pytest.raises(ValueError, match=same):
        build(data, tokenizer)


def test_what_is_longer_than_a_row_is_dropped_or_cut_and_counted(
    data: DataConfig, tokenizer: Tokenizer
):
    many = "0123456789" * 4
    rejected = {"verification": {"by": "human", "verdict": "rejected"}}
    records = [sample("a", "1"), sample("b", many), sample(many, "3"), sample("c", "4", **rejected)]
    write(Path(data.source), [*records, sample("d", "5")])
    corpus, said = build(data, tokenizer)
    assert {t for rows in (corpus.train, corpus.validation) for t in texts(rows, tokenizer)} == {
        "?a=1",
        "?d=5",
    }
    assert said[0].endswith(
        "; 1 rejected by their verification; 2 dropped, longer than data.length 24"
    )
    corpus, said = build(replace(data, too_long="cut"), tokenizer)
    rows = [row for rows in (corpus.train, corpus.validation) for row in rows]
    held = [text for rows in (corpus.train, corpus.validation) for text in texts(rows, tokenizer)]
    assert sorted(t[:3] for t in held) == ["?a=", "?b=", "?d="]
    # The cut one fills its row to the last place, and all of its answer there counts.
    (full,) = [row for row in rows if not row.segments_T.any()]
    asked = len(tokenizer.encode("?b="))
    np.testing.assert_array_equal(full.labels_T >= 0, np.arange(LENGTH) >= asked - 1)
    assert said[0].endswith("; 1 dropped, longer than data.length 24; 1 cut to data.length 24")


def test_no_sample_left_is_told_with_the_reasons(data: DataConfig, tokenizer: Tokenizer):
    write(Path(data.source), [sample("a", "0123456789" * 4)])
    with pytest.raises(ValueError, match=r"no sample is left of 1; 1 dropped, longer than data\.l"):
        build(data, tokenizer)
    write(Path(data.source), [sample("a", "1"), sample("b", "0123456789" * 4)])
    left = r"1 sample is left of 2; 1 dropped, longer than .* 24; allowed: two questions or more"
    with pytest.raises(ValueError, match=left):
        build(data, tokenizer)
    Path(data.source).write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: no sample is in it; allowed: two questions"):
        build(data, tokenizer)


def test_the_template_is_the_files_else_the_folders_else_deepseeks(
    data: DataConfig, tokenizer: Tokenizer, tmp_path: Path
):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("?", "!"))
    own, none = replace(data, length=64), replace(data, length=64, chat_template="")
    found = [build(cfg, tokenizer, tmp_path)[0] for cfg in (own, none)]
    found.append(build(none, tokenizer)[0])
    begins = [texts(corpus.train, tokenizer)[0][:8] for corpus in found]
    assert [begin[0] for begin in begins] == ["?", "!", "<"]
    assert begins[2] == "<｜User｜>"
    assert len({corpus.content_hash for corpus in found}) == 3  # other ids, another run


def test_what_cannot_be_encoded_is_told_with_file_and_line(data: DataConfig, tokenizer: Tokenizer):
    Path(data.chat_template).write_text("{{ raise_exception('no chats') }}")
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: .*t\.jinja: no chats$"):
        build(data, tokenizer)
    Path(data.chat_template).write_text("{% if %}")
    with pytest.raises(ValueError, match=r"t\.jinja is no chat template: "):
        build(data, tokenizer)
    with pytest.raises(ValueError, match=r"data\.chat_template .*none\.jinja: No such file"):
        build(replace(data, chat_template="none.jinja"), tokenizer)
    with pytest.raises(ValueError, match=r"data\.tokenizer is train; allowed with data\.format me"):
        build(data, None)
