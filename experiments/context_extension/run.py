"""A small model before and after its context is extended with YaRN: loss by position, needles.

    python experiments/context_extension/run.py [--folder FOLDER]

Pre-trains at 128 tokens, extends to 512 and 2,048 with YaRN and, as a control, without it. Runs
that are in the folder already are not trained again; one that was stopped goes on. Writes
needles.png and losses.png beside this file, and tables to stdout. 20 minutes on two CPU cores.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from curves import train
from retrieval import documents, draw_secret, write_documents, write_tokenizer

from dsv3_jax.checkpoint.run_model import read_model, write_model
from dsv3_jax.cli import parse, run, to_stderr, user_errors
from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.config.fields import check
from dsv3_jax.config.load import load_config
from dsv3_jax.data.corpus import build_corpus
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.drawing import GREY, SERIES, new_figure, save_picture
from dsv3_jax.evaluate.haystack import open_haystack
from dsv3_jax.evaluate.needle_map import Map, draw_map, shown
from dsv3_jax.evaluate.needle_scores import score_cells, scorer_of
from dsv3_jax.evaluate.needles import Place, Prompt, build_prompts, depths_of, places_of
from dsv3_jax.model.transformer import DeepSeekV3

HERE = Path(__file__).parent
CONFIG = HERE / "config.py"
BASE = load_config(CONFIG)  # of the run before the extension
ORIGINAL, YARN = BASE.model.max_length, BASE.model.yarn
TOKENS = BASE.train.rows * ORIGINAL  # of a step, at every length
PHASES = 512, 2048
LONGEST = PHASES[-1]
LENGTHS = 64, 128, 256, 512, 1024, 2048  # of prompts with needles
EDGES = 0, 32, 64, 128, 256, 512, 1024, 2048  # of the stretches that losses are means over
TEXT = 2**20  # tokens of retrieval documents for each length, about
WEIGHTS = "1", "4"  # of the library's source and the retrieval documents
NO_YARN = replace(YARN, factor=1.0)
SHARP = {"font.size": 9, "savefig.dpi": 85}  # enough to read, and small files
WINDOWS = f"before, in windows of {ORIGINAL}"


@dataclass(frozen=True)
class Options:
    """Where the runs lie, and how much is measured."""

    folder: Path = Path("runs/context_extension")
    """Of the runs"""
    steps: int = 1000
    """Of each phase of the extension"""
    depths: int = 5
    """Of needles"""
    needles: int = 10
    """For each length and depth"""

    def __post_init__(self) -> None:
        for name in ("steps", "depths", "needles"):
            value = getattr(self, name)
            check(f"--{name}", value, value >= 1, "1 or more")


class Variant(NamedTuple):
    """A run's weights with positions of `LONGEST` tokens, scaled by YaRN or as they are."""

    name: str
    run: Path
    yarn: bool


def main(args: list[str]) -> None:
    """The command."""
    options = parse(Options, Options(), prog="run.py", description=__doc__, args=args)
    with user_errors():
        tell(options)


def tell(options: Options) -> None:
    """Trains what is missing, measures, prints the tables and draws the pictures."""
    variants = trained_runs(options)
    tokenizer = load_tokenizer(variants[0].run / "tokenizer.json")
    rows_BT = held_out_rows(tokenizer, LONGEST)
    prompts = all_prompts(tokenizer, options.depths, options.needles)
    maps: dict[str, Map] = {}
    losses: dict[str, np.ndarray] = {}
    for variant in variants:
        to_stderr(f"measured: {variant.name}")
        model = with_positions(read_model(variant.run).model, LONGEST, yarn=variant.yarn)
        if not losses:
            short_BT = in_windows(rows_BT, ORIGINAL)
            losses[WINDOWS] = losses_of(model, short_BT).reshape(len(rows_BT), -1).mean(0)
        losses[variant.name] = losses_of(model, rows_BT).mean(0)
        maps[variant.name] = Map(score_cells(scorer_of(model), prompts, lambda done: None))
    needles = [*needle_table(maps, "exact"), "", *needle_table(maps, "logprob")]
    print("\n".join(["", *loss_table(losses), "", *needles]))
    draw_needles(maps, HERE / "needles.png")
    draw_losses(losses, HERE / "losses.png")


