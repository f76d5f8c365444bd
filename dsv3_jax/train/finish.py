"""The end of a run: whole validation beside zlib, loss picture, a sample, the summary."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.inference.generate import sample
from dsv3_jax.train.loop import Trained, Trainer, validation_record
from dsv3_jax.train.metrics import MetricsLog, read_metrics
from dsv3_jax.train.report import Result, loss_picture, write_summary, zlib_bits_per_byte
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.validation import text_of


def finish(trainer: Trainer, graphdef: nnx.GraphDef, trained: Trained, log: MetricsLog) -> Result:
    """Validates on the whole held-out split, and leaves picture, sample and result in the run's
    folder.
    """
    cfg, run, corpus = trainer.cfg, trainer.run, trainer.corpus
    rows = corpus.validation
    validation = trainer.validate(trained.state, rows, range(len(rows)))
    record = validation_record(validation, trained.position, cfg, whole=True)
    if record not in read_metrics(run.metrics):  # a finished run may be resumed
        log.append(record)
    zlib_bpb = zlib_bits_per_byte(text_of(rows, corpus.tokenizer.token_bytes))
    entries = read_metrics(run.metrics)
    loss_picture(entries, run.picture, zlib_bpb)
    text = continuation(graphdef, trained.state, cfg, corpus)
    run.sample.write_text(cfg.output.sample_prompt + text, encoding="utf-8")
    last = next((entry for entry in reversed(entries) if entry["kind"] == "train"), {})
    result = Result(
        run_folder=run.path,
        steps=trained.position.step,
        tokens=trained.position.consumed_rows * cfg.data.length,
        seconds=trained.position.seconds,
        tokens_per_second=last.get("tokens_per_second", math.nan),
        matmul_share=last.get("matmul_share", math.nan),
        validation_loss=validation.loss,
        bits_per_byte=validation.bits_per_byte,
        zlib_bits_per_byte=zlib_bpb,
        validation_bytes=validation.bytes,
        sample_prompt=cfg.output.sample_prompt,
        sample_text=text,
        picture=run.picture,
        checkpoint=run.checkpoints,
    )
    write_summary(result, run.result)
    return result


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
