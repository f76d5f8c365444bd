"""A training run from configuration to summary: prepare, execute."""

import contextlib
import math
import signal
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx
from rich.console import Console

from dsv3_jax import process
from dsv3_jax.checkpoint import joint, run_model, store
from dsv3_jax.checkpoint.hf import copy_tokenizer, load_pretrained
from dsv3_jax.checkpoint.hf_folder import is_hf_folder
from dsv3_jax.cli import clean_on_signals
from dsv3_jax.config import RunConfig
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.cuts import check_pipeline, cuts_of
from dsv3_jax.quant.recipes import recipe_of
from dsv3_jax.train import snapshot
from dsv3_jax.train.beginning import (
    check_processes,
    joint_folder,
    settled,
    tokenizer_at_hand,
)
from dsv3_jax.train.folder import RunFolder, check_writable
from dsv3_jax.train.kind import Kind
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe, matmul_peak
from dsv3_jax.train.memory import check_memory
from dsv3_jax.train.metrics import MetricsLog, Progress, read_metrics
from dsv3_jax.train.output import Output
from dsv3_jax.train.page import tell_page
from dsv3_jax.train.pipeline_run import PipelineRun
from dsv3_jax.train.planned import Planned, is_exhaustion, planned_of, told_of_exhaustion
from dsv3_jax.train.profile import Profile
from dsv3_jax.train.programs import StepPrograms
from dsv3_jax.train.sameness import check_same_model, check_same_run, check_same_text
from dsv3_jax.train.schedules import rows_after
from dsv3_jax.train.sharding import described, make_sharding
from dsv3_jax.train.start import Prepared, never_saved, next_rows, origin_of, started
from dsv3_jax.train.step import abstract_state, check_state
from dsv3_jax.train.trouble import BadSteps
from dsv3_jax.train.writers import open_writers, packages_of

COMPILING = (  # a run without a pipeline, and one with
    "compiling the training step (up to a minute",
    "compiling the stages of the pipeline (minutes",
)
BAD_STEPS = 3  # exit code
WEIGHTS, MOMENTS = ("params", "router_bias"), ("mu", "nu")  # groups of a checkpoint


class Watch(NamedTuple):
    """What is looked at more closely than in other runs; not part of its configuration."""

    debug_nans: bool = False
    profile: tuple[int, int] | None = None
    """First and last step of a trace"""
    hang_seconds: float = 0.0
    """After which a step is said to hang; 0: by the usual step"""


NO_WATCH = Watch()


def prepare(
    cfg: RunConfig,
    resume: RunFolder | None,
    say: Callable[[str], None],
    init_from: RunFolder | None = None,
    watch: Watch = NO_WATCH,
    *,
    moments: bool = False,
    epochs: int | None = None,
    kind: Kind | None = None,
) -> Prepared:
    """Reads all that a new or a resumed run reads, and makes its folder; `epochs` over its samples
    decide the number of steps.

    ValueError or OSError, one line, for what cannot work.
    """
    if cfg.train.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("train.dtype is float64; JAX has it only with JAX_ENABLE_X64=1 set")
    if resume is None and processes.is_first():
        check_writable(cfg.output)
    packages_of(cfg)
    make_mesh(cfg.mesh)  # refuses too few devices before anything is made
    recipe_of(cfg.quant)  # and this kernels that cannot run on them
    check_pipeline(cfg)
    check_processes(cfg, resume, init_from)
    say(f"machine    {describe()}")
    if resume:
        run_model.check_trained(resume.path)
    check_state(cfg)
    check_memory(cfg)
    checkpoint = None
    if (init_from or resume) and not (resume and never_saved(resume)):
        if moments:
            run_model.check_moments(init_from.path)
        groups = None if resume else WEIGHTS + MOMENTS * moments
        checkpoint = _load(cfg, resume or init_from, groups, say)
    done = checkpoint.step if checkpoint and resume else 0
    if epochs is None:
        _check_profile(cfg, watch, done)
    if checkpoint and init_from and not cfg.model.mtp_depth:
        checkpoint = run_model.without_mtp(checkpoint)
    if checkpoint:  # before the text is read, which may take long
        check = check_same_run if resume else check_same_model
        check(cfg, checkpoint.meta)
    kept = tokenizer_at_hand(cfg, resume, init_from)
    kind = kind or Kind()
    corpus = kind.corpus(cfg, kept, say, resume, init_from)
    cfg = kind.settled(settled(cfg, corpus, epochs, done, say), corpus)
    _check_profile(cfg, watch, done)
    if checkpoint and resume:
        check_same_text(cfg, corpus, checkpoint.meta)
    elif checkpoint and checkpoint.meta["data"]["tokenizer"] != corpus.tokenizer.content_hash:
        say(
            f"warning    data.tokenizer {cfg.data.tokenizer} is not the one that the weights were "
            "trained with: ids mean something else"
        )
    if resume and resume.metrics.exists():
        read_metrics(resume.metrics)
    with joint_folder(cfg, resume) as run:
        writers = []
        if processes.is_first():
            if resume:
                store.clean(run.checkpoints)
            else:
                if init_from and kept and kept.name == str(init_from.tokenizer):
                    copy_tokenizer(init_from.path, run.path)  # a chat template, for one
                corpus.save(run.path)
            kind.save(run)
            writers = open_writers(cfg, run, done if resume else None)
        if not init_from:
            _write_config(cfg, run)
    weights_from = init_from and init_from.path
    is_new = resume is None
    return Prepared(cfg, run, corpus, checkpoint, is_new, writers, weights_from, moments, kind)


