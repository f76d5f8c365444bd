"""What the model writes: a text that continues the run's prompt."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.inference.generate import sample
from dsv3_jax.train.step import TrainState


def continuation(graphdef: nnx.GraphDef, state: TrainState, cfg: RunConfig, corpus: Corpus) -> str:
    """What the model writes after the prompt, at the beginning of a document."""
    tokenizer = corpus.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(cfg.output.sample_prompt).tolist()]
    room = min(cfg.output.sample_tokens, cfg.model.max_length - len(ids))
    if room < 1:
        return ""
    model = nnx.merge(graphdef, state.params, state.biases)
    key = jax.random.key(cfg.train.seed)
    temperature = jnp.float32(cfg.output.sample_temperature)
    sampled = sample(model, jnp.asarray([ids], jnp.int32), key, room, temperature)[0].tolist()
    if tokenizer.eos_id in sampled:
        sampled = sampled[: sampled.index(tokenizer.eos_id)]
    return tokenizer.decode(sampled)
