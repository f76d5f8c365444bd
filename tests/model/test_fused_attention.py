"""Attention by cuDNN: when it is asked for, and what of it stands in a program for a GPU."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import fused_attention as source
from dsv3_jax.model.block import rematerialised
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.quant.kernels.choice import OLDEST_JAX
from tests.quant.kernels.interpret import lowered
from tests.shapes import normal, random_part

T = 256
FORWARD, BACKWARD = "cudnn$fmhaSoftmax(", "cudnn$fmhaSoftmaxBackward("
needs_jax = pytest.mark.skipif(
    jax.__version_info__[:2] < OLDEST_JAX, reason="kernels need JAX 0.11 or later"
)


def q_and_v(dtype=jnp.bfloat16, size: int = 192) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((1, T, 2, size), dtype), jnp.zeros((1, T, 2, 128), dtype)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """As if there were one, with cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    source._usable.cache_clear()
    monkeypatch.setattr(source, "lacking", lambda: None)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: source.OLDEST_CUDNN)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    yield SimpleNamespace(cudnn=cudnn)
    source._usable.cache_clear()


def test_a_cpu_has_none():
    assert not source.fits(*q_and_v(), None)


def test_a_hopper_has_for_whole_rows_of_bfloat16(hopper):
    assert source.fits(*q_and_v(), None)
    assert not source.fits(*q_and_v(), jnp.zeros((1, T), jnp.int32))
    assert not source.fits(*q_and_v(jnp.float32), None)
    assert not source.fits(*q_and_v(size=260), None)
    assert not source.fits(*(x[:, :100] for x in q_and_v()), None)


def test_an_older_cudnn_or_none_is_left_alone(hopper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hopper.cudnn, "check_cudnn_version", lambda: source.OLDEST_CUDNN - 1)
    assert not source.fits(*q_and_v(), None)
    source._usable.cache_clear()

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(hopper.cudnn, "check_cudnn_version", missing)
    assert not source.fits(*q_and_v(), None)


def program(remat: str) -> str:
    """Of MLA's gradient, for a GPU."""
    cfg = ModelConfig(
        vocab_size=128,
        d_model=64,
        num_layers=1,
        num_dense_layers=1,
        num_heads=2,
        q_latent=32,
        kv_latent=32,
    )
    mla = random_part(MLA, cfg)
    x_BTD = normal(0, 2, T, 64, dtype="bfloat16")
    rope_BTR = rope_table(cfg, jnp.arange(T)[None], jnp.bfloat16)

    def layer(mla, x_BTD):
        return x_BTD + mla(x_BTD, rope_BTR)

    def loss(mla, x_BTD):
        form = rematerialised(layer, remat, scanned=False)
        return form(mla, form(mla, x_BTD)).astype(jnp.float32).sum()

    return lowered(jax.grad(loss, argnums=(0, 1)), mla, x_BTD)


@needs_jax
def test_the_report_recomputes_no_attention(hopper):
    for remat in ("none", "report"):
        text = program(remat)
        assert (text.count(FORWARD), text.count(BACKWARD)) == (2, 2), remat
    assert program("full").count(FORWARD) > 2


@needs_jax
def test_devices_that_share_a_batch_have_it_too(hopper):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    q, v = (jnp.concatenate([x, x]) for x in q_and_v())

    def gradient(q, k, v):
        form = partial(source.fused_attention, scale=0.5)
        return jax.grad(lambda *args: form(*args).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    per_device = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows)
    assert lowered(per_device, q, q, v).count(BACKWARD) == 1
