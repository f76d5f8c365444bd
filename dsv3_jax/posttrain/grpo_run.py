"""A training run on rewards of its own answers: what it learns from, and how it ends (report
5.2.2).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.console import Console

from dsv3_jax.config import RunConfig
from dsv3_jax.config.grpo import GrpoConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.sample_corpus import template_of
from dsv3_jax.data.tokenised import check_fits
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.posttrain.grpo import settings_of
from dsv3_jax.posttrain.grpo_feed import GrpoFeed
from dsv3_jax.posttrain.grpo_finish import finish
from dsv3_jax.posttrain.rewards import Rewards
from dsv3_jax.posttrain.rl_prompts import PromptSet, encode_prompts, read_prompts
from dsv3_jax.posttrain.rl_rows import rows_needed
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.kind import Kind
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.output import Output
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.planned import Planned
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.snapshot import Snapshot
from dsv3_jax.train.start import Prepared


@dataclass(frozen=True, eq=False)
class PromptCorpus(Corpus):
    """Prompts in the place of rows, of which there are none before answers are drawn."""

    prompts: PromptSet | None = None


class Grpo(Kind):
    """A run that learns from rewards of its own answers."""

    measures: ClassVar[Mapping[str, str]] = {"reward": "reward", "kl": "KL"}

    def __init__(self, settings: GrpoConfig, rewards: Rewards, *, rows_given: bool) -> None:
        """`rows_given`: train.rows is the user's, and else what always suffices."""
        self.settings, self.rewards, self.rows_given = settings, rewards, rows_given

    def corpus(
        self,
        cfg: RunConfig,
        kept: Tokenizer | None,
        say: Callable[[str], None],
        resume: RunFolder | None,
        init_from: RunFolder | None,
    ) -> PromptCorpus:
        check_fits(kept, cfg.model.vocab_size)
        # A resumed run has a copy of its template, whatever became of the file.
        data, folder = cfg.data, resume or init_from
        data = replace(data, chat_template="") if resume else data
        template = template_of(data, kept, folder and folder.path)
        read = read_prompts(user_path(cfg.data.source, "data.source"))
        room = min(cfg.data.length + 1, cfg.model.max_length) - self.settings.max_tokens
        if room < 1:
            raise ValueError(
                f"--max-tokens is {self.settings.max_tokens}; allowed: less than "
                f"{room + self.settings.max_tokens}, with which data.length {cfg.data.length} "
                "and model.max_length leave room for a prompt"
            )
        prompts = encode_prompts(read, template, room)
        dropped = (
            f"; {prompts.dropped:,} dropped, longer than {room} tokens" if prompts.dropped else ""
        )
        say(
            f"data       {cfg.data.source}: {len(prompts.prompts):,} prompts of up to "
            f"{prompts.longest} tokens, by {template.name}{dropped}"
        )
        contents = f"{kept.content_hash} {prompts.content_hash}"
        processes.check_same("contents", "prompts or tokenizer", contents)
        return PromptCorpus(kept, None, None, prompts.content_hash, template, prompts)

    def settled(self, cfg: RunConfig, corpus: PromptCorpus) -> RunConfig:
        """With rows that hold a batch's answers however long they become."""
        settings, train = self.settings, cfg.train
        longest = corpus.prompts.longest + settings.max_tokens - 1
        needed = rows_needed(settings.outputs, longest, cfg.data.length)
        if not self.rows_given:
            unit = train.microbatches * cfg.mesh.row_groups
            return replace(cfg, train=replace(train, rows=unit * math.ceil(needed / unit)))
        if train.rows < needed:
            raise ValueError(
                f"train.rows is {train.rows}; allowed: at least {needed}, for {settings.outputs} "
                f"answers that with their prompts take up to {longest} places of data.length "
                f"{cfg.data.length}"
            )
        return cfg

    def save(self, run: RunFolder) -> None:
        replace_file(settings_of(run.path), f"{self.settings.to_json()}\n".encode())

    def feed(
        self,
        prepared: Prepared,
        programs: StepPrograms | PipelineRun,
        start: Snapshot,
        say: Callable[[str], None],
    ) -> GrpoFeed:
        return GrpoFeed(self.settings, self.rewards, prepared, programs, start, say)

    def finish(
        self,
        trainer: Trainer,
        trained: Snapshot,
        out: Output,
        console: Console,
        planned: Planned | None,
    ) -> None:
        finish(trainer, trained, console)
