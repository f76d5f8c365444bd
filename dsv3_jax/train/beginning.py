"""What all processes of a run agree on before it begins: devices, configuration, text, folder."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax

from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_json
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.sample_corpus import build_samples
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.parallel import processes
from dsv3_jax.train.folder import RunFolder, new_run
from dsv3_jax.train.schedules import rows_after, steps_of


def check_processes(cfg: RunConfig, resume: RunFolder | None, init_from: RunFolder | None) -> None:
    """ValueError if processes have nothing to do, or not the same."""
    if processes.count() == 1:
        return
    if cfg.mesh.size != jax.device_count():
        raise ValueError(
            f"the axes of mesh multiply to {cfg.mesh.size}, and {processes.count()} processes have "
            f"{jax.device_count()} devices; allowed: the same number"
        )
    folders = (str((folder and folder.path) or "") for folder in (resume, init_from))
    processes.check_same("configuration", "configuration", " ".join((cfg.to_json(), *folders)))


def tokenizer_at_hand(
    cfg: RunConfig, resume: RunFolder | None, init_from: RunFolder | None
) -> Tokenizer | None:
    """That the weights were trained with, which a new one would not fit, unless another one is
    asked for by name. None if the text decides.
    """
    if resume:
        return load_tokenizer(resume.tokenizer)
    if init_from and cfg.data.tokenizer in ("train", load_json(init_from.config).data.tokenizer):
        return load_tokenizer(init_from.tokenizer)
    return None if cfg.data.tokenizer == "train" else load_tokenizer(cfg.data.tokenizer)


def joint_corpus(
    cfg: RunConfig,
    kept: Tokenizer | None,
    say: Callable[[str], None],
    resume: RunFolder | None,
    init_from: RunFolder | None,
) -> Corpus:
    """The run's text. The first process makes what the others then find in the cache."""
    built = []

    def build() -> str:
        seed, size = cfg.train.seed, cfg.model.vocab_size
        if cfg.data.format == "prompts":
            raise ValueError("data.format is prompts; allowed: with python -m dsv3_jax.grpo")
        if cfg.data.format == "text":
            built.append(build_corpus(cfg.data, size, seed, say, kept))
            return ""
        # A resumed run has a copy of its template, whatever became of the file.
        data = replace(cfg.data, chat_template="") if resume else cfg.data
        folder = resume or init_from
        built.append(build_samples(data, size, seed, say, kept, folder and folder.path))
        if cfg.output.sample_tokens:
            built[0].opening(cfg.output.sample_prompt)  # not at the end of a run
        return ""

    processes.of_first("text", build)
    if not built:
        build()
    (corpus,) = built
    contents = f"{corpus.tokenizer.content_hash} {corpus.content_hash}"
    processes.check_same("contents", "text or tokenizer", contents)
    return corpus


def settled(
    cfg: RunConfig, corpus: Corpus, epochs: int | None, done: int, say: Callable[[str], None]
) -> RunConfig:
    """With what only the text tells: the tokenizer's ids and, for so many passes over samples, the
    number of steps. ValueError for fewer steps than are `done`.
    """
    ids = {"bos_id": corpus.tokenizer.bos_id, "eos_id": corpus.tokenizer.eos_id}
    cfg = replace(cfg, model=replace(cfg.model, **ids))
    if epochs is None:
        return cfg
    rows = corpus.train.rows_of_epochs(epochs)
    steps = steps_of(cfg, rows)
    if steps < done:
        raise ValueError(
            f"--epochs {epochs} are {steps:,} steps; allowed: at least {done:,}, where the run "
            "stands"
        )
    cfg = replace(cfg, train=replace(cfg.train, steps=steps))
    taken = rows_after(cfg, 0, steps)
    if (taken - rows) * epochs >= rows:  # once more, or more often
        say(
            f"warning    --epochs {epochs} are {rows:,} rows, whole steps take {taken:,}: samples "
            "are seen more often; --train.rows makes steps smaller"
        )
    return cfg


@contextlib.contextmanager
def joint_folder(cfg: RunConfig, resume: RunFolder | None) -> Iterator[RunFolder]:
    """The resumed run's, or a new one, which the first process makes for all."""
    if resume:
        yield resume
        return
    with contextlib.ExitStack() as stack:

        def make() -> str:
            return str(stack.enter_context(new_run(cfg.output)).path)

        yield RunFolder(Path(processes.of_first("folder", make)))
