"""A training run from configuration to summary: prepare, execute."""

import dataclasses
import signal
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx
from rich.console import Console

from dsv3_jax.checkpoint import store
from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.train import snapshot
from dsv3_jax.train.finish import finish
from dsv3_jax.train.folder import RunFolder, new_run
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe, matmul_peak
from dsv3_jax.train.metrics import MetricsLog, Progress, replace_file
from dsv3_jax.train.report import summary
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import TrainState, init_state


class Prepared(NamedTuple):
    """All that can fail by the user's doing is behind us."""

    cfg: RunConfig
    run: RunFolder
    corpus: Corpus
    graphdef: nnx.GraphDef
    state: TrainState
    position: Position
    resumed: bool


def prepare(cfg: RunConfig, resume: RunFolder | None, say: Callable[[str], None]) -> Prepared:
    """Data, weights and folder of a new or a resumed run.

    ValueError or OSError, one line, for what cannot work.
    """
    if cfg.train.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("train.dtype is float64; JAX has it only with JAX_ENABLE_X64=1 set")
    say(f"machine    {describe()}")
    corpus = build_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, say)
    checkpoint = None
    if resume is not None:
        checkpoint = store.load(resume.checkpoints, report=say)
        _check_same(cfg, corpus, checkpoint.meta)
    count = cfg.model.param_count()
    say(
        f"model      {(count.main + count.mtp) / 1e6:,.1f} M parameters, "
        f"{count.activated_no_embedding / 1e6:,.1f} M active per token beside embedding and MTP"
    )
    graphdef, state = init_state(cfg)
    if checkpoint is None:
        run, position = new_run(cfg.output), Position()
        corpus.tokenizer.save(run.tokenizer)
    else:
        run = resume
        state, position = snapshot.restore(checkpoint, cfg, state)
        say(f"resume     step {position.step:,} of {run.path}")
    replace_file(run.config, f"{cfg.to_json()}\n".encode())
    return Prepared(cfg, run, corpus, graphdef, state, position, resume is not None)


def execute(prepared: Prepared, console: Console) -> int:
    """Trains and finishes. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    cfg, run, corpus, graphdef, state, position, resumed = prepared
    say = partial(console.print, soft_wrap=True)
    say(f"run        {run.path}")
    trainer = Trainer(cfg, run, corpus, graphdef, matmul_peak(cfg.train.dtype))
    if position.step < cfg.train.steps:
        say("           compiling the training step takes some ten seconds")
        trainer.compile(state)
    with MetricsLog(run.metrics, position.step if resumed else None) as log:
        progress = Progress(cfg.train.steps, position.step, title=run.path.name, console=console)
        with progress:
            trained = trainer.train(state, position, log, progress)
        if trained.stopped_by is not None:
            name = signal.Signals(trained.stopped_by).name
            say(f"{name}: saved step {trained.position.step:,}; go on with --resume {run.path}")
            return 128 + trained.stopped_by
        say("           validating on all held-out text, sampling")
        result = finish(trainer, graphdef, trained, log)
    summary(result, console)
    return 0


def _check_same(cfg: RunConfig, corpus: Corpus, meta: dict) -> None:
    """A resumed run keeps model, tokenizer, text and seed; ValueError names what differs."""
    before = from_dict(RunConfig, meta["config"])
    differ = [
        f"{section}.{field.name} is {getattr(new, field.name)}, was {getattr(old, field.name)}"
        for section, new, old in (
            ("model", cfg.model, before.model),
            ("data", cfg.data, before.data),
        )
        for field in dataclasses.fields(new)
        if getattr(new, field.name) != getattr(old, field.name)
    ]
    if cfg.train.seed != before.train.seed:
        differ.append(f"train.seed is {cfg.train.seed}, was {before.train.seed}")
    if meta["data"]["tokenizer"] != corpus.tokenizer.content_hash:
        differ.append("the tokenizer differs")
    if meta["data"]["content"] != corpus.content_hash:
        differ.append(f"the text of data.source {cfg.data.source} has changed")
    if differ:
        raise ValueError(f"--resume: this is another run: {'; '.join(differ)}")
    if cfg.train.steps < meta["step"]:
        raise ValueError(
            f"--resume: train.steps is {cfg.train.steps}; "
            f"allowed: at least {meta['step']}, where the run stands"
        )
