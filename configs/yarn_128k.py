"""DeepSeek-V3's second long-context phase: from 32K to 128K tokens, 1,000 steps (report 4.3).

    python -m dsv3_jax.train --config configs/yarn_128k.py --init-from yarn_32k-001 --init-moments
    python -m dsv3_jax.plan --config configs/yarn_128k.py

Hardware: the report's 2048 H800. The 64 devices of eight nodes share a row, two in a micro-batch: a
device has 2,048 tokens of each, and a step has 120 micro-batches, as in pre-training. Rows and
learning rate are the report's; how it spread its rows is unpublished. The rest is as in
configs/yarn_32k.py.
"""

from dataclasses import replace
from pathlib import Path

from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_config

LENGTH, ROWS = 128 * 1024, 480


def config() -> RunConfig:
    run = load_config(Path(__file__).with_name("yarn_32k.py"))
    return replace(
        run,
        model=replace(run.model, max_length=LENGTH),
        data=replace(run.data, length=LENGTH),
        train=replace(run.train, rows=ROWS),
        mesh=replace(run.mesh, sequence="node_local"),
        output=replace(run.output, name="yarn_128k"),
    )
