"""transformers' `DeepseekV3ForCausalLM` as a contender has it: random weights, by its options."""

from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def model_of(options: dict[str, Any], **more: Any) -> DeepseekV3ForCausalLM:
    """With the attention and the experts that the options name."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **options["config"],
            attn_implementation=options["attention"],
            experts_implementation=options["experts"],
            **more,
        )
    )


def facts_of(model: DeepseekV3ForCausalLM) -> dict[str, str]:
    """Versions, and the dtype of the weights."""
    return {
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "weights": str(next(model.parameters()).dtype),
    }
