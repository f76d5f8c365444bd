"""Continues random prompts with dsv3_jax, greedily, once for every line read.

Run by decode_cpu.py with an interpreter that has the project; the one argument is JSON. What is
timed goes from the prompt on the host to the last token on the host.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
from answering import answer
from flax import nnx

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.run import from_dict
from dsv3_jax.inference.generate import Clock, continued
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.train.step import abstract_state, init_state


def main() -> None:
    options = json.loads(sys.argv[1])
    cfg = replace(tiny_run(), model=from_dict(ModelConfig, options["model"]))
    state = init_state(cfg)
    graphdef, _ = abstract_state(cfg)
    weights = lay_out(nnx.merge(graphdef, state.params, state.biases))
    del state
    size = options["rows"], options["prompt"]
    prompt_BT = np.random.default_rng(0).integers(0, cfg.model.vocab_size, size, np.int32)
    how = sampling(0)

    def work() -> None:
        made = list(continued(weights, prompt_BT, options["tokens"], how, Clock()))
        assert len(made) == options["tokens"], f"{len(made)} tokens instead of {options['tokens']}"

    answer(work, warm_up=options["warm_up"], versions=f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
