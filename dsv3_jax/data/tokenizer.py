"""Byte-level BPE under DeepSeek's pre-tokenisation rules (report 4.1), or a tokenizer from a file.

A trained tokenizer starts with all 256 bytes, so it represents every text. Its six special tokens
take the lowest ids: begin of sentence 0, end of sentence 1 and padding 2 as in the published
tokenizer; then fill-in-the-middle's three, which the published one has at the top: a vocabulary of
any size has a bottom, but no fixed top. The random split of tokens that join punctuation with line
ends is in `split_tokens`.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config.fields import shown
from dsv3_jax.config.plain_json import check_plain, read_json
from dsv3_jax.data.cache import hash_texts, store
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.tiktoken import read_tiktoken
from dsv3_jax.files import cache_folder, replace_file

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
)
FIM_TOKENS = SPECIAL_TOKENS[3:]
"""Before the prefix, before the suffix, before the middle"""
_SETTINGS = "tokenizer_config.json"
_BOS_NAMES = (SPECIAL_TOKENS[0], "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_EOS_NAMES = (SPECIAL_TOKENS[1], "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
# Part of the cache key: raise it with any change of the rules below.
_RULES_VERSION = 1
# Every id has a place in a table, so one stray id would take all memory. Kimi-K2 has 2^17.3.
_LARGEST_ID = 2**24 - 1
_DIGITS = r"\p{N}{1,3}"
_CHINESE_AND_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
# In order of preference.
_WORDS = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII punctuation mark and ASCII letters
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word with what precedes it, such as one space
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation with its line ends
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # indentation, but for the space that belongs to the next word
        r"\s+",
    )
)
_REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """Text to ids and back. Special tokens spelt out in a text are text, not special.

    Attributes:
        name: what messages call it: its file, where it has one.
        vocab_size: the largest id + 1.
        bos_id: written before a document; equal to eos_id where the vocabulary has no such token.
        eos_id: written after a document.
        token_bytes: exact bytes of each id; none for special tokens and for ids without a token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        bos: Sequence[str] = (),
        eos: Sequence[str] = (),
    ) -> None:
        """`bos`, `eos`: tokens that are known to begin and end a text; else usual names count."""
        _allow_threads()
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # the same text gives the same ids, always
        self._backend = backend
        self.name = name
        self.eos_id = _first_id(backend, (*eos, *_EOS_NAMES))
        if self.eos_id is None:
            raise ValueError(
                f"tokenizer {name} has no end-of-sentence token; looked for "
                f"{', '.join(_EOS_NAMES)}, and for eos_token in {_SETTINGS} beside it"
            )
        bos_id = _first_id(backend, (*bos, *_BOS_NAMES))
        self.bos_id = self.eos_id if bos_id is None else bos_id
        self.token_bytes = _token_bytes(backend, name, {self.bos_id, self.eos_id})
        self.vocab_size = len(self.token_bytes)

    @functools.cached_property
    def byte_lengths_V(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [V]."""
        return np.array([len(data) for data in self.token_bytes], np.int32)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything that decides the ids of a text, in hexadecimal."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling, special tokens included; None if there is none."""
        return self._backend.token_to_id(token)

    def spelling_of(self, token_id: int) -> str | None:
        """How the vocabulary writes a token, special ones included; None if there is none."""
        return self._backend.id_to_token(token_id)

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """Spelling -> id of tokens that stand for a mark in a text, special or not: turns, ends."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added}

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [N], without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [N], encoded in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens; U+FFFD for ids beyond V and for broken UTF-8."""
        table = self.token_bytes
        data = b"".join(table[i] if 0 <= i < len(table) else _REPLACEMENT for i in ids)
        return data.decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, as transformers reads it. OSError if that is not possible."""
        replace_file(path, self._backend.to_str(pretty=True).encode())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids, the same for the same texts; fewer for short texts.

    ValueError if `vocab_size` leaves no room for the 256 bytes and the special tokens, or is
    beyond int32.
    """
    check_vocab_size(vocab_size)
    _allow_threads()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, f"trained to {vocab_size} ids")


