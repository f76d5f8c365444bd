"""A `tiktoken.model` gives tiktoken's ids; what would give others is refused."""

import json
import os
import random
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax.data.tiktoken import RESERVED
from dsv3_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from tests.data.tiktoken_folder import FIRST, GOLDEN, PARTS, SPECIAL, write_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("kimi")))


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer):
    assert len(GOLDEN["texts"]) > 400
    assert sum(len(ids) == len(text.encode()) for text, ids in _golden() if text) < 40
    for text, ids in _golden():
        assert tokenizer.encode(text).tolist() == ids, repr(text)
        assert tokenizer.decode(ids) == text


def _golden() -> list[tuple[str, list[int]]]:
    return list(zip(GOLDEN["texts"], GOLDEN["ids"], strict=True))


def test_special_tokens_follow_the_ranks(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == FIRST + RESERVED
    assert (tokenizer.bos_id, tokenizer.eos_id) == (FIRST, FIRST + 1)
    assert {i: tokenizer.id_of(name) for i, name in SPECIAL.items()} == {i: i for i in SPECIAL}
    assert tokenizer.id_of(f"<|reserved_token_{FIRST + 3}|>") == FIRST + 3
    assert max(tokenizer.encode("[BOS]<|im_end|>[EOS]")) < FIRST


def test_saved_it_is_a_tokenizer_json_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = load_tokenizer(tmp_path / "tokenizer.json")
    assert saved.content_hash == tokenizer.content_hash
    for text, ids in _golden():
        assert saved.encode(text).tolist() == ids


def test_a_folder_s_tokenizer_json_comes_before_its_ranks(tmp_path: Path):
    assert find_tokenizer(tmp_path) is None
    path = write_folder(tmp_path)
    assert find_tokenizer(tmp_path) == path
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"


FAULTS = {
    "no wrapper": (
        lambda folder: (folder / "tokenization_kimi.py").unlink(),
        "no tokenization_*.py beside it, which says how text is split",
    ),
    "another pattern": (
        lambda folder: write_folder(folder, parts=PARTS[1:]),
        (
            "tokenization_kimi.py splits text in another way than Moonlight and Kimi-K2 do; "
            "needed: their pat_str, or a tokenizer.json"
        ),
    ),
    "a pipe": (
        lambda folder: [
            (folder / "tokenization_kimi.py").unlink(),
            os.mkfifo(folder / "tokenization_kimi.py"),
        ],
        "cannot read tokenization_kimi.py: not a plain file",
    ),
    "settings nested": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[" * 10**5),
        "tokenizer_config.json has no added_tokens_decoder of ids and tokens",
    ),
    "no Python": (
        lambda folder: (folder / "tokenization_kimi.py").write_text("pat_str = ("),
        (
            "tokenization_kimi.py splits text in another way than Moonlight and Kimi-K2 do; "
            "needed: their pat_str, or a tokenizer.json"
        ),
    ),
    "Python that Python's parser gives up on": (
        lambda folder: (folder / "tokenization_kimi.py").write_text("x = " + "-" * 20000 + "1"),
        (
            "tokenization_kimi.py splits text in another way than Moonlight and Kimi-K2 do; "
            "needed: their pat_str, or a tokenizer.json"
        ),
    ),
    "a token of a whole file": (
        lambda folder: write_folder(
            folder, ranks=[*GOLDEN["ranks"], b64encode(b"a" * 100_000).decode()]
        ),
        f"line {FIRST + 1} has a token of 100,000 bytes; allowed: at most 4,096",
    ),
    "no special tokens": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        "tokenizer_config.json has no added_tokens_decoder of ids and tokens",
    ),
    "no configuration": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "cannot read tokenizer_config.json: No such file or directory",
    ),
    "a special token among the ranks": (
        lambda folder: (folder / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {"7": {"content": "[BOS]"}}})
        ),
        (
            f"tokenizer_config.json has special token [BOS] at 7; "
            f"allowed: {FIRST} to {FIRST + 255}, the ids after the ranks"
        ),
    ),
    "a special token that is a rank": (
        lambda folder: write_folder(folder, ranks=[*GOLDEN["ranks"][:-1], "W0VPU10="]),
        "special token [EOS] would have two ids",
    ),
    "a line cut off": (
        lambda folder: (folder / "tiktoken.model").write_text("AA== 0\nAQ=="),
        "line 2 is no token and its rank",
    ),
    "no base64": (
        lambda folder: (folder / "tiktoken.model").write_text("AA== 0\n?? 1"),
        "line 2 is no token and its rank",
    ),
    "bytes without rank": (
        lambda folder: write_folder(folder, ranks=GOLDEN["ranks"][1:]),
        "1 of the 256 bytes have no rank",
    ),
    "a token twice": (
        lambda folder: write_folder(folder, ranks=[*GOLDEN["ranks"], GOLDEN["ranks"][-1]]),
        f"ranks are not 0 to {FIRST - 1}, each once",
    ),
    "SentencePiece": (
        lambda folder: (folder / "tiktoken.model").write_bytes(b"\n\x0e\xff\x00"),
        "tiktoken.model is not UTF-8 at byte 2",
    ),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_folder_is_refused_with_one_line(
    tmp_path: Path, fault: Callable[[Path], object], message: str
):
    path = write_folder(tmp_path)
    fault(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        load_tokenizer(path)
    assert str(caught.value) == f"tokenizer {path}: {message}"


@pytest.mark.exhaustive
def test_every_character_is_split_as_tiktoken_splits_it(tmp_path: Path):
    """With all pairs of bytes as tokens, in random order, a border moved is another encoding."""
    tiktoken = pytest.importorskip("tiktoken")
    draw = random.Random(1)
    pairs = [bytes((a, b)) for a in range(256) for b in range(256)]
    draw.shuffle(pairs)
    ranks = {token: rank for rank, token in enumerate([*map(_byte, range(256)), *pairs])}
    spelt = [b64encode(token).decode() for token in ranks]
    encoding = tiktoken.Encoding(
        "", pat_str="|".join(PARTS), mergeable_ranks=ranks, special_tokens={}
    )
    path = write_folder(tmp_path, ranks=spelt)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(len(ranks)): {"content": "[EOS]"}}})
    )
    tokenizer = load_tokenizer(path)
    points = (chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    texts = [f"a{c}中{c}Bb{c} {c}{c}12{c}3\n{c}'s{c}  {c}'T" for c in points]
    known = sorted(set("".join(GOLDEN["texts"])))
    texts += ["".join(draw.choices(known, k=draw.randint(1, 14))) for _ in range(200_000)]
    for start in range(0, len(texts), 10_000):
        batch = texts[start : start + 10_000]
        ours = [ids.tolist() for ids in tokenizer.encode_batch(batch)]
        assert ours == encoding.encode_ordinary_batch(batch)


def _byte(value: int) -> bytes:
    return bytes((value,))
