"""Made-up Hugging Face folders in the released layout, spelt out by hand from its description.

Written by the safetensors package itself, so that our reader meets another's files.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

from dsv3_jax.checkpoint.hf import load_pretrained, save_pretrained
from dsv3_jax.checkpoint.tensor_file import DTYPES
from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.model.transformer import DeepSeekV3
from tests.shapes import tiny_model

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.dtype(np.float32)

# Hardly a multiple of 128 among the sizes of linears.
RAGGED = tiny_model(
    d_model=192,
    q_latent=136,
    kv_latent=24,
    nope_dim=70,
    rope_dim=8,
    v_dim=66,
    dense_hidden=200,
    expert_hidden=144,
    num_experts=4,
    num_groups=2,
    num_kept_groups=1,
    init_std=0.006,  # this and the next are what a config.json without them means
    yarn=YarnConfig(factor=1.0),
)
# One dense layer: the few programs that move it compile in a moment.
SMALL = replace(RAGGED, num_layers=1, mtp_depth=0)


FAMILY = (
    {"q_latent": None, "num_shared_experts": 2, "mtp_depth": 0},
    {"tied_head": True, "num_groups": 1, "num_kept_groups": 1},
    {"num_dense_layers": 0, "num_shared_experts": 0, "mtp_depth": 2},
    {"num_dense_layers": 3, "mtp_depth": 0},
)


def tensors_of(cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind (fp8, bf16, f32) of every tensor of a release."""
    d, v = cfg.d_model, cfg.vocab_size
    yield "model.embed_tokens.weight", (v, d), "bf16"
    for i in range(cfg.num_layers + cfg.mtp_depth):
        yield from layer_of(cfg, i)
    yield "model.norm.weight", (d,), "bf16"
    if not cfg.tied_head:
        yield "lm_head.weight", (v, d), "bf16"


