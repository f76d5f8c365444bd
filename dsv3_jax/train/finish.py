"""The end of a run: whole validation beside zlib, loss picture, a sample, the summary."""

import math

from dsv3_jax.data.mixture import Mixture
from dsv3_jax.data.packing import Rows
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.train.ema import in_device_memory
from dsv3_jax.train.loop import Trainer
from dsv3_jax.train.machine import describe
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.output import Output
from dsv3_jax.train.page import write_page
from dsv3_jax.train.records import sample_record, validation_record
from dsv3_jax.train.report import Result, loss_picture, write_summary, zlib_bits_per_byte
from dsv3_jax.train.snapshot import Snapshot
from dsv3_jax.train.validation import text_of


def passes(train: Rows | Mixture, consumed_rows: int) -> float | None:
    """How often the text was gone through. None for a mixture, whose sources differ in that."""
    return None if isinstance(train, Mixture) else consumed_rows / len(train)


def finish(trainer: Trainer, trained: Snapshot, out: Output) -> Result | None:
    """Validates on the whole held-out split, and leaves picture, sample and result in the run's
    folder; None in other processes than the first, which does that.
    """
    cfg, run, corpus = trainer.cfg, trainer.run, trainer.corpus
    rows = corpus.validation
    validation = trainer.validate(trained.state, rows, range(len(rows)))
    text = trainer.sample()
    averaged = None
    records = [validation_record(validation, trained.position, cfg, whole=True)]
    if trained.average is not None:
        average = trained.state._replace(params=in_device_memory(trained.average))
        averaged = trainer.validate(average, rows, range(len(rows)))
        record = validation_record(averaged, trained.position, cfg, whole=True)
        records.append(record | {"kind": "averaged"})
    if not processes.is_first():
        return None
    if text:
        records.append(sample_record(cfg, trained.position, cfg.output.sample_prompt, text))
    known = read_metrics(run.metrics)
    for record in records:
        if record not in known:  # a finished run may be resumed
            out.keep(record)
    entries = read_metrics(run.metrics)
    zlib_bpb = None
    if cfg.data.format == "text":
        zlib_bpb = zlib_bits_per_byte(text_of(rows, corpus.tokenizer.token_bytes))
    loss_picture(entries, run.picture, zlib_bpb)
    replace_file(run.sample, (cfg.output.sample_prompt + text).encode())
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
        averaged_bits_per_byte=averaged and averaged.bits_per_byte,
        passes=passes(corpus.train, trained.position.consumed_rows),
        zlib_bits_per_byte=zlib_bpb,
        validation_bytes=validation.bytes,
        sample_prompt=cfg.output.sample_prompt,
        sample_text=text,
        picture=run.picture,
        checkpoint=run.checkpoints,
    )
    write_summary(result, run.result)
    write_page(run, cfg, describe(), entries, result)
    return result
