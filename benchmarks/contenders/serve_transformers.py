"""Serves requests of different lengths with transformers' `generate` in static batches, greedily,
once for every line read.

Run by decode_cpu.py with an interpreter that has torch and transformers; the one argument is JSON.
"""

import json
import sys
from collections.abc import Sequence

import torch
from answering import answer
from arrivals import Arrival, arrivals, served_in_batches
from torch_deepseek import facts_of, generator_of


def main() -> None:
    options = json.loads(sys.argv[1])
    model, generate = generator_of(options)
    found = arrivals(options)

    def serve(batch: Sequence[Arrival]) -> None:
        length = max(len(arrival.prompt) for arrival in batch)
        tokens = max(arrival.tokens for arrival in batch)
        prompt = torch.zeros((len(batch), length), dtype=torch.long)
        seen = torch.zeros_like(prompt)
        for row, arrival in enumerate(batch):
            prompt[row, length - len(arrival.prompt) :] = torch.tensor(arrival.prompt)
            seen[row, length - len(arrival.prompt) :] = 1
        generate(prompt, seen, tokens)

    def work() -> dict[str, float]:
        return {"wait": served_in_batches(found, options["rows"], serve)}

    answer(work, warm_up=options["warm_up"], **facts_of(model))


if __name__ == "__main__":
    main()
