"""Experiments on routing without their runs: what is counted, tables' arithmetic, pictures."""

import importlib
import json
import struct
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.data.packing import Row
from dsv3_jax.data.tokenizer import train_tokenizer
from tests.experiments.loading import run_module
from tests.runs import jax_option
from tests.shapes import compiled, random_model, random_tokens, tiny_model

ROOT = Path(__file__).parents[2]
NAMES = ("loss_free_balancing", "node_limited_routing", "expert_specialisation")


def script(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """An experiment's run.py, or a module that experiments share."""
    patch.syspath_prepend(ROOT / "experiments")
    if (ROOT / "experiments" / f"{name}.py").exists():
        return importlib.import_module(name)
    return run_module(name, patch)


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """All of them, and what they share."""
    names = (*NAMES, "routing", "balancing", "curves", "kinds_of_text")
    return SimpleNamespace(**{name: script(name, monkeypatch) for name in names})


def is_picture(path: Path) -> bool:
    """Whether a PNG is neither empty nor one of those that are too large to keep."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and min(width, height) > 100 and len(data) < 150_000


# --- counting ---


def test_choices_are_those_of_a_forward_pass_with_one_more_token_that_counts(experiments):
    cfg = tiny_model()
    model, tokens_T = random_model(cfg), np.asarray(random_tokens(cfg, 1, 12))[0]
    labels_T = np.where(np.arange(12) == 5, -1, 1)
    rows = [Row(tokens_T, labels_T), Row(tokens_T[::-1], labels_T)]
    with jax_option("jax_disable_most_optimizations"):
        chosen_LTE = experiments.routing.choices(model, rows, "float32")
    assert chosen_LTE.shape == (2, 22, 8)
    load = compiled(lambda valid_1T: model.hidden(tokens_T[None], valid_1T)[1].load_E)
    loads_TLE = np.array([load(jnp.arange(12)[None] < counted) for counted in range(13)])
    first_LTE = np.delete(np.diff(loads_TLE, axis=0), 5, axis=0).transpose(1, 0, 2)
    np.testing.assert_array_equal(chosen_LTE[:, :11], first_LTE)
    assert (chosen_LTE[:, 11:] != chosen_LTE[:, :11]).any()


def test_nodes_are_counted_as_sets_count_them(experiments):
    draw = np.random.default_rng(0)
    experts_LTK = draw.permuted(np.tile(np.arange(12), (2, 30, 1)), axis=-1)[..., :4]
    chosen_LTE = (experts_LTK[..., None] == np.arange(12)).any(-2)
    by_sets_LT = [
        [len({e // 3 for e in experts_K}) for experts_K in layer] for layer in experts_LTK
    ]
    np.testing.assert_array_equal(experiments.routing.nodes_of(chosen_LTE, 4), by_sets_LT)


def test_loads_are_relative_to_each_layers_mean(experiments):
    load_LE = np.array([[3, 3, 3, 3], [0, 0, 8, 0]])
    np.testing.assert_allclose(experiments.routing.relative(load_LE), [[1, 1, 1, 1], [0, 0, 4, 0]])
    assert experiments.routing.balance_of(load_LE) == (1.5, 0.5)


# --- runs ---


def test_runs_are_trained_from_the_shared_configuration(experiments, monkeypatch, tmp_path: Path):
    started = []

    def run(words: list[str], **options: object) -> subprocess.CompletedProcess:
        started.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    balancing = experiments.balancing
    variant = balancing.Variant(balancing.balanced_by(0, 1e-2), (0, 1))
    found = balancing.trained_runs(tmp_path, {"aux": variant})
    assert found == {("aux", 0): tmp_path / "aux-001", ("aux", 1): tmp_path / "aux_seed1-001"}
    assert balancing.first_seeds(found) == {"aux": tmp_path / "aux-001"}
    _, words = started
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {
        "--config": str(ROOT / "experiments/loss_free_balancing/config.py"),
        "--schedule.bias-speed": "0",
        "--train.balance-weight": "0.01",
        "--train.seed": "1",
        "--output.folder": str(tmp_path),
        "--output.name": "aux_seed1",
    }


def test_variants_differ_in_what_they_compare(experiments):
    from dsv3_jax.train.__main__ import resolve

    config = ("--config", str(experiments.balancing.CONFIG))

    def routing(variant: NamedTuple) -> tuple:
        cfg = resolve([*config, *variant.options])[0].run
        model = cfg.model
        speed, weight = cfg.schedule.bias_speed, cfg.train.balance_weight
        return speed, weight, model.num_groups, model.num_kept_groups

    balanced = {n: routing(v) for n, v in experiments.balancing.BALANCING.items()}
    assert balanced["none"] == (0, 0, 1, 1)
    assert balanced["loss_free"] == (3e-3, 1e-4, 1, 1)
    assert all(
        of[0] == 0 and of[1] > 1e-4 for name, of in balanced.items() if name.startswith("aux")
    )
    limited = {n: routing(v) for n, v in experiments.node_limited_routing.VARIANTS.items()}
    assert limited.pop("loss_free") == balanced["loss_free"]
    assert {n: of[2:] for n, of in limited.items()} == {"nodes_2": (8, 2)}
    assert {of[:2] for of in limited.values()} == {(3e-3, 1e-4)}


# --- tables and pictures ---


def metrics_of(folder: Path, violations: list[float]) -> Path:
    """A run's folder with the entries that curves are made of."""
    folder.mkdir()
    entries = [
        {"kind": "train", "step": i, "tokens": i, "main_loss": 4.0 / i, "max_violation": violation}
        for i, violation in enumerate(violations, start=1)
    ]
    entries.append({"kind": "validation", "step": 3, "tokens": 3, "whole": True})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_balance_is_read_step_by_step_and_drawn(experiments, tmp_path: Path):
    found = experiments.loss_free_balancing
    runs = {name: metrics_of(tmp_path / name, [3.0, 2.0, 1.0]) for name in ("none", "loss_free")}
    np.testing.assert_array_equal(found.violations(runs["none"]), [3, 2, 1])
    balance = experiments.routing.Balance
    of = found.Outcome(4.25, 2.5, 3.5, 0.5, balance(0.125, 0.75), balance(0.375, 0.25))
    assert found.line("none", 0, of) == (
        "| `none` | 0 | 4.2500 | 2.5000 | 3.5000 | 0.500 | 0.125 | 0.750 | 0.375 |"
    )
    found.draw(runs, tmp_path / "balance.png")
    assert is_picture(tmp_path / "balance.png")


def test_uniform_routing_reaches_as_many_nodes_as_combinatorics_says(experiments):
    cfg = load_config(experiments.balancing.CONFIG).model
    found = experiments.node_limited_routing
    nodes_T = found.uniform_nodes(cfg, 20_000)
    # A node of 4 experts is missed by 4 choices of 32 in 28 27 26 25 / (32 31 30 29) of the cases.
    missed = 28 * 27 * 26 * 25 / (32 * 31 * 30 * 29)
    assert nodes_T.mean() == pytest.approx(8 * (1 - missed), abs=0.02)  # 4 standard deviations
    limited = tiny_model(num_experts=16, num_groups=8, num_kept_groups=2)
    assert set(found.uniform_nodes(limited, 1000)) == {1, 2}


def test_bytes_between_nodes_leave_a_tokens_own_out(experiments):
    found = experiments.node_limited_routing
    nodes, draw = 3, np.random.default_rng(0)
    homes_J = draw.integers(0, 8, 50_000)
    on_others = np.mean([len({0, 3, 5} - {home}) for home in homes_J.tolist()])
    assert found.crossings(nodes) == pytest.approx(on_others, abs=0.01)
    assert found.payloads(7168) == (7168 + 56, 14336)
    np.testing.assert_allclose(
        found.shares(np.array([[1, 2], [2, 4]])), [0.25, 0.5, 0, 0.25] + [0] * 4
    )


def test_nodes_are_drawn(experiments, tmp_path: Path):
    found = experiments.node_limited_routing
    cfg = load_config(experiments.balancing.CONFIG).model
    of = found.Outcome(4.0, 0.1, np.array([[1, 2, 4]]), np.array([2, 3]), cfg)
    found.draw({"loss_free": of, "nodes_2": of}, tmp_path / "nodes.png")
    assert is_picture(tmp_path / "nodes.png")


def test_deviation_is_the_distance_from_the_mean_of_the_kinds(experiments):
    deviation = experiments.expert_specialisation.deviation
    assert deviation([np.array([[0.0, 2.0]])] * 2) == 0  # out of balance, but alike
    # Means 1 and 1: distances 1, 0, 1 for the first expert and as many for the second.
    loads = [np.array([[0.0, 2.0]]), np.array([[1.0, 1.0]]), np.array([[2.0, 0.0]])]
    assert deviation(loads) == pytest.approx(2 / 3)


def test_kinds_of_text_are_counted_apart_and_drawn(experiments, monkeypatch, tmp_path: Path):
    found = experiments.expert_specialisation
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "idlelib" / "NEWS.txt").write_text("Some words on what is new.\n" * 20)
    monkeypatch.setattr(
        experiments.kinds_of_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)}
    )
    tokenizer = train_tokenizer(["some words of prose, 0 1 2"], 280)
    cfg = SimpleNamespace(
        model=tiny_model(vocab_size=tokenizer.vocab_size),
        data=SimpleNamespace(length=16),
        train=SimpleNamespace(dtype="float32"),
    )
    of = SimpleNamespace(model=random_model(cfg.model), cfg=cfg, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="whole library"):
        found.outcome(of)
    prose = found.KINDS["prose"]
    monkeypatch.setattr(found, "KINDS", {"source": prose, "prose": prose})
    monkeypatch.setattr(found, "ROWS", 4)
    with jax_option("jax_disable_most_optimizations"):
        outcome = found.outcome(of)
    assert list(outcome.kinds) == ["source", "prose"]
    assert len(outcome.parts) == 3
    assert all(load_LE.shape == (2, 8) for load_LE in (*outcome.kinds.values(), *outcome.parts))
    np.testing.assert_array_equal(outcome.kinds["source"], outcome.kinds["prose"])
    assert (outcome.parts[0] != outcome.parts[1]).any()
    found.draw({"none": outcome, "loss_free": outcome}, tmp_path / "experts.png")
    assert is_picture(tmp_path / "experts.png")
