"""A training run from configuration to summary: prepare, execute."""

import dataclasses
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
from rich.console import Console

from dsv3_jax.checkpoint import store
from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.files import replace_file
from dsv3_jax.train import snapshot
from dsv3_jax.train.finish import finish
from dsv3_jax.train.folder import RunFolder, check_writable, new_run
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe, matmul_peak
from dsv3_jax.train.metrics import MetricsLog, Progress, read_metrics
from dsv3_jax.train.report import summary
from dsv3_jax.train.snapshot import Position
from dsv3_jax.train.step import init_state


class Prepared(NamedTuple):
    """What `execute` needs: configuration, folder, data, and the checkpoint to go on from."""

    cfg: RunConfig
    run: RunFolder
    corpus: Corpus
    checkpoint: store.Checkpoint | None


def prepare(cfg: RunConfig, resume: RunFolder | None, say: Callable[[str], None]) -> Prepared:
    """Reads all that a new or a resumed run reads, and makes its folder.

    ValueError or OSError, one line, for what cannot work.
    """
    if cfg.train.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("train.dtype is float64; JAX has it only with JAX_ENABLE_X64=1 set")
    if resume is None:
        check_writable(cfg.output)
    say(f"machine    {describe()}")
    kept = load_tokenizer(resume.tokenizer) if resume else None
    corpus = build_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, say, kept)
    ids = {"bos_id": corpus.tokenizer.bos_id, "eos_id": corpus.tokenizer.eos_id}
    cfg = replace(cfg, model=replace(cfg.model, **ids))
    checkpoint = None
    if resume is None:
        run = new_run(cfg.output)
        corpus.tokenizer.save(run.tokenizer)
    else:
        run = resume
        checkpoint = store.load(run.checkpoints, report=say)
        _check_same(cfg, corpus, checkpoint.meta)
        if run.metrics.exists():
            read_metrics(run.metrics)
        store.clean(run.checkpoints)
    replace_file(run.config, f"{cfg.to_json()}\n".encode())
    return Prepared(cfg, run, corpus, checkpoint)


def execute(prepared: Prepared, console: Console) -> int:
    """Trains and finishes. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    cfg, run, corpus, checkpoint = prepared
    say = partial(console.print, soft_wrap=True)
    count = cfg.model.param_count()
    say(
        f"model      {(count.main + count.mtp) / 1e6:,.1f} M parameters, "
        f"{count.activated_no_embedding / 1e6:,.1f} M active per token beside embedding and MTP"
    )
    say(f"run        {run.path}")
    graphdef, state = init_state(cfg)
    position = Position()
    if checkpoint is not None:
        state, position = snapshot.restore(checkpoint, cfg, state)
        say(f"           resumed after step {position.step:,}")
    trainer = Trainer(cfg, run, corpus, graphdef, matmul_peak(cfg.train.dtype))
    if position.step < cfg.train.steps:
        say("           compiling the training step takes some ten seconds")
        trainer.compile(state)
    with MetricsLog(run.metrics, None if checkpoint is None else position.step) as log:
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
