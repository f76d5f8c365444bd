"""Nodes that a token's experts lie on, and bytes between nodes, with and without a limit.

    python experiments/node_limited_routing/run.py [--folder FOLDER]

Takes the run `loss_free` of loss_free_balancing from the folder, or trains it, and trains one of
that configuration with node-limited routing. Writes nodes.png beside this file. 10 to 30 minutes
on two CPU cores.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from balancing import BALANCING, RUNS, Variant, first_seeds, trained_runs
from curves import command
from routing import balance_of, held_out_choices, nodes_of, whole_validation

from dsv3_jax.cli import run
from dsv3_jax.config import ModelConfig
from dsv3_jax.drawing import SERIES, new_figure
from dsv3_jax.model.router import choose_experts
from dsv3_jax.train.metrics import read_metrics

NODES = 8
ROWS = 256  # of held-out text that nodes are counted on
RANDOM_TOKENS = 2**16  # that stand for uniform routing
SCALED = 128  # numbers of an FP8 payload that share a scale of one byte


def limited_to(kept: int) -> tuple[str, ...]:
    """Options of a run whose tokens use so many nodes."""
    groups = "--model.num-groups", str(NODES), "--model.num-kept-groups", str(kept)
    return (*BALANCING["loss_free"].options, *groups)


VARIANTS = {"loss_free": BALANCING["loss_free"], "nodes_2": Variant(limited_to(2), (0,))}


class Outcome(NamedTuple):
    """Of a run: loss on the whole held-out split; on some of it, MaxVio, and of every layer and
    token the number of nodes.
    """

    validation_loss: float
    max_violation: float
    nodes_LT: np.ndarray
    uniform_T: np.ndarray
    model: ModelConfig


def tell(folder: Path) -> None:
    """Trains what is missing, prints the tables and draws the distribution."""
    found = {key: outcome(path) for key, path in trained_runs(folder, VARIANTS).items()}
    heads = "run", "seed", "held-out loss, nats per token", "MaxVio of held-out text"
    heads += tuple(f"nodes a token, {of}" for of in ("mean", "most", "mean if uniform"))
    print(f"| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for (name, seed), of in found.items():
        print(
            f"| `{name}` | {seed} | {of.validation_loss:.4f} | {of.max_violation:.3f} "
            f"| {of.nodes_LT.mean():.3f} | {of.nodes_LT.max()} | {of.uniform_T.mean():.3f} |"
        )
    heads = ("run", "seed", *(f"bytes a token and layer, {of}" for of in ("FP8", "BF16")))
    heads += "FP8, if uniform", "FP8, if sent once an expert"
    print(f"\n| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for (name, seed), of in found.items():
        fp8, bf16 = payloads(of.model.d_model)
        mean, uniform = crossings(of.nodes_LT.mean()), crossings(of.uniform_T.mean())
        # A copy for each expert, though several lie on one node.
        copies = crossings(of.model.experts_per_token)
        bytes_of = mean * fp8, mean * bf16, uniform * fp8, copies * fp8
        print(f"| `{name}` | {seed} | {' | '.join(f'{x:.0f}' for x in bytes_of)} |")
    draw(first_seeds(found), Path(__file__).with_name("nodes.png"))


def outcome(path: Path) -> Outcome:
    """Read from the run's metrics and counted with its model."""
    whole = whole_validation(read_metrics(path / "metrics.jsonl"))
    of, chosen_LTE = held_out_choices(path, ROWS)
    nodes_LT = nodes_of(chosen_LTE, NODES)
    uniform_T = uniform_nodes(of.cfg.model, RANDOM_TOKENS)
    violation = balance_of(chosen_LTE.sum(1)).max_violation
    return Outcome(whole["loss"], violation, nodes_LT, uniform_T, of.cfg.model)


def uniform_nodes(cfg: ModelConfig, tokens: int) -> np.ndarray:
    """Nodes [T] of tokens whose scores are all equally likely, under the model's limit."""
    scores_1TE = jax.random.uniform(jax.random.key(0), (1, tokens, cfg.num_experts))
    experts_TK = np.asarray(choose_experts(scores_1TE, cfg))[0]
    chosen_TE = (experts_TK[..., None] == np.arange(cfg.num_experts)).any(1)
    return nodes_of(chosen_TE[None], NODES)[0]


def crossings(nodes: float) -> float:
    """Nodes that a token is sent to, where tokens lie evenly on all: its own counts in 1 / NODES of
    the cases.
    """
    return nodes * (1 - 1 / NODES)


def payloads(d_model: int) -> tuple[float, float]:
    """Bytes of a token in FP8 with its scales, and in BF16."""
    return d_model + d_model / SCALED, 2 * d_model


def shares(nodes_T: np.ndarray) -> np.ndarray:
    """Share of the tokens that use 1, 2, ... nodes."""
    return np.bincount(nodes_T.ravel(), minlength=NODES + 1)[1:] / nodes_T.size


def draw(found: Mapping[str, Outcome], path: Path) -> None:
    """How many nodes tokens use: trained models as bars, uniform routing as dots."""
    with new_figure(10, 3.2, **{"axes.axisbelow": True}) as figure:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for panel, (name, of), color in zip(panels, found.items(), SERIES, strict=False):
            most = min(of.model.experts_per_token, NODES)
            places = np.arange(1, most + 1)
            panel.bar(places, shares(of.nodes_LT)[:most], color=color, label="trained")
            panel.plot(places, shares(of.uniform_T)[:most], "o", color="black", label="uniform")
            panel.set(title=name, xlabel="nodes of a token's experts", xticks=places)
            panel.legend()
        panels[0].set_ylabel("share of tokens and layers")
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(command(tell, __doc__, RUNS))
