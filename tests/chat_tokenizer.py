"""A small tokenizer that knows DeepSeek's marks."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dsv3_jax.data.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, THOUGHT = "<｜User｜>", "<｜Assistant｜>", "</think>"


def byte_backend() -> tokenizers.Tokenizer:
    """Bytes, and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def chat_tokenizer() -> Tokenizer:
    """Bytes, and DeepSeek's marks: two special, three not, as published."""
    backend = byte_backend()
    backend.add_special_tokens([BOS, EOS])
    backend.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT, THOUGHT)])
    return Tokenizer(backend, "of the test")
