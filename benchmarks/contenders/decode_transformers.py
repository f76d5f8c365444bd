"""Continues random prompts with transformers' `generate`, greedily, once for every line read.

Run by decode_cpu.py with an interpreter that has torch and transformers; the one argument is JSON.
"""

import json
import sys

import torch
from answering import answer
from torch_deepseek import facts_of, generator_of


def main() -> None:
    options = json.loads(sys.argv[1])
    model, generate = generator_of(options)
    prompt = torch.randint(0, model.config.vocab_size, (options["rows"], options["prompt"]))
    everywhere = torch.ones_like(prompt)

    def work() -> None:
        generate(prompt, everywhere, options["tokens"])

    answer(work, warm_up=options["warm_up"], **facts_of(model))


if __name__ == "__main__":
    main()
