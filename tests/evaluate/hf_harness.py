"""A tiny model of ours, and the same weights in transformers under lm-eval's own model.

Needs lm-eval, torch and transformers, which the project does not; tests reach this file through a
fixture.
"""

import os
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; nothing here is on the hub

import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

import dsv3_jax
from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from dsv3_jax.evaluate.harness import Harness
from dsv3_jax.evaluate.subject import Subject
from dsv3_jax.inference.opening import open_weights
from dsv3_jax.inference.options import EngineOptions
from tests.shapes import random_model, tiny_model

torch.set_num_threads(1)  # tiny products; threads would wait for one another
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

TEXT = "Water boils at 100 degrees. The answer is: yes, no, A, B, C or D. 水在一百度沸腾。答案是："
CFG = tiny_model(
    vocab_size=300, num_layers=1, num_dense_layers=0, mtp_depth=0, max_length=64, init_std=0.3
)


class Both(NamedTuple):
    """The same model twice."""

    ours: Harness
    theirs: HFLM


def make_both(folder: Path) -> Both:
    """Of random weights, exported by us and read by both."""
    dsv3_jax.save_pretrained(random_model(CFG), folder, progress=False)
    train_tokenizer([TEXT * 20], 300).save(folder / "tokenizer.json")
    options = EngineOptions(rows=4, page_slots=64, pages=4)
    subject = Subject(open_weights(folder, options, dtype="float32"), options, rows=4)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS[:3]
    # What makes transformers' tokenizers begin texts with it, where they are asked to.
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        add_bos_token=True,
        batch_size=2,
        max_length=CFG.max_length,
    )
    return Both(Harness(subject), theirs)