def check_vocab_size(vocab_size: int) -> None:
    """ValueError if no tokenizer of so many ids can be trained."""
    least, most = 256 + len(SPECIAL_TOKENS), 2**31 - 1  # ids are int32
    if not least <= vocab_size <= most:
        raise ValueError(
            f"model.vocab_size is {vocab_size}; allowed with a trained tokenizer: {least} (256 "
            f"bytes and {len(SPECIAL_TOKENS)} special tokens) to {most}"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a `tiktoken.model` with the files beside it.

    ValueError if the file is missing, unreadable or no tokenizer, or if no token is known to end a
    text.
    """
    path = user_path(path, "tokenizer")
    if path.suffix == ".model":
        byte_chars = sorted(_byte_alphabet(), key=_byte_alphabet().__getitem__)
        return Tokenizer(read_tiktoken(path, byte_chars), str(path))
    try:
        check_plain(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"tokenizer {path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tokenizer {path} is no tokenizer.json: not UTF-8 at byte {error.start}"
        ) from None
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer {path} is no tokenizer.json: {reason}") from None
    return Tokenizer(backend, str(path), *_stated(path.parent))


def _stated(folder: Path) -> Iterator[list[str]]:
    """The bos and the eos token of transformers' settings beside a tokenizer, where they are."""
    try:
        settings = read_json(folder / _SETTINGS)
    except (OSError, ValueError):
        settings = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name) if isinstance(settings, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        yield [token] if isinstance(token, str) else []


def find_tokenizer(folder: str | Path) -> Path | None:
    """The tokenizer file of a folder, as `load_tokenizer` takes it; None if there is none."""
    files = (Path(folder) / name for name in ("tokenizer.json", "tiktoken.model"))
    return next((file for file in files if file.is_file()), None)


def cached_tokenizer(
    texts: Sequence[str], vocab_size: int, cache_dir: str | Path | None = None
) -> Tokenizer:
    """`train_tokenizer`, once: kept by content hash in `cache_dir` or the user's cache folder."""
    folder = cache_folder(cache_dir)
    if folder is None:
        return train_tokenizer(texts, vocab_size)
    key = hash_texts((f"rules {_RULES_VERSION}, {vocab_size} ids", *texts))
    path = folder / "tokenizers" / f"{key}.json"
    try:
        return load_tokenizer(path)
    except ValueError:  # absent, or damaged and replaced below
        tokenizer = train_tokenizer(texts, vocab_size)
    store(path, tokenizer._backend.to_str().encode())
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    rules = (_DIGITS, _CHINESE_AND_KANA, _WORDS)
    splits = [pre_tokenizers.Split(tokenizers.Regex(rule), "isolated") for rule in rules]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def _allow_threads() -> None:
    """Encode in parallel, and no warning when the process forks later: children do not encode."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _first_id(backend: tokenizers.Tokenizer, names: Iterable[str]) -> int | None:
    ids = (backend.token_to_id(name) for name in names)
    return next((token_id for token_id in ids if token_id is not None), None)


def _token_bytes(backend: tokenizers.Tokenizer, name: str, separators: set[int]) -> list[bytes]:
    """The bytes of every id. Pieces are spelt in the byte-level alphabet or as in SentencePiece."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    steps = f"{backend.normalizer!r} {backend.pre_tokenizer!r} {backend.decoder!r}"
    is_byte_level = "ByteLevel" in steps
    piece_bytes = _byte_level_piece if is_byte_level else _sentence_piece
    largest = max(vocabulary.values(), default=-1)
    if largest > _LARGEST_ID:
        piece = max(vocabulary, key=vocabulary.__getitem__)
        raise ValueError(
            f"tokenizer {name} has id {largest} for {shown(piece)}; allowed: at most {_LARGEST_ID}"
        )
    table = [b""] * (largest + 1)
    for piece, token_id in vocabulary.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else piece.encode()
        elif token_id not in separators:
            table[token_id] = piece_bytes(piece)
    return table


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: what Latin-1 can show is itself, the other 68 follow from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _byte_level_piece(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in piece):
        return bytes(alphabet[char] for char in piece)
    return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
