"""A training run from configuration to summary: prepare, execute."""

import dataclasses
import signal
from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from rich.console import Console

from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.train import snapshot
from dsv3_jax.train.finish import finish
from dsv3_jax.train.folder import RunFolder, new_run
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe, matmul_peak
from dsv3_jax.train.metrics import MetricsLog, Progress
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


def prepare(cfg: RunConfig, resume: RunFolder | None, say: Callable[[str], None]) -> Prepared:
    """Data, weights and folder of a new or a resumed run.

    ValueError or OSError, one line, for what cannot work.
    """
    say(f"machine    {describe()}")
    corpus = build_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, say)
    count = cfg.model.param_count()
    say(
        f"model      {(count.main + count.mtp) / 1e6:,.1f} M parameters, "
        f"{count.activated_no_embedding / 1e6:,.1f} M active per token beside embedding and MTP"
    )
    graphdef, state = init_state(cfg)
    position = Position()
    if resume is None:
        run = new_run(cfg.output)
        corpus.tokenizer.save(run.tokenizer)
    else:
        run = resume
        state, position, meta = snapshot.restore(run.checkpoints, cfg, state, say)
        _check_same(cfg, corpus, meta)
        say(f"resume     step {position.step:,} of {run.path}")
    run.config.write_text(cfg.to_json() + "\n")
    return Prepared(cfg, run, corpus, graphdef, state, position)


def execute(prepared: Prepared, console: Console) -> int:
    """Trains and finishes. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    cfg, run, corpus, graphdef, state, position = prepared
    say = console.print
    say(f"run        {run.path}")
    trainer = Trainer(cfg, run, corpus, graphdef, matmul_peak(cfg.train.dtype))
    with console.status("compiling the training step"):
        trainer.compile(state)
    resumed = position.step if position.step else None
    with MetricsLog(run.metrics, resumed) as log:
        progress = Progress(cfg.train.steps, position.step, title=run.path.name, console=console)
        with progress:
            trained = trainer.train(state, position, log, progress)
        if trained.stopped_by is not None:
            name = signal.Signals(trained.stopped_by).name
            say(f"{name}: saved step {trained.position.step:,}; go on with --resume {run.path}")
            return 128 + trained.stopped_by
        with console.status("validating on all held-out text, sampling"):
            result = finish(trainer, graphdef, trained, log)
    summary(result, console)
    return 0


def _check_same(cfg: RunConfig, corpus: Corpus, meta: dict) -> None:
    """A resumed run keeps model, tokenizer and text; ValueError names what differs."""
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
