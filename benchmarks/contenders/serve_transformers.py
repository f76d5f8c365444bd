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
from torch_deepseek import facts_of, model_of


def main() -> None:
    options = json.loads(sys.argv[1])
    model = model_of(options).eval()
    # No token ends a text, so that every row has all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    found = arrivals(options)

    def serve(batch: Sequence[Arrival]) -> None:
        length = max(len(arrival.prompt) for arrival in batch)
        tokens = max(arrival.tokens for arrival in batch)
        prompt = torch.zeros((len(batch), length), dtype=torch.long)
        seen = torch.zeros_like(prompt)
        for row, arrival in enumerate(batch):
            prompt[row, length - len(arrival.prompt) :] = torch.tensor(arrival.prompt)
            seen[row, length - len(arrival.prompt) :] = 1
        with torch.inference_mode():
            made = model.generate(
                prompt,
                attention_mask=seen,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
            )
        assert made.shape[1] == length + tokens, f"{made.shape[1]} instead of {length + tokens}"

    def work() -> dict[str, float]:
        return {"wait": served_in_batches(found, options["rows"], serve)}

    answer(work, warm_up=options["warm_up"], **facts_of(model))


if __name__ == "__main__":
    main()
