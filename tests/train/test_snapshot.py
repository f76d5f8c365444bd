"""A run's state through a checkpoint: every bit, and where the run stood."""

import copy
import ctypes
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optax.tree_utils import tree_set

from dsv3_jax.checkpoint import store
from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train import ema
from dsv3_jax.train.optimizer import adamw
from dsv3_jax.train.snapshot import Position, Snapshot, contents, restore, weights_of
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.trouble import SpikeState
from tests.runs import random_state, with_model
from tests.shapes import TINY, random_model

CFG = RunConfig(model=TINY, data=DataConfig(length=16))
POSITION = Position(step=7, consumed_rows=21, seconds=1.5)
DATA = {"content": "c0ffee", "tokenizer": "7ea"}


@cache
def weights(dtype: str, seed: int) -> tuple[nnx.State, nnx.State]:
    """Parameters and router biases of a random model."""
    return nnx.split(random_model(TINY, jnp.dtype(dtype), seed), nnx.Param, RouterBias)[1:]


def distinct_state(cfg: RunConfig) -> TrainState:
    """A state in which no two leaves are alike."""
    params, biases = weights("float32", 0)
    (mu, _), (nu, _) = (weights(cfg.optimizer.moment_dtype, seed) for seed in (1, 2))
    optimizer = tree_set(adamw(cfg.optimizer).init(params), count=jnp.int32(3), mu=mu, nu=nu)
    return TrainState(params, biases, optimizer)


def save(folder: Path, cfg: RunConfig, snapshot: Snapshot) -> None:
    store.save(folder, snapshot.position.step, *contents(cfg, snapshot, DATA))


@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path: Path, moments: str):
    cfg = replace(CFG, optimizer=replace(CFG.optimizer, moment_dtype=moments))
    state = distinct_state(cfg)
    average, spike = weights("float32", 3)[0], SpikeState(3, 1.5, 0.25, 6, 1.25)
    save(tmp_path, cfg, Snapshot(state, POSITION, average, spike))
    fresh = jax.tree.map(jnp.zeros_like, state)
    restored = restore(store.load(tmp_path), cfg, fresh)
    assert all(x.is_deleted() for x in jax.tree.leaves(fresh))  # before another is made
    assert (restored.position, restored.spike) == (POSITION, spike)
    for new, old in ((restored.state, state), (restored.average, average)):
        assert jax.tree.structure(new) == jax.tree.structure(old)
        for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)


def test_weights_alone_leave_optimiser_and_position_fresh(tmp_path: Path):
    state = distinct_state(CFG)
    save(tmp_path, CFG, Snapshot(state, POSITION))
    fresh = jax.tree.map(jnp.zeros_like, state)
    checkpoint = store.load(tmp_path)
    taken = weights_of(checkpoint, CFG, fresh)
    assert not checkpoint.arrays["params"]
    assert all(x.is_deleted() for x in jax.tree.leaves((fresh.params, fresh.biases)))
    same = jax.tree.map(np.array_equal, taken, state)
    assert all(jax.tree.leaves((same.params, same.biases)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(taken.optimizer))


def test_a_checkpoint_holds_everything_by_name_and_what_identifies_the_run(tmp_path: Path):
    save(tmp_path, CFG, Snapshot(distinct_state(CFG), POSITION))
    checkpoint = store.load(tmp_path)
    assert checkpoint.step == 7
    assert checkpoint.meta["step"] == 7
    assert checkpoint.meta["consumed_rows"] == 21
    assert checkpoint.meta["updates"] == 3
    assert checkpoint.meta["data"] == DATA
    assert checkpoint.meta["config"]["model"]["d_model"] == TINY.d_model
    arrays = checkpoint.arrays
    assert arrays["params"].keys() == arrays["mu"].keys() == arrays["nu"].keys()
    assert {array.dtype for array in arrays["params"].values()} == {np.dtype(np.float32)}
    assert {array.dtype for array in arrays["mu"].values()} == {np.dtype(jnp.bfloat16)}
    assert arrays["router_bias"].keys() == {
        "layers.1.moe.router.bias_E",
        "layers.2.moe.router.bias_E",
        "mtp.0.block.moe.router.bias_E",
    }


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path):
    save(tmp_path, CFG, Snapshot(distinct_state(CFG), POSITION))
    checkpoint = store.load(tmp_path)
    for changes, said in (
        ({"num_layers": 4}, "lacks tensors of this model"),
        ({"mtp_depth": 0}, "holds tensors that this model has not.*mtp.0"),
        ({"vocab_size": 65}, r"embed_VD has shape \(64, 32\)"),
    ):
        other = with_model(CFG, **changes)
        with pytest.raises(ValueError, match=said):
            restore(checkpoint, other, random_state(other))


def leaves(snapshot: Snapshot) -> list[jax.Array]:
    return jax.tree.leaves((snapshot.state, snapshot.average))


def test_what_a_checkpoint_is_made_of_outlives_the_state_it_was_taken_from():
    """Overwrites every buffer of the state, as a later step may that the state was donated to."""
    average = jax.tree.map(jnp.copy, weights("float32", 3)[0])
    state = jax.tree.map(jnp.copy, distinct_state(CFG))
    taken = Snapshot(state, POSITION, ema.on_host(average))
    arrays, meta = contents(CFG, taken, DATA)
    kept = copy.deepcopy(arrays)
    for leaf in leaves(taken):
        ctypes.memset(leaf.unsafe_buffer_pointer(), 0x2A, leaf.nbytes)
    for leaf in leaves(taken):
        assert set(np.asarray(leaf).tobytes()) == {0x2A}
    for group, named in arrays.items():
        for name, array in named.items():
            assert array.tobytes() == kept[group][name].tobytes(), f"{group}/{name}"
    assert arrays.keys() == {"params", "router_bias", "mu", "nu", "average"}
    assert meta["updates"] == 3


def test_taking_a_checkpoint_leaves_the_state_to_be_donated():
    """A view that NumPy holds makes XLA:CPU find new memory instead, for the whole state."""
    state = jax.tree.map(jnp.copy, distinct_state(CFG))
    arrays, _ = contents(CFG, Snapshot(state, POSITION), DATA)
    leaf = jax.tree.leaves(state)[0]
    place = leaf.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(leaf)
    assert after.unsafe_buffer_pointer() == place
    assert arrays
