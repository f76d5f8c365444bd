"""Makes the folders beside this file: tiny models, and their logits by transformers.

    pip install torch==2.13.0 transformers accelerate
    python -m tests.golden.make

Each is a Hugging Face folder, and `expected.npz` with int32 tokens and float32 logits in it.
`tests/checkpoint/test_golden.py` reads them where neither torch nor transformers is installed. FP8
blocks are expanded here with torch alone, so that nothing of ours takes part in what is expected.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM

from tests.checkpoint import transformers_models as theirs

HERE = Path(__file__).parent
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 40}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BIAS = "e_score_correction_bias"


def main() -> None:
    """Every folder anew."""
    v3 = theirs.make_model("DeepSeek-V3 extended", **SMALL, num_nextn_predict_layers=1)
    write("deepseek_v3_bf16", v3, dtype=torch.bfloat16, extra=theirs.mtp_tensors(v3))
    write("moonlight", theirs.make_model("Moonlight", **SMALL))
    changes = {"tie_word_embeddings": True, "moe_intermediate_size": 8, "rms_norm_eps": 0.05}
    write(
        "groups_tied",
        theirs.make_model("three of eight groups, negative biases", **SMALL, **changes),
    )
    # Sizes that end in a short block, and 128 itself.
    blocks = {"kv_lora_rank": 132, "intermediate_size": 136, "q_lora_rank": 128}
    k2 = theirs.make_model("Kimi-K2", **SMALL, **blocks)
    write("kimi_k2_fp8", k2, dtype=torch.bfloat16, fp8=True)


def write(
    name: str,
    model: DeepseekV3ForCausalLM,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """One folder: what is stored decides, and transformers computes with it in float32."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    stored, expanded = {}, {}
    for tensor_name, tensor in (theirs.in_files(model) | (extra or {})).items():
        x = tensor if tensor_name.endswith(BIAS) else tensor.to(dtype)
        if fp8 and is_linear(tensor_name):
            x, scales = quantised(tensor)
            stored[f"{tensor_name}_scale_inv"] = scales
            expanded[tensor_name] = dequantised(x, scales)
        stored[tensor_name] = x.contiguous()
        expanded.setdefault(tensor_name, x.float())
    theirs.save(folder, model, expanded)
    model, _ = theirs.load(folder)
    tokens = theirs.make_tokens(model, rows=1)
    assert theirs.routing_margin(model, tokens) > 1e-4
    expected = {"tokens": tokens, "logits": theirs.logits_of(model, tokens)}
    if extra:
        expected["mtp_logits"] = theirs.mtp_logits(model, tokens)
    np.savez_compressed(folder / "expected.npz", **expected)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        config |= {"quantization_config": FP8 | {"weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def is_linear(name: str) -> bool:
    return "_proj" in name and not name.endswith("eh_proj.weight")


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values and a float32 scale for each block of 128 x 128, both of them arbitrary."""
    rows, columns = (-(-size // 128) for size in x.shape)
    scales = torch.linspace(0.5, 1.5, rows * columns).reshape(rows, columns)
    scales = scales * x.abs().max() / 100  # uses E4M3 from 2^-9 to about 200
    return (x / spread(scales, x.shape)).to(torch.float8_e4m3fn), scales


def dequantised(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return values.float() * spread(scales, values.shape)


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each block's scale at all of its elements."""
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return full[: shape[0], : shape[1]]


if __name__ == "__main__":
    main()
