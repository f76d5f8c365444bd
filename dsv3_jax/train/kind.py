"""What differs between runs that learn from different things; here, from texts and samples."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import load_grain
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.train.beginning import joint_corpus
from dsv3_jax.train.feed import Feed, RowFeed
from dsv3_jax.train.finish import finish
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.metrics import LOSSES
from dsv3_jax.train.output import Output
from dsv3_jax.train.planned import Planned
from dsv3_jax.train.report import summary
from dsv3_jax.train.snapshot import Snapshot

if TYPE_CHECKING:
    from dsv3_jax.train.pipeline_run import PipelineRun
    from dsv3_jax.train.programs import StepPrograms
    from dsv3_jax.train.start import Prepared


class Kind:
    """A run on texts, or on conversations. Others override what they do otherwise."""

    measures: ClassVar[Mapping[str, str]] = LOSSES
    """Two values of training records that the display shows first, with their labels"""

    def corpus(
        self,
        cfg: RunConfig,
        kept: Tokenizer | None,
        say: Callable[[str], None],
        resume: RunFolder | None,
        init_from: RunFolder | None,
    ) -> Corpus:
        """What is learned from; `kept` is the tokenizer at hand. ValueError for what cannot be."""
        return joint_corpus(cfg, kept, say, resume, init_from)

    def settled(self, cfg: RunConfig, corpus: Corpus) -> RunConfig:
        """With what only the corpus tells. ValueError for what does not fit it."""
        return cfg

    def save(self, run: RunFolder) -> None:
        """Writes what a resumed run needs beside its configuration; in the first process."""

    def feed(
        self,
        prepared: "Prepared",
        programs: "StepPrograms | PipelineRun",
        start: Snapshot,
        say: Callable[[str], None],
    ) -> Feed:
        """Of a run from this snapshot on."""
        load_grain()  # now, while the step is compiled
        return RowFeed(prepared.cfg, prepared.corpus, programs.sharding.own_rows)

    def finish(
        self,
        trainer: Trainer,
        trained: Snapshot,
        out: Output,
        console: Console,
        planned: Planned | None,
    ) -> None:
        """Tells and writes what has become of it."""
        console.print("           validating on all held-out text, sampling", soft_wrap=True)
        result = finish(trainer, trained, out)
        if result:
            summary(result, console)
            if planned:
                console.print(planned.end(result.tokens_per_second), soft_wrap=True)
