"""Tokenizers as a `tiktoken.model`, the form in which Moonlight and Kimi-K2 come.

The file holds tokens and their ranks alone. How text is split before them stands in a Python file
beside it, which is read and never run; the one pattern of all those releases is supported. Special
tokens are named in `tokenizer_config.json`.

The result is a byte-level BPE of the tokenizers library and gives tiktoken's ids: two neighbours
merge if their bytes together are a token, the lowest rank first, whatever their division was when
the vocabulary was made. So every division of a token into two becomes a merge of its rank.
One difference is left: the released wrapper cuts texts of more than 25,000 characters without a
space (or of spaces alone) before it splits them.
"""

import ast
import base64
import binascii
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsv3_jax.config.plain_json import check_plain, parse_json

_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
RESERVED = 256
"""Ids after the ranks, for special tokens and for those that have no name yet"""
LONGEST = 4096
"""Bytes of a token: every division of it is looked at"""


def read_tiktoken(path: Path, byte_chars: list[str]) -> Tokenizer:
    """The tokenizer of a `tiktoken.model` and the files beside it.

    Args:
        byte_chars: the character that stands for each byte in a byte-level vocabulary.

    ValueError if a file is missing or unreadable, or if text would be split in another way.
    """
    ranks = _ranks(path)
    _check_pattern(path)
    special = _special_tokens(path, len(ranks))
    spelt = {token: "".join(byte_chars[byte] for byte in token) for token in ranks}
    merges = sorted(
        (rank, ranks[left], ranks[right], spelt[left], spelt[right])
        for token, rank in ranks.items()
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token)))
        if left in ranks and right in ranks
    )
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    pairs = [(left, right) for *_, left, right in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    for name in special:
        if name in vocabulary or special.count(name) > 1:
            raise ValueError(f"tokenizer {path}: special token {name} would have two ids")
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    return backend


def _ranks(path: Path) -> dict[bytes, int]:
    """Tokens by rank 0, 1, 2 ..., all 256 bytes among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path, path).splitlines(), start=1):
        try:
            spelt, rank = line.split()
            token = base64.b64decode(spelt, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"tokenizer {path}: line {number} is no token and its rank") from None
        if len(token) > LONGEST:
            raise ValueError(
                f"tokenizer {path}: line {number} has a token of {len(token):,} bytes; allowed: at "
                f"most {LONGEST:,}"
            )
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise ValueError(f"tokenizer {path}: {missing} of the 256 bytes have no rank")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"tokenizer {path}: ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


def _check_pattern(path: Path) -> None:
    files = sorted(path.parent.glob("tokenization_*.py"))
    if not files:
        raise ValueError(
            f"tokenizer {path}: no tokenization_*.py beside it, which says how text is split"
        )
    for file in files:
        if _pattern_in(_read(file, path)) != PATTERN:
            raise ValueError(
                f"tokenizer {path}: {file.name} splits text in another way than Moonlight and "
                "Kimi-K2 do; needed: their pat_str, or a tokenizer.json"
            )


def _pattern_in(source: str) -> str | None:
    """What is assigned to `pat_str`: a string, or a list of strings joined by another."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes, which do not concern us
            nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of deep nesting
        return None
    for node in nodes:
        names = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(name, ast.Name) and name.id == "pat_str" for name in names):
            inside = ast.walk(node.value)
            strings = [str(part.value) for part in inside if isinstance(part, ast.Constant)]
            return strings[0].join(strings[1:]) if len(strings) > 1 else "".join(strings)
    return None


def _special_tokens(path: Path, first: int) -> list[str]:
    """Names of the ids from `first` on."""
    file = path.with_name("tokenizer_config.json")
    config = _read(file, path)
    try:
        added: dict[str, Any] = parse_json(config)["added_tokens_decoder"]
        names = {int(token_id): token["content"] for token_id, token in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"tokenizer {path}: {file.name} has no added_tokens_decoder of ids and tokens"
        ) from None
    ids = range(first, first + RESERVED)
    strays = sorted(set(names) - set(ids))
    if strays:
        raise ValueError(
            f"tokenizer {path}: {file.name} has special token {names[strays[0]]} at "
            f"{strays[0]}; allowed: {ids[0]} to {ids[-1]}, the ids after the ranks"
        )
    return [names.get(token_id, f"<|reserved_token_{token_id}|>") for token_id in ids]


def _read(file: Path, path: Path) -> str:
    try:
        check_plain(file)
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"tokenizer {path}: cannot read {file.name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"tokenizer {path}: {file.name} is not UTF-8 at byte {error.start}"
        ) from None
