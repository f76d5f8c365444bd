"""Random `DeepseekV3ForCausalLM` models of transformers over the whole family, tiny.

Every weight is drawn, gains, gates and correction biases too, so that none can be left out or
mistaken for another unnoticed. Scales are chosen for signals, and so logits, of about unit size.
Needs torch and transformers, which the project does not; tests reach this file through a fixture.
"""

import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; nothing here is on the hub

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.checkpoint.transformers_family import BASE, BIAS_MEAN, FAMILY

torch.set_num_threads(1)  # tiny products; threads would wait for one another
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def make_model(name: str, seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """A member of the family with random weights, float32."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**BASE | FAMILY[name] | changes)).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            values = draw(tensor_name, tuple(tensor.shape), model.config.tie_word_embeddings, seed)
            if tensor_name.endswith("e_score_correction_bias"):
                values += np.float32(BIAS_MEAN.get(name, 0))
            tensor.copy_(torch.from_numpy(values))
    return model


def draw(name: str, shape: tuple[int, ...], tied: bool = False, seed: int = 0) -> np.ndarray:
    """A tensor's numbers: a function of its name and the seed, float32."""
    if tied and name == "lm_head.weight":
        name = "model.embed_tokens.weight"
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        values = 0.1 * noise
    elif "norm" in name:
        values = 1 + 0.2 * noise
    elif name.endswith("embed_tokens.weight") and not tied:
        values = noise
    elif name.endswith("mlp.gate.weight"):
        values = 2 * noise / np.sqrt(shape[-1])  # scores well apart, not all near 1/2
    else:
        values = noise / np.sqrt(shape[-1])
    return values.astype(np.float32)


def make_tokens(model: DeepseekV3ForCausalLM, rows: int = 2) -> np.ndarray:
    """int32 [rows, max_position_embeddings]: as long as the model takes."""
    size = rows, model.config.max_position_embeddings
    return np.random.default_rng(7).integers(0, model.config.vocab_size, size).astype(np.int32)


@torch.no_grad()
def logits_of(model: DeepseekV3ForCausalLM, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    return model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy()


@torch.no_grad()
def routing_margin(model: DeepseekV3ForCausalLM, tokens_BT: np.ndarray) -> float:
    """Least distance, over layers and tokens, at which another group or expert would be chosen."""
    output = model(torch.from_numpy(tokens_BT).long(), output_router_logits=True, use_cache=False)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    margins = [np.inf]
    for gate, logits_NE in zip(gates, output.router_logits or (), strict=True):
        biased_NE = torch.sigmoid(logits_NE) + gate.e_score_correction_bias
        biased_NGE = biased_NE.reshape(len(biased_NE), gate.num_group, -1)
        group_NG = biased_NGE.topk(2, -1)[0].sum(-1)
        margins.append(_gap(group_NG, gate.topk_group))
        dropped_NG = group_NG < group_NG.topk(gate.topk_group)[0][:, -1:]
        kept_NE = biased_NGE.masked_fill(dropped_NG[..., None], -torch.inf).flatten(1)
        margins.append(_gap(kept_NE, gate.top_k))
    return float(min(margins))


def _gap(scores_NE: torch.Tensor, k: int) -> float:
    """From the k-th best score to the next, the least over rows."""
    best_NE = scores_NE.sort(descending=True)[0]
    return (best_NE[:, k - 1] - best_NE[:, k]).min().item() if k < best_NE.shape[1] else np.inf


def mtp_tensors(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """An MTP layer as released, copies of embedding and head among it, by Hugging Face's names."""
    config = model.config
    prefix, d = f"model.layers.{config.num_hidden_layers}", config.hidden_size
    one_layer = config.to_dict() | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    layer = in_files(DeepseekV3ForCausalLM(DeepseekV3Config(**one_layer)))
    shapes = {
        name.replace("model.layers.0", prefix): tuple(tensor.shape)
        for name, tensor in layer.items()
        if name.startswith("model.layers.0.")
    }
    shapes |= {f"{prefix}.{norm}.weight": (d,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"{prefix}.eh_proj.weight"] = (d, 2 * d)
    drawn = {name: torch.from_numpy(draw(name, shape)) for name, shape in shapes.items()}
    state = model.state_dict()
    return drawn | {
        f"{prefix}.embed_tokens.weight": state["model.embed_tokens.weight"].clone(),
        f"{prefix}.shared_head.head.weight": state["lm_head.weight"].clone(),
    }


def in_files(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the names and in the shapes of its files: experts one by one."""
    named = {}
    for name, tensor in model.state_dict().items():
        fused = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if fused is None:
            named[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = {"down_proj": expert}
            if fused[2] == "gate_up":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            named |= {f"{fused[1]}.{e}.{part}.weight": x.clone() for part, x in parts.items()}
    if model.config.tie_word_embeddings:
        del named["lm_head.weight"]
    return named


@torch.no_grad()
def mtp_logits(model: DeepseekV3ForCausalLM, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T - 1, V] of depth 1, as transformers drafts; the model must come from a folder.

    Position i sees the main model's hidden state there and token i + 1.
    """
    tokens = torch.from_numpy(tokens_BT).long()
    hidden = model(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
    # Transformers looks for tensors of layer 61, by this; a smaller model's come after its last.
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{model.config.num_hidden_layers}\."
    ]
    mtp = MtpModel.from_pretrained(model).eval()
    positions = torch.arange(1, tokens.shape[1])[None]
    cache = MtpCache(config=model.config.get_mtp_config())
    h = mtp.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=tokens[:, 1:])
    return model.lm_head(h).numpy()


def load(path: Path, **kwargs: Any) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """A folder as transformers reads it, and what it says of missing and unexpected tensors."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    return model.eval(), info


def load_expanded(path: Path) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """The same of an FP8 folder, expanded to float32."""
    expand = FineGrainedFP8Config(dequantize=True)
    return load(path, quantization_config=expand, dtype=torch.float32)


def save(
    path: Path, model: DeepseekV3ForCausalLM, extra: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A folder as transformers writes it, with further tensors in its one file."""
    model.save_pretrained(path)
    if extra:
        file = path / "model.safetensors"
        save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return path
