"""What the model writes: a text that continues the run's prompt."""

import numpy as np
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.inference.generate import continued
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.train.step import TrainState


def continuation(graphdef: nnx.GraphDef, state: TrainState, cfg: RunConfig, corpus: Corpus) -> str:
    """What the model writes after the prompt, at the beginning of a document; or its answer, if it
    is trained on conversations.
    """
    tokenizer, ids = corpus.tokenizer, corpus.opening(cfg.output.sample_prompt)
    room = min(cfg.output.sample_tokens, cfg.model.max_length - len(ids))
    if room < 1:
        return ""
    weights = lay_out(nnx.merge(graphdef, state.params, state.biases))
    how = sampling(cfg.train.seed, cfg.output.sample_temperature)
    written, ends = [], corpus.end_ids
    for token_B in continued(weights, np.array([ids]), room, how):
        if int(token_B[0]) in ends:
            break
        written.append(int(token_B[0]))
    return tokenizer.decode(written)
