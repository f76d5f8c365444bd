"""A folder with a small `tiktoken.model`, as Moonlight and Kimi-K2 come; ids that tiktoken gave."""

import json
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tiktoken.json").read_text("utf-8"))
FIRST = len(GOLDEN["ranks"])
SPECIAL = {FIRST: "[BOS]", FIRST + 1: "[EOS]", FIRST + 2: "<|im_end|>", FIRST + 255: "[PAD]"}
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PARTS = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}*{_SMALL}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}+{_SMALL}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
CODE = """
class TikTokenTokenizer(PreTrainedTokenizer):
    special_tokens: Dict[str, int]
    pat_str = "|".join([{}])
raise SystemExit("this file is not run")
"""


def write_folder(path: Path, ranks: list[str] | None = None, parts: tuple = PARTS) -> Path:
    """A folder in the form of the releases; returns the file of its ranks."""
    path.mkdir(exist_ok=True)
    lines = (f"{token} {rank}\n" for rank, token in enumerate(ranks or GOLDEN["ranks"]))
    (path / "tiktoken.model").write_text("".join(lines))
    spelt = ", ".join(f'r"""{part}"""' for part in parts)
    (path / "tokenization_kimi.py").write_text(CODE.format(spelt))
    added = {str(i): {"content": name, "special": True} for i, name in SPECIAL.items()}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "tiktoken.model"