def _load(
    cfg: RunConfig,
    source: RunFolder,
    groups: Collection[str] | None,
    say: Callable[[str], None],
) -> store.Checkpoint:
    """The newest checkpoint of a run, or a Hugging Face model as one, expanded as exactly as the
    masters can hold it.
    """
    wanted = None
    if processes.count() > 1:
        wanted = snapshot.wanted(cfg, _programs(cfg)[2].shapes)
    if is_hf_folder(source.path):
        skip_mtp = not cfg.model.mtp_depth
        model = load_pretrained(source.path, dtype="float32", skip_mtp=skip_mtp)
        found = run_model.as_checkpoint(model, source.path)
        # A pipeline's process has some stages, and nowhere to put the others' arrays.
        return replace(found, arrays=store.only(found.arrays, wanted or {}))
    found = joint.load(source.checkpoints, groups=groups, wanted=wanted, report=say)
    if wanted is not None:
        say(f"           process 0 has read {found.bytes_read / 1e6:,.2f} MB of step {found.step}")
    return found


def _write_config(cfg: RunConfig, run: RunFolder) -> None:
    """From here on the run can be resumed."""
    if not processes.is_first():
        return
    replace_file(run.config, f"{cfg.to_json()}\n".encode())


def _check_profile(cfg: RunConfig, watch: Watch, done: int) -> None:
    """ValueError if the steps to trace are not all to come."""
    if watch.profile and not done < watch.profile[0] <= watch.profile[1] <= cfg.train.steps:
        raise ValueError(
            f"--profile {watch.profile[0]}:{watch.profile[1]}; allowed: steps {done + 1} to "
            f"{cfg.train.steps} of this run"
        )


def execute(prepared: Prepared, console: Console, watch: Watch = NO_WATCH) -> int:
    """Trains and finishes.

    Returns the exit code: 0, 128 + the signal that stopped the run, or 3 after too many updates in
    a row that were skipped. MemoryError, one line, if a batch does not fit.
    """
    try:
        return _execute(prepared, console, watch)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_exhaustion(error):
            raise
        raise MemoryError(told_of_exhaustion(prepared.cfg, error)) from error


