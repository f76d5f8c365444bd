"""Makes `tiktoken.json` beside this file: a small vocabulary, texts, and their ids by tiktoken.

pip install tiktoken
python -m tests.golden.make_tiktoken
"""

import base64
import json
import random
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dsv3_jax.data.tiktoken import PATTERN
from dsv3_jax.data.tokenizer import _byte_alphabet

# Of every kind that the pattern tells apart, and of kinds that engines of regular expressions
# have disagreed on: unassigned, titlecase, modifiers, marks, odd spaces, odd cases of s and k.
TRICKY = (
    "aAzZ0'sStTmMlLdDrReEvV \t\n\r.,-_中文漢あアー々〆한א١²½ⅧǅʰªºſK\u0301\u00a0\u2003\u0085\u2028"
    "\x00\x1c\x0b\x0c\u200b\u3007\u2e80\u0378\U0001f600\U00020000\U00030000\U000e0100\U0010ffff"
)
TEXTS = (
    "",
    "def f(x):\n    return x  # the next line\n\n\nclass A:\t\n\tpass\r\n",
    "I'll say we've done what they'd want, it's John's turn. WE'VE SHOUTED, HE'LL SAY'S",
    "人工智能正在改变世界。DeepSeek发布V3模型，共671B参数。",
    "日本語のカタカナとひらがな、한국어, Ελληνικά, ÀÉÎÕÜ, العربية 1234567 ١٢٣٤",
    "snake_case camelCase HTTPServer XMLHttpRequest2 iPhone15ProMax",
    "  leading   inner     trailing   \n \n\t\n   ",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 [BOS]<|im_end|>[EOS]",
)


def main() -> None:
    """The file anew."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 14) for _ in range(400)]
    texts = [*TEXTS, *("".join(draw.choices(TRICKY, k=length)) for length in lengths)]
    ranks = trained([*TEXTS[:-1] * 20, *texts[len(TEXTS) :]])  # no token is a special token's name
    encoding = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    content = {
        "ranks": [base64.b64encode(token).decode() for token in ranks],
        "texts": texts,
        "ids": [encoding.encode_ordinary(text) for text in texts],
    }
    file = Path(__file__).with_name("tiktoken.json")
    file.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n")


def trained(texts: list[str]) -> dict[bytes, int]:
    """Tokens in the order of their merges, which cross the pattern's borders where they can."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    byte_of = _byte_alphabet()
    by_rank = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[char] for char in piece): rank for piece, rank in by_rank}


if __name__ == "__main__":
    main()
