"""transformers' `DeepseekV3ForCausalLM` as a contender has it: random weights, by its options."""

from collections.abc import Callable
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


def generator_of(
    options: dict[str, Any],
) -> tuple[DeepseekV3ForCausalLM, Callable[..., None]]:
    """The model, and what continues prompts greedily by so many tokens, over its cache; `streamer`,
    if there is one, hears of each.
    """
    model = model_of(options).eval()
    # No token ends a text, so that every row has all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(
        prompt: torch.Tensor, seen: torch.Tensor, tokens: int, streamer: Any = None
    ) -> None:
        with torch.inference_mode():
            made = model.generate(
                prompt,
                attention_mask=seen,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                streamer=streamer,
            )
        length = prompt.shape[1] + tokens
        assert made.shape[1] == length, f"{made.shape[1]} tokens instead of {length}"

    return model, generate


def facts_of(model: DeepseekV3ForCausalLM) -> dict[str, str]:
    """Versions, and the dtype of the weights."""
    return {
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "weights": str(next(model.parameters()).dtype),
    }