def _execute(prepared: Prepared, console: Console, watch: Watch) -> int:
    cfg, run = prepared.cfg, prepared.run
    say = partial(console.print, soft_wrap=True)
    count = cfg.model.param_count()
    say(
        f"model      {(count.main + count.mtp) / 1e6:,.1f} M parameters, "
        f"{count.activated_no_embedding / 1e6:,.1f} M active per token beside embedding and MTP"
    )
    if recipe := recipe_of(cfg.quant):
        by_kernels = any(rule.by_kernels for rule in recipe.values())
        how = "kernels where sizes are multiples of 128, else " if by_kernels else ""
        say(f"           linears by the recipe {cfg.quant.recipe}, in {how}emulated GEMMs")
    if cfg.mesh.size > 1:
        say(f"mesh       {described(cfg)}")
    if cfg.mesh.pipe > 1:
        say(f"pipeline   {cfg.pipeline.schedule}: {' | '.join(map(str, cuts_of(cfg)))}")
    tokens = rows_after(cfg, 0, cfg.train.steps) * cfg.data.length
    say(f"run        {run.path}")
    say(f"           {cfg.train.steps:,} steps, {tokens / 1e6:.2f} M tokens")
    graphdef, params, programs = _programs(cfg)
    rows = next_rows(prepared)
    if rows:
        say(f"           {COMPILING[cfg.mesh.pipe > 1]}, kept for the next time)")
    if rows and prepared.checkpoint is None:  # one that does not fit is refused without waiting
        programs.begin(rows)
    planned = planned_of(cfg, params, say) if rows else None
    if planned:
        say(planned.begin())
    start = started(prepared, programs, say)
    if rows:
        programs.begin(rows)
    feed = prepared.kind.feed(prepared, programs, start, say)
    if rows:
        programs.of(rows)  # before the peak is measured, which it would disturb
        process.give_back()
    # Emulated devices share the cores that one product takes.
    devices = 1 if jax.default_backend() == "cpu" else cfg.mesh.size
    peak = matmul_peak(cfg.train.dtype) * devices if processes.is_first() else math.inf
    processes.wait("compiled")
    step, has_weights = start.position.step, prepared.is_new and prepared.checkpoint is not None
    trainer = Trainer(
        cfg,
        run,
        prepared.corpus,
        graphdef,
        programs,
        start,
        peak,
        feed,
        debug_nans=watch.debug_nans,
        # The first process traces its own devices.
        profile=Profile(*watch.profile, run.profile)
        if watch.profile and processes.is_first()
        else None,
        hang_seconds=watch.hang_seconds,
    )
    consumed = start.position.consumed_rows * cfg.data.length
    origin = origin_of(prepared, start.position)
    if origin and not prepared.is_new:
        for change in origin["text"].split("; ")[1:]:
            say(f"           {change}")
    prepared.checkpoint = start = None  # the trainer holds what it needs of them
    if has_weights:  # a run stopped before its first checkpoint would start from others
        trainer.save()
        _write_config(cfg, run)
    with contextlib.ExitStack() as stack:
        log = None
        if processes.is_first():
            log = MetricsLog(run.metrics, None if prepared.is_new else consumed)
            stack.enter_context(contextlib.closing(log))
        measures = prepared.kind.measures
        progress = Progress(cfg.train.steps, step, run.path.name, console, measures)
        with contextlib.closing(Output(log, progress, prepared.writers)) as out:
            if origin:
                out.keep(origin)
            return _train(trainer, out, console, planned, prepared.kind)


def _programs(cfg: RunConfig) -> tuple[nnx.GraphDef, nnx.State, StepPrograms | PipelineRun]:
    """The whole model's structure, its abstract weights, and a run's programs."""
    graphdef, shapes = abstract_state(cfg)
    if cfg.mesh.pipe > 1:
        return graphdef, shapes.params, PipelineRun(cfg)
    sharding = make_sharding(cfg, shapes.params)
    return graphdef, shapes.params, StepPrograms(cfg, graphdef, shapes, sharding)


def _train(
    trainer: Trainer, out: Output, console: Console, planned: Planned | None, kind: Kind
) -> int:
    """Trains, says how that ended, and returns the exit code."""
    run, say = trainer.run, partial(console.print, soft_wrap=True)
    try:
        with out.progress:
            trained = trainer.train(out)
    except BadSteps as error:
        say(f"stopped: {error}; what happened: {run.report}")
        tell_page(run, trainer.cfg, out.message)
        return BAD_STEPS
    if trained.stopped_by is not None:
        name = signal.Signals(trained.stopped_by).name
        at = trained.snapshot.position.step
        tell_page(run, trainer.cfg, out.message)
        if trained.unsaved:
            raise trained.unsaved
        say(f"{name}: saved step {at:,}; go on with --resume {run.path}")
        return 128 + trained.stopped_by
    heard = clean_on_signals() if processes.count() == 1 else contextlib.nullcontext()
    try:
        with heard:
            kind.finish(trainer, trained.snapshot, out, console, planned)
    except OSError as error:
        raise trained.unsaved or error from None
    except KeyboardInterrupt:  # any signal
        if not run.result.exists():
            tell_page(run, trainer.cfg, say)
        at = trained.snapshot.position.step
        saved = f"step {at:,} is saved, and --resume {run.path} finishes the run"
        with contextlib.suppress(BrokenPipeError):
            say(f"stopped: {trained.unsaved or saved}")
        raise
    if trained.unsaved:  # what takes less room may have been written all the same
        raise trained.unsaved
    return 0
