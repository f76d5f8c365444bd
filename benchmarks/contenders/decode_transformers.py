"""Continues random prompts with transformers' `generate`, greedily, once for every line read.

Run by decode_cpu.py with an interpreter that has torch and transformers; the one argument is JSON.
"""

import json
import sys

import torch
from answering import answer
from torch_deepseek import facts_of, model_of


def main() -> None:
    options = json.loads(sys.argv[1])
    model = model_of(options).eval()
    # No token ends a text, so that every row has all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = torch.randint(0, model.config.vocab_size, (options["rows"], options["prompt"]))
    everywhere = torch.ones_like(prompt)
    length = options["prompt"] + options["tokens"]

    def work() -> None:
        with torch.inference_mode():
            made = model.generate(
                prompt,
                attention_mask=everywhere,
                max_new_tokens=options["tokens"],
                do_sample=False,
                use_cache=True,
            )
        assert made.shape[1] == length, f"{made.shape[1]} tokens instead of {length}"

    answer(work, warm_up=options["warm_up"], **facts_of(model))


if __name__ == "__main__":
    main()