# --- runs ----------------------------------------------------------------------------------------


def trained_runs(options: Options) -> list[Variant]:
    """What is compared, in the order of the tables."""
    original = train(options.folder, "original", *data(options.folder, ORIGINAL), config=CONFIG)
    plain = unscaled(original, options.folder.absolute() / "original_unscaled")
    variants = [
        Variant("before, plain RoPE", original, False),
        Variant("before, YaRN", original, True),
    ]
    for name, start, yarn in (("YaRN", original, True), ("plain RoPE", plain, False)):
        for length in PHASES:
            start = extended(options, start, length, yarn=yarn)
            variants.append(Variant(f"after {length:,}, {name}", start, yarn))
    return variants


def data(folder: Path, length: int) -> tuple[str, ...]:
    """Options of a run: the library's source, and documents for rows of so many tokens."""
    folder, count = folder.absolute(), TEXT // (length * 3 // 2)
    tokenizer = write_tokenizer(folder / "tokenizer.json", BASE.model.vocab_size)
    path = folder / f"retrieval_{length}.jsonl"
    write_documents(path, documents(length, count, seed=0))
    source = ("--data.source", "stdlib", str(path), "--data.weights", *WEIGHTS)
    return (*source, "--data.tokenizer", str(tokenizer))


def extended(options: Options, start: Path, length: int, *, yarn: bool) -> Path:
    """A phase of the extension (report 4.3): as many tokens a step, one small learning rate."""
    rate = str(BASE.schedule.final_learning_rate)
    return train(
        options.folder,
        f"{'yarn' if yarn else 'plain'}_{length}",
        *("--init-from", str(start), *data(options.folder, length)),
        *("--model.max-length", str(length), "--data.length", str(length)),
        *(() if yarn else ("--model.yarn.factor", "1")),
        *("--train.rows", str(TOKENS // length), "--train.steps", str(options.steps)),
        *("--schedule.learning-rate", rate, "--schedule.final-learning-rate", rate),
        *("--schedule.warmup-steps", "0", "--output.save-every", str(options.steps)),
        config=CONFIG,
    )


def unscaled(run: Path, out: Path) -> Path:
    """A run's model with YaRN switched off at every length, as an imported one to start from."""
    if not out.exists():
        model = read_model(run).model
        cfg = replace(model.cfg, yarn=NO_YARN)
        write_model(of_config(model, cfg), run, out, overwrite=False)
    return out


# --- models --------------------------------------------------------------------------------------


def with_positions(model: DeepSeekV3, length: int, *, yarn: bool) -> DeepSeekV3:
    """The same weights in a model of another longest sequence."""
    return of_config(model, replace(model.cfg, max_length=length, yarn=YARN if yarn else NO_YARN))


def of_config(model: DeepSeekV3, cfg: ModelConfig) -> DeepSeekV3:
    """The same weights under another configuration of the same sizes."""
    abstract = jax.eval_shape(lambda: DeepSeekV3(cfg, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model))


# --- measures ------------------------------------------------------------------------------------


def all_prompts(tokenizer: Tokenizer, depths: int, needles: int) -> dict[Place, list[Prompt]]:
    """The same for all variants."""
    haystack = open_haystack(None, tokenizer, LONGEST)
    return {
        place: list(build_prompts(tokenizer, haystack, place, needles, 0, draw_secret))
        for place in places_of(LENGTHS, depths_of(depths))
    }


def held_out_rows(tokenizer: Tokenizer, length: int) -> np.ndarray:
    """The held-out source in whole rows, each with one more token, int32 [B, length + 1]."""
    data, size = DataConfig(length=length), tokenizer.vocab_size
    rows = build_corpus(data, size, 0, lambda line: None, tokenizer=tokenizer).validation
    whole = [row for row in rows if (row.labels_T >= 0).all()]
    return np.stack([np.append(row.tokens_T, row.labels_T[-1:]) for row in whole])


def losses_of(model: DeepSeekV3, rows_BT: np.ndarray) -> np.ndarray:
    """Nats of every token but the first, each from those before it in its row, [B, T - 1]."""
    at_once = max(TOKENS // rows_BT.shape[1], 1)
    lots = [rows_BT[i : i + at_once] for i in range(0, len(rows_BT), at_once)]
    return np.concatenate([np.asarray(_losses(model, lot)) for lot in lots])


@jax.jit
def _losses(model: DeepSeekV3, rows_BT: jax.Array) -> jax.Array:
    log_p_BTV = jax.nn.log_softmax(model(rows_BT[:, :-1]), axis=-1)
    return -jnp.take_along_axis(log_p_BTV, rows_BT[:, 1:, None], axis=-1)[..., 0]


def in_windows(rows_BT: np.ndarray, size: int) -> np.ndarray:
    """Rows of length + 1 tokens as rows of size + 1, so that the same tokens are predicted."""
    starts = range(0, rows_BT.shape[1] - 1, size)
    return np.concatenate(
        [np.stack([row[start : start + size + 1] for start in starts]) for row in rows_BT]
    )


# --- what is told --------------------------------------------------------------------------------


def loss_table(losses: Mapping[str, np.ndarray]) -> list[str]:
    """In Markdown: means over stretches of positions."""
    stretches = list(itertools.pairwise(EDGES))
    lines = [
        [name, *(f"{loss_T[start:end].mean():.3f}" for start, end in stretches)]
        for name, loss_T in losses.items()
    ]
    return table(["positions", *(f"{start:,}–{end - 1:,}" for start, end in stretches)], lines)


def needle_table(maps: Mapping[str, Map], field: str) -> list[str]:
    """In Markdown: means over the depths, by length."""
    lines = [[name, *(shown(score, field) for score in of.means())] for name, of in maps.items()]
    return table([field, *(f"{length:,}" for length in LENGTHS)], lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    marked = [f"| {' | '.join(line)} |" for line in (heads, *lines)]
    return [marked[0], "|" + " --- |" * len(heads), *marked[1:]]


def draw_needles(maps: Mapping[str, Map], path: Path) -> None:
    """A heat map for each variant; the model was pre-trained left of the line."""
    with new_figure(12, 5.4, **SHARP, **{"axes.grid": False}) as figure:
        panels = figure.subplots(2, 3).flat
        for panel, (name, found) in zip(panels, maps.items(), strict=True):
            draw_map(panel, found, "exact")
            panel.set_title(name, fontsize=10)
            panel.axvline(LENGTHS.index(ORIGINAL) + 0.5, color=GREY, linewidth=1.5)
        save_picture(figure, path, "needles")


def draw_losses(losses: Mapping[str, np.ndarray], path: Path) -> None:
    """Loss of held-out source by position, means over stretches that grow by a quarter."""
    with new_figure(8.5, 4.2, **SHARP, **{"lines.linewidth": 1.4}) as figure:
        panel = figure.subplots()
        for (name, loss_T), color in zip(losses.items(), (GREY, *SERIES), strict=False):
            middles, means = by_stretches(loss_T)
            style = ":" if name == WINDOWS else "-"
            panel.plot(middles, means, label=name, color=color, linestyle=style)
        for length in (ORIGINAL, *PHASES):
            panel.axvline(length, color=GREY, linewidth=0.8, linestyle="--")
        panel.set(xscale="log", xlabel="position, tokens", ylabel="nats per token")
        panel.set_xticks(EDGES[1:], [f"{edge:,}" for edge in EDGES[1:]])
        panel.minorticks_off()
        panel.legend()
        save_picture(figure, path, "losses")


def by_stretches(loss_T: np.ndarray) -> tuple[list[float], list[float]]:
    """Middles and means of stretches of positions from 16 on, each a quarter longer."""
    edges = [0, 16]
    while edges[-1] < len(loss_T):
        edges.append(min(int(edges[-1] * 1.25), len(loss_T)))
    pairs = list(itertools.pairwise(edges))
    return [(a + b) / 2 for a, b in pairs], [float(loss_T[a:b].mean()) for a, b in pairs]


if __name__ == "__main__":
    run(main)