def layer_of(cfg: ModelConfig, i: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    d, c, r, h = cfg.d_model, cfg.kv_latent, cfg.rope_dim, cfg.num_heads
    layer, qk = f"model.layers.{i}", h * (cfg.nope_dim + r)
    yield f"{layer}.input_layernorm.weight", (d,), "bf16"
    yield f"{layer}.post_attention_layernorm.weight", (d,), "bf16"
    attention = f"{layer}.self_attn"
    if cfg.q_latent is None:
        yield f"{attention}.q_proj.weight", (qk, d), "fp8"
    else:
        yield f"{attention}.q_a_proj.weight", (cfg.q_latent, d), "fp8"
        yield f"{attention}.q_a_layernorm.weight", (cfg.q_latent,), "bf16"
        yield f"{attention}.q_b_proj.weight", (qk, cfg.q_latent), "fp8"
    yield f"{attention}.kv_a_proj_with_mqa.weight", (c + r, d), "fp8"
    yield f"{attention}.kv_a_layernorm.weight", (c,), "bf16"
    yield f"{attention}.kv_b_proj.weight", (h * (cfg.nope_dim + cfg.v_dim), c), "fp8"
    yield f"{attention}.o_proj.weight", (d, h * cfg.v_dim), "fp8"
    if i < cfg.num_dense_layers:
        yield from feed_forward_of(f"{layer}.mlp", d, cfg.dense_hidden)
    else:
        yield f"{layer}.mlp.gate.weight", (cfg.num_experts, d), "bf16"
        yield f"{layer}.mlp.gate.e_score_correction_bias", (cfg.num_experts,), "f32"
        for e in range(cfg.num_experts):
            yield from feed_forward_of(f"{layer}.mlp.experts.{e}", d, cfg.expert_hidden)
        if cfg.num_shared_experts:
            hidden = cfg.num_shared_experts * cfg.expert_hidden
            yield from feed_forward_of(f"{layer}.mlp.shared_experts", d, hidden)
    if i >= cfg.num_layers:
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{layer}.{name}.weight", (d,), "bf16"
        yield f"{layer}.eh_proj.weight", (d, 2 * d), "bf16"
        yield f"{layer}.embed_tokens.weight", (cfg.vocab_size, d), "bf16"
        yield f"{layer}.shared_head.head.weight", (cfg.vocab_size, d), "bf16"


def feed_forward_of(name: str, d: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield f"{name}.gate_proj.weight", (hidden, d), "fp8"
    yield f"{name}.up_proj.weight", (hidden, d), "fp8"
    yield f"{name}.down_proj.weight", (d, hidden), "fp8"


def random_tensors(
    cfg: ModelConfig, *, fp8: bool, dtype: np.dtype = BF16, seed: int = 0
) -> dict[str, np.ndarray]:
    """Numbers of a size that a forward pass bears; every E4M3 code but NaN may occur."""
    draw = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, shape, kind in tensors_of(cfg):
        if kind == "fp8" and fp8:
            found[name] = draw.standard_normal(shape).astype(FP8)
            scales = 0.1 * (1 + draw.random([-(-size // 128) for size in shape]))
            found[f"{name}_scale_inv"] = scales.astype(F32)
        elif kind == "f32":
            found[name] = (0.05 * draw.standard_normal(shape)).astype(F32)
        else:
            gain = 1 if "norm" in name else 0
            found[name] = (gain + 0.1 * draw.standard_normal(shape)).astype(dtype)
    return with_copies(cfg, found)


def random_bits(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every E4M3 code and finite bfloat16 number, NaN in FP8 among them; scales of any size.

    A signalling NaN in bfloat16 would come back quiet from XLA:CPU.
    """
    draw = np.random.default_rng(seed)
    found = random_tensors(cfg, fp8=True, seed=seed)
    for name, x in found.items():
        if x.dtype == F32:
            found[name] = (draw.standard_normal(x.shape) * 2.0 ** draw.integers(-99, 99)).astype(
                F32
            )
        else:
            bits = draw.integers(0, 256, x.nbytes, np.uint8)
            if x.dtype == BF16:
                bits[1::2] &= 0xBF  # the exponent is never all ones
            found[name] = bits.view(x.dtype).reshape(x.shape)
    return with_copies(cfg, found)


def with_copies(cfg: ModelConfig, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MTP's copies made equal to the main tensors."""
    embed = found["model.embed_tokens.weight"]
    for i in range(cfg.num_layers, cfg.num_layers + cfg.mtp_depth):
        found[f"model.layers.{i}.embed_tokens.weight"] = embed
        found[f"model.layers.{i}.shared_head.head.weight"] = found.get("lm_head.weight", embed)
    return found


def expanded(tensors: dict[str, np.ndarray], dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    """FP8 weights times their scales, one element at a time."""
    plain = {}
    for name, x in tensors.items():
        if x.dtype == FP8:
            s = tensors[f"{name}_scale_inv"]
            rows, columns = (np.arange(size) // 128 for size in x.shape)
            plain[name] = (x.astype(F32) * s[np.ix_(rows, columns)]).astype(dtype)
        elif not name.endswith("_scale_inv"):
            plain[name] = x
    return plain


def write_folder(
    path: Path, cfg: ModelConfig, tensors: Mapping[str, np.ndarray], files: int = 1
) -> Path:
    """A folder; with several files, tensor n goes to file n modulo their number, so that weights
    and scales lie apart.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(cfg.to_hf()))
    if files == 1:
        save_file(dict(tensors), path / "model.safetensors")
        return path
    names = {n: f"model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)}
    file_of = {name: names[n % files] for n, name in enumerate(tensors)}
    for file in names.values():
        save_file({name: x for name, x in tensors.items() if file_of[name] == file}, path / file)
    index = {"metadata": {}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def read_folder(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the safetensors package's own reader."""
    found = {}
    for file in path.glob("*.safetensors"):
        for name, described in deserialize(file.read_bytes()):
            assert name not in found
            dtype = DTYPES[described["dtype"]]
            array = np.frombuffer(described["data"], dtype).reshape(described["shape"])
            found[name] = array
    return found


def changed(path: Path, cfg: ModelConfig, change: Callable[[dict], object], **how) -> Path:
    """A folder with a fault: `change` acts on its tensors before they are written."""
    tensors = random_tensors(cfg, fp8=True)
    change(tensors)
    return write_folder(path, cfg, tensors, **how)


def load(path: Path, **how) -> DeepSeekV3:
    return load_pretrained(path, progress=False, **how)


def save(model: DeepSeekV3, path: Path, **how) -> dict[str, np.ndarray]:
    """What lies in the folder then."""
    save_pretrained(model, path, progress=False, **how)
    return read_folder(path)


def assert_same_tensors(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]):
    """Names, dtypes, shapes and every bit."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        y = actual[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), name
        assert np.ascontiguousarray(y).tobytes() == np.ascontiguousarray(x).tobytes(), name


def edit_config(path: Path, **fields: object) -> None:
    """Changes fields of a folder's config.json."""
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))
