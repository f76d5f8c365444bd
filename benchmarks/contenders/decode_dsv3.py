"""Continues random prompts with dsv3_jax, greedily, once for every line read.

Run by decode_cpu.py with an interpreter that has the project; the one argument is JSON. What is
timed goes from the prompt on the host to the last token on the host.
"""

import json
import sys

import jax
import numpy as np
from answering import answer
from dsv3_model import model_of

from dsv3_jax.inference.generate import continued
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.weights import lay_out


def main() -> None:
    options = json.loads(sys.argv[1])
    weights = lay_out(model_of(options), consume=True)
    size = options["rows"], options["prompt"]
    vocab_size = options["model"]["vocab_size"]
    prompt_BT = np.random.default_rng(0).integers(0, vocab_size, size, np.int32)
    how = sampling(0)

    def work() -> None:
        made = list(continued(weights, prompt_BT, options["tokens"], how))
        assert len(made) == options["tokens"], f"{len(made)} tokens instead of {options['tokens']}"

    answer(work, warm_up=options["warm_up"], versions=f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
