"""Trains transformers' `DeepseekV3ForCausalLM` on one batch, a step for every line read.

Run by train_cpu.py with an interpreter that has torch and transformers; the one argument is JSON.
"""

import json
import sys

import torch
from answering import answer
from torch_deepseek import facts_of, model_of


def main() -> None:
    options = json.loads(sys.argv[1])
    model = model_of(options, use_cache=False).train()
    # "bfloat16" is the recipe's: float32 masters under products in bfloat16; "pure_bfloat16" has
    # no masters and is worse training, but may be faster.
    if options["dtype"] == "pure_bfloat16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    size = options["rows"], options["length"]
    tokens = torch.randint(0, model.config.vocab_size, size)
    labels = tokens.roll(-1, 1)
    forward = torch.compile(model) if options["compile"] else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options["dtype"] == "bfloat16"):
            loss = forward(input_ids=tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()}")

    answer(step, warm_up=options["warm_up"], **facts_of(model))


if __name__ == "__main__":
    main()
