"""Serves the loads of serve_cpu.py with transformers' `generate`, one request after the other and
without HTTP, all loads once for every line read.

Run by serve_cpu.py with an interpreter that has torch and transformers; the one argument is JSON.
"""

import asyncio
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from answering import answer, peak_memory
from arrivals import Arrival
from http_client import Answer
from loads import Turns
from torch_deepseek import facts_of, generator_of
from transformers.generation.streamers import BaseStreamer


class FirstPiece(BaseStreamer):
    """When the first token was there; the prompt comes before it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and then with each token."""
        if len(self.times) < 2:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called behind the last token."""


def main() -> None:
    options = json.loads(sys.argv[1])
    model, generate = generator_of(options)
    ids = json.loads(Path(options["text"]).read_text(encoding="utf-8"))["ids"]
    line = ThreadPoolExecutor(max_workers=1)  # in the order of their coming

    def generated(arrival: Arrival) -> Answer:
        prompt, streamer = torch.tensor([arrival.prompt]), FirstPiece()
        generate(prompt, torch.ones_like(prompt), arrival.tokens, streamer=streamer)
        end = time.perf_counter()
        return Answer(200, streamer.times[1], end, arrival.tokens, len(arrival.prompt))

    async def ask(arrival: Arrival) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(line, generated, arrival)

    turns = Turns(options, ids, ask, time.process_time, peak_memory)
    for _ in range(options["warm_up"]):
        turns.warm_up()
    answer(turns, warm_up=0, **facts_of(model))


if __name__ == "__main__":
    main()
